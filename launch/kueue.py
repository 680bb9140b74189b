"""A scheduler `kueue` for TorchX: jobs of Kubernetes itself, which Kueue admits when its queue has room.

A job is an indexed `Job` that is created suspended, with the label of its queue, and a headless `Service` by
which its pods find the first one. Kueue starts all pods or none. A pod that fails is started again alone, and
the agents of torchrun meet again. An index is not known when the job is described, so that a component has to
be a line of bash, as those of `jobs.py` are.
"""

from typing import TYPE_CHECKING, Any, List  # noqa: UP035

import yaml
from torchx.schedulers.api import AppDryRunInfo, DescribeAppResponse, ListAppResponse
from torchx.schedulers.ids import make_unique
from torchx.schedulers.kubernetes_scheduler import KubernetesOpts, role_to_pod, sanitize_for_serialization
from torchx.specs import AppDef, AppState, macros, runopts
from torchx.util.strings import normalize_str

from mim_torchrec.errors import OptionError, Status
from mim_torchrec.extras import needs
from mim_torchrec.launch.kubernetes import VolcanoScheduler, check, complete
from mim_torchrec.launch.refusals import refusals

if TYPE_CHECKING:
    from kubernetes.client import CoreV1Api

QUEUE, PRIORITY = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"
OURS = {"app.kubernetes.io/managed-by": "mim-torchrec"}
FINAL = {"operator": "In", "values": [int(one) for one in (Status.USAGE, Status.DATA, Status.VERSION)]}
"""Exit statuses of a wrong submission or wrong data: another attempt would end as this one."""
INDEX, FIRST = "JOB_COMPLETION_INDEX", "MIM_FIRST_HOST"


class KueueJob:
    """What is sent to Kubernetes.

    Args:
        job: of `batch/v1`.
        service: of `v1`, headless.
    """

    def __init__(self, job: dict[str, Any], service: dict[str, Any]) -> None:
        self.job, self.service = job, service

    def __str__(self) -> str:
        return yaml.dump_all([self.job, self.service], sort_keys=False)

    __repr__ = __str__


class KueueScheduler(VolcanoScheduler):
    """Indexed jobs in a queue of Kueue."""

    def _run_opts(self) -> runopts:
        opts = super()._run_opts()
        opts.add("queue", type_=str, help="LocalQueue of Kueue in the namespace", required=True)
        opts.add("priority_class", type_=str, help="WorkloadPriorityClass of Kueue")
        return opts

    def _submit_dryrun(self, app: AppDef, cfg: KubernetesOpts) -> AppDryRunInfo[KueueJob]:
        with refusals():
            check(app)
            with needs("kubernetes"):
                import kubernetes  # noqa: F401
            return AppDryRunInfo(describe_job(app, cfg), repr)

    def schedule(self, dryrun_info: AppDryRunInfo[KueueJob]) -> str:
        """Create the job and its service; the service is deleted with the job."""
        from kubernetes import client

        namespace = (dryrun_info._cfg or {}).get("namespace") or "default"
        job, service = dryrun_info.request.job, dryrun_info.request.service
        made = client.BatchV1Api(self._api_client()).create_namespaced_job(namespace, job)
        owner = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "name": made.metadata.name,
            "uid": made.metadata.uid,
        }
        owned = service | {"metadata": service["metadata"] | {"ownerReferences": [owner]}}
        client.CoreV1Api(self._api_client()).create_namespaced_service(namespace, owned)
        return f"{namespace}:{made.metadata.name}"

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """The state of a job; None where there is none."""
        from kubernetes import client

        namespace, name = app_id.split(":")
        try:
            job = client.BatchV1Api(self._api_client()).read_namespaced_job(name, namespace)
        except client.ApiException as error:
            if error.status == 404:
                return None
            raise
        return DescribeAppResponse(app_id=app_id, state=state_of(job))

    def list(self) -> List[ListAppResponse]:  # noqa: UP006
        """All jobs that this scheduler has created, in all namespaces."""
        from kubernetes import client

        selector = ",".join(f"{name}={value}" for name, value in OURS.items())
        found = client.BatchV1Api(self._api_client()).list_job_for_all_namespaces(label_selector=selector)
        return [
            ListAppResponse(app_id=f"{job.metadata.namespace}:{job.metadata.name}", state=state_of(job))
            for job in found.items
        ]

    def _cancel_existing(self, app_id: str) -> None:
        from kubernetes import client

        namespace, name = app_id.split(":")
        client.BatchV1Api(self._api_client()).delete_namespaced_job(
            name, namespace, propagation_policy="Background"
        )

    def _pod(self, core: "CoreV1Api", app_id: str, role_name: str, number: int) -> str:
        namespace, name = app_id.split(":")
        selector = f"batch.kubernetes.io/job-name={name},batch.kubernetes.io/job-completion-index={number}"
        pods = core.list_namespaced_pod(namespace, label_selector=selector).items
        if not pods:
            raise OptionError(f"{app_id} has no pod {number}; `torchx status` says whether it is admitted")
        newest = max(pods, key=lambda pod: pod.metadata.creation_timestamp)
        return str(newest.metadata.name)


def describe_job(app: AppDef, cfg: KubernetesOpts) -> KueueJob:
    """The job of a component.

    Raises:
        OptionError: it has several roles, or is no line of bash, or a variable with the number of a pod.
    """
    if len(app.roles) != 1 or app.roles[0].entrypoint != "bash":
        raise OptionError("kueue runs components of mim_torchrec.launch.jobs: one role, a line of bash")
    numbered = [key for key, value in app.roles[0].env.items() if macros.replica_id in value]
    if numbered:
        raise OptionError(
            f"--env {numbered[0]}: on kueue a variable does not hold {macros.replica_id}; pods have their "
            f"number in {INDEX}, and flags of the stage may hold {macros.replica_id}"
        )
    name = normalize_str(make_unique(app.name))[-52:].strip("-")  # a pod's host name is longer by its index
    values = macros.Values(img_root="", app_id=name, replica_id=f"${INDEX}", rank0_env=FIRST)
    role = values.apply(app.roles[0])
    role.env[FIRST] = f"{name}-0.{name}"
    pod = role_to_pod(normalize_str(role.name), role, cfg.get("service_account"))
    complete(pod, cfg)
    pod.spec.subdomain = name
    labels = OURS | {QUEUE: cfg["queue"], "app.kubernetes.io/name": normalize_str(app.name)}
    if cfg.get("priority_class"):
        labels[PRIORITY] = str(cfg["priority_class"])
    pod.metadata.labels = dict(OURS)
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "suspend": True,  # until Kueue admits it
            "completionMode": "Indexed",
            "completions": role.num_replicas,
            "parallelism": role.num_replicas,
            "backoffLimit": role.max_retries * role.num_replicas,  # when one pod fails, all do
            "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": FINAL}]},
            "template": sanitize_for_serialization(pod),
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": OURS},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"batch.kubernetes.io/job-name": name},
        },
    }
    return KueueJob(job, service)


def state_of(job: Any) -> AppState:
    """The state of a job in TorchX's words."""
    ended = {one.type for one in job.status.conditions or [] if one.status == "True"}
    if "Complete" in ended:
        return AppState.SUCCEEDED
    if "Failed" in ended:
        return AppState.FAILED
    return AppState.RUNNING if job.status.active else AppState.PENDING


def create_scheduler(session_name: str, **settings: Any) -> KueueScheduler:
    """What TorchX calls for `-s kueue`; `settings` are those of its scheduler of Kubernetes."""
    known = {name: settings[name] for name in ("client", "docker_client") if name in settings}
    return KueueScheduler(session_name, **known)
