"""An elastic CTR run goes on when a machine leaves, and grows again when one comes: plain torchrun agents."""

import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mim_torchrec.training.history import read_history
from tests.namespaces import Node, hosts_file, linked_nodes, lose, start_on, torchrun
from tests.programs import small_shop

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_stages")]
PORT = 29412
QUICK = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"
EPOCHS = 2000  # far more than are trained before the last machine joins


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    with linked_nodes() as found:
        yield found


class Agents:
    """Agents of one elastic job, each on a machine.

    Args:
        nodes: the machines.
        folder: of the data, the run and the logs.
    """

    def __init__(self, nodes: list[Node], folder: Path, epochs: int) -> None:
        self.nodes, self.folder, self.out = nodes, folder, folder / "run"
        data = small_shop(folder, requests=400, users=60, searches=40)
        self._stage = [
            "-m", "mim_torchrec.ctr.main", "--data", str(data), "--out", str(self.out), "--mim", "off",
            "--epochs", str(epochs), "--batch-size", "256", "--log-every", "1", "--checkpoint.every", "1",
            "--checkpoint.asynchronous", "False", "--patience", str(epochs),
        ]  # fmt: skip
        self._started: list[tuple[Node, subprocess.Popen[str]]] = []

    def start(self, number: int) -> subprocess.Popen[str]:
        """Start an agent on a machine; the first one hosts the store."""
        node = self.nodes[number]
        known = hosts_file(self.folder / "hosts", {each.name: each.address for each in self.nodes})
        conf = f"is_host={int(number == 0)},{QUICK}"
        more = ("--rdzv_conf", conf, "--max_restarts", "10")
        command = torchrun(
            f"{self.nodes[0].address}:{PORT}", "1:2", *self._stage, address=node.address, more=more
        )
        variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
        log = self.folder / f"{len(self._started)}.log"
        agent = start_on(node, known, *command, log=log, environment=variables)
        self._started.append((node, agent))
        return agent

    def close(self) -> None:
        for node, agent in self._started:
            lose(node)
            agent.wait()

    def logs(self) -> str:
        return "\n".join(log.read_text()[-3000:] for log in sorted(self.folder.glob("*.log")))

    def world_size(self) -> int:
        """How many ranks wrote the newest checkpoint; 0 where there is none."""
        newest = sorted((self.out / "checkpoints").glob("epoch-*[0-9]"))[-1:]
        try:
            return json.loads((newest[0] / "run.json").read_text())["world_size"] if newest else 0
        except FileNotFoundError:  # it is being removed
            return 0

    def until(self, reached: Callable[[], bool], agent: subprocess.Popen[str]) -> None:
        """Wait for a state that the agent brings about."""
        while not reached():
            try:
                agent.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                continue
            raise AssertionError(f"an agent ended with {agent.returncode}:\n{self.logs()}")


def test_a_run_goes_on_with_the_ranks_that_are_left_and_grows_again(nodes, tmp_path):
    agents = Agents(nodes, tmp_path, EPOCHS)
    try:
        first, second = agents.start(0), agents.start(1)
        agents.until(lambda: agents.world_size() == 2, first)
        lose(nodes[1])
        second.wait()
        agents.until(lambda: agents.world_size() == 1, first)
        third = agents.start(1)
        agents.until(lambda: agents.world_size() == 2, first)
        first.send_signal(signal.SIGTERM)
        third.send_signal(signal.SIGTERM)
        for agent in (first, third):
            agent.wait()
    finally:
        agents.close()
    said = (tmp_path / "0.log").read_text()
    assert "the rest of epoch" in said and "is divided over 1 ranks, not 2" in said
    assert "is divided over 2 ranks, not 1" in said
    steps = [entry["step"] for entry in read_history(agents.out / "history.jsonl").steps]
    assert steps == list(range(1, len(steps) + 1))


def test_a_run_that_lost_a_machine_ends_with_the_ranks_that_are_left(nodes, tmp_path):
    agents = Agents(nodes, tmp_path, epochs=8)
    try:
        first, second = agents.start(0), agents.start(1)
        agents.until(lambda: agents.world_size() == 2, first)
        lose(nodes[1])
        second.wait()
        assert first.wait() == 0, agents.logs()
    finally:
        agents.close()
    metrics = json.loads((agents.out / "metrics.json").read_text())
    assert metrics["world_size"] == 1
    assert pq.read_table(agents.out / "predictions.parquet").num_rows > 0
