"""Image search with an encoder, at the end of `mim csft` and by `mim retrieve`."""

import json
from pathlib import Path

import pytest
from PIL import Image

from mim_torchrec.csft.main import main as fine_tune
from mim_torchrec.csft.retrieve import main
from mim_torchrec.encoders.checkpoint import CheckpointError, load_encoder, save_towers
from tests.programs import TINY_TOWERS, small_shop, words


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    return small_shop(tmp_path_factory.mktemp("retrieve"), items=200, searches=400)


@pytest.fixture(scope="module")
def trained(shop, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "csft"
    flags = TINY_TOWERS | {"batch-size": "64", "epochs": "3", "lr": "0.003", "freeze-towers": "False"}
    fine_tune(words(shop, out, flags, validation_fraction="0.1"))
    return out


def run(shop: Path, encoder: str, out: Path, *more: str) -> dict:
    main(["--data", str(shop), "--encoder", encoder, "--out", str(out), *more])
    return json.loads((out / "retrieval.json").read_text())


def test_csft_searches_with_the_encoder_it_kept(shop, trained, tmp_path):
    metrics = json.loads((trained / "metrics.json").read_text())
    found = run(shop, str(trained / "encoder"), tmp_path, "--held-out-fraction", "0.1")
    assert metrics["retrieval"]["recall_at_10"] == metrics["recall_at_10"]
    assert metrics["trained_until"] < found["held_out_from"]
    for name in ("n", "recall_at_10", "recall_at_100", "items"):
        assert found[name] == metrics["retrieval"][name]
    assert found["mean_rank"] == pytest.approx(metrics["retrieval"]["mean_rank"], rel=0.01)


def test_the_search_of_a_training_run_is_not_replaced(shop, trained):
    before = (trained / "retrieval.json").read_bytes()
    with pytest.raises(ValueError, match="is the directory of a training run"):
        run(shop, str(trained / "encoder"), trained, "--held-out-fraction", "0.2")
    assert (trained / "retrieval.json").read_bytes() == before


def test_queries_are_told_apart_by_age_and_category(trained):
    found = json.loads((trained / "retrieval.json").read_text())
    assert found["n"] == 40
    for part in ("by_age", "by_category"):
        assert sum(group["n"] for group in found[part].values()) == 40
        mean = sum(group["n"] * group["mean_rank"] for group in found[part].values()) / 40
        assert mean == pytest.approx(found["mean_rank"])
    assert set(found["by_age"]) <= {f"S{k}" for k in range(1, 11)}


def test_the_image_has_a_line_a_query(shop, trained, tmp_path):
    run(shop, str(trained / "encoder"), tmp_path, "--drawn-queries", "3")
    with Image.open(tmp_path / "retrieval.png") as three, Image.open(trained / "retrieval.png") as eight:
        assert three.size[0] == eight.size[0]
        assert 8 * three.size[1] == 3 * eight.size[1]


def test_towers_alone_compare_images(shop, trained, tmp_path):
    encoder = load_encoder(trained / "encoder")
    save_towers(encoder.vision, encoder.text, tmp_path / "towers")
    found = run(shop, f"plain:{tmp_path / 'towers'}", tmp_path / "out")
    assert found["n"] == 20


def test_csft_compares_itself_with_what_the_plain_towers_find(shop, tmp_path):
    flags = TINY_TOWERS | {"batch-size": "64", "epochs": "1", "freeze-towers": "True", "select": "mrr"}
    fine_tune(words(shop, tmp_path / "csft", flags, validation_fraction="0.1"))
    selection = json.loads((tmp_path / "csft" / "metrics.json").read_text())["selection"]
    assert selection["towers_trained"] is False
    encoder = load_encoder(tmp_path / "csft" / "encoder")
    save_towers(encoder.vision, encoder.text, tmp_path / "towers")
    plain = f"plain:{tmp_path / 'towers'}"
    found = run(shop, plain, tmp_path / "out", "--held-out-fraction", "0.1")
    assert selection["plain"] == pytest.approx(found["mrr"], rel=1e-5)


def test_what_is_no_encoder_is_refused(shop, tmp_path):
    with pytest.raises(CheckpointError, match="is not an encoder checkpoint"):
        run(shop, str(tmp_path), tmp_path / "out")


@pytest.mark.parametrize("share", ["0", "1.5", "0.0001"])
def test_no_queries_are_refused(shop, trained, tmp_path, share):
    with pytest.raises(ValueError, match="--held-out-fraction"):
        run(shop, str(trained / "encoder"), tmp_path, "--held-out-fraction", share)
