"""What several pipelines start from."""

from pathlib import Path

import pytest

from mim_torchrec.ctr.evaluation import main as evaluate
from tests.pipeline.test_ctr_main import write_dataset
from tests.pipeline.test_evaluate_main import write_table
from tests.serving import trained_bundle


@pytest.fixture(scope="session")
def serving_folder(tmp_path_factory) -> Path:
    """A data set, a table and two trained models with their bundles; tests write elsewhere."""
    root = tmp_path_factory.mktemp("serving")
    write_dataset(root / "data")
    write_table(root / "table", "styles")
    run = trained_bundle(root, "run", "--ubm", "sim", "--top-k", "2")
    trained_bundle(root, "second", "--seed", "1")
    evaluate(["--model", str(run), "--out", str(run / "evaluation"), "--draws", "0"])
    return root
