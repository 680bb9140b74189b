"""Features of frozen towers are computed once: C-SFT keeps them, the search and the export find them."""

from pathlib import Path

import pytest
import torch

from mim_torchrec.csft.main import main as fine_tune
from mim_torchrec.csft.retrieve import main as retrieve
from mim_torchrec.embeddings.table.format import Table
from mim_torchrec.encoders.vision import VisionEncoder
from mim_torchrec.representation.export import main as export
from tests.programs import TINY_TOWERS, small_shop, words

FLAGS = TINY_TOWERS | {"batch-size": "64", "epochs": "1", "init": "pca"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with the shop, its C-SFT run and the features it kept."""
    root = tmp_path_factory.mktemp("cache")
    cache = str(root / "features")
    fine_tune(words(small_shop(root), root / "csft", FLAGS, feature_cache=cache))
    return root


@pytest.fixture
def no_tower(monkeypatch) -> None:
    """From here on a tower that is run fails the test; finding its sizes when it is built is no run."""

    def refuse(self: VisionEncoder, images: torch.Tensor) -> torch.Tensor:
        assert len(images) == 1 and not images.any(), "a tower was run"
        return self.model((images.float() / 255 - self.mean) / self.std)

    monkeypatch.setattr(VisionEncoder, "forward", refuse)


def vectors(table: Path) -> torch.Tensor:
    opened = Table.open(table)
    return opened.read_float(torch.as_tensor(opened.row_index().ids))


def run_export(root: Path, out: Path, *more: str) -> Path:
    export(["--data", str(root / "shop"), "--encoder", str(root / "csft" / "encoder"), "--out", str(out),
            "--dtype", "float32", *more])  # fmt: skip
    return out


def test_the_search_and_the_export_run_no_tower(trained, tmp_path, no_tower):
    retrieve(["--data", str(trained / "shop"), "--encoder", str(trained / "csft" / "encoder"), "--out",
              str(tmp_path / "found"), "--feature-cache", str(trained / "features")])  # fmt: skip
    run_export(trained, tmp_path / "table", "--feature-cache", str(trained / "features"))


def test_the_table_is_that_of_an_export_that_encodes(trained, tmp_path):
    kept = run_export(trained, tmp_path / "kept", "--feature-cache", str(trained / "features"))
    assert torch.allclose(vectors(kept), vectors(run_export(trained, tmp_path / "encoded")), atol=1e-5)


def test_features_of_other_items_are_not_taken(trained, tmp_path, no_tower):
    small_shop(tmp_path, seed=1)
    with pytest.raises(AssertionError, match="a tower was run"):
        export(["--data", str(tmp_path / "shop"), "--encoder", str(trained / "csft" / "encoder"), "--out",
                str(tmp_path / "table"), "--feature-cache", str(trained / "features")])  # fmt: skip
