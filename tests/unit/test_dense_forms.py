"""The forms of serving give what training computes on packed pairs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mim_torchrec.ciubm.jagged import RequestPairs
from mim_torchrec.ciubm.similarity import similarity_interest
from mim_torchrec.ciubm.ubm.avg_pooling import AvgPooling
from mim_torchrec.ciubm.ubm.bst import BST
from mim_torchrec.ciubm.ubm.dien import DIEN
from mim_torchrec.ciubm.ubm.din import DIN
from mim_torchrec.ciubm.ubm.interface import BehaviorContext
from mim_torchrec.ciubm.ubm.sim import SIM
from mim_torchrec.ciubm.ubm.twin import TWIN
from mim_torchrec.ctr.dense import DeepCTR
from mim_torchrec.serving.dense import blocks
from mim_torchrec.serving.dense import similarity as dense_similarity
from mim_torchrec.serving.dense.folding import fold_batch_norms
from mim_torchrec.serving.dense.search import among_largest, exponentials_of_largest_, largest
from mim_torchrec.serving.dense.similarity import similarity_of_request
from mim_torchrec.serving.dense.ubm import FORMS, DenseUBM
from mim_torchrec.serving.grid import pairs_of

DIM = 8
MODELS = {
    "avg_pooling": lambda: AvgPooling(DIM),
    "din": lambda: DIN(DIM),
    "din-dice-softmax": lambda: DIN(DIM, hidden=(6, 5), activation="dice", softmax=True),
    "dien": lambda: DIEN(DIM),
    "bst": lambda: BST(DIM, heads=2, max_positions=6, feedforward=12),
    "sim": lambda: SIM(DIM, top_k=4, heads=2),
    "sim-hard": lambda: SIM(DIM, search="hard", top_k=4, heads=2),
    "sim-no-auxiliary": lambda: SIM(DIM, top_k=1, heads=2, auxiliary=False),
    "twin": lambda: TWIN(DIM, top_k=4, heads=2),
}
REQUESTS = {
    "one": [(7, 9)],
    "empty": [(3, 0)],
    "short": [(2, 3)],
    "many": [(3, 9), (2, 0), (0, 4), (5, 4), (4, 30)],
}


def trained(name: str) -> torch.nn.Module:
    """A model with weights, and statistics of its normalizations, away from where they start."""
    torch.manual_seed(len(name))
    model = MODELS[name]().eval()
    for key, value in model.state_dict().items():
        value.copy_(torch.rand_like(value) + 0.1 if "var" in key else 0.5 * torch.randn_like(value))
    return model


@pytest.mark.parametrize("block", [40, 200])  # one candidate or several in a block, the last one smaller
@pytest.mark.parametrize("requests", REQUESTS)
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_an_interest_is_that_of_packed_pairs(name, requests, block, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", block)
    model = trained(name)
    counts = torch.tensor(REQUESTS[requests])
    offsets = [F.pad(column.cumsum(0), (1, 0)) for column in counts.T]
    candidates, behaviors = torch.randn(int(offsets[0][-1]), DIM), torch.randn(int(offsets[1][-1]), DIM)
    behaviors[1::3] = behaviors[:1]  # an item that was seen often
    context = BehaviorContext(
        recency=torch.rand(len(behaviors)) * 1e6,
        candidate_categories=torch.randint(3, (len(candidates),)),
        behavior_categories=torch.randint(3, (len(behaviors),)),
    )
    expected = model(candidates, behaviors, RequestPairs.build(*offsets), context).value
    found = DenseUBM(model)(candidates, behaviors, pairs_of(*offsets), context).value
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_model_of_a_user_is_computed_by_itself():
    class Mine(DIN):
        def forward(self, candidates, behaviors, pairs, context=None):
            return super().forward(candidates, behaviors, pairs, context)._replace(value="mine")

    with torch.inference_mode():
        pairs = pairs_of(torch.tensor([0, 2]), torch.tensor([0, 3]))
        assert DIN in FORMS
        assert DenseUBM(Mine(DIM).eval())(torch.randn(2, DIM), torch.randn(3, DIM), pairs).value == "mine"


@pytest.mark.parametrize("k", [1, 3, 7])
def test_the_largest_are_those_of_a_stable_order(k):
    rng = np.random.default_rng(k)
    scores = torch.tensor(rng.integers(0, 4, (50, 9)).astype(np.float32))
    expected = [sorted(np.argsort(row, kind="stable")[-k:]) for row in scores.numpy()]
    assert largest(scores, k).view(-1, k).tolist() == expected
    scores[3] = torch.nan  # as many are chosen of whatever cannot be compared
    assert largest(scores, k).view(-1, k)[3].tolist() == list(range(9 - k, 9))


@pytest.mark.parametrize("kind", ["distinct", "equal", "close", "far"])
def test_a_softmax_sees_the_largest_alone(kind):
    scores = torch.randn(40, 9, generator=torch.Generator().manual_seed(0))
    if kind == "equal":
        scores = scores.round()
    elif kind == "close":  # neighbors among float32, whose difference rounds to nothing in an exponential
        scores = torch.from_numpy(np.nextafter(np.float32(1), np.arange(9, dtype=np.float32))).repeat(40, 1)
        scores[:, 2:] += torch.arange(7) * torch.finfo(torch.float32).eps
    elif kind == "far":  # whose exponentials float32 cannot hold
        scores *= 1000
    kept = torch.from_numpy(among_largest(scores, 4))
    expected = scores.masked_fill(~kept, -torch.inf).softmax(1)
    found = exponentials_of_largest_(scores.clone(), 4)
    torch.testing.assert_close(found / found.sum(1, keepdim=True), expected)
    assert found[~kept].max() < 1e-20
    assert kind == "far" or found[kept].min() > 1e-9  # beside a far one, what is kept may be nothing


@pytest.mark.parametrize("tiers", [2, 3, 7, 20, 100])
def test_tiers_begin_where_training_computes_them(tiers):
    bounds, wanted = torch.from_numpy(dense_similarity._smallest_of_tiers(tiers)), torch.arange(1, tiers)
    below = torch.nextafter(bounds, torch.tensor(-2.0))
    assert torch.equal(((bounds + 1) * (tiers / 2)).long(), wanted)
    assert torch.equal(((below + 1) * (tiers / 2)).long(), wanted - 1)


@pytest.mark.parametrize(("tiers", "spans"), [(20, (5, 0)), (3, (0, 1)), (1, (2,)), (120, (5, 0))])
@pytest.mark.parametrize("kind", ["full", "without", "orthogonal", "alike", "none", "long"])
def test_similarities_are_those_of_packed_pairs(kind, tiers, spans, monkeypatch):
    rows = dense_similarity.ROWS if kind == "long" else 7
    monkeypatch.setattr(dense_similarity, "ROWS", rows)
    monkeypatch.setattr(blocks, "BLOCK", 4 * rows)  # four candidates, and then two
    monkeypatch.setattr(dense_similarity, "NARROW", 4)
    torch.manual_seed(tiers)
    candidates, behaviors = torch.randn(6, 5), torch.randn(4100 if kind == "long" else 19, 5)
    if kind == "without":
        candidates[2] = behaviors[3:17] = 0
    elif kind == "orthogonal":  # an exact 0 of two items with vectors
        candidates, behaviors = torch.eye(5)[[0, 1, 2, 3, 4, 0]], torch.eye(5).repeat(3, 1)[:14]
    elif kind == "alike":
        behaviors[:] = -candidates[1]
    elif kind == "none":
        behaviors[:] = 0
    pairs = RequestPairs.build(torch.tensor([0, len(candidates)]), torch.tensor([0, len(behaviors)]))
    candidates, behaviors = F.normalize(candidates, dim=1), F.normalize(behaviors, dim=1)
    relevance = (candidates @ behaviors.T).view(-1)
    expected = similarity_interest(relevance, pairs, tiers, spans)
    found = similarity_of_request(candidates, behaviors, tiers, spans)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_similarities_of_no_history_are_zero():
    found = similarity_of_request(F.normalize(torch.randn(3, 4), dim=1), torch.empty(0, 4), 20, (5, 0))
    assert torch.equal(found, torch.zeros(3, 44))


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@torch.inference_mode()
def test_a_tower_without_its_normalizations_is_the_same_function(batch_norm, dropout):
    torch.manual_seed(int(batch_norm))
    tower = DeepCTR(6, (5, 4), batch_norm, dropout).eval()
    for key, value in tower.state_dict().items():
        value.copy_(torch.rand_like(value) + 0.1 if "var" in key else torch.randn_like(value))
    folded = fold_batch_norms(tower)
    assert {type(layer).__name__ for layer in folded} == {"Linear", "PReLU", "Flatten"}
    for count in (0, 1, 7):
        x = torch.randn(count, 6)
        torch.testing.assert_close(folded(x), tower(x), rtol=1e-5, atol=1e-5)
