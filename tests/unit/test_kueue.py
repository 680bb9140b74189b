"""Jobs for Kueue: what is described, and what is asked of Kubernetes, by a server that stands for it."""

import json
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest
import yaml
from kubernetes import client
from torchx.runner import Runner
from torchx.specs import AppState

from mim_torchrec.errors import OptionError
from mim_torchrec.launch.kueue import create_scheduler
from tests.manifests import expanded, faults

CTR = ["--data", "shop", "--out", "out", "--image", "mim:1"]
BASE = ["--", "--mim", "off"]
QUEUE = {"queue": "research", "namespace": "ads"}


class Kubernetes:
    """Keeps what it is asked to create, and says that jobs run."""

    def __init__(self) -> None:
        self.created: dict[str, dict[str, Any]] = {}
        self.deleted: list[str] = []
        self.status: dict[str, Any] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self, status: int, body: Any) -> None:
                data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                kind = "text/plain" if isinstance(body, str) else "application/json"
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_POST(self) -> None:
                sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.created[urlparse(self.path).path] = sent
                self._answer(201, sent | {"metadata": sent["metadata"] | {"uid": "u-1"}})

            def do_DELETE(self) -> None:
                outer.deleted.append(self.path)
                self._answer(200, {})

            def do_GET(self) -> None:
                asked = urlparse(self.path)
                words = parse_qs(asked.query)
                job = {"metadata": {"name": "a-job", "namespace": "ads"}, "status": outer.status}
                if asked.path == "/apis/batch/v1/namespaces/ads/jobs/a-job":
                    self._answer(200, job)
                elif asked.path == "/apis/batch/v1/jobs":
                    assert words["labelSelector"] == ["app.kubernetes.io/managed-by=mim-torchrec"]
                    self._answer(200, {"items": [job]})
                elif asked.path == "/api/v1/namespaces/ads/pods":
                    (selector,) = words["labelSelector"]
                    made = {f"a-job-1-{k}": f"2026-01-0{k}T00:00:00Z" for k in (2, 1)}
                    items = [{"metadata": {"name": k, "creationTimestamp": v}} for k, v in made.items()]
                    self._answer(200, {"items": items if selector.endswith("job-completion-index=1") else []})
                elif asked.path == "/api/v1/namespaces/ads/pods/a-job-1-2/log":
                    self._answer(200, "one\ntwo\n")
                else:
                    self._answer(404, {"message": asked.path})

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def kubernetes() -> Iterator[Kubernetes]:
    made = Kubernetes()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def runner(kubernetes: Kubernetes) -> Iterator[Runner]:
    configuration = client.Configuration()
    configuration.host = f"http://127.0.0.1:{kubernetes.server.server_port}"
    configuration.retries = False
    api = client.ApiClient(configuration)

    def kueue(session_name: str, **_: object):
        return create_scheduler(session_name, client=api)

    with Runner("tests", {"kueue": kueue}) as runner:
        yield runner


def job_of(runner: Runner, *words: str, **config: object) -> tuple[dict[str, Any], dict[str, Any]]:
    dryrun = runner.dryrun_component("mim.ctr", [*CTR, *words, *BASE], "kueue", QUEUE | config)
    job, service = yaml.safe_load_all(str(dryrun))
    return job, service


def test_the_job_and_its_service_are_well_formed(runner):
    job, service = job_of(
        runner, "-j", "4x8", "--gpu", "8", "--max_retries", "2", "--mounts", "type=volume,src=data,dst=/data",
        run_as_user=1000, tolerations=["nvidia.com/gpu"], secrets=["redis:/secrets/redis"],
        priority_class="high",
    )  # fmt: skip
    assert list(faults(job, "V1Job", "Job")) == list(faults(service, "V1Service", "Service")) == []
    assert job["spec"]["suspend"] and job["spec"]["completionMode"] == "Indexed"
    assert (job["spec"]["completions"], job["spec"]["parallelism"], job["spec"]["backoffLimit"]) == (4, 4, 8)
    (rule,) = job["spec"]["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2, 3, 4]
    labels = job["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == "research"
    assert labels["kueue.x-k8s.io/priority-class"] == "high"
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"] == job["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert pod["restartPolicy"] == "Never" and pod["tolerations"] and pod["securityContext"]["runAsNonRoot"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"


@pytest.mark.parametrize("index", [0, 1])
def test_the_line_of_a_pod_has_its_index_and_the_first_host(runner, index):
    job, _ = job_of(runner, "-j", "2x1")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    variables = {one["name"]: one["value"] for one in container["env"]}
    name = job["metadata"]["name"]
    assert variables["MIM_FIRST_HOST"] == f"{name}-0.{name}"
    line = expanded(container["command"][2], variables).replace('exec "${MIM_PYTHON:-python}"', "echo")
    said = subprocess.run(
        ["bash", "-c", line], env=variables | {"JOB_COMPLETION_INDEX": str(index), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert f"--rdzv_conf is_host={int(index == 0)} " in said
    assert f"--rdzv_endpoint {name}-0.{name}:2" in said and f"--rdzv_id {name} " in said


def test_a_job_is_created_with_a_service_that_is_deleted_with_it(runner, kubernetes):
    handle = runner.run_component("mim.ctr", [*CTR, "-j", "2x1", *BASE], "kueue", QUEUE)
    job = kubernetes.created["/apis/batch/v1/namespaces/ads/jobs"]
    service = kubernetes.created["/api/v1/namespaces/ads/services"]
    assert handle == f"kueue://tests/ads:{job['metadata']['name']}"
    (owner,) = service["metadata"]["ownerReferences"]
    assert owner == {"apiVersion": "batch/v1", "kind": "Job", "name": job["metadata"]["name"], "uid": "u-1"}


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ({}, AppState.PENDING),
        ({"conditions": [{"type": "Suspended", "status": "True"}]}, AppState.PENDING),
        ({"active": 2}, AppState.RUNNING),
        ({"active": 1, "conditions": [{"type": "Failed", "status": "False"}]}, AppState.RUNNING),
        ({"conditions": [{"type": "Complete", "status": "True"}]}, AppState.SUCCEEDED),
        ({"conditions": [{"type": "Failed", "status": "True"}]}, AppState.FAILED),
    ],
)
def test_the_state_of_a_job(runner, kubernetes, status, state):
    kubernetes.status = status
    assert runner.status("kueue://tests/ads:a-job").state == state
    (listed,) = runner.list("kueue")
    assert (listed.app_id, listed.state) == ("ads:a-job", state)


def test_a_job_that_is_not_there_has_no_state(runner):
    assert runner.status("kueue://tests/ads:another") is None


def test_a_job_is_cancelled_with_its_pods(runner, kubernetes):
    runner.cancel("kueue://tests/ads:a-job")
    (deleted,) = kubernetes.deleted
    assert deleted == "/apis/batch/v1/namespaces/ads/jobs/a-job?propagationPolicy=Background"


def test_logs_are_those_of_the_newest_pod_of_an_index(runner):
    assert list(runner.log_lines("kueue://tests/ads:a-job", "ctr", 1)) == ["one\n", "two\n"]
    assert list(runner.log_lines("kueue://tests/ads:a-job", "ctr", 1, regex="tw")) == ["two\n"]
    with pytest.raises(OptionError, match="ads:a-job has no pod 0"):
        runner.log_lines("kueue://tests/ads:a-job", "ctr", 0)


@pytest.mark.parametrize(
    ("component", "words", "problem"),
    [
        ("mim.ctr", ["--data", "d", "--out", "o", *BASE], "needs --image"),
        ("utils.echo", ["--image", "mim:1"], "kueue runs components of mim_torchrec.launch.jobs"),
    ],
)
def test_what_cannot_run_is_refused(runner, component, words, problem):
    with pytest.raises(OptionError, match=problem):
        runner.dryrun_component(component, words, "kueue", QUEUE)
