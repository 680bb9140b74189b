"""Space-time negatives on two gloo ranks against one process that sees every pair."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from mim_torchrec.losses.alignment import ImageTextContrastive
from mim_torchrec.losses.info_nce import MultiLevelInfoNCE
from tests.ranks import run_ranks

N, RANKS, K, WIDTH, DIM, STEPS = 5, 2, 2, 8, 6, 4
LEVELS = ("query", "mm", "text", "image", "query_mm")


class Encoder(nn.Module):
    """A linear layer for each kind of vector, and the loss."""

    def __init__(self, mask: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict({name: nn.Linear(WIDTH, DIM) for name in LEVELS})
        self.loss = MultiLevelInfoNCE(0.5, 0.3, 0.7, mask_same_item=mask, queue_batches=K)

    def forward(self, features: dict[str, Tensor], item_ids: Tensor, query_ids: Tensor):
        vectors = {name: layer(features[name]) for name, layer in self.layers.items()}
        return self.loss(**vectors, item_ids=item_ids, query_ids=query_ids)


def batch_of(step: int, pairs: slice):
    """Some of a step's RANKS x N pairs: positives, and after them hard negatives."""
    generator = torch.Generator().manual_seed(step)
    count = RANKS * N
    drawn = {name: torch.randn(2 * count, WIDTH, generator=generator) for name in LEVELS}
    ids = torch.randint(12, (2, count), generator=generator)
    own = torch.randint(-1, 12, (count,), generator=generator)
    features = {
        name: value[:count][pairs]
        if name.startswith("query")
        else torch.cat([value[:count][pairs], value[count:][pairs]])
        for name, value in drawn.items()
    }
    return features, ids[:, pairs].flatten(), own[pairs]


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def one_rank_of_two(mask: bool):
    model = DistributedDataParallel(Encoder(mask))
    mine = slice(dist.get_rank() * N, (dist.get_rank() + 1) * N)
    for step in range(STEPS):
        loss, report = model(*batch_of(step, mine))
    loss.backward()
    return float(loss.detach()), gradients_of(model.module), {k: float(v) for k, v in report.items()}


@pytest.fixture(scope="module", params=[True, False], ids=["masked", "unmasked"])
def both(request):
    model = Encoder(request.param)
    for step in range(STEPS):
        loss, report = model(*batch_of(step, slice(None)))
    loss.backward()
    alone = float(loss.detach()), gradients_of(model), {k: float(v) for k, v in report.items()}
    return request.param, alone, run_ranks(one_rank_of_two, RANKS, request.param)


def test_two_ranks_with_queues_have_the_loss_of_one(both):
    _, (loss, _, report), ranks = both
    assert sum(rank[0] for rank in ranks) / RANKS == pytest.approx(loss, rel=1e-6)
    for name, value in report.items():
        assert sum(rank[2][name] for rank in ranks) / RANKS == pytest.approx(value, rel=1e-5), name


def test_two_ranks_with_queues_have_the_gradients_of_one(both):
    _, (_, gradients, _), ranks = both
    for _, theirs, _ in ranks:
        for name, gradient in gradients.items():
            assert float((theirs[name] - gradient).norm() / gradient.norm()) < 1e-5, name


def test_there_are_2np_k_plus_1_minus_1_negatives_less_those_of_the_same_item(both):
    mask, _, ranks = both
    formula = 2 * N * RANKS * (K + 1) - 1
    for _, _, report in ranks:
        assert report["negatives"] < formula if mask else report["negatives"] == formula


def embeddings(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    image, text = (torch.randn(N, DIM, generator=generator, requires_grad=True) for _ in range(2))
    return image, text, torch.tensor(10.0, requires_grad=True)


def beside_open_clip(symmetric: bool):
    from open_clip.loss import ClipLoss  # takes seconds to load

    rank = dist.get_rank()
    image, text, scale = embeddings(rank)
    ids = torch.arange(rank * N, (rank + 1) * N)
    if symmetric:
        ours, _ = ImageTextContrastive(temperature=0.1)(image, text, ids)
        inputs = (image, text)
    else:
        loss = MultiLevelInfoNCE(alpha=0, beta=0)
        with torch.no_grad():
            loss.log_scale.fill_(scale.log())
        ours, _ = loss(image, text, text, text, ids)
        inputs = (image, text, loss.log_scale)
    found = torch.autograd.grad(ours, inputs)

    clip = ClipLoss(local_loss=False, gather_with_grad=True, rank=rank, world_size=RANKS)
    images, texts = F.normalize(image, dim=1), F.normalize(text, dim=1)
    if symmetric:
        theirs = clip(images, texts, scale)
        expected = torch.autograd.grad(theirs, (image, text))
    else:
        per_image, _ = clip.get_logits(images, texts, scale)
        theirs = F.cross_entropy(per_image, clip.get_ground_truth(per_image.device, len(per_image)))
        *expected, of_scale = torch.autograd.grad(theirs, (image, text, scale))
        expected.append(of_scale * scale.detach())  # with respect to its logarithm
    return float(ours.detach()), float(theirs.detach()), found, expected


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_loss_and_the_gradients_are_those_of_the_global_loss_of_open_clip(symmetric):
    ranks = run_ranks(beside_open_clip, RANKS, symmetric)
    assert sum(rank[0] for rank in ranks) / RANKS == pytest.approx(ranks[0][1], rel=1e-5)
    for _, _, found, expected in ranks:
        for ours, theirs in zip(found[:2], expected[:2], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    if not symmetric:  # each rank has its part of the gradient of what all share; DDP takes the mean
        mean = sum(rank[2][2] for rank in ranks) / RANKS
        torch.testing.assert_close(mean, ranks[0][3][2], atol=1e-6, rtol=1e-4)


def unequal(pairs_more: int, items_more: int) -> str:
    count = N + pairs_more * dist.get_rank()
    items = 2 * count + items_more * dist.get_rank()
    vectors = torch.randn(items, DIM)
    with pytest.raises(ValueError) as found:
        MultiLevelInfoNCE()(torch.randn(count, DIM), vectors, vectors, vectors, torch.arange(items))
    return str(found.value)


@pytest.mark.parametrize(("more", "shown"), [
    ((1, 0), "rank 0: 5, 10, 6; rank 1: 6, 12, 6"),
    ((0, 1), "rank 0: 5, 10, 6; rank 1: 5, 11, 6"),
])  # fmt: skip
def test_unequal_batches_are_refused_on_every_rank(more, shown):
    for message in run_ranks(unequal, RANKS, *more):
        assert message == f"the ranks have batches of different sizes (queries, items, dim): {shown}"


def resumed_and_unbroken() -> list[tuple[float, float]]:
    mine = slice(dist.get_rank() * N, (dist.get_rank() + 1) * N)
    unbroken = DistributedDataParallel(Encoder(True))
    for step in range(3):
        unbroken(*batch_of(step, mine))
    state = {name: value for name, value in unbroken.state_dict().items()}
    resumed = DistributedDataParallel(Encoder(True))
    resumed.load_state_dict(state)
    return [
        tuple(float(model(*batch_of(step, mine))[0].detach()) for model in (unbroken, resumed))
        for step in range(3, 6)
    ]


def test_a_rank_that_loads_its_own_queue_goes_on_to_the_bit():
    for losses in run_ranks(resumed_and_unbroken, RANKS):
        assert all(one == other for one, other in losses)
