"""Describe your own jobs as the stages are described: TorchX components of one process or of several ranks.

    @distributed()                                      # or @service() for one process
    def train(*script_args: str, data: str) -> specs.AppDef:
        '''Train my model.

        Args:
            script_args: further flags, after a lone --
            data: dataset directory
        '''
        return process("train", "my_package.train", script_args, data=data)

The function describes one process by the words of its command line, with `process`. The decorator adds the
arguments of a job and applies them: image, resources and retries, and the ranks of torchrun. These arguments
are the keyword arguments of `_job` and `_torchrun`, which document them too: they stand behind those of the
function, in its signature and docstring. TorchX takes types of arguments as `Optional`, `Dict` and `List`
only.

What cannot run is refused at submission, by an `OptionError`; the command `torchx` prints it as one line.
"""

import inspect
import re
import shlex
from functools import partial, wraps
from pathlib import PurePath
from typing import Any, Callable, Dict, List, Optional, Tuple  # noqa: UP035

import torchx.specs as specs
from torchx.components.dist import parse_nnodes
from torchx.specs import macros

from mim_torchrec.errors import OptionError
from mim_torchrec.launch.refusals import refusals

__all__ = ["distributed", "process", "service"]

CPU_PER_PROCESS, MEMORY_PER_PROCESS = 1, 4096
CPU_PER_GPU, MEMORY_PER_GPU = 8, 32768  # as in the named resources of TorchX
"""What a node gets where a submission names neither cores nor MiB; at least two processes' share."""
ENDLESS = 1000
"""`max_retries` of jobs that run until they are cancelled."""
ELASTIC_RESTARTS = 10
MACROS = re.compile("(" + "|".join(map(re.escape, (macros.app_id, macros.replica_id, macros.img_root))) + ")")
FIRST_PORT, PORTS = 20000, 10000  # below those that Linux gives to outgoing connections


def process(
    stage: str,
    module: str,
    script_args: Tuple[str, ...],  # noqa: UP006
    **flags: object,
) -> specs.AppDef:
    """A job of one process, for a decorator below to complete.

    Args:
        stage: name of the job.
        module: what python runs, with the words of a command that it has.
        script_args: behind the flags.
        flags: of the module by name; those that are None are left out.

    Returns:
        A job with one role, whose `args` are the words behind `python`. A function may change the role
        further, such as its `num_replicas`, before it returns the job.
    """
    words = [
        ["--" + name.replace("_", "-"), str(value)] for name, value in flags.items() if value is not None
    ]
    command = ["-m", *module.split(), *(word for pair in words for word in pair), *script_args]
    role = specs.Role(name=stage, image="", args=command)
    name = _job_name(stage, str(flags.get("out") or ""))
    return specs.AppDef(name=name, roles=[role], metadata={"app": "mim", "stage": stage})


def _job_name(stage: str, out: str) -> str:
    """What the job does and where to: mim-ctr-base for --out runs/base."""
    last = re.sub("[^a-z0-9]+", "-", PurePath(out).name.lower()).strip("-")[:40].strip("-")
    return f"mim-{stage}-{last}" if last not in ("", stage) else f"mim-{stage}"


def service(**defaults: Any) -> Callable:
    """Make a component of one process, which most often runs until it is told to stop.

    Args:
        defaults: of arguments of the job (`image`, `job_name`, `h`, `cpu`, `gpu`, `memMB`, `max_retries`,
            `env`, `mounts`), where they are others.

    Returns:
        A decorator of a function that returns `process(...)`.
    """
    return partial(_component, [_python, _job], defaults)


def distributed(*, elastic: bool = True, **defaults: Any) -> Callable:
    """Make a component of torchrun agents, a replica for each node.

    Args:
        elastic: whether the program goes on with another number of ranks; else a range of nodes is refused.
        defaults: of arguments of the job, those of `service` and `j`, `max_restarts`, `port` and `grace`,
            where they are others.

    Returns:
        A decorator of a function that returns `process(...)`.
    """
    return partial(_component, [_torchrun if elastic else _torchrun_of_fixed_size, _job], defaults)


def _component(
    steps: List[Callable],  # noqa: UP006
    defaults: Dict[str, Any],  # noqa: UP006
    function: Callable,
) -> Callable:
    """The function with the keyword arguments of the steps behind its own."""
    own = inspect.signature(function)
    of_step = [
        [
            parameter.replace(default=defaults.get(name, parameter.default))
            for name, parameter in inspect.signature(step).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        ]
        for step in steps
    ]
    added = [parameter for parameters in of_step for parameter in parameters]

    @wraps(function)
    def component(*script_args: str, **arguments: Any) -> specs.AppDef:
        given = {p.name: arguments.pop(p.name, p.default) for p in added}
        with refusals():
            app = function(*script_args, **arguments)
            app.name = given["job_name"] or app.name
            for step, parameters in zip(steps, of_step, strict=True):
                step(app.roles[0], **{p.name: given[p.name] for p in parameters})
        return app

    lines = [line for step in steps for line in (inspect.getdoc(step) or "").splitlines()]
    documented = [line for line in lines if line.strip().partition(":")[0] in {p.name for p in added}]
    component.__doc__ = "\n".join([inspect.getdoc(function) or "", *documented])
    signature = own.replace(parameters=[*own.parameters.values(), *added])
    component.__signature__ = signature  # type: ignore[attr-defined]
    return component


def _python(role: specs.Role) -> None:
    """Run the words of a role by python."""
    _run(role, f'exec "$${{MIM_PYTHON:-python}}" {_quoted(role.args)}')


def _torchrun(
    role: specs.Role, *, j: str = "1x2", max_restarts: int = 0, port: int = 0, grace: int = 120
) -> None:
    """Run the words of a role by torchrun agents.

    Args:
        role: of the stage.
        j: [{min_nnodes}:]{nnodes}x{nproc_per_node}
        max_restarts: times the workers are started again inside the job; 0 is 10 where nodes may leave
        port: of the first node, where the agents of several nodes meet; 0 derives it from the job's id
        grace: seconds from a signal to end until ranks are killed, in which a checkpoint has to be written
    """
    min_nodes, max_nodes, processes, nodes = _nodes(j)
    endpoint, hosting = _meeting(max_nodes, port)
    options = {
        "--rdzv_backend": "c10d",
        "--rdzv_id": macros.app_id,
        "--nnodes": nodes,
        "--nproc_per_node": str(processes),
        "--max_restarts": str(max_restarts or (ELASTIC_RESTARTS if min_nodes < max_nodes else 0)),
        "--tee": "3",
        "--role": "",
    }
    words = [word for option in options.items() for word in option] + role.args
    # not `torchrun`: the first one on PATH may belong to another environment
    launcher = 'exec "$${MIM_PYTHON:-python}" -m mim_torchrec.training.agent --rdzv_endpoint'
    _run(role, f"{launcher} {endpoint} {hosting}{_quoted(words)}")
    role.num_replicas, role.min_replicas = max_nodes, min_nodes
    role.metadata["torchrun"] = {"processes": processes}
    if port:
        role.port_map = {"c10d": port}
    # workers that are restarted hang when they share the store of the rendezvous
    role.env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(grace)}
    if processes > 1:  # torchrun's own default, which it announces with a warning
        role.env["OMP_NUM_THREADS"] = "1"


def _torchrun_of_fixed_size(
    role: specs.Role, *, j: str = "1x2", max_restarts: int = 0, port: int = 0, grace: int = 120
) -> None:
    """Run the words of a role by torchrun agents, the same number from the start to the end.

    Args:
        role: of the stage.
        j: {nnodes}x{nproc_per_node}
        max_restarts: times the workers are started again inside the job when one fails
        port: of the first node, where the agents of several nodes meet; 0 derives it from the job's id
        grace: seconds from a signal to end until ranks are killed, in which a checkpoint has to be written
    """
    min_nodes, max_nodes, *_ = _nodes(j)
    if min_nodes < max_nodes:
        raise OptionError(
            f"-j {j}: {role.name} cannot go on with another number of ranks; name one number of nodes, as in "
            f"-j {max_nodes}x{j.partition('x')[2]}"
        )
    _torchrun(role, j=j, max_restarts=max_restarts, port=port, grace=grace)


def _nodes(j: str) -> Tuple[int, int, int, str]:  # noqa: UP006
    """The least and the largest number of nodes, processes of each, and the nodes as torchrun takes them."""
    form = "write [MIN_NODES:]NODESxPROCESSES, such as 1x2 or 2x8"
    try:
        found = parse_nnodes(j)
    except ValueError:
        raise OptionError(f"-j {j}: {form}") from None
    if not (1 <= found[0] <= found[1] and found[2] >= 1):
        raise OptionError(f"-j {j}: {form}, each at least 1")
    return found


def _meeting(nodes: int, port: int) -> Tuple[str, str]:  # noqa: UP006
    """Where the agents of a job meet, in the words of bash, and an option that says who is the host.

    TorchX fills in the macros, bash the variable that `rank0_env` names. Jobs that share a first node have
    different ports. Where two ids give one port, the second store cannot be opened and its job fails at once:
    only the first replica hosts the store, and it never joins one that is there already.
    """
    if nodes == 1:
        # torchrun chooses a free port; ranks meet without a name that a container may not resolve
        return "localhost:0", "--local_addr localhost "
    of_id = f"$(($(printf %s {macros.app_id} | cksum | cut -d' ' -f1) % {PORTS} + {FIRST_PORT}))"
    host = f"is_host=$((!{macros.replica_id}))"
    return f'"$${{{macros.rank0_env}:=localhost}}:{port or of_id}"', f"--rdzv_conf {host} "


def _quoted(words: List[str]) -> str:  # noqa: UP006
    """Words for the line of bash: as they are, but for macros, which may stand for a variable of bash."""
    joined = []
    for word in words:
        parts = MACROS.split(word)  # every second one is a macro
        quoted = [
            f'"{part}"' if at % 2 else _literal(shlex.quote(part)) for at, part in enumerate(parts) if part
        ]
        joined.append("".join(quoted) or "''")
    return " ".join(joined)


def _literal(text: str) -> str:
    """Text that TorchX, which makes one dollar of two, leaves as it is."""
    return text.replace("$$", "$$$$")


def _run(role: specs.Role, line: str) -> None:
    role.entrypoint, role.args = "bash", ["-c", line]


def _job(
    role: specs.Role,
    *,
    image: str = "",
    job_name: Optional[str] = None,  # noqa: ARG001, UP045
    h: Optional[str] = None,  # noqa: UP045
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 0,
    max_retries: int = 0,
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
) -> None:
    """What every job has.

    Args:
        role: of the job.
        image: container image with mim-torchrec in it; kubernetes, kueue and local_docker need one
        job_name: of the job; by default made of the stage and the last part of its out
        h: a named resource, in place of cpu, gpu and memMB
        cpu: cores of a node; 0 is 8 for each GPU, without GPUs 1 for each process, at least 2
        gpu: accelerators of a node, one for each process
        memMB: MiB of a node; 0 is 32768 for each GPU, without GPUs 4096 for each process, at least 8192
        max_retries: times the scheduler starts a failed job again; local_cwd never does
        env: environment variables, A=1,B=2
        mounts: type=bind|volume,src=/host|CLAIM,dst=/job[,readonly]
    """
    role.image = image
    role.resource = _resource(role, h, cpu, gpu, memMB)
    role.max_retries, role.retry_policy = max_retries, specs.RetryPolicy.APPLICATION
    role.env.update({name: _literal(value) for name, value in (env or {}).items()})
    try:
        role.mounts = specs.parse_mounts(mounts) if mounts else []
    except (KeyError, ValueError) as error:
        form = "type=bind|volume|device,src=…,dst=…[,readonly]"
        raise OptionError(f"--mounts {','.join(mounts or [])}: {error.args[0]}; write {form}") from None


def _resource(
    role: specs.Role,
    h: Optional[str],  # noqa: UP045
    cpu: int,
    gpu: int,
    memMB: int,
) -> specs.Resource:
    """What a node of the job has."""
    if min(cpu, gpu, memMB) < 0:
        raise OptionError("--cpu, --gpu and --memMB are at least 0")
    ranks = role.metadata.get("torchrun")
    processes = ranks["processes"] if ranks else 1
    if h:
        try:
            resource = specs.resource(h=h)
        except KeyError as error:
            raise OptionError(f"-h {h}: {error.args[0]}") from None
    elif gpu:
        resource = specs.Resource(cpu=cpu or CPU_PER_GPU * gpu, gpu=gpu, memMB=memMB or MEMORY_PER_GPU * gpu)
    else:
        share = max(processes, 2)
        resource = specs.Resource(
            cpu=cpu or CPU_PER_PROCESS * share, gpu=0, memMB=memMB or MEMORY_PER_PROCESS * share
        )
    if ranks and resource.gpu > 0 and (resource.gpu < processes or gpu > processes):
        raise OptionError(
            f"a node has {resource.gpu} GPUs and {processes} processes, and each process takes one GPU; "
            f"say -j {role.min_replicas}x{resource.gpu}"
        )
    return resource
