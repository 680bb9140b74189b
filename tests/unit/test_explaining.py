"""Explanations are exact: a loop of scores without each behavior and each interest finds the same."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingConfig

from mim_torchrec.ctr.config import PRESETS, CTRConfig
from mim_torchrec.ctr.parameters import is_dense
from mim_torchrec.ctr.sharding import build_model
from mim_torchrec.embeddings.table.format import TableWriter
from mim_torchrec.serving import explaining
from mim_torchrec.serving.bundle import Bundle, save_bundle
from mim_torchrec.serving.explaining import explain
from mim_torchrec.serving.messages import ScoreRequest
from mim_torchrec.serving.scorer import Scorer

UBMS = ("avg_pooling", "din", "dien", "bst", "sim", "twin")
ITEMS, DIM, BEHAVIORS, CANDIDATES = 40, 8, 7, 3
NOW = 10**15


def bundle(folder: Path, ubm: str, preset: str = "default", **words) -> Bundle:
    """A model with random weights, whose logits depend on all that it is given."""
    torch.manual_seed(3)
    fields = PRESETS[preset] | {"max_behaviors": 6, "embedding_dim": 4, "tower": (16,)} | words
    settings = CTRConfig(
        data=folder, out=folder, table=folder / "table", table_version="random", ubm=ubm, **fields
    )
    mm = None
    if settings.mim == "on":
        features = ["candidate_mm", "behavior_mm"]
        mm = EmbeddingConfig(name="mm", num_embeddings=1, embedding_dim=DIM, feature_names=features)
    else:
        settings = replace(settings, table_version=None)
    rows = {"user_id": 5, "item_id": ITEMS, "category": 4}
    built = build_model(settings, dict.fromkeys(rows, 1), mm, torch.device("meta"))
    dense = {name: value for name, value in built.state_dict().items() if is_dense(name)}
    made = {name: torch.randn(count + 1, 4) for name, count in rows.items()}
    tables = {name: (torch.arange(count), lambda name=name: made[name]) for name, count in rows.items()}
    return save_bundle(folder / "bundle", settings, dense, tables, 0 if mm is None else DIM)


def scorer(folder: Path, ubm: str, preset: str = "default", plain: bool = False, **words) -> Scorer:
    found = bundle(folder, ubm, preset, **words)
    if not (folder / "table").exists():
        writer = TableWriter(folder / "table", table_version="random", dim=DIM, dtype="float32", encoder={})
        vectors = torch.randn(ITEMS, DIM, generator=torch.Generator().manual_seed(0))
        writer.write_shard(torch.arange(ITEMS), vectors)
        writer.finish(None)
    return Scorer(found, folder / "table" if found.table_version else None, plain=plain, cache=10)


def request(behaviors: int = BEHAVIORS) -> ScoreRequest:
    """The last behavior was seen before, and one candidate is unknown."""
    generator = torch.Generator().manual_seed(1)
    items = torch.randint(ITEMS, (behaviors,), generator=generator)
    if behaviors > 3:
        items[-1] = items[-3]
    candidates = torch.tensor([4, 9, 1000])
    return ScoreRequest(
        ids={"user_id": torch.tensor([2]), "behavior_item_id": items, "behavior_category": items % 4,
             "candidate_item_id": candidates, "candidate_category": candidates % 4},
        request_ts=NOW, behavior_ts=NOW - 3_600_000_000 * torch.arange(behaviors, 0, -1),
    )  # fmt: skip


def logits(one: Scorer, sent: ScoreRequest) -> torch.Tensor:
    return one.score([sent])[0].logits


def naive_behaviors(one: Scorer, sent: ScoreRequest) -> torch.Tensor:
    """What each behavior adds, by a loop over histories that are written out without it."""
    columns = []
    whole = logits(one, sent)
    for place in range(sent.num_behaviors):
        kept = [k for k in range(sent.num_behaviors) if k != place]
        ids = dict(sent.ids)
        for name in ("behavior_item_id", "behavior_category"):
            ids[name] = sent.ids[name][kept]
        left = ScoreRequest(ids=ids, request_ts=sent.request_ts, behavior_ts=sent.behavior_ts[kept])
        columns.append(whole - logits(one, left))
    return torch.stack(columns, dim=1)


def naive_interest(one: Scorer, sent: ScoreRequest, name: str) -> torch.Tensor:
    whole = logits(one, sent)

    def without(_module, _inputs, found):
        return replace(found, **{name: 0 * getattr(found, name)})

    hook = one._model.ciubm.register_forward_hook(without)
    left = logits(one, sent)
    hook.remove()
    return whole - left


@pytest.mark.parametrize("preset", ["default", "recommended"])
@pytest.mark.parametrize("ubm", UBMS)
def test_an_explanation_is_what_a_loop_of_scores_finds(tmp_path, ubm, preset, monkeypatch):
    monkeypatch.setattr(explaining, "PAIRS_AT_ONCE", 2 * CANDIDATES * BEHAVIORS)  # two histories at a time
    one, plain = (scorer(tmp_path, ubm, preset, plain=plain) for plain in (False, True))
    sent = request()
    found, used = explain(one, sent), one.recent(sent)
    torch.testing.assert_close(found.logits, logits(plain, sent), rtol=0, atol=1e-5)
    assert found.behaviors.shape == (CANDIDATES, 6)  # of 7 behaviors the model reads 6
    torch.testing.assert_close(found.behaviors, naive_behaviors(plain, used), rtol=0, atol=2e-5)
    assert float(found.behaviors.abs().max()) > 1e-3
    expected = ["id", "content", "fusion", *(["similarity"] if preset == "recommended" else [])]
    assert list(found.interests) == expected
    for name, lost in found.interests.items():
        torch.testing.assert_close(lost, naive_interest(plain, used, name), rtol=0, atol=2e-5)
        assert float(lost[:2].abs().max()) > 1e-4, name


def test_the_relevance_is_the_cosine_of_the_vectors(tmp_path):
    one, sent = scorer(tmp_path, "din"), request()
    found = explain(one, sent).relevance
    for k, candidate in enumerate(sent.ids["candidate_item_id"].tolist()):
        for place, behavior in enumerate(sent.ids["behavior_item_id"][1:].tolist()):
            vectors, known = one.mm.lookup(torch.tensor([candidate, behavior]))
            cosine = torch.nn.functional.cosine_similarity(vectors[:1], vectors[1:]) if known.all() else 0.0
            assert float(found[k, place]) == pytest.approx(float(cosine), abs=1e-6)
    assert float(found[:2].abs().max()) > 0.1 and not found[2].any()


def test_base_has_the_id_interest_and_no_relevance(tmp_path):
    found = explain(scorer(tmp_path, "din", mim="off"), request())
    assert list(found.interests) == ["id"] and found.relevance is None


def test_an_empty_history_has_nothing_to_lose(tmp_path):
    found = explain(scorer(tmp_path, "sim"), request(0))
    assert found.behaviors.shape == found.relevance.shape == (CANDIDATES, 0)
    for lost in found.interests.values():
        torch.testing.assert_close(lost, torch.zeros(CANDIDATES), rtol=0, atol=1e-6)


def test_an_explanation_leaves_cache_and_model_as_they_were(tmp_path):
    one, sent = scorer(tmp_path, "din"), request()
    before = logits(one, sent)
    whole = one._model.ciubm
    explain(one, replace(sent, explain=True))
    assert one._model.ciubm is whole
    assert one.score([sent])[0].was_kept is True and len(one.cache) == 1
    assert torch.equal(logits(one, sent), before)
