"""The criterion of C-SFT, its standard error, and the comparison with plain towers on the same pairs."""

import json
import math

import numpy as np
import pytest
import torch

from mim_torchrec.csft.selection import compare, epoch_metrics, scores
from mim_torchrec.data.errors import DataError
from mim_torchrec.encoders.selection import FILE, Selection, read_selection
from mim_torchrec.encoders.text import TextEncoder, TextEncoderConfig, train_tokenizer
from mim_torchrec.encoders.titles import distinct, encode_titles

RANKS = torch.tensor([1, 4, 20, 300])


def test_criteria_and_standard_errors_are_those_of_the_definitions():
    found = epoch_metrics(RANKS, "log_rank")
    logs = np.log([1, 4, 20, 300])
    assert found["log_rank"] == pytest.approx(logs.mean())
    assert found["log_rank_se"] == pytest.approx(logs.std(ddof=1) / 2)
    reciprocal = np.array([1, 1 / 4, 1 / 20, 1 / 300])
    assert found["mrr"] == pytest.approx(reciprocal.mean())
    assert found["mrr_se"] == pytest.approx(reciprocal.std(ddof=1) / 2)
    assert found["recall_at_10"] == 0.5


@pytest.mark.parametrize("criterion", ["log_rank", "mrr", "recall_at_10"])
def test_the_score_grows_when_bought_items_rise(criterion):
    better = torch.tensor([1, 2, 9, 100])
    assert epoch_metrics(better, criterion)["score"] > epoch_metrics(RANKS, criterion)["score"]


def test_one_pair_has_no_standard_error_and_no_gain():
    assert not any(name.endswith("_se") for name in epoch_metrics(RANKS[:1], "mrr"))
    found = compare(RANKS[3:], RANKS[:1], "log_rank", False)
    assert (found.standard_error, found.gained) == (None, False)


def test_a_gain_is_the_mean_of_paired_differences_and_counts_beyond_two_standard_errors():
    generator = torch.Generator().manual_seed(0)
    plain = torch.randint(1, 1000, (400,), generator=generator)
    better = (plain / 1.3).ceil().long()
    found = compare(plain, better, "log_rank", True)
    differences = np.log(plain.numpy()) - np.log(better.numpy())
    assert found.gain == pytest.approx(differences.mean())
    assert found.standard_error == pytest.approx(differences.std(ddof=1) / 20)
    assert found.encoder - found.plain == pytest.approx(found.gain)
    assert found.gained and found.towers_trained and found.pairs == 400
    assert not compare(plain, plain.flip(0), "log_rank", False).gained  # of the same ranks in another order
    assert not compare(better, plain, "log_rank", False).gained


def test_recall_of_few_hits_is_noise_where_the_rank_is_not():
    plain = torch.arange(100, 1100)
    better = (plain / 1.05).long()
    better[:3] = 5
    assert not compare(plain, better, "recall_at_10", False).gained
    assert compare(plain, better, "log_rank", False).gained
    assert float(scores(better, "recall_at_10").sum()) == 3


def test_what_is_written_beside_an_encoder_is_read_again(tmp_path):
    assert read_selection(tmp_path) is None
    made = compare(RANKS, RANKS + 1, "mrr", False)
    (tmp_path / FILE).write_text(json.dumps(made.facts()))
    assert read_selection(tmp_path) == made
    assert json.loads((tmp_path / FILE).read_text())["gained"] is False
    (tmp_path / FILE).write_text('{"gained": true}')
    with pytest.raises(DataError, match="run mim csft again"):
        read_selection(tmp_path)


def test_the_line_about_it_says_both_values_and_the_error():
    found = Selection(criterion="mrr", pairs=7, plain=0.1, encoder=0.2, gain=0.1, standard_error=0.03,
                      towers_trained=False)  # fmt: skip
    assert str(found) == "mrr 0.2000, of plain towers 0.1000: gain +0.1000, standard error 0.0300, 7 pairs"


def test_titles_are_encoded_once_each_and_get_what_they_get_alone(monkeypatch):
    torch.manual_seed(0)
    titles = ["a red lamp with a shade", "vase", "", "vase", "red lamp", "vase"]
    tower = TextEncoder(TextEncoderConfig(name="bert-tiny", weights="random"),
                        tokenizer=train_tokenizer(titles, 64)).eval()  # fmt: skip
    read: list[list[str]] = []
    tokenize = tower.tokenize
    monkeypatch.setattr(tower, "tokenize", lambda some: read.append(list(some)) or tokenize(some))
    with torch.inference_mode():
        found = encode_titles(tower, titles, 2, torch.device("cpu"))
        assert read == [["", "vase"], ["red lamp", "a red lamp with a shade"]]
        for row, title in zip(found, titles, strict=True):
            torch.testing.assert_close(row, tower(tokenize([title]))[0], rtol=1e-4, atol=1e-5)
    order, places = distinct(titles)
    assert [order[place] for place in places] == titles
    assert math.isclose(float((found[1] - found[3]).abs().max()), 0.0)
