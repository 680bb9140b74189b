"""Checkpoints of two ranks: one model on both, divided or not, and no half of one when a disk is full."""

import json
import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mim_torchrec.embeddings.collective import on_all_ranks
from mim_torchrec.training.checkpoints import Checkpoints
from mim_torchrec.training.config import CheckpointConfig
from mim_torchrec.training.distributed import DistributedContext, distributed
from mim_torchrec.training.parallel import Parallel, clip_gradient, gradient_norm, parallelize
from mim_torchrec.training.shared_directory import shared_atomic_directory
from mim_torchrec.training.state import TrainingState
from tests.ranks import RankError, run_ranks


class Tower(nn.Module):
    """Batch normalization, and a layer that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.unused = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower, self.head = Tower(), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.tower(x)).square().mean()


class Run:
    """A few steps on batches that differ from rank to rank."""

    def __init__(self, context: DistributedContext, kind: Parallel, out: Path) -> None:
        torch.manual_seed(0)
        self.module, self.context = Model(), context
        options = {} if kind == "fsdp" else {"find_unused_parameters": True}
        self.model = parallelize(self.module, kind, [self.module.tower], context, **options)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.state = TrainingState(self.model, self.optimizer, schedule)
        self.checkpoints = Checkpoints(out, CheckpointConfig(), {}, context)
        self.norm = 0.0

    def train(self, *steps: int) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(10 * step + self.context.rank)
            self.optimizer.zero_grad()
            self.model(torch.randn(6, 4, generator=generator)).backward()
            self.norm = float(gradient_norm(self.model))
            self.optimizer.step()

    def values(self) -> dict[str, torch.Tensor]:
        state = self.module.state_dict()
        return {name: v.full_tensor() if hasattr(v, "full_tensor") else v for name, v in state.items()}


def broken_off_and_not(kind: Parallel, out: Path):
    with distributed(0) as context:
        whole = Run(context, kind, out)
        whole.train(0, 1)
        whole.checkpoints.save(whole.state, 0, 2, {})
        whole.checkpoints.wait()
        saved = {name: value.clone() for name, value in whole.module.named_buffers()}
        whole.train(2, 3)
        again = Run(context, kind, out)
        assert again.checkpoints.restore(again.state) == (0, 2, {})
        restored = {name: value.clone() for name, value in again.module.named_buffers()}
        again.train(2, 3)
        return whole.values(), again.values(), saved, restored


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_running_statistics_and_layers_without_a_gradient_come_back_as_they_were(tmp_path, kind):
    results = run_ranks(broken_off_and_not, 2, kind, tmp_path)
    for whole, again, saved, restored in results:
        for name in whole:
            assert torch.equal(whole[name], again[name]), name
        for name in saved:
            assert torch.equal(saved[name], restored[name]), name
            assert torch.equal(saved[name], results[0][2][name]), name  # one model is evaluated on all ranks


def norm_of(kind: Parallel, out: Path) -> tuple[float, float]:
    """The length of a gradient, and what clipping has made of it."""
    with distributed(0) as context:
        run = Run(context, kind, out)
        run.train(0)
        clip_gradient(run.model, gradient_norm(run.model), run.norm / 3)
        return run.norm, float(gradient_norm(run.model))


def test_the_norm_of_a_divided_gradient_is_that_of_the_whole(tmp_path):
    whole, divided = (run_ranks(norm_of, 2, kind, tmp_path) for kind in ("ddp", "fsdp"))
    assert whole[0] == whole[1] and whole[0][0] > 0
    for (norm, clipped), (other, _) in zip(divided, whole, strict=True):
        assert norm == pytest.approx(other, rel=1e-5) and clipped == pytest.approx(norm / 3, rel=1e-5)
    assert whole[0][1] == pytest.approx(whole[0][0] / 3, rel=1e-5)


def save_on_a_full_disk(out: Path) -> str:
    """Files of rank 1 may not grow beyond some bytes, as if its disk were full."""
    with distributed(0) as context:
        run = Run(context, "ddp", out)
        run.train(0)
        run.checkpoints.save(run.state, 0, 1, {})
        run.checkpoints.wait()
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if context.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
        try:
            run.checkpoints.save(run.state, 0, 2, {})
            run.checkpoints.wait()
        except OSError as error:
            return str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        return "saved"


def test_a_full_disk_of_one_rank_is_an_error_of_all_and_leaves_what_was_there(tmp_path):
    problems = run_ranks(save_on_a_full_disk, 2, tmp_path)
    assert all("rank 1: " in problem for problem in problems), problems
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-0000-step-00000001"]
    assert json.loads((tmp_path / "epoch-0000-step-00000001" / "run.json").read_text())["step"] == 1


def write_a_directory(path: Path, fails: bool) -> None:
    with distributed(0) as context, shared_atomic_directory(path, context) as folder:

        def write() -> None:
            (folder / f"{dist.get_rank()}").write_text("")
            if fails and context.rank == 1:
                raise OSError(28, "No space left on device")

        on_all_ranks(write)


def test_a_directory_of_ranks_has_the_files_of_all_or_stays_as_it_was(tmp_path):
    target = tmp_path / "best"
    run_ranks(write_a_directory, 2, target, False)
    assert sorted(path.name for path in target.iterdir()) == ["0", "1"]
    with pytest.raises(RankError, match="rank 1: .*No space left"):
        run_ranks(write_a_directory, 2, target, True)
    assert sorted(path.name for path in target.iterdir()) == ["0", "1"]
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
