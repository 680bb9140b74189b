"""Which loss a configuration of C-SFT asks for (Eq. 5–6 and the variants of Table 4).

| variant of Table 4 | `--loss` | `--interest-signal` |
|---|---|---|
| v1 | cross_entropy | category |
| v2 | cross_entropy | click |
| v3 | cross_entropy | purchase |
| v4 | contrastive | click |
| v5 | contrastive | purchase |

Of Table 5, "w/o multi-level" is `--alpha 0 --beta 0`, and "w/o ST-NSG" is `--queue-batches 0
--hard-negatives False`: each query is then contrasted with the other positives of its batch only.
"""

from mim_torchrec.csft.config import CSFTConfig
from mim_torchrec.errors import OptionError
from mim_torchrec.losses.cross_entropy import CategoryCrossEntropy, PairCrossEntropy
from mim_torchrec.losses.info_nce import MultiLevelInfoNCE

VariantLoss = MultiLevelInfoNCE | PairCrossEntropy | CategoryCrossEntropy


def check_objective(config: CSFTConfig) -> None:
    """OptionError, with a way out, where the loss, the signal and their options do not go together."""
    if config.loss == "contrastive":
        if config.interest_signal == "category":
            raise OptionError(
                "--loss contrastive needs pairs of a query and an item, which --interest-signal category "
                "does not use; take --loss cross_entropy, or another signal"
            )
        return
    if config.gamma or config.queue_batches:
        raise OptionError("--gamma and --queue-batches are options of --loss contrastive; leave them at 0")
    if config.interest_signal != "category" and not config.hard_negatives:
        raise OptionError(
            "--loss cross_entropy tells positives from hard negatives: it needs --hard-negatives True"
        )


def make_variant_loss(config: CSFTConfig, num_categories: int) -> VariantLoss:
    """The loss of a configuration that `check_objective` lets pass.

    Args:
        config: the stage's configuration.
        num_categories: of the items; used for signal `category` only.
    """
    if config.loss == "contrastive":
        return MultiLevelInfoNCE(
            config.alpha,
            config.beta,
            config.gamma,
            config.temperature,
            config.mask_same_item,
            config.queue_batches,
            config.queue_start_step,
            config.balance_queue,
        )
    if config.interest_signal == "category":
        return CategoryCrossEntropy(config.head.dim, num_categories, config.alpha, config.beta)
    return PairCrossEntropy(config.alpha, config.beta, config.temperature)
