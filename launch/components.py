"""TorchX components: one a stage, `torchx run -s <scheduler> mim.<stage> … -- <any flag of the stage>`.

A component only builds the description of a job; it imports none of the stages. The job is one documented
line of torchrun on every node:

    python -m torch.distributed.run --nproc_per_node 2 -m mim_torchrec.<module> --data DIR --out DIR …

TorchX reads `Optional`, `List` and `Dict` in signatures, private ones too, but neither `X | None` nor
postponed annotations; the part of a docstring under `Args:` is the component's `--help`. Schedulers in use:
local_cwd, local_docker, slurm and kubernetes.
"""

import shlex
from typing import Dict, List, Optional  # noqa: UP035

import torchx.specs as specs
from torchx.components.dist import parse_nnodes
from torchx.specs import macros

PORT = 29500


def pretrain(
    *script_args: str,
    data: str,
    out: str,
    j: str = "1x2",
    image: str = "",
    h: Optional[str] = None,  # noqa: UP045
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    max_restarts: int = 0,
    max_retries: int = 0,
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
) -> specs.AppDef:
    """
    Adapt the towers to images and titles of the items (DDA) and align them with each other (DMA).

    Args:
        script_args: further flags of the stage, after a lone --
        data: dataset directory
        out: directory of the towers, metrics and config
        j: [{min_nnodes}:]{nnodes}x{nproc_per_node}
        image: container image with mim-torchrec in it, for kubernetes and local_docker
        h: a named resource, in place of cpu, gpu and memMB
        cpu: cores per node
        gpu: accelerators per node
        memMB: memory per node in MiB
        max_restarts: times the workers are started again inside the job when one fails
        max_retries: times the scheduler starts the job again; local_cwd never does
        env: environment variables, A=1,B=2
        mounts: type=bind,src=/host,dst=/job[,readonly]
    """
    command = ["-m", "mim_torchrec.pretraining.main", "--data", data, "--out", out, *script_args]
    resource = specs.resource(cpu=cpu, gpu=gpu, memMB=memMB, h=h)
    return _distributed("pretrain", command, j, image, resource, max_restarts, max_retries, env, mounts)


def csft(
    *script_args: str,
    data: str,
    out: str,
    j: str = "1x2",
    image: str = "",
    h: Optional[str] = None,  # noqa: UP045
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    max_restarts: int = 0,
    max_retries: int = 0,
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
) -> specs.AppDef:
    """
    Fine-tune the item encoder contrastively on what users bought (C-SFT).

    Args:
        script_args: further flags of the stage, after a lone --
        data: dataset directory
        out: directory of the encoder, history and config
        j: [{min_nnodes}:]{nnodes}x{nproc_per_node}
        image: container image with mim-torchrec in it, for kubernetes and local_docker
        h: a named resource, in place of cpu, gpu and memMB
        cpu: cores per node
        gpu: accelerators per node
        memMB: memory per node in MiB
        max_restarts: times the workers are started again inside the job when one fails
        max_retries: times the scheduler starts the job again; local_cwd never does
        env: environment variables, A=1,B=2
        mounts: type=bind,src=/host,dst=/job[,readonly]
    """
    command = ["-m", "mim_torchrec.csft.main", "--data", data, "--out", out, *script_args]
    resource = specs.resource(cpu=cpu, gpu=gpu, memMB=memMB, h=h)
    return _distributed("csft", command, j, image, resource, max_restarts, max_retries, env, mounts)


def export(
    *script_args: str,
    data: str,
    encoder: str,
    out: str,
    j: str = "1x2",
    image: str = "",
    h: Optional[str] = None,  # noqa: UP045
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    max_restarts: int = 0,
    max_retries: int = 0,
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
) -> specs.AppDef:
    """
    Encode every item and write the multi-modal table.

    Args:
        script_args: further flags of the stage, after a lone --
        data: dataset directory
        encoder: encoder directory written by csft, or plain:<vision>+<text>, or plain:<directory of towers>
        out: directory of the table; must not exist
        j: [{min_nnodes}:]{nnodes}x{nproc_per_node}
        image: container image with mim-torchrec in it, for kubernetes and local_docker
        h: a named resource, in place of cpu, gpu and memMB
        cpu: cores per node
        gpu: accelerators per node
        memMB: memory per node in MiB
        max_restarts: times the workers are started again inside the job when one fails
        max_retries: times the scheduler starts the job again; local_cwd never does
        env: environment variables, A=1,B=2
        mounts: type=bind,src=/host,dst=/job[,readonly]
    """
    command = ["-m", "mim_torchrec.representation.export", "--data", data, "--encoder", encoder, "--out", out]
    command += script_args
    resource = specs.resource(cpu=cpu, gpu=gpu, memMB=memMB, h=h)
    return _distributed("export", command, j, image, resource, max_restarts, max_retries, env, mounts)


def ctr(
    *script_args: str,
    data: str,
    out: str,
    table: Optional[str] = None,  # noqa: UP045
    j: str = "1x2",
    image: str = "",
    h: Optional[str] = None,  # noqa: UP045
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    max_restarts: int = 0,
    max_retries: int = 0,
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
) -> specs.AppDef:
    """
    Train a click-through-rate model, with content interest or (-- --mim off) without, and evaluate it.

    Args:
        script_args: further flags of the stage, after a lone --
        data: dataset directory
        out: directory of the metrics, predictions and checkpoint
        table: directory of the multi-modal table; needed unless --mim is off
        j: [{min_nnodes}:]{nnodes}x{nproc_per_node}
        image: container image with mim-torchrec in it, for kubernetes and local_docker
        h: a named resource, in place of cpu, gpu and memMB
        cpu: cores per node
        gpu: accelerators per node
        memMB: memory per node in MiB
        max_restarts: times the workers are started again inside the job when one fails
        max_retries: times the scheduler starts the job again; local_cwd never does
        env: environment variables, A=1,B=2
        mounts: type=bind,src=/host,dst=/job[,readonly]
    """
    command = ["-m", "mim_torchrec.ctr.main", "--data", data, "--out", out]
    command += ["--table", table] if table is not None else []
    command += script_args
    resource = specs.resource(cpu=cpu, gpu=gpu, memMB=memMB, h=h)
    return _distributed("ctr", command, j, image, resource, max_restarts, max_retries, env, mounts)


def evaluate(
    *script_args: str,
    model: str,
    out: str,
    j: str = "1x2",
    image: str = "",
    h: Optional[str] = None,  # noqa: UP045
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    max_restarts: int = 0,
    max_retries: int = 0,
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
) -> specs.AppDef:
    """
    Score a split with a trained click-through-rate model.

    Args:
        script_args: further flags of the stage, after a lone --
        model: directory that ctr has written
        out: directory of the metrics and predictions
        j: [{min_nnodes}:]{nnodes}x{nproc_per_node}
        image: container image with mim-torchrec in it, for kubernetes and local_docker
        h: a named resource, in place of cpu, gpu and memMB
        cpu: cores per node
        gpu: accelerators per node
        memMB: memory per node in MiB
        max_restarts: times the workers are started again inside the job when one fails
        max_retries: times the scheduler starts the job again; local_cwd never does
        env: environment variables, A=1,B=2
        mounts: type=bind,src=/host,dst=/job[,readonly]
    """
    command = ["-m", "mim_torchrec.ctr.evaluation", "--model", model, "--out", out, *script_args]
    resource = specs.resource(cpu=cpu, gpu=gpu, memMB=memMB, h=h)
    return _distributed("evaluate", command, j, image, resource, max_restarts, max_retries, env, mounts)


def rim(
    *script_args: str,
    source: str,
    encoder: str,
    table: str,
    log: str,
    out: str,
    image: str = "",
    h: Optional[str] = None,  # noqa: UP045
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    max_retries: int = 1000,
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
) -> specs.AppDef:
    """
    Encode new items as they come and publish them in windows (RIM), until the job is cancelled.

    Args:
        script_args: further flags of the stage, after a lone --
        source: directory of Parquet files, or URL of a Redis stream, that items come to
        encoder: encoder directory written by csft, of which the table is
        table: directory of the base table
        log: directory or URL of the window log
        out: directory of the dead-letter file and the counts
        image: container image with mim-torchrec in it, for kubernetes and local_docker
        h: a named resource, in place of cpu, gpu and memMB
        cpu: cores
        gpu: accelerators
        memMB: memory in MiB
        max_retries: times the scheduler starts the job again; local_cwd never does
        env: environment variables, A=1,B=2
        mounts: type=bind,src=/host,dst=/job[,readonly]
    """
    command = ["-m", "mim_torchrec.rim.main", "--source", source, "--encoder", encoder, "--table", table]
    command += ["--log", log, "--out", out, *script_args]
    resource = specs.resource(cpu=cpu, gpu=gpu, memMB=memMB, h=h)
    return _service("rim", command, image, resource, max_retries, env, mounts)


def follow(
    *script_args: str,
    store: str,
    log: str,
    table_version: str,
    image: str = "",
    h: Optional[str] = None,  # noqa: UP045
    cpu: int = 1,
    memMB: int = 2048,
    max_retries: int = 1000,
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
) -> specs.AppDef:
    """
    Apply the windows of a log to a parameter store as they come, until the job is cancelled.

    Args:
        script_args: further flags of the stage, after a lone --
        store: URL of the store
        log: directory or URL of the window log
        table_version: of both
        image: container image with mim-torchrec in it, for kubernetes and local_docker
        h: a named resource, in place of cpu and memMB
        cpu: cores
        memMB: memory in MiB
        max_retries: times the scheduler starts the job again; local_cwd never does
        env: environment variables, A=1,B=2
        mounts: type=bind,src=/host,dst=/job[,readonly]
    """
    command = ["-m", "mim_torchrec.embeddings.stores.main", "follow", "--store", store, "--log", log]
    command += ["--table-version", table_version, *script_args]
    resource = specs.resource(cpu=cpu, gpu=0, memMB=memMB, h=h)
    return _service("follow", command, image, resource, max_retries, env, mounts)


def serve(
    *script_args: str,
    release: Optional[str] = None,  # noqa: UP045
    bundle: Optional[str] = None,  # noqa: UP045
    host: str = "0.0.0.0",
    port: int = 8080,
    replicas: int = 1,
    image: str = "",
    h: Optional[str] = None,  # noqa: UP045
    cpu: int = 2,
    memMB: int = 4096,
    max_retries: int = 1000,
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
) -> specs.AppDef:
    """
    Answer requests for scores over HTTP, until the job is cancelled.

    Args:
        script_args: further flags of the stage, after a lone --; --token-file unless host is loopback
        release: folder of releases, whose current one is served
        bundle: in place of release, directory that mim bundle has written; --store goes after a lone --
        host: address to bind to
        port: port to bind to
        replicas: servers, each with a copy of the dense weights
        image: container image with mim-torchrec in it, for kubernetes and local_docker
        h: a named resource, in place of cpu and memMB
        cpu: cores of a server
        memMB: memory of a server in MiB
        max_retries: times the scheduler starts the job again; local_cwd never does
        env: environment variables, A=1,B=2
        mounts: type=bind,src=/host,dst=/job[,readonly]
    """
    command = ["-m", "mim_torchrec.serving.main", "--host", host, "--port", str(port)]
    command += ["--release", release] if release is not None else []
    command += ["--bundle", bundle] if bundle is not None else []
    command += script_args
    resource = specs.resource(cpu=cpu, gpu=0, memMB=memMB, h=h)
    app = _service("serve", command, image, resource, max_retries, env, mounts)
    app.roles[0].num_replicas = replicas
    app.roles[0].port_map = {"http": port}
    return app


def bench(
    *script_args: str,
    name: str,
    out: str,
    image: str = "",
    h: Optional[str] = None,  # noqa: UP045
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    max_retries: int = 0,
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
) -> specs.AppDef:
    """
    Run a benchmark, such as paper.efficiency.main (Table 6).

    Args:
        script_args: further flags of the benchmark, after a lone --
        name: module of mim_torchrec.benchmarks: paper.efficiency.main, speed.ctr_throughput, chaos.main, ...
        out: directory of the report
        image: container image with mim-torchrec[report] in it, for kubernetes and local_docker
        h: a named resource, in place of cpu, gpu and memMB
        cpu: cores
        gpu: accelerators
        memMB: memory in MiB
        max_retries: times the scheduler starts the job again; local_cwd never does
        env: environment variables, A=1,B=2
        mounts: type=bind,src=/host,dst=/job[,readonly]
    """
    command = ["-m", f"mim_torchrec.benchmarks.{name}", "--out", out, *script_args]
    resource = specs.resource(cpu=cpu, gpu=gpu, memMB=memMB, h=h)
    return _service("bench", command, image, resource, max_retries, env, mounts)


def _service(
    stage: str,
    command: list[str],
    image: str,
    resource: specs.Resource,
    max_retries: int,
    env: Optional[Dict[str, str]],  # noqa: UP006, UP045
    mounts: Optional[List[str]],  # noqa: UP006, UP045
) -> specs.AppDef:
    """One process, which most often runs until it is told to stop."""
    role = specs.Role(
        name=stage,
        image=image,
        entrypoint="bash",
        args=["-c", f'exec "$${{MIM_PYTHON:-python}}" {shlex.join(command)}'],
        env=dict(env or {}),
        max_retries=max_retries,
        retry_policy=specs.RetryPolicy.APPLICATION,
        resource=resource,
        mounts=specs.parse_mounts(mounts) if mounts else [],
    )
    return specs.AppDef(name=f"mim-{stage}", roles=[role], metadata={"app": "mim", "stage": stage})


def _distributed(
    stage: str,
    command: list[str],
    j: str,
    image: str,
    resource: specs.Resource,
    max_restarts: int,
    max_retries: int,
    env: Optional[Dict[str, str]],  # noqa: UP006, UP045
    mounts: Optional[List[str]],  # noqa: UP006, UP045
) -> specs.AppDef:
    """One role of torchrun agents, a replica for each node."""
    min_nodes, max_nodes, processes, nodes = parse_nnodes(j)
    # port 0 lets torchrun choose a free one; TorchX fills in ${rank0_env}, bash the variable it names
    endpoint = "localhost:0" if max_nodes == 1 else f'"$${{{macros.rank0_env}:=localhost}}:{PORT}"'
    options = {
        "--rdzv_backend": "c10d",
        "--rdzv_id": macros.app_id,
        "--nnodes": nodes,
        "--nproc_per_node": str(processes),
        "--max_restarts": str(max_restarts),
        "--tee": "3",
        "--role": "",
    }
    words = [word for option in options.items() for word in option] + command
    # not `torchrun`: the first one on PATH may belong to another environment
    launcher = 'exec "$${MIM_PYTHON:-python}" -m torch.distributed.run --rdzv_endpoint'
    role = specs.Role(
        name=stage,
        image=image,
        entrypoint="bash",
        args=["-c", f"{launcher} {endpoint} {shlex.join(words)}"],
        num_replicas=max_nodes,
        min_replicas=min_nodes,
        # workers that are restarted hang when they share the store of the rendezvous
        env={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **(env or {})},
        port_map={"c10d": PORT},
        max_retries=max_retries,
        retry_policy=specs.RetryPolicy.APPLICATION,
        resource=resource,
        mounts=specs.parse_mounts(mounts) if mounts else [],
    )
    return specs.AppDef(name=f"mim-{stage}", roles=[role], metadata={"app": "mim", "stage": stage})
