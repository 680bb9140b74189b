"""The train pipeline changes no number: not on one rank, not on two, not in a resumed run."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from mim_torchrec.ctr.main import main
from mim_torchrec.ctr.pipeline import SparseExchange
from mim_torchrec.training.history import read_history
from tests.pipeline.test_ctr_main import SMALL, write_dataset
from tests.pipeline.test_evaluate_main import write_table
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pipeline")
    write_dataset(root / "data")
    write_table(root / "table", "styles")
    return root


def train(root: Path, out: str, *words: str) -> None:
    paths = ["--data", str(root / "data"), "--out", str(root / out), "--ubm", "dien"]
    table = [] if "--mim" in words else ["--table", str(root / "table")]
    main([*paths, *table, *SMALL, "--checkpoint.every", "5", "--checkpoint.keep", "9", *words])


def found(run: Path) -> dict:
    losses = [step["loss"] for step in asdict(read_history(run / "history.jsonl"))["steps"]]
    return {"losses": losses, "auc": json.loads((run / "metrics.json").read_text())["auc"]}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("mim", [(), ("--mim", "off", "--preset", "recommended")])
def test_losses_and_auc_are_those_of_the_plain_loop(folder, world_size, mim):
    runs = {pipeline: f"{pipeline}-{world_size}-{len(mim)}" for pipeline in ("off", "on")}
    for pipeline, out in runs.items():
        run_ranks(train, world_size, folder, out, "--pipeline", pipeline, *mim)
    plain, piped = (found(folder / out) for out in runs.values())
    assert len(plain["losses"]) > 10
    assert piped == plain


@pytest.mark.parametrize("more", [(), ("--preset", "recommended")])
def test_the_ids_of_all_tables_are_exchanged_ahead(folder, monkeypatch, more):
    ahead = []
    start = SparseExchange.start_sparse_data_dist

    def counted(self, batch, context) -> None:
        ahead.append(sorted(module.forward.name for module in self._pipelined_modules))
        start(self, batch, context)

    monkeypatch.setattr(SparseExchange, "start_sparse_data_dist", counted)
    out = f"counted-{len(more)}"
    train(folder, out, "--pipeline", "on", *more)
    steps = len(found(folder / out)["losses"])
    assert ahead == [["item_embeddings", "mm_embeddings", "request_embeddings"]] * steps


def test_a_run_of_the_plain_loop_goes_on_in_the_pipeline(folder):
    train(folder, "whole", "--pipeline", "off")
    whole = found(folder / "whole")
    checkpoints = sorted((folder / "whole" / "checkpoints").iterdir())
    middle = next(path for path in checkpoints if not path.name.endswith("step-00000000"))
    for later in checkpoints[checkpoints.index(middle) + 1 :]:
        shutil.rmtree(later)
    train(folder, "whole", "--pipeline", "on")
    assert found(folder / "whole") == whole
