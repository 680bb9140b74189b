"""A user behavior model at serving: each request by itself, as products of matrices where we have that form.

Models without such a form, and forms that do not fit a request, are computed by the module itself. So is a
user's own model, whatever it is derived from.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mim_torchrec.ciubm.jagged import RequestPairs
from mim_torchrec.ciubm.ubm.bst import BST
from mim_torchrec.ciubm.ubm.din import DIN
from mim_torchrec.ciubm.ubm.interface import BehaviorContext, Interest
from mim_torchrec.ciubm.ubm.sim import SIM
from mim_torchrec.ciubm.ubm.twin import TWIN
from mim_torchrec.serving.dense_bst import bst_interest
from mim_torchrec.serving.dense_din import din_interest
from mim_torchrec.serving.dense_search import sim_interest, twin_interest
from mim_torchrec.serving.grid import Grid

Form = Callable[[Any, Tensor, Tensor, BehaviorContext | None], Tensor | None]
"""The interest of one request with candidates and behaviors; None where the module is to compute it."""

FORMS: dict[type[nn.Module], Form] = {
    BST: bst_interest, DIN: din_interest, SIM: sim_interest, TWIN: twin_interest
}  # fmt: skip


class DenseUBM(nn.Module):
    """A trained user behavior model in evaluation.

    Args:
        ubm: the model.
    """

    def __init__(self, ubm: nn.Module) -> None:
        super().__init__()
        self.inner = ubm
        self._form = FORMS.get(type(ubm))

    def forward(
        self,
        candidates: Tensor,
        behaviors: Tensor,
        pairs: RequestPairs,
        context: BehaviorContext | None = None,
    ) -> Interest:
        """See `UserBehaviorModel.forward`."""
        if self._form is None:
            return self.inner(candidates, behaviors, pairs, context)
        parts = []
        for own_candidates, own_behaviors in requests_of(pairs):
            one, other = candidates[own_candidates], behaviors[own_behaviors]
            own = part_of(context, own_candidates, own_behaviors)
            found = self._form(self.inner, one, other, own) if len(one) and len(other) else None
            if found is None:
                found = self.inner(one, other, Grid(len(one), len(other)), own).value
            parts.append(found)
        return Interest(parts[0] if len(parts) == 1 else torch.cat(parts))


def requests_of(pairs: RequestPairs) -> list[tuple[slice, slice]]:
    """Where the candidates and the behaviors of each request are."""
    ends = (pairs.candidate_offsets.tolist(), pairs.behavior_offsets.tolist())
    candidates, behaviors = ([slice(*both) for both in zip(e, e[1:], strict=False)] for e in ends)
    return list(zip(candidates, behaviors, strict=True))


def part_of(context: BehaviorContext | None, candidates: slice, behaviors: slice) -> BehaviorContext | None:
    """What a context knows of one request."""
    if context is None:
        return None

    def own(values: Tensor | None, where: slice) -> Tensor | None:
        return None if values is None else values[where]

    return BehaviorContext(
        recency=own(context.recency, behaviors),
        candidate_categories=own(context.candidate_categories, candidates),
        behavior_categories=own(context.behavior_categories, behaviors),
    )
