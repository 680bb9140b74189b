"""A primary, a replica and sentinels of Redis on loopback ports; the sentinels do the failover."""

import subprocess
from pathlib import Path

import redis

from mim_torchrec.benchmarks.harness.redis_server import RedisServer, free_port

SERVICE = "vectors"


class Sentinels:
    """Two servers, and sentinels that watch them.

    Args:
        folder: gets their files.
        count: sentinels; more than half of them agree on a failover.
        password: of the servers.
        own: password of the sentinels.

    Attributes:
        url: what clients connect to.
        servers: the primary of the beginning, and its replica.
    """

    def __init__(self, folder: Path, count: int = 1, password: str = "", own: str = "") -> None:
        words = ["--requirepass", password, "--masterauth", password] if password else []
        address = f"redis://:{password}@127.0.0.1:{{port}}" if password else "redis://127.0.0.1:{port}"
        self.servers: list[RedisServer] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._own = own
        try:
            for name in ("primary", "replica"):
                self.servers.append(RedisServer(folder / name, *words, url=address))
            self.servers[1].copy(self.servers[0])
            self.ports = [self._watch(folder / f"sentinel-{k}", count, password) for k in range(count)]
            for port in self.ports:
                self._wait_until_all_are_known(port, count)
        except BaseException:
            self.kill()
            raise
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        self.url = f"redis+sentinel://{hosts}/{SERVICE}"

    def _watch(self, folder: Path, count: int, password: str) -> int:
        folder.mkdir()
        port, file = free_port(), folder / "sentinel.conf"
        lines = [f"port {port}", "bind 127.0.0.1", f"dir {folder}",
                 f"sentinel monitor {SERVICE} 127.0.0.1 {self.servers[0].port} {count // 2 + 1}",
                 f"sentinel down-after-milliseconds {SERVICE} 300",
                 f"sentinel failover-timeout {SERVICE} 3000"]  # fmt: skip
        if password:
            lines.append(f"sentinel auth-pass {SERVICE} {password}")
        if self._own:
            lines += [f"requirepass {self._own}", f"sentinel sentinel-pass {self._own}"]
        file.write_text("\n".join(lines) + "\n")
        with (folder / "log.txt").open("wb") as log:
            words = ["redis-server", str(file), "--sentinel"]
            self._processes.append(subprocess.Popen(words, stdout=log, stderr=log))
        return port

    def _wait_until_all_are_known(self, port: int, count: int) -> None:
        client = redis.Redis(port=port, password=self._own or None, protocol=2)
        while True:
            try:
                found = client.execute_command("SENTINEL MASTER", SERVICE)
            except (redis.ConnectionError, redis.TimeoutError):
                assert self._processes[-1].poll() is None
                continue
            if found["num-slaves"] == 1 and found["num-other-sentinels"] == count - 1:
                return

    def kill(self) -> None:
        """End all of them at once."""
        for process in self._processes:
            process.kill()
            process.wait()
        for server in self.servers:
            server.kill()
