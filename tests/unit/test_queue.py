"""Negatives of the last batches: which they are, and that a resumed run has them."""

import math

import pytest
import torch
from torch.nn import functional as F

from mim_torchrec.losses.info_nce import MultiLevelInfoNCE
from mim_torchrec.losses.queue import ItemQueue

N, D, K = 4, 6, 2


def batch(step: int, rows: int = 2 * N) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    vectors = {
        name: torch.randn(count, D, generator=generator, requires_grad=True)
        for name, count in {"query": N, "mm": rows, "text": rows, "image": rows, "query_mm": N}.items()
    }
    return vectors | {"item_ids": torch.randint(40, (rows,), generator=generator),
                      "query_ids": torch.randint(-1, 40, (N,), generator=generator)}  # fmt: skip


def loss(**options) -> MultiLevelInfoNCE:
    return MultiLevelInfoNCE(0.5, 0.25, 0.3, 0.2, **({"queue_batches": K} | options))


def naive(step: int, level: str, source: str, earlier: list[int]) -> float:
    """Eq. 5 entry by entry, over the items of this batch and those of earlier ones, stored in bfloat16."""
    now = batch(step)
    queries = F.normalize(now[source].detach().double(), dim=1)
    columns = [(F.normalize(now[level].detach().double(), dim=1), now["item_ids"])]
    columns += [(F.normalize(batch(s)[level].detach(), dim=1).bfloat16().double(), batch(s)["item_ids"])
                for s in earlier]  # fmt: skip
    vectors, ids = torch.cat([c[0] for c in columns]), torch.cat([c[1] for c in columns])
    total = 0.0
    for i in range(N):
        terms = [
            math.exp(float(queries[i] @ vectors[j]) / 0.2)
            for j in range(len(vectors))
            if j == i or ids[j] not in (now["item_ids"][i], now["query_ids"][i])
        ]
        total += math.log(sum(terms)) - float(queries[i] @ vectors[i]) / 0.2
    return total / N


def test_the_items_of_the_last_k_batches_are_negatives_on_every_level():
    contrast = loss()
    for step in range(4):
        total, report = contrast(**batch(step))
    levels = {"mm": ("mm", "query"), "text": ("text", "query"), "image": ("image", "query"),
              "item": ("mm", "query_mm")}  # fmt: skip
    expected = {name: naive(3, *of, earlier=[1, 2]) for name, of in levels.items()}
    for name, value in expected.items():
        assert float(report[f"loss_{name}"]) == pytest.approx(value, rel=1e-5), name
    weighted = expected["mm"] + 0.5 * expected["text"] + 0.25 * expected["image"] + 0.3 * expected["item"]
    assert float(total.detach()) == pytest.approx(weighted, rel=1e-5)


def test_there_are_2n_k_plus_1_minus_1_negatives_when_the_queue_is_full():
    contrast = loss(mask_same_item=False)
    negatives = [float(contrast(**batch(step))[1]["negatives"]) for step in range(5)]
    assert negatives == [2 * N * (min(step, K) + 1) - 1 for step in range(5)]


def test_the_queue_is_read_from_its_first_step_on_and_filled_before():
    contrast = loss(mask_same_item=False, queue_start_step=3, queue_batches=5)
    negatives = [float(contrast(**batch(step))[1]["negatives"]) for step in range(5)]
    assert negatives == [2 * N * (earlier + 1) - 1 for earlier in (0, 0, 0, 3, 4)]


def test_without_hard_negatives_the_queue_holds_positives():
    contrast = loss(mask_same_item=False)
    negatives = [float(contrast(**batch(step, rows=N))[1]["negatives"]) for step in range(3)]
    assert negatives == [N * (step + 1) - 1 for step in range(3)]


def test_evaluation_neither_reads_nor_writes_the_queue():
    contrast, plain = loss(), loss(queue_batches=0)
    contrast(**batch(0))
    contrast.eval()
    assert torch.equal(contrast(**batch(1))[0], plain(**batch(1))[0])
    assert contrast.queue.pushed == 1


def test_gradients_are_the_same_whether_the_queue_was_overwritten_before_the_backward_pass_or_not():
    found = []
    for later in (False, True):
        contrast = loss(queue_batches=1)
        contrast(**batch(0))
        now = batch(1)
        total, _ = contrast(**now)
        if later:
            contrast(**batch(2))
        found.append(torch.autograd.grad(total, [now["query"], now["mm"], now["text"], now["image"]]))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("stopped_after", [1, 2, 5])
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(tmp_path, stopped_after):
    unbroken = loss()
    expected = [unbroken(**batch(step))[0] for step in range(8)]
    first = loss()
    for step in range(stopped_after):
        first(**batch(step))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    resumed = loss()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(stopped_after, 8):
        assert torch.equal(resumed(**batch(step))[0], expected[step])


def test_a_loaded_queue_shares_no_memory_with_the_state():
    first, second = loss(), loss()
    first(**batch(0))
    second.load_state_dict(first.state_dict())
    before = first.queue.vectors("mm").clone()
    for step in range(1, 4):
        second(**batch(step))
    assert torch.equal(first.queue.vectors("mm"), before)


def test_converting_the_model_leaves_the_queue_in_bfloat16():
    contrast = loss()
    contrast(**batch(0))
    contrast.double()
    assert contrast.queue.vectors("mm").dtype == torch.bfloat16


def test_a_level_of_no_weight_takes_no_memory():
    assert MultiLevelInfoNCE(alpha=0.0, beta=0.3, queue_batches=1).queue.levels == ("mm", "image")


def test_a_queue_of_another_length_is_refused():
    state = loss(queue_batches=3).state_dict()
    with pytest.raises(ValueError, match="queue of 3 batches .* this run has one of 2"):
        loss().load_state_dict(state)


def test_a_checkpoint_without_the_queue_is_refused():
    with pytest.raises(RuntimeError, match="queue._extra_state"):
        loss().load_state_dict(loss(queue_batches=0).state_dict())


def test_a_batch_of_another_size_is_refused():
    contrast = loss()
    contrast(**batch(0))
    with pytest.raises(ValueError, match=r"\(3, 4, 6\) and 4 ids does not fit .* of \(3, 8, 6\)"):
        contrast(**batch(1, rows=N))


def test_negative_numbers_are_refused():
    with pytest.raises(ValueError, match="queue_batches is -1"):
        MultiLevelInfoNCE(queue_batches=-1)
    with pytest.raises(ValueError, match="holds nothing"):
        ItemQueue(["mm"], 0)


def test_balance_counts_the_push_of_an_items_own_batch_for_all_in_which_it_is_a_negative():
    """Loss as without; an item's gradient as a negative times (items + queued) / items, else once."""
    found = {}
    for balance in (False, True):
        module = loss(balance_queue=balance)
        for step in range(3):
            now = batch(step)
            total, _ = module(**now)
        found[balance] = float(total.detach()), torch.autograd.grad(total, [now["mm"], now["query"]])
    assert found[True][0] == found[False][0]

    now = {name: value.detach().double() for name, value in batch(2).items()}
    ids, own = now["item_ids"].long(), now["query_ids"].long()
    queued = torch.cat([F.normalize(batch(s)["mm"].detach(), dim=1).bfloat16().double() for s in (0, 1)])
    queued_ids = torch.cat([batch(s)["item_ids"] for s in (0, 1)])
    as_positive, as_negative = (now["mm"].clone().requires_grad_() for _ in range(2))
    queries = {"query": 1.0, "query_mm": 0.3}
    expected_total = 0.0
    for name, weight in queries.items():
        query = F.normalize(now[name], dim=1)
        for i in range(N):
            score = query[i] @ F.normalize(as_positive[i], dim=0) / 0.2
            others = [
                query[i] @ F.normalize(as_negative[j], dim=0) / 0.2
                for j in range(2 * N)
                if j != i and int(ids[j]) not in (int(ids[i]), int(own[i]))
            ]
            others += [query[i] @ v / 0.2 for v, k in zip(queued, queued_ids, strict=True)
                       if int(k) not in (int(ids[i]), int(own[i]))]  # fmt: skip
            one = torch.stack([score, *others]).logsumexp(0) - score
            expected_total = expected_total + weight * one / N
    pull, push = torch.autograd.grad(expected_total, [as_positive, as_negative])
    share = (2 * N + len(queued)) / (2 * N)
    assert torch.allclose(found[True][1][0].double(), pull + share * push, atol=1e-5)
    assert torch.allclose(found[False][1][0].double(), pull + push, atol=1e-5)
    assert torch.equal(found[True][1][1], found[False][1][1])
