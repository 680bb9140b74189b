"""User behavior models of one request as plain functions of tensors, for `torch.export`.

No size is read and nothing is branched on: a history shorter than what a model keeps is padded with older
behaviors that weigh nothing. They give what the modules give, of any number of candidates and behaviors.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim_torchrec.ciubm.ubm.activation import Dice
from mim_torchrec.ciubm.ubm.avg_pooling import AvgPooling
from mim_torchrec.ciubm.ubm.bst import BST
from mim_torchrec.ciubm.ubm.din import DIN
from mim_torchrec.ciubm.ubm.interface import BehaviorContext, recency_buckets
from mim_torchrec.ciubm.ubm.sim import SIM
from mim_torchrec.ciubm.ubm.twin import TWIN

LOWEST = torch.finfo(torch.float32).min


def avg_pooling(ubm: AvgPooling, candidates: Tensor, behaviors: Tensor, context: BehaviorContext) -> Tensor:
    """The mean of the behaviors, for every candidate."""
    count = torch.ones_like(behaviors[:, :1]).sum(0).clamp(min=1)
    return (behaviors.sum(0) / count).expand(candidates.shape[0], -1)


def din(ubm: DIN, candidates: Tensor, behaviors: Tensor, context: BehaviorContext) -> Tensor:
    """As in `dense_din`, of all candidates at once."""
    w_candidate, w_behavior, w_difference, w_product = ubm.first.weight.chunk(4, dim=1)
    constant = F.linear(candidates, w_candidate + w_difference, ubm.first.bias)
    matrices = w_behavior - w_difference + w_product * candidates[:, None]
    units = matrices @ behaviors.T + constant[:, :, None]
    for layer in ubm.middle:
        units = layer.weight @ units + layer.bias[:, None] if isinstance(layer, nn.Linear) else _active(
            layer, units
        )  # fmt: skip
    scores = (ubm.last.weight @ _active(ubm.activation, units)).squeeze(1) + ubm.last.bias
    return (scores.softmax(1) if ubm.softmax else scores) @ behaviors


def _active(activation: nn.Module, units: Tensor) -> Tensor:
    if isinstance(activation, nn.PReLU):
        return F.prelu(units, activation.weight)
    assert isinstance(activation, Dice)
    norm, slope = activation.normalize, activation.slope[:, None]
    scale = torch.rsqrt(norm.running_var + norm.eps)[:, None]
    gate = ((units - norm.running_mean[:, None]) * scale).sigmoid()
    return units * (gate * (1 - slope) + slope)


def _padded(rows: Tensor, count: int) -> Tensor:
    """Rows (num_rows, ...) with so many zeros ahead."""
    return torch.cat([rows.new_zeros(count, *rows.shape[1:]), rows])


def _largest(scores: Tensor, k: int) -> Tensor:
    """Places (num_candidates, k) of the largest scores among padded behaviors; of equal ones the later."""
    padded = F.pad(scores, (k, 0), value=-torch.inf)
    order = padded.flip(1).sort(dim=1, descending=True, stable=True).indices[:, :k]
    return padded.shape[1] - 1 - order


def sim(ubm: SIM, candidates: Tensor, behaviors: Tensor, context: BehaviorContext) -> Tensor:
    """A soft search, and the attention to what it keeps."""
    z = torch.cat([behaviors, ubm.recency(recency_buckets(context, "SIM"))], dim=-1)
    seekers, keys = candidates, behaviors
    if ubm.auxiliary:
        seekers, keys = ubm.search_query(candidates), ubm.search_key(behaviors)
    places = _largest(seekers @ keys.T, ubm.top_k)
    found = _padded(z, ubm.top_k)[places]
    of_heads = ubm.key(found).unflatten(2, (ubm.heads, -1))
    scores = torch.einsum("chw,ckhw->chk", ubm.query(candidates).unflatten(1, (ubm.heads, -1)), of_heads)
    return (_softmax(scores, (places >= ubm.top_k)[:, None]) @ found).flatten(1)


def twin(ubm: TWIN, candidates: Tensor, behaviors: Tensor, context: BehaviorContext) -> Tensor:
    """Search and attention of each head."""
    buckets, dim, heads = recency_buckets(context, "TWIN"), behaviors.shape[1], ubm.heads
    of_recency = F.linear(ubm.recency.weight, ubm.value.weight[:, dim:])
    values = F.linear(behaviors, ubm.value.weight[:, :dim]) + F.embedding(buckets, of_recency)
    biases = F.embedding(buckets, ubm.cross(ubm.recency.weight) * ubm.cross_weight)
    queries = ubm.query(candidates) / math.sqrt(ubm.key.out_features // heads)
    parts = []
    of_heads = zip(*(x.chunk(heads, 1) for x in (queries, ubm.key(behaviors), values, biases)), strict=True)
    for query, key, value, bias in of_heads:
        scores = query @ key.T + bias.T
        places = _largest(scores, ubm.top_k)
        kept = F.pad(scores, (ubm.top_k, 0)).gather(1, places)
        weights = _softmax(kept, places >= ubm.top_k)
        parts.append((weights[:, None] @ _padded(value, ubm.top_k)[places]).squeeze(1))
    return ubm.out(torch.cat(parts, dim=-1))


def _softmax(scores: Tensor, exists: Tensor) -> Tensor:
    """Over what exists; zeros where nothing does."""
    return torch.where(exists, torch.where(exists, scores, LOWEST).softmax(-1), 0.0)


def bst(ubm: BST, candidates: Tensor, behaviors: Tensor, context: BehaviorContext) -> Tensor:
    """The transformer layer over the last behaviors and the target."""
    most, width = ubm.max_positions, candidates.shape[1] // ubm.heads

    def recent(rows: Tensor) -> Tensor:
        return _padded(rows, most).narrow(0, rows.shape[0], most)

    exists = recent(torch.ones_like(behaviors[:, 0], dtype=torch.bool))
    target = candidates + ubm.position.weight[-1]
    history = recent(behaviors) + ubm.position(recent(recency_buckets(context, "BST")))
    q_t, k_t, v_t = _by_head(ubm.projection(target), ubm.heads)
    q_i, k_i, v_i = _by_head(ubm.projection(history), ubm.heads)
    scale = math.sqrt(width)

    def attend(queries: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.where(exists, (queries / scale) @ k_i.transpose(1, 2), LOWEST)
        return scores.softmax(-1) @ v_i, scores.logsumexp(-1)

    read, normalizer = attend(q_t)
    share = torch.sigmoid((q_t * k_t).sum(-1) / scale - normalizer)
    read = torch.lerp(read, v_t, share[:, :, None]).transpose(0, 1).flatten(1)
    among, normalizers = attend(q_i)
    shares = torch.sigmoid((k_t / scale) @ q_i.transpose(1, 2) - normalizers[:, None])[..., None]
    # (heads, candidates, behaviors, width)
    pairs = among[:, None] + shares * (v_t[:, :, None] - among[:, None])
    outputs = _layer(ubm, history + ubm.out(pairs.permute(1, 2, 0, 3).flatten(2)))
    mean = (outputs * exists[:, None]).sum(1) / exists.sum().clamp(min=1)
    at_target = torch.where(exists.any(), _layer(ubm, target + ubm.out(read)), 0.0)
    return torch.cat([at_target, mean], dim=-1)


def _by_head(projected: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values, (heads, n, width) each."""
    return projected.unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3).unbind(0)


def _layer(ubm: BST, attended: Tensor) -> Tensor:
    s = ubm.attention_norm(attended)
    return ubm.norm(s + ubm.narrow(F.leaky_relu(ubm.widen(s))))


Function = Callable[[Any, Tensor, Tensor, BehaviorContext], Tensor]
FUNCTIONS: dict[type[nn.Module], Function] = {
    AvgPooling: avg_pooling, BST: bst, DIN: din, SIM: sim, TWIN: twin
}  # fmt: skip
