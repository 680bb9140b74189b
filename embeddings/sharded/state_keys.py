"""Which entries of a state dict belong to frozen tables, for checkpoints that are older than the tables."""

from collections.abc import Iterator

from torch import nn
from torchrec.distributed.model_parallel import get_unwrapped_module

from mim_torchrec.embeddings.sharded.frozen import FrozenModule


def frozen_keys(model: nn.Module) -> list[str]:
    """Return the keys of ``model.state_dict()`` that belong to frozen tables.

    A checkpoint that was written before a model had frozen tables lacks them. Leave them out of what
    ``torch.distributed.checkpoint`` loads, which refuses a missing key::

        state = model.state_dict()
        own = {key: state.pop(key) for key in frozen_keys(model)}
        dcp.load({"model": state}, checkpoint_id=path)
        model.load_state_dict(state | own)

    Args:
        model: sharded or not.
    """
    return list(_keys(model, ""))


def _keys(module: nn.Module, prefix: str) -> Iterator[str]:
    module = get_unwrapped_module(module)
    if isinstance(module, FrozenModule):
        yield from module.state_keys(prefix)
        return
    for name, child in module.named_children():
        yield from _keys(child, f"{prefix}{name}.")
