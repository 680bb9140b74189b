"""Log-sum-exp over logits that are never held as a whole (the denominators of Eq. 5 at the size of ST-NSG).

With the negatives of k batches and P ranks the matrix of logits would be by far the largest tensor of the
training: 3.5 GiB for 1,024 queries against 901,120 items. Here it exists one tile at a time, as scores do in
flash attention. The mean of the items under the softmax is all that the gradient of a query needs, so it is
summed up in the forward pass beside the log-sum-exp: the backward pass reads only items that are to have a
gradient themselves, and computes their logits again. Items of a queue are read once a step and never saved.

Not here: second derivatives, and collectives.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Tile(NamedTuple):
    """Rows and columns of the logits that are computed at a time.

    On a CPU a tile of about 1 MiB stays in the cache of its core between the passes over it, which leaves the
    matrix products as the cost; from 128 x 1024 to 1024 x 2048 the time differs by a fifth. A GPU wants tiles
    that keep all of it busy.
    """

    queries: int
    items: int


CPU_TILE = Tile(512, 512)
GPU_TILE = Tile(4096, 8192)
WHOLE = GPU_TILE.items
"""Items on a GPU of which all are compared with all queries: the host would wait for the few that matter."""


class TiledLogSumExp(NamedTuple):
    """Of every query."""

    logsumexp: Tensor
    """(num_queries,) logarithm of the sum of exp(logit); -inf where every item is left out."""
    hardest: Tensor
    """(num_queries,) largest logit, without gradient; -inf likewise."""


class LeftOut:
    """Which entries of the logits do not count.

    On a GPU the host waits for nothing where there are at most `WHOLE` items, and else twice.

    Args:
        item_ids: (num_items,) int64.
        query_ids: (num_queries, n) int64, the items that each query leaves out; None: none.
        positive: (num_queries,) int64, a further column that each query leaves out, -1 for none; None: none.
    """

    def __init__(
        self, item_ids: Tensor, query_ids: Tensor | None = None, positive: Tensor | None = None
    ) -> None:
        self._item_ids, self._query_ids, self._positive = item_ids, query_ids, positive
        self._of_tiles: dict[int, list[Tensor]] = {}
        self._columns = item_ids.new_empty(0)
        if query_ids is None or not query_ids.numel():
            return
        if item_ids.is_cuda and len(item_ids) <= WHOLE:
            self._columns = torch.arange(len(item_ids), device=item_ids.device)
            return
        # few items are left out by any query; only their columns are compared with all queries
        known = query_ids.flatten().sort().values
        found = torch.cat([_is_in(part, known) for part in item_ids.split(65536)])
        self._columns = torch.nonzero(found).flatten()

    def columns(self, size: int) -> list[Tensor]:
        """For every `size` items, the columns that any query leaves out because of their ids."""
        if size not in self._of_tiles:
            self._of_tiles[size] = self._divided(size)
        return self._of_tiles[size]

    def _divided(self, size: int) -> list[Tensor]:
        starts = range(0, len(self._item_ids), size)
        if not len(self._columns):
            return [self._columns for _ in starts]
        if len(self._columns) == len(self._item_ids):
            return list(self._columns.split(size))
        edges = torch.arange(0, len(self._item_ids) + size, size, device=self._columns.device)
        bounds = torch.searchsorted(self._columns, edges).tolist()
        return [self._columns[start:stop] for start, stop in pairwise(bounds)]

    def fill_(self, logits: Tensor, columns: Tensor, first_query: int, first_item: int) -> None:
        """Set what does not count to -inf in a tile of the logits.

        Args:
            logits: (queries, items) of the tile.
            columns: of `columns`, those of the tile.
            first_query: row of the tile's first query.
            first_item: column of its first item.
        """
        rows = slice(first_query, first_query + logits.shape[0])
        if len(columns):
            same, columns = self._same(rows, columns), columns - first_item
            if len(columns) == logits.shape[1]:
                logits.masked_fill_(same, -torch.inf)
            else:
                logits.index_copy_(1, columns, logits.index_select(1, columns).masked_fill_(same, -torch.inf))
        if self._positive is not None:
            column = self._positive[rows] - first_item
            here = (self._positive[rows] >= 0) & (column >= 0) & (column < logits.shape[1])
            column = column.clamp(0, logits.shape[1] - 1)[:, None]
            logits.scatter_(1, column, logits.gather(1, column).masked_fill_(here[:, None], -torch.inf))

    def remaining(self, num_queries: int) -> Tensor:
        """(num_queries,) int64, how many items count for each query."""
        left = self._item_ids.new_full((num_queries,), len(self._item_ids))
        for start in range(0, len(self._columns), 4096):
            left -= self._same(slice(None), self._columns[start : start + 4096]).sum(1)
        if self._positive is not None:
            further = self._positive >= 0
            if self._query_ids is not None:
                found = self._item_ids[self._positive.clamp_min(0)]
                further = further & (self._query_ids != found[:, None]).all(1)
            left -= further.long()
        return left

    def _same(self, rows: slice, columns: Tensor) -> Tensor:
        assert self._query_ids is not None  # there are columns only where there are ids of queries
        ids = self._item_ids[columns]
        first, *others = self._query_ids[rows].unbind(1)
        same = first[:, None] == ids
        for other in others:
            same |= other[:, None] == ids
        return same


def tiled_logsumexp(
    queries: Tensor, items: Tensor, scale: Tensor, left_out: LeftOut | None = None, tile: Tile | None = None
) -> TiledLogSumExp:
    """Log-sum-exp over items of scale * <query, item>, and the largest of these logits.

    Memory beyond the arguments and their gradients: one tile of logits, its items in the queries' type, and
    one vector per query. Sums are in the queries' type.

    Args:
        queries: (num_queries, dim) float32 or float64.
        items: (num_items, dim); other types, such as a queue's bfloat16, are converted one tile at a time.
        scale: () of the queries' type.
        left_out: entries that do not count.
        tile: by default one for the caches of a CPU, or for a GPU.

    Returns:
        Both (num_queries,). A query that leaves out every item has -inf, and gradients of 0.
    """
    if tile is None:
        tile = GPU_TILE if queries.is_cuda else CPU_TILE
    with torch.autocast(queries.device.type, enabled=False):
        return TiledLogSumExp(*_TiledLogSumExp.apply(queries, items, scale, left_out, tile))


class _TiledLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, items: Tensor, scale: Tensor, left_out: LeftOut | None, tile: Tile
    ) -> tuple[Tensor, Tensor]:
        logits_of = _Logits(queries * scale, items, left_out, tile)
        largest = queries.new_full((len(queries),), -torch.inf)
        total = torch.zeros_like(largest)
        of_queries = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]
        mean = torch.zeros_like(queries) if of_queries else None
        for first_item, block in logits_of.blocks():
            for rows, logits in logits_of.tiles(first_item, block):
                before, largest[rows] = largest[rows].clone(), torch.maximum(largest[rows], logits.amax(1))
                # while a row has nothing that counts its maximum is -inf, and -inf - -inf must not be nan
                against = largest[rows].clamp_min(torch.finfo(logits.dtype).min)
                weights = logits.sub_(against[:, None]).exp_()
                shrink = (before - against).exp_()
                total[rows] = total[rows] * shrink + weights.sum(1)
                if mean is not None:
                    mean[rows] = torch.addmm(mean[rows] * shrink[:, None], weights, block)
        logsumexp = largest + total.log()
        if mean is not None:
            mean /= total.clamp_min(torch.finfo(total.dtype).tiny)[:, None]
        ctx.save_for_backward(queries, items if ctx.needs_input_grad[1] else None, scale, logsumexp, mean)
        ctx.left_out, ctx.tile = left_out, tile
        ctx.mark_non_differentiable(largest)
        return logsumexp, largest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        queries, items, scale, logsumexp, mean = ctx.saved_tensors
        gradient = gradient.masked_fill(logsumexp == -torch.inf, 0)
        of_queries = of_items = of_scale = None
        if ctx.needs_input_grad[0]:
            of_queries = mean * (gradient * scale)[:, None]
        if ctx.needs_input_grad[2]:
            of_scale = gradient.dot((queries * mean).sum(1))
        if ctx.needs_input_grad[1]:
            of_items = torch.zeros_like(items)
            scaled = queries * scale
            logits_of = _Logits(scaled, items, ctx.left_out, ctx.tile)
            against = logsumexp.masked_fill(logsumexp == -torch.inf, 0)
            towards = scaled * gradient[:, None]
            for first_item, block in logits_of.blocks():
                total = torch.zeros_like(block)
                for rows, logits in logits_of.tiles(first_item, block):
                    weights = logits.sub_(against[rows, None]).exp_()
                    total.addmm_(weights.T, towards[rows])
                of_items[first_item : first_item + len(block)] = total
        return of_queries, of_items, of_scale, None, None


class _Logits:
    """Tiles of logits, one after the other in the same memory."""

    def __init__(self, queries: Tensor, items: Tensor, left_out: LeftOut | None, tile: Tile) -> None:
        self._queries, self._items, self._left_out, self._tile = queries, items, left_out, tile
        self._memory = queries.new_empty(min(tile.queries, len(queries)) * min(tile.items, len(items)))
        self._columns = None if left_out is None else left_out.columns(tile.items)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Number of the first item of a tile's width, and its items in the type of the queries."""
        for first_item in range(0, len(self._items), self._tile.items):
            block = self._items[first_item : first_item + self._tile.items]
            yield first_item, block.to(self._queries.dtype)

    def tiles(self, first_item: int, block: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows of a tile and its logits, which the next tile overwrites."""
        for first_query in range(0, len(self._queries), self._tile.queries):
            queries = self._queries[first_query : first_query + self._tile.queries]
            shape = (len(queries), len(block))
            logits = torch.mm(queries, block.T, out=self._memory[: shape[0] * shape[1]].view(shape))
            if self._left_out is not None and self._columns is not None:
                columns = self._columns[first_item // self._tile.items]
                self._left_out.fill_(logits, columns, first_query, first_item)
            yield slice(first_query, first_query + len(queries)), logits


def _is_in(ids: Tensor, known: Tensor) -> Tensor:
    place = torch.searchsorted(known, ids).clamp_max(len(known) - 1)
    return known[place] == ids
