"""Connections between hosts: what is measured, and what `mim doctor --nodes` makes of it."""

import socket
from dataclasses import replace

import pytest

from mim_torchrec.doctor_nodes import CLOCKS, SHOWN, Node, judge
from mim_torchrec.findings import Finding
from mim_torchrec.links import Answers, Link, measure

NODE = Node(
    name="a", machine="1", address="10.0.0.1", port=1, problem="", interfaces="eth0 (10.0.0.1)",
    versions="torch 2", token="",
)  # fmt: skip
SECOND = replace(NODE, name="b", machine="2", address="10.0.0.2", interfaces="eth1 (10.0.0.2)")
FORTH = Link(0, 1, bytes_per_second=1e9, round_trip=0.001, clock=0.01)
BACK = Link(1, 0, bytes_per_second=5e8, round_trip=0.002, clock=-0.01)


def found(nodes: list[Node], links: list[Link]) -> dict[str, list[Finding]]:
    findings: dict[str, list[Finding]] = {}
    for finding in judge(nodes, links):
        findings.setdefault(finding.check, []).append(finding)
    return findings


def test_a_connection_is_measured():
    with Answers("127.0.0.1") as answers:
        link = measure(0, 1, "127.0.0.1", answers.port, answers.token)
        assert measure(0, 1, "127.0.0.1", answers.port, answers.token).problem == ""  # it answers again
    assert (link.start, link.to, link.problem) == (0, 1, "")
    assert link.bytes_per_second > 1e6 and link.round_trip > 0
    assert abs(link.clock) <= link.round_trip  # one clock


def test_strangers_are_not_answered():
    with Answers("127.0.0.1") as answers:
        link = measure(0, 1, "127.0.0.1", answers.port, "0" * len(answers.token))
        assert measure(0, 1, "127.0.0.1", answers.port, answers.token).problem == ""
    assert link.problem.startswith(f"port {answers.port}: ") and link.bytes_per_second == 0


def test_a_port_at_which_nobody_listens_is_a_problem():
    with socket.socket() as taken:  # so that nobody else does
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        assert measure(0, 1, "127.0.0.1", port, "").problem == f"port {port}: Connection refused"


def test_sound_hosts():
    findings = found([NODE, SECOND], [FORTH, BACK])
    assert all(one.ok for several in findings.values() for one in several)
    (speed,) = findings["bandwidth"]
    assert "median 6.00 Gbit/s, slowest 4.00 Gbit/s (b -> a); round trip at most 2.00 ms" in speed.detail
    assert findings["connection"][0].detail == "2 connections between 2 hosts"


def test_clocks_that_differ_are_named():
    (clocks,) = found([NODE, SECOND], [replace(FORTH, clock=CLOCKS + 0.5), BACK])["clocks"]
    assert (
        not clocks.ok and "differ by 1500.0 ms at most (a -> b)" in clocks.detail and "chrony" in clocks.fix
    )
    (clocks,) = found([NODE, SECOND], [replace(FORTH, clock=-CLOCKS), BACK])["clocks"]
    assert clocks.ok


def test_versions_that_differ_are_named():
    (versions,) = found([NODE, replace(SECOND, versions="torch 3")], [FORTH, BACK])["versions"]
    assert not versions.ok and versions.detail == "hosts differ: a: torch 2; b: torch 3"


def test_a_loopback_address_is_a_fault_between_machines_only():
    problem = "b resolves to 127.0.1.1"
    (interface,) = found([NODE, replace(SECOND, problem=problem)], [FORTH, BACK])["interface"]
    assert not interface.ok and interface.detail == f"b: {problem}"
    same = replace(SECOND, problem=problem, machine=NODE.machine)
    assert "interface" not in found([NODE, same], [FORTH, BACK])


def test_a_pair_without_a_connection_is_named_with_the_way_out():
    findings = found([NODE, SECOND], [replace(FORTH, problem="port 1: timed out"), BACK])
    (connection,) = findings["connection"]
    assert connection.detail == "a -> b (10.0.0.2): port 1: timed out"
    assert "of b by GLOO_SOCKET_IFNAME: eth1 (10.0.0.2)" in connection.fix
    assert findings["bandwidth"][0].detail.count("4.00 Gbit/s") == 2  # of the pair that is left


@pytest.mark.parametrize("failing", [SHOWN, SHOWN + 2])
def test_many_failing_pairs_are_counted(failing):
    connections = found([NODE, SECOND], [replace(FORTH, problem="timed out")] * failing)["connection"]
    assert len(connections) == SHOWN + (failing > SHOWN)
    assert failing == SHOWN or connections[-1].detail == "2 more pairs fail"
