"""The loop on a task of one weight."""

import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from mim_torchrec.training.checkpoints import Checkpoints, ResumeError
from mim_torchrec.training.config import CheckpointConfig
from mim_torchrec.training.distributed import DistributedContext, distributed
from mim_torchrec.training.history import read_history
from mim_torchrec.training.loop import Interrupted, fit
from mim_torchrec.training.run_directory import RunDirectory
from mim_torchrec.training.state import TrainingState

ONE = DistributedContext(0, 1, torch.device("cpu"))


class Line:
    """Fits y = 3 x; its validation metric is what the test says."""

    def __init__(self, scores: list[float], batch_values: tuple[float, ...] = (1.0, 2.0, 0.5)) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(1, 1, bias=False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.scores, self.batch_values = scores, batch_values
        self.saved: list[float] = []
        schedule = torch.optim.lr_scheduler.ConstantLR(self.optimizer)
        self.state = TrainingState(self.model, self.optimizer, schedule)

    def num_batches(self, epoch):
        return len(self.batch_values)

    def batches(self, epoch, first=0):
        for value in self.batch_values[first:]:
            yield torch.tensor([[value]])

    def batch_ids(self, batch):
        return {"values": batch.flatten().tolist()}

    def num_samples(self, batch):
        return len(batch)

    def training_forward(self, batch):
        error = self.model(batch) - 3 * batch
        return error.square().mean(), {"error": error.mean()}

    def after_epoch(self, epoch):
        return {"score": self.scores[epoch]} if self.scores else {}

    def save(self, path: Path):
        path.mkdir(exist_ok=True)
        self.saved.append(float(self.model.weight.detach()))


def run(task, out, **changes):
    plain = {"epochs": 3, "run": RunDirectory(out), "context": ONE, "select": None, "patience": None}
    return fit(task, **(plain | changes))


def test_the_loss_falls_and_every_step_is_in_the_history(tmp_path):
    run(Line([]), tmp_path, log_every=2)
    history = read_history(tmp_path / "history.jsonl")
    losses = [entry["loss"] for entry in history.steps]
    assert [entry["step"] for entry in history.steps] == list(range(1, 10))
    assert losses[-1] < 0.05 * losses[0]
    assert {"samples_per_s", "data_wait", "peak_memory_gib", "grad_norm", "error"} <= history.steps[1].keys()


def test_a_long_gradient_is_shortened_and_a_short_one_is_not(tmp_path):
    for limit in (0.3, 1e9):
        task = Line([], batch_values=(1.0, 2.0, 0.5, 0.01))
        norms, weight, rate = [], float(task.model.weight.detach()), task.optimizer.param_groups[0]["lr"]
        run(task, tmp_path / str(limit), epochs=1, clip_norm=limit, log_every=1)
        for value in task.batch_values:  # naive
            slope = 2 * value * (value * weight - 3 * value)
            weight -= rate * slope * min(1.0, limit / abs(slope))
            norms.append(abs(slope))
        assert float(task.model.weight.detach()) == pytest.approx(weight, rel=1e-5)
        logged = [step["grad_norm"] for step in read_history(tmp_path / str(limit) / "history.jsonl").steps]
        assert logged == pytest.approx(norms, rel=1e-4)  # as it was before
        assert min(norms) < 0.3 < max(norms)


def test_the_best_epoch_is_the_first_with_the_highest_metric(tmp_path):
    task = Line([0.1, 0.7, 0.7, 0.2])
    history = run(task, tmp_path, epochs=4, select="score")
    assert history.best_epoch == 1
    assert len(task.saved) == 2


def test_without_a_metric_the_last_epoch_is_the_best(tmp_path):
    assert run(Line([]), tmp_path).best_epoch == 2


def test_training_stops_when_patience_is_over(tmp_path):
    history = run(Line([0.5, 0.4, 0.3, 0.9]), tmp_path, epochs=4, select="score", patience=2)
    assert [entry["epoch"] for entry in history.epochs] == [0, 1, 2]


def test_a_loss_that_is_not_finite_stops_before_its_step_and_names_epoch_and_step(tmp_path):
    task = Line([], batch_values=(1.0, float("nan")))
    with pytest.raises(FloatingPointError, match="epoch 0 at step 2"):
        run(task, tmp_path)
    assert torch.isfinite(task.model.weight).all()


@pytest.mark.parametrize(("every", "kept"), [(1, "epoch-0000-step-00000001"), (0, None)])
def test_weights_behind_a_gradient_that_is_not_finite_are_not_kept(tmp_path, every, kept):
    task = Line([], batch_values=(1.0, 2.0))
    plain = task.training_forward

    def forward(batch):
        loss, report = plain(batch)
        return loss + (task.model.weight * (batch - 2)).square().sum().sqrt(), report  # of slope 0 / 0 at 2

    task.training_forward = forward
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig(every=every), {}, ONE)
    with pytest.raises(FloatingPointError, match="gradient is nan in epoch 0 at step 2"):
        run(task, tmp_path, checkpoints=checkpoints)
    assert torch.isfinite(task.model.weight).all()
    assert not task.saved
    assert [path.name for path in (tmp_path / "checkpoints").glob("epoch-*")] == ([kept] if kept else [])
    assert "2.0" in (tmp_path / "bad_batch" / "rank0.json").read_text()


def test_an_ignored_interrupt_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig(), {}, ONE)
        history = run(signaled(Line([]), 2, signal.SIGINT), tmp_path, checkpoints=checkpoints)
        assert history.num_steps == 9
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_unknown_metric_is_an_error_that_names_those_there_are(tmp_path):
    with pytest.raises(ValueError, match="no finite auc .* score 0.5"):
        run(Line([0.5]), tmp_path, select="auc")


def signaled(task: Line, at: int, number: signal.Signals, method: str = "training_forward") -> Line:
    """A task in whose at-th call of a method, from 1, the signal comes."""
    plain, calls = getattr(task, method), []

    def call(argument):
        calls.append(argument)
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return plain(argument)

    setattr(task, method, call)
    return task


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("method", "at", "steps"), [
    ("training_forward", 1, 1), ("training_forward", 3, 3), ("training_forward", 9, 9),
    ("after_epoch", 1, 3), ("after_epoch", 3, 9),
])  # fmt: skip
def test_a_run_that_a_signal_stops_goes_on_as_if_it_had_not(tmp_path, number, method, at, steps):
    scores = [0.1, 0.3, 0.2]
    run(Line(scores), tmp_path / "whole", select="score")
    whole = read_history(tmp_path / "whole" / "history.jsonl")

    def resumable(task):
        checkpoints = Checkpoints(tmp_path / "broken" / "checkpoints", CheckpointConfig(), {}, ONE)
        return run(task, tmp_path / "broken", select="score", checkpoints=checkpoints)

    with pytest.raises(Interrupted) as stopped:
        resumable(signaled(Line(scores), at, number, method))
    assert stopped.value.code == 143
    resumable(Line(scores))
    history = read_history(tmp_path / "broken" / "history.jsonl")
    assert [entry["loss"] for entry in history.steps] == [entry["loss"] for entry in whole.steps]
    assert [entry["loss"] for entry in history.epochs] == [entry["loss"] for entry in whole.epochs]
    assert history.best_epoch == whole.best_epoch
    trained = []
    untouched = Line(scores)
    untouched.training_forward = trained.append
    resumable(untouched)
    assert not trained  # the run was over


@pytest.fixture
def keyboard():
    """Python's own handling of Ctrl-C, whatever a launcher started in this process has left in its place."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("keyboard")
def test_a_second_interrupt_from_the_keyboard_ends_at_once(tmp_path):
    task = signaled(signaled(Line([]), 2, signal.SIGINT), 2, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(task, tmp_path, checkpoints=Checkpoints(tmp_path / "checkpoints", CheckpointConfig(), {}, ONE))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_leaves_the_handlers_of_signals_as_it_found_them(tmp_path, number):
    def handler(*_):
        """A handler of the program that runs the loop."""

    before = signal.signal(number, handler)
    try:
        with pytest.raises(Interrupted):
            run(
                signaled(Line([]), 2, number),
                tmp_path,
                checkpoints=Checkpoints(tmp_path / "checkpoints", CheckpointConfig(), {}, ONE),
            )
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)


def test_the_norm_of_the_gradient_is_that_before_the_step(tmp_path):
    task = Line([], batch_values=(2.0,))
    weight = float(task.model.weight.detach())
    run(task, tmp_path, epochs=1)
    history = read_history(tmp_path / "history.jsonl")
    assert history.steps[0]["grad_norm"] == pytest.approx(abs(2 * (2 * weight - 6) * 2), rel=1e-5)


def test_the_history_file_holds_the_history(tmp_path):
    history = run(Line([0.1, 0.2, 0.3]), tmp_path, select="score")
    stored = read_history(tmp_path / "history.jsonl")
    assert stored.epochs == history.epochs
    assert [entry["epoch"] for entry in stored.steps] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert stored.best_epoch == 2


def resumed(task, out, **changes):
    checkpoints = Checkpoints(out / "checkpoints", CheckpointConfig(**changes.pop("checkpoint", {})), {}, ONE)
    return run(task, out, checkpoints=checkpoints, **changes)


def test_a_checkpoint_does_not_grow_with_the_steps_before_it(tmp_path):
    sizes = {}
    for count in (3, 300):
        resumed(Line([], batch_values=(0.1,) * count), tmp_path / f"{count}", epochs=1)
        (checkpoint,) = (tmp_path / f"{count}" / "checkpoints").iterdir()
        sizes[count] = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    assert abs(sizes[300] - sizes[3]) < 100


def test_lines_of_steps_after_the_checkpoint_are_cut_off(tmp_path):
    with pytest.raises(RuntimeError):
        task = Line([], batch_values=(1.0,) * 5)
        plain, calls = task.training_forward, []

        def forward(batch):
            calls.append(batch)
            if len(calls) == 5:
                raise RuntimeError
            return plain(batch)

        task.training_forward = forward
        resumed(task, tmp_path, epochs=1, log_every=1, checkpoint={"every": 2, "asynchronous": False})
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"step": 5, "epo')  # as of a kill
    resumed(Line([], batch_values=(1.0,) * 5), tmp_path, epochs=1)
    assert [entry["step"] for entry in read_history(tmp_path / "history.jsonl").steps] == [1, 2, 3, 4, 5]


def test_a_checkpoint_is_written_when_the_newest_is_too_old(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(Checkpoints, "is_overdue", lambda _: len(steps) in (2, 4))
    task = Line([], batch_values=(1.0,) * 5)
    plain = task.training_forward
    task.training_forward = lambda batch: (steps.append(batch), plain(batch))[1]
    resumed(task, tmp_path, epochs=1, checkpoint={"minutes": 1, "keep": 9})
    found = [path.name for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert found == ["epoch-0000-step-00000002", "epoch-0000-step-00000004", "epoch-0001-step-00000000"]


def test_a_finished_run_trains_further_epochs_as_if_it_had_been_told_at_first(tmp_path):
    scores = [0.3, 0.1, 0.4]
    run(Line(scores), tmp_path / "whole", select="score")
    resumed(Line(scores), tmp_path / "more", select="score", epochs=2)
    task = Line(scores)
    history = resumed(task, tmp_path / "more", select="score", epochs=3)
    whole, more = (read_history(tmp_path / name / "history.jsonl") for name in ("whole", "more"))
    assert [entry["loss"] for entry in more.steps] == [entry["loss"] for entry in whole.steps]
    assert history.best_epoch == whole.best_epoch == more.best_epoch == 2


def test_fewer_epochs_than_were_trained_are_refused(tmp_path):
    resumed(Line([]), tmp_path, epochs=2)
    with pytest.raises(ResumeError, match="has trained 2 epochs, 1 are fewer"):
        resumed(Line([]), tmp_path, epochs=1)


def test_an_epoch_that_cannot_be_judged_is_not_trained_again(tmp_path):
    with pytest.raises(ValueError, match="no finite score"):
        resumed(Line([0.1, float("nan")]), tmp_path, epochs=2, select="score")
    task, trained = Line([0.1, 0.2]), []
    plain = task.training_forward
    task.training_forward = lambda batch: (trained.append(batch), plain(batch))[1]
    assert resumed(task, tmp_path, epochs=2, select="score").best_epoch == 1
    assert not trained


def test_tensorboard_gets_event_files(tmp_path):
    run(Line([]), tmp_path)
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_an_epoch_without_batches_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no batches"):
        run(Line([], batch_values=()), tmp_path)


def test_a_process_without_torchrun_is_a_world_of_one_with_a_fixed_seed():
    drawn = []
    for _ in range(2):
        with distributed(5) as context:
            assert (context.rank, context.world_size, context.is_main) == (0, 1, True)
            assert context.all_gather_objects("me") == ["me"]
            drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
