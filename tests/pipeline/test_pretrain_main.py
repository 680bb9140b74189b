"""`mim pretrain` on a small shop: what it writes, what it learns, who takes it, what it refuses."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mim_torchrec.csft.main import main as csft
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.shop import main as make_shop
from mim_torchrec.embeddings.table.format import Table
from mim_torchrec.encoders.checkpoint import CheckpointError, load_encoder, load_towers
from mim_torchrec.pretraining.main import main
from mim_torchrec.representation.export import main as export
from mim_torchrec.training.history import read_history

PHASES = ("dda-vision", "dda-text", "dma")
TOWERS = {
    "vision.name": "test_convnext", "vision.weights": "random", "vision.image-size": "32",
    "text.name": "bert-tiny", "text.weights": "random",
}  # fmt: skip
SMALL = {"dda-vision.mask-size": "8", "validation-fraction": "0.2"} | {
    f"{phase}.{name}": value
    for phase in PHASES
    for name, value in (("epochs", "3"), ("batch-size", "32"), ("lr", "0.001"))
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    data = tmp_path_factory.mktemp("pretrain") / "shop"
    make_shop(["--out", str(data), "--items", "300", "--users", "50", "--requests", "100",
               "--searches", "200", "--browsing", "300", "--categories", "3",
               "--image-size", "32"])  # fmt: skip
    return data


def run(data: Path, out: Path, *phases: str, towers: Path | None = None, **changes: str) -> Path:
    """The stage's `main`; `phase__flag=value` is `--phase.flag value`, no phases are all."""
    flags = {"data": str(data), "out": str(out), **SMALL}
    flags |= TOWERS if towers is None else {"towers": str(towers)}
    flags |= {name.replace("_", "-").replace("--", "."): value for name, value in changes.items()}
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    main([*words, "--phases", *phases] if phases else words)
    return out


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def changed(before: Path, after: Path) -> set[str]:
    """Which of the towers two directories differ in."""
    one, two = load_towers(before), load_towers(after)
    return {
        name
        for name, ours, theirs in zip(one._fields, one, two, strict=True)
        if any(not torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    }


@pytest.fixture(scope="module")
def finished(shop, tmp_path_factory) -> Path:
    return run(shop, tmp_path_factory.mktemp("run") / "pretrain")


@pytest.mark.parametrize("phase", PHASES)
def test_every_phase_improves_on_its_first_epoch_and_on_none(finished, phase):
    figures = metrics_of(finished / phase)
    losses = [figures[when]["validation_loss"] for when in ("before", "first", "best")]
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize(
    "phase, better", [("dda-vision", "explained"), ("dda-text", "accuracy"), ("dma", "recall_at_1")]
)
def test_every_phase_has_a_figure_that_rises(finished, phase, better):
    figures = metrics_of(finished / phase)
    assert figures["best"][f"validation_{better}"] > figures["before"][f"validation_{better}"]


def test_each_phase_goes_on_from_the_one_before_and_trains_its_towers_only(finished):
    towers = [finished / phase / "towers" for phase in PHASES]
    assert changed(towers[0], towers[1]) == {"text"}
    assert changed(towers[1], towers[2]) == {"vision", "text"}
    assert changed(towers[2], finished / "towers") == set()


def test_it_writes_config_histories_and_metrics_of_every_phase(finished):
    assert json.loads((finished / "config.json").read_text())["phases"] == list(PHASES)
    assert list(metrics_of(finished)["phases"]) == list(PHASES)
    for phase in PHASES:
        assert len(asdict(read_history(finished / phase / "history.jsonl"))["epochs"]) == 3
        assert list((finished / phase / "tensorboard").iterdir())
        assert metrics_of(finished / phase) == metrics_of(finished)["phases"][phase]


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_runs_alone(shop, tmp_path, phase):
    out = run(shop, tmp_path / "out", phase, **{f"{phase.replace('-', '_')}__epochs": "1"})
    assert list(metrics_of(out)["phases"]) == [phase]
    assert not any((out / other).exists() for other in PHASES if other != phase)
    assert load_towers(out / "towers").vision.image_size == 32


def test_the_same_seed_gives_the_same_towers_and_another_others(shop, tmp_path):
    runs = [("one", "0"), ("again", "0"), ("other", "1")]
    once = {"dda_vision__epochs": "1", "dda_text__epochs": "1"}
    versions = [
        metrics_of(run(shop, tmp_path / name, "dda-vision", "dda-text", seed=seed, **once))["towers_version"]
        for name, seed in runs
    ]
    assert versions[0] == versions[1] != versions[2]


def test_a_later_run_goes_on_from_towers(shop, finished, tmp_path):
    out = run(shop, tmp_path / "out", "dda-text", towers=finished / "towers", dda_text__epochs="1")
    before, after = metrics_of(finished)["phases"]["dda-text"], metrics_of(out)["phases"]["dda-text"]
    assert changed(finished / "towers", out / "towers") <= {"text"}
    assert after["best"]["validation_loss"] < before["first"]["validation_loss"]


def test_images_that_do_not_fit_in_memory_are_decoded_as_needed(shop, tmp_path):
    versions = {
        metrics_of(run(shop, tmp_path / gib, "dda-vision", image_memory_gib=gib, dda_vision__epochs="1"))[
            "towers_version"
        ]
        for gib in ("0", "1")
    }
    assert len(versions) == 1


def test_without_held_out_items_the_last_epoch_is_kept(shop, tmp_path):
    out = run(shop, tmp_path / "out", "dda-text", validation_fraction="0", dda_text__epochs="2")
    figures = metrics_of(out / "dda-text")
    assert figures["before"] == {} and figures["best_epoch"] == 1


def test_csft_starts_from_towers_that_were_moved(shop, finished, tmp_path):
    moved = shutil.copytree(finished / "towers", tmp_path / "moved")
    flags = {"data": shop, "out": tmp_path / "csft", "towers": moved, "epochs": 1, "batch-size": 64,
             "head.dim": 16, "head.fusion-dim": 8}  # fmt: skip
    csft([str(word) for name, value in flags.items() for word in (f"--{name}", value)])
    shutil.rmtree(moved)
    encoder, towers = load_encoder(tmp_path / "csft" / "encoder"), load_towers(finished / "towers")
    for ours, theirs in ((encoder.vision, towers.vision), (encoder.text, towers.text)):
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name


def test_csft_refuses_names_beside_towers(shop, finished, tmp_path):
    words = ["--data", str(shop), "--out", str(tmp_path / "csft"), "--towers", str(finished / "towers")]
    with pytest.raises(ValueError, match="--text.name is settled by --towers"):
        csft([*words, "--text.name", "bert-tiny"])


def test_the_export_takes_towers(shop, finished, tmp_path):
    spec = f"plain:{finished / 'towers'}"
    words = ["--data", str(shop), "--encoder", spec, "--dim", "16", "--out"]
    export([*words, str(tmp_path / "table")])
    manifest = Table.open(tmp_path / "table").manifest
    assert manifest.encoder["kind"] == "plain" and manifest.encoder["vision"]["name"] == "test_convnext"
    with pytest.raises(ValueError, match="--image-size"):
        export([*words, str(tmp_path / "other"), "--image-size", "64"])


def test_other_towers_give_another_table(shop, finished, tmp_path):
    versions = set()
    for phase in ("dda-text", "dma"):
        spec = f"plain:{finished / phase / 'towers'}"
        out = tmp_path / phase
        export(["--data", str(shop), "--encoder", spec, "--dim", "16", "--out", str(out)])
        versions.add(Table.open(out).manifest.table_version)
    assert len(versions) == 2


def test_a_directory_without_towers_is_refused_by_the_export(shop, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match="is not a checkpoint of towers"):
        export(["--data", str(shop), "--encoder", f"plain:{empty}", "--out", str(tmp_path / "table")])


def test_an_unknown_phase_is_refused(shop, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(shop, tmp_path / "out", "dda-sound")
    assert "dda-sound" in capsys.readouterr().err


def test_a_phase_named_twice_is_refused(shop, tmp_path):
    with pytest.raises(ValueError, match="each once"):
        run(shop, tmp_path / "out", "dma", "dma")


@pytest.mark.parametrize("phase", PHASES)
def test_a_batch_larger_than_the_items_is_refused(shop, tmp_path, phase):
    with pytest.raises(ValueError, match=f"--{phase}.batch-size 100000"):
        run(shop, tmp_path / "out", phase, **{f"{phase.replace('-', '_')}__batch_size": "100000"})


def changed_items(shop: Path, to: Path, column: str, values) -> Path:
    shutil.copytree(shop, to)
    for file in (to / "items").glob("*.parquet"):
        table = pq.read_table(file)
        place = table.schema.get_field_index(column)
        kind = table.schema.field(place).type
        table = table.set_column(place, column, pa.array(values(table[column].to_pylist()), kind))
        pq.write_table(table, file)
    return to


def test_titles_without_any_word_are_refused(shop, tmp_path):
    data = changed_items(shop, tmp_path / "shop", "title", lambda titles: [""] * len(titles))
    with pytest.raises(ValueError, match="nothing to predict"):
        run(data, tmp_path / "out", "dda-text")


def test_some_titles_without_words_do_no_harm(shop, tmp_path):
    some = lambda titles: [title if k % 3 else "" for k, title in enumerate(titles)]  # noqa: E731
    data = changed_items(shop, tmp_path / "shop", "title", some)
    for phase in metrics_of(run(data, tmp_path / "out", "dda-text", "dma"))["phases"].values():
        assert phase["best"]["validation_loss"] < phase["before"]["validation_loss"]


def test_a_truncated_image_is_named(shop, tmp_path):
    cut = lambda images: [images[0][:40], *images[1:]]  # noqa: E731
    data = changed_items(shop, tmp_path / "shop", "image", cut)
    with pytest.raises(DataError, match=r"row group 0, row 0, column image"):
        run(data, tmp_path / "out", "dma")
    assert not (tmp_path / "out" / "towers").exists()
