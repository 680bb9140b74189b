"""`--precision` of export, RIM and pre-training: bfloat16 near float32, as the table says, and refusals."""

from pathlib import Path

import pytest
import torch

from mim_torchrec.data.errors import DataError
from mim_torchrec.embeddings.table.format import Table
from mim_torchrec.embeddings.windows.transport import open_log
from mim_torchrec.errors import OptionError
from mim_torchrec.pretraining.main import main as pretrain
from mim_torchrec.representation.export import main as export
from mim_torchrec.rim.config import RIMConfig
from mim_torchrec.rim.main import RIM, precision_of
from mim_torchrec.rim.main import main as rim
from tests.pipeline.test_export_main import encoder, exported  # noqa: F401  fixtures

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def low(tmp_path_factory, encoder, exported) -> Path:  # noqa: F811
    """The table, exported in bfloat16."""
    path = tmp_path_factory.mktemp("low") / "table"
    export(["--data", str(exported[0]), "--encoder", str(encoder[0]), "--out", str(path),
            "--dtype", "float32", "--precision", "bf16"])  # fmt: skip
    return path


def flags(data: Path, encoder: Path, table: Path, folder: Path) -> dict[str, Path]:  # noqa: F811
    return {"source": data / "items", "encoder": encoder, "table": table, "out": folder / "rim",
            "log": folder / "log"}  # fmt: skip


def test_a_table_in_bfloat16_is_near_that_in_float32_and_says_what_it_is(low, exported):  # noqa: F811
    full, found = Table.open(exported[1]), Table.open(low)
    assert (precision_of(full.manifest), precision_of(found.manifest)) == ("fp32", "bf16")
    ids = full.row_index().ids
    expected, vectors = full.read(ids), found.read(ids)
    assert not torch.equal(vectors, expected) and (vectors - expected).norm() < 0.03 * expected.norm()


def test_new_items_are_encoded_as_the_table_was(low, exported, encoder, tmp_path):  # noqa: F811
    given = flags(exported[0], encoder[0], low, tmp_path)
    rim([*(word for name, value in given.items() for word in (f"--{name}", str(value))), "--once"])
    (window,) = open_log(str(given["log"]), encoder[1]).after(0)
    ids, vectors = window.ids, window.vectors.float()
    own, full = Table.open(low).read(ids), Table.open(exported[1]).read(ids)
    assert (vectors - own).norm() < 0.3 * (vectors - full).norm()


def test_another_precision_than_that_of_the_table_has_to_be_asked_for(low, exported, encoder, tmp_path):  # noqa: F811
    given = flags(exported[0], encoder[0], low, tmp_path)
    words = {name: str(value) if name in ("source", "log") else value for name, value in given.items()}
    assert RIM(RIMConfig(**words), CPU).precision == "bf16"
    assert RIM(RIMConfig(**words, precision="fp32"), CPU).precision == "fp32"
    manifest = Table.open(low).manifest
    manifest.encoder["export"]["precision"] = "fp4"
    with pytest.raises(DataError, match="exported in 'fp4'"):
        precision_of(manifest)


def test_features_that_are_kept_are_of_float32_only(exported, encoder, tmp_path):  # noqa: F811
    with pytest.raises(OptionError, match="features that are kept were computed in fp32"):
        export(["--data", str(exported[0]), "--encoder", str(encoder[0]), "--out", str(tmp_path / "table"),
                "--precision", "bf16", "--feature-cache", str(tmp_path)])  # fmt: skip


def test_tf32_without_a_gpu_is_refused(low, exported, encoder, tmp_path):  # noqa: F811
    data = ["--data", str(exported[0]), "--out", str(tmp_path / "out"), "--precision", "tf32"]
    given = flags(exported[0], encoder[0], low, tmp_path) | {"precision": "tf32"}
    for main, words in (
        (export, [*data, "--encoder", str(encoder[0])]),
        (pretrain, data),
        (rim, [word for name, value in given.items() for word in (f"--{name}", str(value))]),
    ):
        with pytest.raises(OptionError, match="--precision tf32 is of GPUs"):
            main(words)
    assert not (tmp_path / "out").exists()
