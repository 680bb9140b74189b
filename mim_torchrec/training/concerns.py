"""What a run that ended well should still say aloud: findings by name, in the log and in metrics.json."""

import logging
from collections.abc import Mapping

from mim_torchrec.training.history import History

log = logging.getLogger(__name__)

WORSE_THAN_CONSTANT = "worse_than_constant"
FELL_AFTER_FIRST_EPOCH = "fell_after_first_epoch"
NO_GAIN = "no_gain_over_plain_towers"


def concerns(history: History, select: str | None, entropies: Mapping[str, float | None]) -> dict[str, str]:
    """What is wrong with a finished run, by name; {} where nothing is.

    Args:
        history: of the run.
        select: the metric that was maximized; None where the last epoch was kept.
        entropies: normalized entropy of each part of the data that was scored.
    """
    found = {}
    worse = {name: value for name, value in entropies.items() if value is not None and value > 1}
    if worse:
        parts = ", ".join(f"{name} {value:.4f}" for name, value in worse.items())
        found[WORSE_THAN_CONSTANT] = (
            f"normalized entropy above 1 ({parts}): predicting the mean click rate would be better. The "
            "scores may still rank well; they are no probabilities"
        )
    if select is not None and history.best_epoch == 0 and len(history.epochs) > 1:
        first, second = (epoch[select] for epoch in history.epochs[:2])
        if second < first:
            found[FELL_AFTER_FIRST_EPOCH] = (
                f"validation fell after the first epoch ({select} {first:.4f}, then {second:.4f}): what is "
                "learned further is memorized"
            )
    return found


def log_concerns(found: Mapping[str, str]) -> None:
    """Log concerns, each with its name."""
    for name, text in found.items():
        log.warning("%s: %s", name, text)
