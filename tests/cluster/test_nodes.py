"""The Slurm of the tests: two do not see each other, and nothing stays, whatever ends it."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mim_torchrec.benchmarks.cluster.nodes import wait_until
from mim_torchrec.benchmarks.cluster.slurm import SlurmCluster, why_no_slurm

pytestmark = pytest.mark.skipif(bool(why_no_slurm()), reason=why_no_slurm() or "there is one")

OWNER = """
import json, sys
from pathlib import Path
from mim_torchrec.benchmarks.cluster.slurm import SlurmCluster
slurm = SlurmCluster(Path(sys.argv[1]))
slurm.call("sbatch", "--nodes=2", "--output=/dev/null", "--wrap", f"srun sh -c 'sleep 1000; : {sys.argv[1]}'")
print(json.dumps([slurm.interface, str(slurm.private)]), flush=True)
sys.stdin.read()
"""


def interfaces() -> set[str]:
    """Names of this machine's."""
    text = subprocess.run(["ip", "-json", "link", "show"], capture_output=True, text=True, check=True).stdout
    return {link["ifname"] for link in json.loads(text)}


def processes(word: str) -> list[str]:
    """Command lines that hold a word."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if word in line:
            found.append(line)
    return found


def test_two_at_once_are_apart_and_leave_the_host_as_it_was(tmp_path):
    before = Path("/etc/hosts").read_bytes(), interfaces()
    with SlurmCluster(tmp_path / "a") as first, SlurmCluster(tmp_path / "b") as second:
        assert first.interface != second.interface and {first.interface, second.interface} <= interfaces()
        for number, slurm in enumerate((first, second)):
            out = tmp_path / f"{number}.out"
            wrapped = ["--wrap", "srun --label hostname"]
            slurm.call("sbatch", "--wait", "--nodes=2", f"--output={out}", *wrapped)
            assert sorted(out.read_text().split()) == ["0:", "1:", "node1", "node2"]
        count = [slurm.call("squeue", "--states=all", "--noheader").count("\n") for slurm in (first, second)]
        assert count == [1, 1]
        assert Path("/etc/hosts").read_bytes() == before[0]
    wait_until(lambda: not {first.interface, second.interface} & interfaces())
    assert processes(str(tmp_path)) == [] and not first.private.exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_outlives_its_owner(tmp_path, number):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    interface, private = json.loads(owner.stdout.readline())
    wait_until(lambda: len(processes("sleep 1000")) > 0)
    owner.send_signal(number)
    owner.communicate()
    wait_until(lambda: processes(str(tmp_path)) == [])
    wait_until(lambda: interface not in interfaces() and not Path(private).exists())
