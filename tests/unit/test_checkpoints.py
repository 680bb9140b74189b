"""Checkpoints: only whole ones count, the newest are kept, generators go on where they were."""

import copy
import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mim_torchrec.embeddings.files import remove_directory
from mim_torchrec.errors import OptionError
from mim_torchrec.training import checkpoints as module
from mim_torchrec.training.checkpoints import (
    CheckpointConfig,
    Checkpoints,
    ResumeError,
)
from mim_torchrec.training.distributed import distributed
from mim_torchrec.training.generators import get_generators, set_generators
from mim_torchrec.training.sharded_state import damage
from mim_torchrec.training.state import TrainingState
from tests.said import said


@pytest.fixture
def ranks():
    with distributed(0) as ranks:
        yield ranks


def make_state(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, TrainingState]:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    schedule.step()
    return model, optimizer, TrainingState(model, optimizer, schedule)


def written(store: Checkpoints, *arguments) -> None:
    store.save(*arguments)
    store.wait()


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_state_comes_back_as_it_was(tmp_path, ranks):
    model, optimizer, state = make_state(0)
    store = Checkpoints(tmp_path, CheckpointConfig(), {"lr": 1}, ranks)
    written(store, state, 2, 7, {"steps": [0.1, 1 / 3]})
    other, other_optimizer, other_state = make_state(1)
    assert store.restore(other_state) == (2, 7, {"steps": [0.1, 1 / 3]})
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    mine, theirs = (o.state_dict() for o in (optimizer, other_optimizer))
    assert mine["param_groups"] == theirs["param_groups"]
    for key, values in mine["state"].items():
        for name, value in values.items():
            assert torch.equal(value, theirs["state"][key][name])


def test_the_newest_are_kept(tmp_path, ranks):
    state = make_state(0)[2]
    store = Checkpoints(tmp_path, CheckpointConfig(keep=2), {}, ranks)
    for epoch, step in [(0, 5), (0, 10), (1, 0)]:
        written(store, state, epoch, step, {})
    assert names(tmp_path) == ["epoch-0000-step-00000010", "epoch-0001-step-00000000"]
    assert store.restore(state)[:2] == (1, 0)


def test_one_that_is_not_whole_does_not_count(tmp_path, ranks):
    state = make_state(0)[2]
    store = Checkpoints(tmp_path, CheckpointConfig(), {}, ranks)
    written(store, state, 0, 5, {})
    (tmp_path / "epoch-0000-step-00000009.partial").mkdir()
    assert store.restore(state)[:2] == (0, 5)
    assert names(tmp_path) == ["epoch-0000-step-00000005"]


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("breaks", ["torch.save", "os.rename", "os.fsync"])
def test_a_full_disk_leaves_those_before(tmp_path, ranks, monkeypatch, breaks, asynchronous):
    state = make_state(0)[2]
    store = Checkpoints(tmp_path, CheckpointConfig(asynchronous=asynchronous), {}, ranks)
    written(store, state, 0, 5, {})

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        owner, name = breaks.split(".")
        patched.setattr(getattr(module, owner), name, full)
        written(store, state, 0, 6, {})
    assert store.restore(state)[:2] == (0, 5)


def test_without_a_checkpoint_there_is_nothing_to_restore(tmp_path, ranks):
    assert Checkpoints(tmp_path / "none", CheckpointConfig(), {}, ranks).restore(make_state(0)[2]) is None


def test_resume_never_removes_what_is_there(tmp_path, ranks):
    state = make_state(0)[2]
    written(Checkpoints(tmp_path, CheckpointConfig(), {}, ranks), state, 0, 5, {})
    assert Checkpoints(tmp_path, CheckpointConfig(resume="never"), {}, ranks).restore(state) is None
    assert not tmp_path.exists()


def test_resume_never_is_of_the_first_start_only_and_not_of_workers_that_torchrun_starts_again(
    tmp_path, ranks, monkeypatch
):
    state = make_state(0)[2]
    store = Checkpoints(tmp_path, CheckpointConfig(resume="never"), {}, ranks)
    written(store, state, 0, 5, {})
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert store.restore(state)[:2] == (0, 5)


def test_one_that_is_being_removed_does_not_count(tmp_path, ranks, monkeypatch):
    state = make_state(0)[2]
    store = Checkpoints(tmp_path, CheckpointConfig(keep=1), {}, ranks)
    written(store, state, 0, 5, {})

    def killed(path, **_):
        if path.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("shutil.rmtree", killed)
        remove_directory(tmp_path / "epoch-0000-step-00000005")
    assert store.restore(state) is None
    assert names(tmp_path) == []


def test_any_bit_that_flips_in_any_file_is_found(tmp_path, ranks):
    state = make_state(0)[2]
    store = Checkpoints(tmp_path, CheckpointConfig(), {"lr": 1}, ranks, {"ubm": "din"})
    written(store, state, 0, 5, {})
    folder = tmp_path / "epoch-0000-step-00000005"
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    known = {"run.json", "rank-0.pt", ".metadata", "__0_0.distcp", "model.json", "sha256.json"}
    assert {file.name for file in files} == known
    rng = np.random.default_rng(0)
    assert damage(folder) is None
    for file in files:
        whole = file.read_bytes()
        for bit in rng.choice(8 * len(whole), size=min(40, 8 * len(whole)), replace=False):
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << (bit % 8)
            file.write_bytes(flipped)
            assert damage(folder) is not None, (file, bit)
        file.write_bytes(whole)
        file.unlink()
        assert damage(folder) is not None, file
        file.write_bytes(whole)
    assert damage(folder) is None


@pytest.mark.parametrize("file", ["run.json", "rank-0.pt", "state/.metadata", "state/__0_0.distcp"])
def test_the_newest_whole_one_is_taken_and_the_damaged_one_is_named_and_set_aside(
    tmp_path, ranks, caplog, file
):
    state = make_state(0)[2]
    store = Checkpoints(tmp_path, CheckpointConfig(keep=2), {}, ranks)
    written(store, state, 0, 5, {})
    written(store, state, 0, 9, {})
    damaged = tmp_path / "epoch-0000-step-00000009" / file
    damaged.write_bytes(damaged.read_bytes()[:20])
    assert store.restore(state)[:2] == (0, 5)
    assert f"step-00000009 is damaged and set aside: {file} has changed" in caplog.text
    written(store, state, 0, 6, {})
    written(store, state, 0, 7, {})
    assert store.restore(state)[:2] == (0, 7)


def test_without_a_whole_one_nothing_is_trained_again_silently(tmp_path, ranks):
    state = make_state(0)[2]
    store = Checkpoints(tmp_path, CheckpointConfig(), {}, ranks)
    written(store, state, 0, 5, {})
    (tmp_path / "epoch-0000-step-00000005" / "run.json").unlink()
    with pytest.raises(
        ResumeError, match=r"no checkpoint is whole: .*run.json is missing; choose another --out"
    ):
        store.restore(state)


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata.tmp", "rank-0.pt"])
def test_a_full_disk_is_called_so_with_path_and_bytes(tmp_path, ranks, monkeypatch, file, asynchronous):
    state = make_state(0)[2]
    store = Checkpoints(tmp_path, CheckpointConfig(asynchronous=asynchronous), {}, ranks)
    written(store, state, 0, 5, {})
    plain = Path.open

    def on_a_full_disk(path, mode="r", *arguments, **words):
        stream = plain(path, mode, *arguments, **words)
        return Full(stream) if file in path.name and "r" not in mode else stream

    class Full:
        def __init__(self, stream):
            self.stream = stream

        def write(self, data):
            raise OSError(28, "No space left on device")

        def __getattr__(self, name):
            return getattr(self.stream, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.stream.close()

    expected = r"step-00000006.*No space left on device; \d+ bytes are needed, \d+ bytes are free"
    with monkeypatch.context() as patched, pytest.raises(OSError, match=expected):
        patched.setattr(Path, "open", on_a_full_disk)
        written(store, state, 0, 6, {})
    assert names(tmp_path) == ["epoch-0000-step-00000005"]
    assert store.restore(state)[:2] == (0, 5)


def test_a_parameter_without_a_gradient_has_the_state_that_adamw_begins_with(tmp_path, ranks):
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    optimizer = torch.optim.AdamW(model.parameters())
    state = TrainingState(model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))
    model[0](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    store = Checkpoints(tmp_path, CheckpointConfig(), {}, ranks)
    written(store, state, 0, 1, {})
    store.restore(state)
    assert all(not value.any() for value in optimizer.state[model[1].weight].values())
    fresh = copy.deepcopy(model[1])
    model[1](torch.ones(1, 2)).sum().backward()
    fresh(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.optim.AdamW(fresh.parameters(), lr=optimizer.param_groups[0]["lr"]).step()
    assert torch.equal(model[1].weight, fresh.weight)


def test_another_run_is_refused_by_what_differs(tmp_path, ranks):
    state = make_state(0)[2]
    written(Checkpoints(tmp_path, CheckpointConfig(), {"lr": 1, "seed": 0}, ranks), state, 0, 5, {})
    with pytest.raises(ResumeError, match=r"with lr 1 \(now 2\); choose another --out"):
        Checkpoints(tmp_path, CheckpointConfig(), {"lr": 2, "seed": 0}, ranks).restore(state)


def test_every_nth_step_is_due():
    store = Checkpoints(None, CheckpointConfig(every=3), {}, None)
    assert [step for step in range(1, 10) if store.is_due(step)] == [3, 6, 9]
    assert not Checkpoints(None, CheckpointConfig(), {}, None).is_due(3)


class Clock:
    """Stands for the module `time`: every look at it takes some seconds."""

    def __init__(self, seconds: float) -> None:
        self.now, self.seconds = 0.0, seconds

    def monotonic(self) -> float:
        self.now += self.seconds
        return self.now


def test_one_is_due_when_the_newest_is_too_old(tmp_path, ranks, monkeypatch):
    monkeypatch.setattr(module, "time", clock := Clock(0.0))
    store = Checkpoints(tmp_path, CheckpointConfig(minutes=2), {}, ranks)
    ages = []
    for clock.now in (60.0, 119.0, 120.0, 130.0):
        ages.append(store.is_overdue())
    assert ages == [False, False, True, True]
    written(store, make_state(0)[2], 0, 1, {})
    assert not store.is_overdue()
    clock.now = 250.0
    assert store.is_overdue()
    assert not Checkpoints(tmp_path, CheckpointConfig(), {}, ranks).is_overdue()
    with pytest.raises(OptionError, match=r"--checkpoint.minutes is -1"):
        Checkpoints(tmp_path, CheckpointConfig(minutes=-1), {}, ranks)


@pytest.mark.parametrize(("grace", "warned"), [(None, False), ("120", False), ("30", True)])
def test_one_that_takes_longer_than_the_launcher_waits_is_warned_of_once(
    tmp_path, ranks, monkeypatch, caplog, grace, warned
):
    monkeypatch.setattr(module, "time", Clock(20.0))
    if grace is not None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a-job")
        monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", grace)
    store = Checkpoints(tmp_path, CheckpointConfig(), {}, ranks)
    for step in (1, 2):
        written(store, make_state(0)[2], 0, step, {})
    said = [record.getMessage() for record in caplog.records if "a checkpoint took" in record.getMessage()]
    assert len(said) == warned and all("kills ranks 30 s after" in text for text in said)


def test_generators_go_on_where_they_were():
    states = get_generators()
    first = (random.random(), float(np.random.normal()), torch.rand(2).tolist())
    set_generators(states)
    assert (random.random(), float(np.random.normal()), torch.rand(2).tolist()) == first


def test_a_run_that_goes_on_on_another_device_says_that_its_dropout_differs(caplog):
    of_gpu = get_generators() | {"cuda": torch.zeros(16, dtype=torch.uint8)}
    first = torch.rand(2).tolist()
    set_generators(of_gpu)
    assert torch.rand(2).tolist() == first
    (warned,) = said(caplog, "training.generators")
    assert "began on a GPU and goes on on a CPU" in warned


def test_an_asynchronous_one_holds_the_state_of_its_step_though_training_goes_on(
    tmp_path, ranks, monkeypatch
):
    model, optimizer, state = make_state(0)
    store = Checkpoints(tmp_path, CheckpointConfig(), {}, ranks)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    may_write = threading.Event()
    plain = module.Checkpoints._finish

    def late(self, path, save):
        may_write.wait(30)
        plain(self, path, save)

    monkeypatch.setattr(module.Checkpoints, "_finish", late)
    store.save(state, 0, 1, {})
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()  # while nothing has its name yet
    assert names(tmp_path) == ["epoch-0000-step-00000001.partial"]
    may_write.set()
    other, _, other_state = make_state(1)
    assert store.restore(other_state)[:2] == (0, 1)
    for name, value in other.state_dict().items():
        assert torch.equal(value, expected[name])
        assert not torch.equal(value, model.state_dict()[name])


def test_what_goes_wrong_in_the_background_is_raised_by_the_next_save(tmp_path, ranks, monkeypatch):
    state = make_state(0)[2]
    store = Checkpoints(tmp_path, CheckpointConfig(), {}, ranks)
    written(store, state, 0, 5, {})
    with monkeypatch.context() as patched:
        patched.setattr(module, "publish_shared", lambda path: (_ for _ in ()).throw(OSError(28, "full")))
        store.save(state, 0, 6, {})
        with pytest.raises(OSError, match="step-00000006 could not be written: .*full"):
            store.save(state, 0, 7, {})
    assert names(tmp_path) == ["epoch-0000-step-00000005"]


def test_one_that_is_not_asynchronous_is_written_by_the_calling_thread(tmp_path, ranks, monkeypatch):
    threads = []
    plain = module.dcp.save

    def save(*arguments, **words):
        threads.append(threading.current_thread())
        return plain(*arguments, **words)

    monkeypatch.setattr(module.dcp, "save", save)
    store = Checkpoints(tmp_path, CheckpointConfig(asynchronous=False), {}, ranks)
    store.save(make_state(0)[2], 0, 1, {})
    assert threads == [threading.current_thread()]
    assert names(tmp_path) == ["epoch-0000-step-00000001"]
