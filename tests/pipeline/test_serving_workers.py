"""`mim serve --workers 2`: the same scores, one set of metrics, a worker that dies is replaced."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton

from tests.pipeline.test_serving_grpc import tensors
from tests.serving import COMMAND, INFER, ROOT, get, messages, output, post


def children(pid: int) -> set[int]:
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def counted(address: str, **headers: str) -> float:
    """Scored requests by the metrics of whichever worker answers."""
    text = get(f"{address}/metrics", headers=headers).text
    return sum(float(value) for value in re.findall(r'mim_requests_total{.*cause="ok".*nfer".*} (.+)', text))


@pytest.mark.slow
def test_workers_are_one_server(serving_folder, tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text("first\n")
    tokens.chmod(0o600)
    words = ["--workers", "2", "--grpc-port", "0", "--token-file", str(tokens)]
    words += ["--bundle", str(serving_folder / "run" / "bundle"), "--store", str(serving_folder / "table")]
    server = subprocess.Popen([sys.executable, *COMMAND, *words], cwd=ROOT, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    try:
        found = re.fullmatch(r"serving mim \w+ and by gRPC on (\S+), on (\S+)\n", server.stdout.readline())
        rpc, address = found.groups()
        pids, sent, allowed = (
            children(server.pid),
            messages(serving_folder)[:6],
            {"Authorization": "Bearer first"},
        )
        assert len(pids) == 2
        # every request has a connection of its own, which either worker takes
        expected = [post(address + INFER, json=one, headers=allowed) for one in sent]
        assert {answer.status_code for answer in expected} == {200}
        with triton.InferenceServerClient(rpc) as client:
            scores = client.infer("mim", tensors(sent[0]), headers={"authorization": "Bearer first"})
            np.testing.assert_array_equal(
                scores.as_numpy("score"), np.array(output(expected[0].json()), np.float32)
            )
            (about,) = client.get_inference_statistics(headers={"authorization": "Bearer first"}).model_stats
        assert about.inference_count == 7
        while counted(address, **allowed) < 7:  # an answer is counted when it has been sent
            pass
        assert {counted(address, **allowed) for _ in range(6)} == {7}

        victim = min(pids)
        os.kill(victim, signal.SIGKILL)
        logged = iter(server.stderr.readline, "")
        assert any(
            f"worker {victim} was ended by SIGKILL; another takes its place" in line for line in logged
        )
        tokens.write_text("second\n")
        changed = {"Authorization": "Bearer second"}
        while len(children(server.pid)) < 2 or victim in children(server.pid):
            pass
        server.send_signal(signal.SIGHUP)
        answers = [post(address + INFER, json=sent[0], headers=changed) for _ in range(6)]
        assert {answer.status_code for answer in answers} == {200}
        assert counted(address, **changed) == 13  # what the dead one had counted stays
        pids = children(server.pid)
        server.send_signal(signal.SIGTERM)
        threading.Thread(target=server.stderr.read, daemon=True).start()
        assert server.wait() == 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
        server.stderr.close()
