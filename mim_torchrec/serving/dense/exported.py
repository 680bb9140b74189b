"""The dense part of a model as one file of `torch.export`, for servers that are not ours.

The caller looks rows up. The file takes the rows of one request, of any number of candidates and behaviors,
and gives the scores. It needs torch alone. `inputs.json` in it names the inputs in their order.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim_torchrec.ciubm.ciubm import CiUBM, Interests
from mim_torchrec.ciubm.jagged import RequestPairs
from mim_torchrec.ciubm.similarity import WHOLE
from mim_torchrec.ciubm.ubm.activation import PReLU
from mim_torchrec.ciubm.ubm.interface import BehaviorContext
from mim_torchrec.ciubm.ubm.sim import SIM
from mim_torchrec.ctr.config import CTRConfig
from mim_torchrec.ctr.dense import DeepCTR, DenseCTR, LookedUp
from mim_torchrec.ctr.esmm import second_scores
from mim_torchrec.ctr.tables import id_tables_of
from mim_torchrec.data.features import ROLES
from mim_torchrec.embeddings.files import atomic_file
from mim_torchrec.errors import OptionError
from mim_torchrec.serving.bundle import Bundle
from mim_torchrec.serving.dense.exported_ubm import FUNCTIONS, LOWEST
from mim_torchrec.serving.dense.folding import fold_batch_norms

NAME = "dense.pt2"
INPUTS = "inputs.json"


@dataclass(frozen=True)
class ExportedInput:
    """An input of the exported file.

    Args:
        name: of the feature.
        kind: `row` of an ID table, `vector` of the multi-modal table, `numbers`, or `times`.
        owner: `request` (one), `candidate` or `behavior` (one each).
        width: of a row; None of times, which have one number each.
    """

    name: str
    kind: str
    owner: str
    width: int | None

    def example(self) -> Tensor:
        """Of three candidates or five behaviors."""
        count = {"request": 1, "candidate": 3, "behavior": 5}[self.owner]
        return torch.ones(count, dtype=torch.int64) if self.width is None else torch.zeros(count, self.width)


class _Pairs:
    """What the model reads of the pairs of one request."""

    def __init__(self, candidates: Tensor, behaviors: Tensor) -> None:
        self.candidate_request = torch.zeros_like(candidates[:, 0], dtype=torch.int64)
        self.behavior_request = torch.zeros_like(behaviors[:, 0], dtype=torch.int64)

    @property
    def order(self) -> Tensor:
        return torch.ones_like(self.behavior_request).flip(0).cumsum(0).flip(0) - 1

    def history_lengths(self) -> Tensor:
        return self.candidate_request + torch.ones_like(self.behavior_request).sum()


class _CiUBM(nn.Module):
    """`CiUBM` of one request in evaluation, without a size that is read."""

    def __init__(self, ciubm: CiUBM) -> None:
        super().__init__()
        self.inner = ciubm
        self._of_ids = None if ciubm.ubm is None else FUNCTIONS[type(ciubm.ubm)]
        self.similarity_dim = ciubm.similarity_dim

    def forward(
        self,
        candidates: Tensor,
        behaviors: Tensor,
        pairs: _Pairs,
        candidates_mm: Tensor | None,
        behaviors_mm: Tensor | None,
        context: BehaviorContext,
    ) -> Interests:
        inner = self.inner
        of_ids = content = fusion = similarity = None
        if self._of_ids is not None:
            of_ids = self._of_ids(inner.ubm, candidates, behaviors, context)
        if candidates_mm is not None and behaviors_mm is not None:
            relevance = F.normalize(candidates_mm, dim=-1) @ F.normalize(behaviors_mm, dim=-1).T
            if inner.tiers:
                similarity = _similarity(relevance, pairs.order, inner)
            if inner.log_temperature is not None:
                scores = torch.where(relevance == 0, LOWEST, relevance / inner.log_temperature.exp())
                relevance = torch.where(relevance == 0, 0.0, scores.softmax(1))
            if inner.pooling == "mean":
                relevance = relevance / pairs.history_lengths().clamp(min=1)[:, None]
            content = relevance @ behaviors_mm if inner.content else None
            fusion = relevance @ behaviors if inner.fusion else None
        return Interests(of_ids, content, fusion, similarity)


def _similarity(relevance: Tensor, order: Tensor, ciubm: CiUBM) -> Tensor:
    """`similarity_interest` of (num_candidates, num_behaviors)."""
    relevance, order = F.pad(relevance, (1, 0)), F.pad(order, (1, 0))  # one without a vector: never empty
    tier = ((relevance + 1) * (ciubm.tiers / 2)).long().clamp(0, ciubm.tiers - 1)
    parts = []
    for span in ciubm.spans:
        seen = relevance != 0
        if span != WHOLE:
            seen = seen & (order < span)
        weight = seen / (1 + order)
        mean = (weight * relevance).sum(1) / weight.sum(1).clamp(min=torch.finfo(torch.float32).tiny)
        largest = torch.where(seen.any(1), torch.where(seen, relevance, -torch.inf).amax(1), 0.0)
        counts = torch.stack([((tier == k) & seen).sum(1) for k in range(ciubm.tiers)], dim=1)
        parts.append(torch.cat([counts.float().log1p(), largest[:, None], mean[:, None]], dim=1))
    return torch.cat(parts, dim=1)


class DensePart(nn.Module):
    """Scores of one request from its rows: (num_candidates,) each.

    Args:
        model: in evaluation; it is changed.
        config: of its run.
        inputs: in their order.
    """

    def __init__(self, model: DenseCTR, config: CTRConfig, inputs: list[ExportedInput]) -> None:
        super().__init__()
        model.tower = cast(DeepCTR, fold_batch_norms(model.tower))
        if model.second_tower is not None:
            model.second_tower = cast(DeepCTR, fold_batch_norms(model.second_tower))
        model.ciubm = cast(CiUBM, _CiUBM(model.ciubm))
        for module in model.modules():
            for name, child in module.named_children():
                if isinstance(child, PReLU):  # whose slope is read
                    made = nn.PReLU()
                    made.weight = child.weight
                    setattr(module, name, made)
        self.model, self.inputs = model, inputs
        self.pooled = [one.name for one in inputs if one.kind == "row" and one.owner == "request"]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Scores; where the model has a second label, its two scores too (see `Scores`)."""
        given = {one.name: tensor for one, tensor in zip(self.inputs, tensors, strict=True)}
        pairs = _Pairs(given["candidate_item_id"], given["behavior_item_id"])
        vectors = (given["candidate_mm"], given["behavior_mm"]) if "candidate_mm" in given else None
        found = self.model.predict(
            LookedUp(
                pairs=cast(RequestPairs, pairs),
                pooled=lambda: torch.cat([given[name] for name in self.pooled], dim=1),
                rows=given,
                vectors=vectors,
                request_ts=given.get("request_ts"),
                behavior_ts=given.get("behavior_ts"),
                request_dense=given.get("request_dense"),
                candidate_dense=given.get("candidate_dense"),
                behavior_dense=given.get("behavior_dense"),
            )
        )
        scores = torch.sigmoid(found.logits)
        if found.conversion_logits is None:
            return (scores,)
        return scores, *second_scores(found.logits, found.conversion_logits)


def inputs_of(bundle: Bundle) -> list[ExportedInput]:
    """What the dense part of a bundle takes, in order."""
    features, dim = bundle.config.features(), bundle.config.embedding_dim
    tables = id_tables_of(bundle.config, bundle.tables)
    found = [ExportedInput(name, "row", "request", dim) for names in tables.requests.values()
             for name in names]  # fmt: skip
    found += [ExportedInput(name, "row", name.partition("_")[0], dim) for names in tables.items.values()
              for name in names]  # fmt: skip
    if bundle.table_version is not None:
        found += [
            ExportedInput(f"{role}_mm", "vector", role, bundle.mm_dim) for role in ("candidate", "behavior")
        ]
    found += [ExportedInput(f"{owner}_dense", "numbers", owner, features.width(owner)) for owner in ROLES
              if features.width(owner)]  # fmt: skip
    config = bundle.config
    if config.id_interest and config.recency == "time" and "recency" in config.ubm_options.needs:
        found += [ExportedInput("request_ts", "times", "request", None),
                  ExportedInput("behavior_ts", "times", "behavior", None)]  # fmt: skip
    return found


def export_dense(bundle: Bundle, path: Path) -> list[ExportedInput]:
    """Write the dense part of a bundle.

    Args:
        bundle: of the model.
        path: of the file.

    Returns:
        The inputs, in order.

    Raises:
        OptionError: the user behavior model steps through histories (DIEN), searches by category, or is not
            one of ours.
    """
    model, _ = bundle.load()
    ubm = model.ciubm.ubm
    if ubm is not None and (type(ubm) not in FUNCTIONS or (isinstance(ubm, SIM) and ubm.search != "soft")):
        raise OptionError(
            f"--export: {bundle.config.ubm} cannot be written by torch.export; avg_pooling, bst, din, "
            "twin, and sim with --search soft can"
        )
    inputs = inputs_of(bundle)
    sizes = {
        "candidate": torch.export.Dim("candidates", min=0),
        "behavior": torch.export.Dim("behaviors", min=0),
    }
    shapes = tuple({0: sizes[one.owner]} if one.owner in sizes else None for one in inputs)
    with torch.no_grad():
        program = torch.export.export(
            DensePart(model, bundle.config, inputs).eval(), tuple(one.example() for one in inputs),
            dynamic_shapes=(shapes,), strict=False,
        )  # fmt: skip
    facts = {"model_version": bundle.model_version, "table_version": bundle.table_version,
             "inputs": [vars(one) for one in inputs]}  # fmt: skip
    with atomic_file(path) as file:
        torch.export.save(program, file, extra_files={INPUTS: json.dumps(facts, indent=2)})
    return inputs
