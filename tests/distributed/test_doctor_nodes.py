"""What `mim doctor --nodes` says of two machines that reach each other, and of two that do not."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from mim_torchrec import doctor
from mim_torchrec.benchmarks.harness.redis_server import free_port
from mim_torchrec.errors import OptionError, Status
from tests.namespaces import LINK, Node, hosts_file, ip, linked_nodes, start_on, torchrun

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_stages")]
DOCTOR = ("-m", "mim_torchrec.doctor", "--nodes")
PORT = 29411


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    with linked_nodes() as found:
        yield found


def examine(
    nodes: list[Node], folder: Path, names: list[dict[str, str]], environment: Mapping[str, str] | None = None
) -> tuple[list[int], str]:
    """Run the check on both machines; `names` are what each one's /etc/hosts says.

    Returns:
        How the agents ended, and what they wrote.
    """
    logs = [folder / f"{node.name}.log" for node in nodes]
    endpoint = f"{nodes[0].address}:{PORT}"
    agents = [
        start_on(node, hosts_file(folder / f"{node.name}.hosts", known),
                 *torchrun(endpoint, "2", *DOCTOR, address=node.address), log=log, environment=environment)
        for node, known, log in zip(nodes, names, logs, strict=True)
    ]  # fmt: skip
    try:
        ended = [agent.wait(timeout=300) for agent in agents]
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
                agent.wait()
    return ended, "".join(log.read_text() for log in logs)


def test_two_machines_that_reach_each_other(nodes, tmp_path):
    known = {node.name: node.address for node in nodes}
    ended, said = examine(nodes, tmp_path, [known, known])
    assert ended == [0, 0], said
    assert "FAIL" not in said
    for node in nodes:
        assert f"{node.name} ({node.address})" in said
    for check in ("meeting", "versions", "connection", "bandwidth", "clocks", "group"):
        assert said.count(f"ok    {check} ") == 1, said
    assert "2 connections between 2 hosts" in said and "2 ranks summed a number" in said


def test_a_host_whose_name_is_loopback_is_told_which_interface_to_name(nodes, tmp_path):
    first, second = nodes
    good = {node.name: node.address for node in nodes}
    ended, said = examine(nodes, tmp_path, [good, good | {second.name: "127.0.1.1"}])
    assert any(ended), said
    (line,) = [line for line in said.splitlines() if line.startswith("FAIL  interface")]
    assert f"{second.name}: {second.name} resolves to 127.0.1.1" in line
    assert f"{LINK} ({second.address})" in line and "GLOO_SOCKET_IFNAME=lo" not in said
    assert f"FAIL  connection     {first.name} -> {second.name}" in said
    assert "ok    group" not in said  # it is not tried


def test_a_network_between_which_nothing_passes_is_named(nodes, tmp_path):
    for number, node in enumerate(nodes):
        ip("-n", node.name, "link", "add", "far0", "type", "veth", "peer", "name", "far1")
        ip("-n", node.name, "addr", "add", f"10.78.0.{1 + number}/32", "dev", "far0")
        ip("-n", node.name, "link", "set", "far0", "up")
        ip("-n", node.name, "link", "set", "far1", "up")
    known = {node.name: node.address for node in nodes}
    ended, said = examine(nodes, tmp_path, [known, known], {"GLOO_SOCKET_IFNAME": "far0"})
    assert any(ended), said
    failed = [line for line in said.splitlines() if line.startswith("FAIL  connection")]
    assert len(failed) == 2, said
    assert f"{nodes[0].name} -> {nodes[1].name} (10.78.0.2): port " in failed[0]
    assert f"{LINK} ({nodes[1].address})" in failed[0]  # the way out


def test_two_ranks_of_one_machine_stand_for_two(tmp_path):
    command = torchrun(f"localhost:{free_port()}", "2", *DOCTOR)
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    agents = [
        subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for _ in range(2)
    ]
    said = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert sorted("2 ranks summed a number" in text for text in said) == [False, True]


def test_outside_a_job_it_says_how_it_is_started(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(OptionError, match="python -m torch.distributed.run --nnodes 2"):
        doctor.main(["--nodes"])
    done = subprocess.run(
        [sys.executable, "-m", *DOCTOR[1:]], capture_output=True, text=True,
        env={name: value for name, value in os.environ.items() if name != "RANK"},
    )  # fmt: skip
    assert done.returncode == Status.USAGE and len(done.stderr.splitlines()) == 1
