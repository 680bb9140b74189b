"""Exact metrics of the impressions of all ranks, without the impressions of all ranks anywhere.

Scores go to the ranks by ranges and groups (users, queries) by their ids, see `row_exchange`. Each rank
counts what it owns as a single process would count all; counts and sums are added up. So every metric is that
of `metrics`, for any number of ranks.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mim_torchrec.errors import Diverged
from mim_torchrec.training import metrics
from mim_torchrec.training.distributed import DistributedContext
from mim_torchrec.training.row_exchange import exchange_rows, owners_by_id, owners_by_range

Sums = dict[str, np.ndarray]
AUC, TOTAL = "auc", "total"


class Impressions:
    """Impressions of all ranks, divided for metrics that may weigh them by the draws of a bootstrap.

    Every rank calls every method in the same order.

    Args:
        labels: (n,) zeros and ones, of this rank.
        scores: (n,) probabilities, of this rank.
        context: the process group.
        parts: name of a division of the impressions → their codes (n,), and how many parts there are.
        groups: name of a metric → ids (n,) int64 of the groups whose mean AUC it is, weighted by their
            impressions.
        drawn: (n,) int64 ids of what a bootstrap draws; None for no draws.
        weights: (n,) how often each impression counts; None counts each once.

    Raises:
        Diverged: a score is NaN; on all ranks.
    """

    def __init__(
        self,
        labels: np.ndarray,
        scores: np.ndarray,
        context: DistributedContext,
        *,
        parts: Mapping[str, tuple[np.ndarray, int]],
        groups: Mapping[str, np.ndarray],
        drawn: np.ndarray | None = None,
        weights: np.ndarray | None = None,
    ) -> None:
        self._context = context
        if any(context.all_gather_objects(bool(np.isnan(scores).any()))):
            raise Diverged("the model predicts NaN; try a lower learning rate")
        columns = {"label": labels, "score": scores}
        if weights is not None:
            columns["weight"] = weights
        self.num_drawn = 0
        """Distinct ids of `drawn`, over all ranks."""
        if drawn is not None:
            columns["drawn"] = self._numbered(drawn)
        of_parts = {name: codes.astype(np.int32) for name, (codes, _) in parts.items()}
        mine = exchange_rows(columns | of_parts, owners_by_range(scores, context), context)
        self._label, self._score = mine["label"].astype(np.float64), mine["score"].astype(np.float64)
        self._drawn, self._weight = mine.get("drawn"), mine.get("weight")
        clipped = metrics.clipped(self._score)
        self._loss = metrics.losses(self._label, clipped)
        self._clipped = clipped
        self._ranges = {AUC: metrics.GroupedAUC(self._label, self._score)} | {
            name: metrics.GroupedAUC(self._label, clipped, mine[name], count)
            for name, (_, count) in parts.items()
        }
        self._groups = {name: self._grouped(columns, ids) for name, ids in groups.items()}

    def compute(self, of_drawn: np.ndarray | None = None) -> dict[str, Any]:
        """The metrics of all impressions, the same on every rank; what is undefined is NaN.

        Args:
            of_drawn: (num_drawn,) how often the impressions of each drawn id count; None counts each once.

        Returns:
            `auc`, `logloss`, `ne`, `calibration_ratio`, the mean AUC of each of `groups`, and an array of the
            AUC of each part of each of `parts`.
        """
        return self.compute_draws([of_drawn])[0]

    def compute_draws(self, draws: Any) -> list[dict[str, Any]]:
        """`compute` of each of several draws."""
        gathered = self._context.all_gather_objects([self._sums(of_drawn) for of_drawn in draws])
        return [self._merged(parts) for parts in zip(*gathered, strict=True)]

    def calibration(self, bins: int = 10) -> dict[str, Any] | None:
        """See `metrics.calibration_of_sums`; the same on every rank."""
        sizes = self._context.all_gather_objects(len(self._label))
        first = sum(sizes[: self._context.rank])
        sums = metrics.calibration_sums(self._label, self._score, bins, first, sum(sizes), self._weight)
        return metrics.calibration_of_sums(np.sum(self._context.all_gather_objects(sums), axis=0))

    def _numbered(self, ids: np.ndarray) -> np.ndarray:
        """Numbers of ids, by their ascending order among those of all ranks."""
        owners = owners_by_id(np.unique(ids), self._context.world_size)
        mine = exchange_rows({"id": np.unique(ids)}, owners, self._context)["id"]
        known = np.sort(np.concatenate(self._context.all_gather_objects(np.unique(mine))))
        self.num_drawn = len(known)
        return np.searchsorted(known, ids)

    def _grouped(
        self, columns: Mapping[str, np.ndarray], ids: np.ndarray
    ) -> tuple[metrics.GroupedAUC, np.ndarray, np.ndarray | None, np.ndarray | None]:
        owners = owners_by_id(ids, self._context.world_size)
        mine = exchange_rows({**columns, "group": ids}, owners, self._context)
        codes, count = metrics.group_codes(mine["group"])
        scores = metrics.clipped(mine["score"].astype(np.float64))
        auc = metrics.GroupedAUC(mine["label"], scores, codes, count)
        return auc, codes, mine.get("drawn"), mine.get("weight")

    def _sums(self, of_drawn: np.ndarray | None) -> Sums:
        """Of what this rank owns: sums from which `_merged` has the metrics of all."""
        w = _weights(of_drawn, self._drawn, self._weight, len(self._label))
        found = {name: ranges.sums(w) for name, ranges in self._ranges.items()}
        found[TOTAL] = np.array([w.sum(), *(np.sum(w * x) for x in (self._label, self._loss, self._clipped))])
        for name, (auc, codes, drawn, weight) in self._groups.items():
            w = _weights(of_drawn, drawn, weight, len(codes))
            values, sizes = auc(w), np.bincount(codes, weights=w, minlength=auc.num_groups)
            defined = ~np.isnan(values) & (sizes > 0)
            found[name] = np.array([np.sum((values * sizes)[defined]), np.sum(sizes[defined])])
        return found

    def _merged(self, every: tuple[Sums, ...]) -> dict[str, Any]:
        count, positives, loss, predicted = np.sum([sums[TOTAL] for sums in every], axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            rate, mean_loss = np.divide(positives, count), np.divide(loss, count)
            entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
            found: dict[str, Any] = {
                "logloss": mean_loss, "ne": np.divide(mean_loss, entropy) if 0 < rate < 1 else np.nan,
                "calibration_ratio": np.divide(predicted, positives),
            }  # fmt: skip
            for name in self._groups:
                total, weight = np.sum([sums[name] for sums in every], axis=0)
                found[name] = np.divide(total, weight)
        for name in self._ranges:
            found[name] = metrics.auc_of_sums(metrics.merge_sums([sums[name] for sums in every]))
        found[AUC] = found[AUC][0]
        return found


def _weights(
    of_drawn: np.ndarray | None, drawn: np.ndarray | None, weight: np.ndarray | None, count: int
) -> np.ndarray:
    own = np.ones(count) if weight is None else weight.astype(np.float64)
    return own if of_drawn is None or drawn is None else own * of_drawn[drawn]
