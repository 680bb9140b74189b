"""Say why the candidates of a request got their scores, by exact leave-one-out (`explaining.py`).

    mim explain --model RUN|BUNDLE [--request ID] [--out FILE]

Prints what is largest, and writes all of it as JSON. A run is bundled into a temporary folder first.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import tyro

from mim_torchrec import program
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.items import ItemStore
from mim_torchrec.data.schema import ORIGINAL, Dataset
from mim_torchrec.domains import Count, check_domains
from mim_torchrec.embeddings.files import write_json
from mim_torchrec.embeddings.remote.fetching import fetched
from mim_torchrec.embeddings.remote.places import LocalPath, Place
from mim_torchrec.errors import OptionError
from mim_torchrec.serving.bundle import ABOUT, Bundle
from mim_torchrec.serving.bundling import write_bundle
from mim_torchrec.serving.explaining import explain
from mim_torchrec.serving.logged import LoggedRequest, find_request
from mim_torchrec.serving.messages import BadRequest
from mim_torchrec.serving.scorer import Scorer

log = logging.getLogger("mim_torchrec.serving.explain")  # also where this file is __main__


@dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """Say what every interest and every behavior contributes to the logits of a request's candidates."""

    model: Place
    """Directory that `mim ctr` or `mim bundle` has written."""
    checkpoint: str = "best"
    """Of a run: `best`, or one of the names in its `checkpoints`, or the directory of a checkpoint."""
    data: Place | None = None
    """Dataset directory; by default that of the run."""
    split: Literal["train", "validation", "test"] = "test"
    """Part of the data set that the request is in."""
    request: str | None = None
    """Id of the request; by default the first one that has behaviors."""
    store: str | None = None
    """Directory of the multi-modal table, or URL of a store that holds it; by default the table that the
    model was trained on."""
    candidates: Count = 5
    """Candidates that are printed, those with the highest scores."""
    behaviors: Count = 5
    """Behaviors that are printed of each candidate, those that contribute most."""
    out: LocalPath | None = None
    """JSON file for all candidates and behaviors."""


def report(scorer: Scorer, logged: LoggedRequest, titles: dict[int, str]) -> dict[str, Any]:
    """What an explanation says, as JSON.

    Args:
        scorer: of the model.
        logged: the request.
        titles: of items, by id; those that are known.

    Returns:
        `request_id`, `user_id`, `model_version`, `table_version`, `behaviors_in_log`, and `candidates`, the
        highest score first. Each has `item_id`, `title`, `score`, `logit`, `clicked`, `interests` (by name)
        and `behaviors`, the oldest first, each with `item_id`, `title`, `age` (0 is the newest),
        `contribution` and `alpha` (None without vectors).

    Raises:
        OptionError: the model lacks something that the request has not.
    """
    try:
        found = explain(scorer, logged.asked(scorer))
    except BadRequest as error:
        raise OptionError(f"the request cannot be scored: {error}") from None
    used = logged.behaviors[len(logged.behaviors) - found.behaviors.shape[1] :]
    ids = logged.columns.candidate.values
    names = ids.get(f"item_id{ORIGINAL}", ids["item_id"])
    candidates = []
    for k in np.argsort(-found.logits.numpy(), kind="stable"):
        behaviors = [
            {
                "item_id": str(item),
                "title": titles.get(int(item)),
                "age": len(used) - 1 - place,
                "contribution": float(found.behaviors[k, place]),
                "alpha": None if found.relevance is None else float(found.relevance[k, place]),
            }
            for place, item in enumerate(used)
        ]
        candidates.append({
            "item_id": str(names[k]),
            "title": titles.get(int(logged.candidates[k])),
            "score": float(found.logits[k].sigmoid()),
            "logit": float(found.logits[k]),
            "clicked": logged.clicked[k],
            "interests": {name: float(lost[k]) for name, lost in found.interests.items()},
            "behaviors": behaviors,
        })  # fmt: skip
    return {
        "request_id": logged.known_as("request_id"),
        "user_id": logged.known_as("user_id"),
        "model_version": scorer.bundle.model_version,
        "table_version": scorer.bundle.table_version,
        "behaviors_in_log": len(logged.behaviors),
        "candidates": candidates,
    }


def lines(found: dict[str, Any], candidates: int, behaviors: int) -> Iterator[str]:
    """A report for people: some candidates, and of each the behaviors that contribute most."""
    used = len(found["candidates"][0]["behaviors"])
    count = len(found["candidates"])
    yield f"request {found['request_id']} of user {found['user_id']}, model {found['model_version']}"
    yield f"{count} candidates, {used} of {found['behaviors_in_log']} behaviors used"
    yield "what the logit loses without an interest, or without a behavior; such losses do not add up"
    for one in found["candidates"][:candidates]:
        yield ""
        yield (f"item {_named(one)}: score {one['score']:.4f}, logit {one['logit']:+.3f}"
               f"{', clicked' if one['clicked'] else ''}")  # fmt: skip
        yield "  " + "  ".join(f"{name} {lost:+.3f}" for name, lost in one["interests"].items())
        largest = sorted(one["behaviors"], key=lambda b: -abs(b["contribution"]))[:behaviors]
        for behavior in largest:
            alpha = "" if behavior["alpha"] is None else f"  alpha {behavior['alpha']:+.3f}"
            yield (f"  {behavior['contribution']:+.3f}{alpha}  {_ago(behavior['age'])}, "
                   f"item {_named(behavior)}")  # fmt: skip


def _named(one: dict[str, Any]) -> str:
    return one["item_id"] if not one["title"] else f"{one['item_id']} {one['title']!r}"


def _ago(age: int) -> str:
    return "newest" if age == 0 else f"{age + 1}. newest"


@contextmanager
def opened(path: Path, checkpoint: str) -> Iterator[Bundle]:
    """The bundle at a path, or one that is made of the run there for as long as a block lasts.

    Raises:
        DataError: it is neither.
    """
    if (path / ABOUT).is_file():
        yield Bundle.open(path)
        return
    with TemporaryDirectory() as folder:
        yield write_bundle(path, Path(folder) / "bundle", checkpoint)


def titles_of(dataset: Dataset, ids: Sequence[int]) -> dict[int, str]:
    """Titles of the items that the data set has; {} with a line in the log where it has none."""
    try:
        items = ItemStore.read(dataset, ("item_id", "title"))
    except DataError as error:
        log.warning("no titles: %s", error)
        return {}
    known = np.unique(np.asarray(ids, np.int64))
    known = known[items.has(known)]
    return dict(zip(known.tolist(), items.titles(items.rows_of(known)), strict=True))


def main(argv: list[str] | None = None) -> None:
    """Entry point of `mim explain`."""
    config = tyro.cli(ExplainConfig, args=argv, prog="mim explain", description=__doc__)
    check_domains(config)
    with opened(fetched(config.model), config.checkpoint) as bundle:
        trained = bundle.config
        dataset = Dataset(config.data or trained.data, trained.days() if config.data is None else {})
        store = config.store or (None if trained.table is None else str(trained.table))
        scorer = Scorer(bundle, store if bundle.table_version is not None else None)
        logged = find_request(dataset, config.split, scorer.features, config.request)
        titles = titles_of(dataset, [*logged.candidates, *logged.behaviors])
        found = report(scorer, logged, titles)
    if config.out is not None:
        write_json(config.out, found)
    print("\n".join(lines(found, config.candidates, config.behaviors)))
    if config.out is not None:
        print(f"\nall {len(found['candidates'])} candidates with all behaviors: {config.out}")


if __name__ == "__main__":
    program.run(main)
