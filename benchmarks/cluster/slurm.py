"""A real Slurm on this machine: its daemons here, its nodes in namespaces, its authentication its own.

    with SlurmCluster(folder) as slurm:
        slurm.call("sbatch", "--parsable", "--wrap", "hostname")

Programs find it by the variables in `environment`. Two clusters do not see each other: addresses, ports and
keys are drawn. Preemption is by partition: a job in `high` preempts those in `main`.
"""

import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from mim_torchrec.benchmarks.cluster.nodes import (
    Network,
    dying_with_us,
    wait_until,
    why_no_nodes,
)
from mim_torchrec.benchmarks.harness.redis_server import free_port
from mim_torchrec.errors import SetupError

DAEMONS = ("slurmctld", "slurmd", "munged")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "DEADLINE")

CONFIGURATION = """\
ClusterName=mim
SlurmctldHost=controller({address})
SlurmctldPort={port}
CommunicationParameters=NoCtldInAddrAny
AuthType=auth/munge
AuthInfo=socket={socket},cred_expire=10
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=20
TCPTimeout=10
MessageTimeout=60
KillWait=15
MinJobAge=7200
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=bf_interval=2,sched_interval=5
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime={grace}
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""
CONTROLLER = 'hostname controller && mount --bind "$1" /etc/hosts && exec slurmctld -D -f "$0"'
# cred_expire is also how long a requeued job waits before it starts again


def why_no_slurm() -> str:
    """Why this machine can run no Slurm of its own, "" if it can."""
    missing = [daemon for daemon in DAEMONS if shutil.which(daemon) is None]
    if missing:
        return f"a Slurm needs {', '.join(missing)} (Debian: slurm-wlm, munge)"
    return why_no_nodes()


class SlurmCluster:
    """A controller and nodes, until it is closed.

    Args:
        folder: gets state and logs; all nodes see it, as everything else on this machine.
        nodes: how many.
        cores: of a node, as Slurm counts them.
        memory: of a node in MiB, as Slurm counts it.
        grace: seconds between the signal to a preempted job and its end.

    Attributes:
        private: folder of its key and socket, which is removed at its end, however that comes.

    Raises:
        SetupError: this machine cannot, or a daemon does not start.
    """

    def __init__(
        self, folder: Path, nodes: int = 2, cores: int = 4, memory: int = 16384, grace: int = 60
    ) -> None:
        reason = why_no_slurm()
        if reason:
            raise SetupError(f"no Slurm can be started: {reason}")
        self.folder = folder.resolve()
        (self.folder / "state").mkdir(parents=True, exist_ok=True)
        self.private = Path(tempfile.mkdtemp(prefix="mim-munge-"))  # sockets have short names
        self.private.chmod(0o711)  # munged wants it
        self._janitor = _remove_afterwards(self.private)
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._network: Network | None = None
        try:
            self._network = Network(self.folder)
            self._addresses = self._network.addresses([f"node{k + 1}" for k in range(nodes)])
            self._configure(self._network.address, cores, memory, grace)
            self._start_munge()
            self._start("slurmctld", ["unshare", "--uts", "--mount", "bash", "-c", CONTROLLER,
                                      str(self.configuration), str(self._network.hosts)])  # fmt: skip
            for name in self.nodes:
                self.restore(name)
            wait_until(self._is_ready, self._daemons[-1], self.folder / "slurmctld.log")
        except BaseException:
            self.close()
            raise

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes, in their order."""
        return list(self._addresses)

    @property
    def interface(self) -> str:
        """This machine's interface to the nodes."""
        assert self._network is not None
        return self._network.interface

    @property
    def configuration(self) -> Path:
        """slurm.conf."""
        return self.folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """What programs need in their environment to find it."""
        return {"SLURM_CONF": str(self.configuration)}

    def call(self, *words: str, environment: Mapping[str, str] | None = None) -> str:
        """Run a program that talks to this Slurm and return what it prints.

        Raises:
            SetupError: it ends with an error.
        """
        known = {**os.environ, **self.environment, **(environment or {})}
        done = subprocess.run(words, env=known, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            raise SetupError(f"{' '.join(words)} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def lose(self, name: str) -> None:
        """Cut the power of a node."""
        assert self._network is not None
        self._network.nodes[name].lose()

    def restore(self, name: str) -> None:
        """Start a node, which comes back by itself if it was lost."""
        assert self._network is not None
        command = ["slurmd", "-D", "-f", str(self.configuration)]
        self._network.start(name, self._addresses[name], command)

    def close(self) -> None:
        """End everything."""
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.wait()
        if self._network is not None:
            self._network.close()
        assert self._janitor.stdin is not None
        self._janitor.stdin.close()
        self._janitor.wait()

    def __enter__(self) -> "SlurmCluster":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _configure(self, address: str, cores: int, memory: int, grace: int) -> None:
        lines = [
            f"NodeName={name} NodeAddr={at} CPUs={cores} RealMemory={memory} State=UNKNOWN"
            for name, at in self._addresses.items()
        ]
        text = CONFIGURATION.format(
            address=address, port=free_port(), socket=self.private / "socket", folder=self.folder,
            nodes="\n".join(lines), grace=grace,
        )  # fmt: skip
        self.configuration.write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def _start_munge(self) -> None:
        key = self.private / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        files = {
            "key-file": "key",
            "socket": "socket",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        words = [f"--{option}={self.private / name}" for option, name in files.items()]
        self._start("munged", ["munged", "--foreground", "--num-threads=4", *words])
        socket = self.private / "socket"
        wait_until(socket.exists, self._daemons[-1], self.folder / "munged.out")

    def _start(self, name: str, words: list[str]) -> None:
        with (self.folder / f"{name}.out").open("ab") as log:
            self._daemons.append(
                subprocess.Popen(dying_with_us(words), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            )

    def _is_ready(self) -> bool:
        try:
            states = self.call("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T").split()
        except SetupError:
            return False
        return states == ["idle"] * len(self.nodes)


def _remove_afterwards(folder: Path) -> "subprocess.Popen[bytes]":
    """A process that removes a folder when its standard input ends: when we close it, or end in any way."""
    script = 'trap "" INT TERM HUP; read -r _; rm -rf -- "$0"'
    return subprocess.Popen(
        ["bash", "-c", script, str(folder)], stdin=subprocess.PIPE, start_new_session=True
    )
