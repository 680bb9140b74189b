"""TorchX's scheduler `kubernetes` (Volcano jobs) with what a real cluster asks of pods, and with refusals.

Added to TorchX's: tolerations, secrets as files, a user that is not root, pods of an elastic job that start
again alone. An image is needed, and it is used as it is: TorchX would build the current folder into it with a
Docker daemon, also in a dry run. Several servers are no job: Volcano starts all of its pods again when one
fails, so servers are the Deployment of `deploy/kubernetes/serve`.
"""

import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, List  # noqa: UP035

from torchx.schedulers.api import AppDryRunInfo, Stream, filter_regex, split_lines
from torchx.schedulers.kubernetes_scheduler import KubernetesJob, KubernetesOpts, KubernetesScheduler
from torchx.specs import AppDef, CfgVal, Role, runopts
from torchx.util.strings import normalize_str

from mim_torchrec.errors import OptionError
from mim_torchrec.extras import needs
from mim_torchrec.launch.refusals import refusals

if TYPE_CHECKING:
    from kubernetes.client import CoreV1Api, V1Pod, V1Toleration

EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
RESTART_ALONE = [{"event": event, "action": "RestartTask"} for event in ("PodFailed", "PodEvicted")]


class VolcanoScheduler(KubernetesScheduler):
    """Volcano jobs on Kubernetes."""

    def _run_opts(self) -> runopts:
        opts = super()._run_opts()
        opts.add(
            "tolerations",
            type_=List[str],  # noqa: UP006
            default=None,
            help="taints of nodes that the pods tolerate, each KEY[=VALUE][:EFFECT], separated by ;",
        )
        opts.add(
            "secrets",
            type_=List[str],  # noqa: UP006
            default=None,
            help="secrets that are mounted as read-only files, each NAME:/FOLDER, separated by ;",
        )
        opts.add(
            "run_as_user",
            type_=int,
            default=None,
            help="number of the user, 1000 for the project's image; the pod gives up all other privileges",
        )
        return opts

    def build_workspace_and_update_role(self, role: Role, workspace: str, cfg: Mapping[str, CfgVal]) -> None:
        """Build the current folder into the image only where a repository is named for the result."""
        with refusals():
            check_image(role)
        if cfg.get("image_repo"):
            super().build_workspace_and_update_role(role, workspace, cfg)

    def _submit_dryrun(self, app: AppDef, cfg: KubernetesOpts) -> AppDryRunInfo[KubernetesJob]:
        with refusals():
            check(app)
            with needs("kubernetes"):
                import kubernetes  # noqa: F401
            dryrun: AppDryRunInfo[KubernetesJob] = super()._submit_dryrun(app, cfg)
            spec: Any = dryrun.request.resource["spec"]
            for task in spec["tasks"]:
                complete(task["template"], cfg)
            for task in spec["tasks"] if is_elastic(app.roles[0]) else ():
                if "policies" in task:
                    task["policies"] = RESTART_ALONE
        return dryrun

    def log_iter(
        self,
        app_id: str,
        role_name: str,
        k: int = 0,
        regex: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        should_tail: bool = False,
        streams: Stream | None = None,
    ) -> Iterable[str]:
        """Lines of a pod. TorchX's own get the bytes of newer clients as one line."""
        from kubernetes import client, watch

        if streams not in (None, Stream.COMBINED) or until is not None:
            raise OptionError("logs of Kubernetes have one stream, and no end in time")
        core = client.CoreV1Api(self._api_client())
        words: dict[str, Any] = {
            "name": self._pod(core, app_id, role_name, k), "namespace": app_id.split(":")[0],
        }  # fmt: skip
        if since is not None:
            words["since_seconds"] = max(1, int((datetime.now(since.tzinfo) - since).total_seconds()))
        if should_tail:
            lines: Iterable[str] = watch.Watch().stream(core.read_namespaced_pod_log, **words)
        else:
            answer = core.read_namespaced_pod_log(**words, _preload_content=False)
            lines = split_lines(answer.data.decode(errors="replace"))
        return filter_regex(regex, lines) if regex else lines

    def _pod(self, core: "CoreV1Api", app_id: str, role_name: str, number: int) -> str:
        """Name of the pod of a node of the job."""
        return normalize_str(f"{app_id.split(':')[1]}-{role_name}-{number}-0")


def check(app: AppDef) -> None:
    """Refuse what would be accepted here and fail on the cluster.

    Raises:
        OptionError: an image is missing, or the job has several servers.
    """
    for role in app.roles:
        check_image(role)
    if app.metadata.get("stage") == "serve" and app.roles[0].num_replicas > 1:
        raise OptionError(
            f"--replicas {app.roles[0].num_replicas}: in one Volcano job a server that crashes restarts all "
            "others; use the Deployment of deploy/kubernetes/serve (docs/cluster.md), or --replicas 1"
        )


def check_image(role: Role) -> None:
    """Refuse a job without an image.

    Raises:
        OptionError: there is none.
    """
    if not role.image.strip():
        raise OptionError(f"{role.name} on kubernetes needs --image NAME, an image with mim-torchrec in it")


def is_elastic(role: Role) -> bool:
    """Whether the job goes on when some of its nodes leave."""
    return role.min_replicas is not None and role.min_replicas < role.num_replicas


def complete(pod: "V1Pod", cfg: Mapping[str, Any]) -> None:
    """Add to a pod what the configuration of the scheduler says, and keep its words from Kubernetes.

    Raises:
        OptionError: a toleration or a secret is malformed.
    """
    from kubernetes.client import (
        V1Capabilities,
        V1PodSecurityContext,
        V1SeccompProfile,
        V1SecretVolumeSource,
        V1SecurityContext,
        V1Volume,
        V1VolumeMount,
    )

    container = pod.spec.containers[0]
    container.command = [literal(word) for word in container.command]
    for variable in container.env:
        if variable.value is not None:
            variable.value = literal(variable.value)
    pod.spec.tolerations = [toleration(text) for text in cfg.get("tolerations") or []] or None
    for number, text in enumerate(cfg.get("secrets") or []):
        name, _, folder = text.partition(":")
        if not name or not folder.startswith("/"):
            raise OptionError(f"secrets={text}: write NAME:/FOLDER")
        volume = f"secret-{number}"
        pod.spec.volumes.append(V1Volume(name=volume, secret=V1SecretVolumeSource(secret_name=name)))
        container.volume_mounts.append(V1VolumeMount(name=volume, mount_path=folder, read_only=True))
    user = cfg.get("run_as_user")
    if user is None:
        return
    if user < 1:
        raise OptionError(f"run_as_user={user}: it must be at least 1; root is 0")
    if container.security_context.privileged:
        raise OptionError(
            "run_as_user and a mount of type=device exclude each other: TorchX makes such a pod privileged"
        )
    pod.spec.security_context = V1PodSecurityContext(
        run_as_user=user,
        run_as_group=user,
        fs_group=user,
        run_as_non_root=True,
        seccomp_profile=V1SeccompProfile(type="RuntimeDefault"),
    )
    container.security_context = V1SecurityContext(
        allow_privilege_escalation=False, capabilities=V1Capabilities(drop=["ALL"])
    )


def literal(text: str) -> str:
    """Text in which Kubernetes sees no reference `$(NAME)` and no `$$`, of which it makes one dollar."""
    return re.sub(r"\$(?=[$(])", "$$", text)


def toleration(text: str) -> "V1Toleration":
    """A toleration of KEY[=VALUE][:EFFECT].

    Raises:
        OptionError: it has another form.
    """
    from kubernetes.client import V1Toleration

    taint, _, effect = text.partition(":")
    key, equals, value = taint.partition("=")
    if not key or effect not in ("", *EFFECTS):
        raise OptionError(
            f"tolerations={text}: write KEY[=VALUE][:EFFECT], EFFECT one of {', '.join(EFFECTS)}"
        )
    return V1Toleration(
        key=key, operator="Equal" if equals else "Exists", value=value if equals else None,
        effect=effect or None,
    )  # fmt: skip


def create_scheduler(session_name: str, **settings: Any) -> VolcanoScheduler:
    """What TorchX calls for `-s kubernetes`; `settings` are those of its own scheduler."""
    known = {name: settings[name] for name in ("client", "docker_client") if name in settings}
    return VolcanoScheduler(session_name, **known)
