"""Commands of the fork server are as those of Python: what they get, how they end, and when they die."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mim_torchrec.benchmarks.cluster.nodes import IN_NAMESPACES, wait_until, why_no_nodes

SHOW = """
import os, sys
print(__name__, sys.argv[1:], os.getcwd(), os.environ["COLOR"], os.getpid() == os.getsid(0), sys.path[0])
print("an error", file=sys.stderr)
sys.exit(3)
"""


@pytest.fixture
def run(forked, tmp_path):
    def run(*words: str, **options) -> "subprocess.CompletedProcess[str]":
        environment = {**os.environ, **forked, "COLOR": "red"}
        return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, **options)

    return run


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_program_gets_what_it_would_get_from_python(run, tmp_path):
    (tmp_path / "shown.py").write_text(SHOW)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "script.py").write_text(SHOW)
    started = f"__main__ ['a', 'b c'] {tmp_path} red"
    for words, given, place in (
        (["-m", "shown"], None, str(tmp_path)),
        (["-u", "folder/script.py"], None, str(tmp_path / "folder")),
        (["-c", SHOW], None, ""),
        (["-"], SHOW, ""),
    ):
        done = run("python", *words, "a", "b c", input=given)
        assert done.stdout == f"{started} True {place}\n", words
        assert (done.stderr, done.returncode) == ("an error\n", 3), words
        real = run(sys.executable, *words, "a", "b c", input=given)
        assert real.stdout == f"{started} False {place}\n", words
        assert (real.stderr, real.returncode) == (done.stderr, done.returncode), words


def test_modules_are_there_before_the_program_starts(run):
    code = "import sys; print('torchrec' in sys.modules, sys.executable, len(sys.argv))"
    assert run("python", "-c", code).stdout == f"True {sys.executable} 1\n"


def test_options_that_the_server_does_not_know_are_for_the_real_python(run):
    code = "import sys; print('torchrec' in sys.modules, sys.flags.isolated)"
    assert run("python", "-I", "-c", code).stdout == "False 1\n"


def test_installed_programs(run):
    assert run("mim", "--version").stdout.count(".") == 2
    done = run("mim", "csft", "--nothing", "1")
    assert done.returncode == 2 and "--nothing" in done.stderr
    assert "usage: torchx" in run("torchx", "--help").stdout
    assert "usage: torchrun" in run("torchrun", "--help").stdout


def test_an_error_has_its_traceback(run):
    done = run("python", "-c", "1 / 0")
    assert done.returncode == 1 and done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_every_process_draws_numbers_of_its_own(run):
    code = "import random, numpy; print(random.random(), numpy.random.rand())"
    first, second = (run("python", "-c", code).stdout.split() for _ in range(2))
    assert not set(first) & set(second)


@pytest.mark.skipif(bool(why_no_nodes()), reason=why_no_nodes() or "there are nodes")
def test_a_program_of_another_machine_runs_there(run):
    shown = "import os, socket; print(socket.gethostname(), len(socket.if_nameindex()), os.getppid())"
    killed = "import os; os.kill(os.getpid(), 9)"
    line = f'hostname apart; python -c "{shown}"; python -c "{killed}"; echo $?'
    done = run("unshare", *IN_NAMESPACES, "bash", "-c", line)
    assert done.stdout.split() == ["apart", "1", "0", "137"], done.stderr


WAITS = """
import os, signal, sys
def told(number, frame):
    print("told", number, flush=True)
    sys.exit(5)
signal.signal(signal.SIGTERM, told)
print(os.getpid(), flush=True)
signal.pause()
"""


@pytest.fixture
def waiting(forked):
    """A command that waits, and its process; the command itself is the client."""
    client = subprocess.Popen(
        ["python", "-c", WAITS], env={**os.environ, **forked}, stdout=subprocess.PIPE, text=True
    )
    assert client.stdout is not None
    yield client, int(client.stdout.readline())
    client.kill()
    client.wait()
    client.stdout.close()


def test_a_signal_comes_to_the_program(waiting):
    client, process = waiting
    client.terminate()
    assert client.communicate()[0] == f"told {signal.SIGTERM.value}\n"
    assert client.returncode == 5 and not alive(process)


def test_a_program_that_a_signal_ends(waiting):
    client, process = waiting
    os.kill(process, signal.SIGKILL)
    assert client.wait() == -signal.SIGKILL


def test_a_command_that_is_killed_is_gone(waiting):
    client, process = waiting
    client.kill()
    wait_until(lambda: not alive(process))
