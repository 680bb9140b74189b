"""`mim csft` on a small shop: what it writes, what it learns, what it refuses."""

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mim_torchrec.csft.main import main
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.shop import main as make_shop
from mim_torchrec.encoders.checkpoint import encoder_version, load_encoder
from mim_torchrec.training.history import read_history

SMALL = {
    "vision.name": "test_convnext", "vision.weights": "random", "vision.image-size": "32",
    "text.name": "bert-tiny", "text.weights": "random", "head.dim": "16", "head.fusion-dim": "8",
    "freeze-towers": "False", "epochs": "1", "batch-size": "64",
}  # fmt: skip


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    data = tmp_path_factory.mktemp("csft") / "shop"
    make_shop(["--out", str(data), "--items", "300", "--users", "50", "--requests", "100",
               "--searches", "700", "--browsing", "300", "--categories", "3",
               "--image-size", "32"])  # fmt: skip
    return data


def run(data: Path, out: Path, **changes: str) -> Path:
    flags = SMALL | {name.replace("_", "-").replace("--", "."): value for name, value in changes.items()}
    main(["--data", str(data), "--out", str(out), *(w for k, v in flags.items() for w in (f"--{k}", v))])
    return out


@pytest.fixture(scope="module")
def finished(shop, tmp_path_factory) -> Path:
    return run(shop, tmp_path_factory.mktemp("run") / "csft", epochs="6", lr="0.003")


def test_it_finds_what_was_bought_more_often_than_chance(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["chance"] == pytest.approx(10 / 300)
    assert metrics["recall_at_10"] > 3 * metrics["chance"]


def test_the_encoder_directory_is_all_it_takes(finished, tmp_path):
    alone = tmp_path / "elsewhere"
    shutil.copytree(finished / "encoder", alone)
    encoder = load_encoder(alone)
    tokens = encoder.text.tokenize(["a title", "another"])
    vectors = encoder.encode_items(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), tokens)
    assert vectors.mm.shape == (2, 16)
    assert encoder_version(alone) == json.loads((finished / "metrics.json").read_text())["encoder_version"]


def test_it_writes_history_config_and_tensorboard(finished):
    history = asdict(read_history(finished / "history.jsonl"))
    assert len(history["epochs"]) == 6
    assert {"loss", "accuracy", "negatives", "scale"} <= history["steps"][0].keys()
    assert json.loads((finished / "config.json").read_text())["vision"]["name"] == "test_convnext"
    assert list((finished / "tensorboard").iterdir())


def test_the_kept_epoch_has_the_lowest_logarithm_of_ranks(finished):
    history = asdict(read_history(finished / "history.jsonl"))
    logs = [epoch["log_rank"] for epoch in history["epochs"]]
    assert history["best_epoch"] == logs.index(min(logs))
    assert all(0 < epoch["log_rank_se"] < epoch["log_rank"] for epoch in history["epochs"])


def test_the_encoder_is_compared_with_the_towers_before_training(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    selection = metrics["selection"]
    assert json.loads((finished / "encoder" / "selection.json").read_text()) == selection
    assert (selection["criterion"], selection["pairs"]) == ("log_rank", metrics["held_out_pairs"])
    assert selection["encoder"] == pytest.approx(-metrics["log_rank"], abs=0.05)
    assert selection["towers_trained"] is True and -math.log(300) < selection["plain"] < 0
    noise = 2 * selection["standard_error"]
    assert selection["gained"] == (selection["gain"] > noise)
    assert ("no_gain_over_plain_towers" in metrics["warnings"]) != selection["gained"]


def test_features_of_frozen_towers_are_computed_once_for_many_runs_which_train_the_head_only(
    shop, tmp_path, monkeypatch
):
    cache = str(tmp_path / "features")
    run(shop, tmp_path / "one", freeze_towers="True", feature_cache=cache)

    def refuse(*_):
        raise AssertionError("a image was decoded again")

    monkeypatch.setattr("mim_torchrec.csft.inputs.SearchContent.decode", refuse)
    run(shop, tmp_path / "two", freeze_towers="True", feature_cache=cache, lr="0.01")
    versions = [encoder_version(tmp_path / name / "encoder") for name in ("one", "two")]
    assert versions[0] != versions[1]
    one, two = (load_encoder(tmp_path / name / "encoder").state_dict() for name in ("one", "two"))
    changed = {name.split(".")[0] for name in one if not torch.equal(one[name], two[name])}
    assert changed == {"head"}


def test_images_that_do_not_fit_in_memory_are_decoded_as_needed(shop, tmp_path):
    losses = [
        asdict(read_history(run(shop, tmp_path / gib, image_memory_gib=gib) / "history.jsonl"))
        for gib in ("0", "1")
    ]
    assert [step["loss"] for step in losses[0]["steps"]] == [step["loss"] for step in losses[1]["steps"]]


def changed_pairs(shop: Path, to: Path, change) -> Path:
    shutil.copytree(shop, to)
    file = next((to / "pairs").glob("*.parquet"))
    pq.write_table(change(pq.read_table(file)), file)
    return to


def test_pairs_without_time_cannot_be_held_out(shop, tmp_path):
    data = changed_pairs(shop, tmp_path / "shop", lambda table: table.drop_columns("ts"))
    with pytest.raises(DataError, match=r"part-.*, row 0, column ts: .*--validation-fraction 0"):
        run(data, tmp_path / "out")
    run(data, tmp_path / "out", validation_fraction="0")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["best_epoch"] == 0


def test_a_truncated_query_image_is_named(shop, tmp_path):
    first = [0]

    def cut(table: pa.Table) -> pa.Table:
        images, ids = table["query_image"].to_pylist(), table["query_id"].to_pylist()
        first[0] = ids.index(ids[5])
        images = [image[:40] if own == ids[5] else image for image, own in zip(images, ids, strict=True)]
        place = table.schema.get_field_index("query_image")
        return table.set_column(place, "query_image", pa.array(images, pa.binary()))

    data = changed_pairs(shop, tmp_path / "shop", cut)
    with pytest.raises(DataError, match=rf"row group 0, row {first[0]}, column query_image"):
        run(data, tmp_path / "out", interest_signal="all")
    assert not (tmp_path / "out" / "encoder").exists()


def test_gamma_with_queries_that_are_no_items_is_refused(shop, tmp_path):
    with pytest.raises(ValueError, match="--gamma"):
        run(shop, tmp_path / "out", gamma="0.5")


def test_a_batch_larger_than_the_data_is_refused(shop, tmp_path):
    with pytest.raises(ValueError, match="--batch-size"):
        run(shop, tmp_path / "out", batch_size="100000")


def test_an_unknown_flag_is_refused(shop, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(shop, tmp_path / "out", betta="1")
    assert "--betta" in capsys.readouterr().err


@pytest.fixture(scope="module")
def smallest(tmp_path_factory) -> Path:
    data = tmp_path_factory.mktemp("csft") / "smallest"
    make_shop(["--out", str(data), "--items", "120", "--users", "20", "--requests", "20", "--searches", "40",
               "--browsing", "60", "--categories", "3", "--image-size", "32"])  # fmt: skip
    return data


@pytest.mark.parametrize("frozen", ["True", "False"])
def test_changed_queries_train_another_encoder_and_leave_the_plain_towers_alone(smallest, tmp_path, frozen):
    flags = {"freeze-towers": frozen, "batch-size": "16", "validation-fraction": "0.2"}
    changes = {"augment-queries": "0.5", "augment-views": "2"}
    plain, changed = (
        json.loads((run(smallest, tmp_path / name, **flags, **more) / "metrics.json").read_text())
        for name, more in (("plain", {}), ("changed", changes))
    )
    assert changed["encoder_version"] != plain["encoder_version"]
    assert changed["selection"]["plain"] == plain["selection"]["plain"]
