"""TorchX components: one a stage, `torchx run -s <scheduler> mim.<stage> … -- <any flag of the stage>`.

A component only builds the description of a job; it imports none of the stages. The job is one documented
line of torchrun on every node (`training/agent.py`), or of python for a service:

    python -m mim_torchrec.training.agent --nproc_per_node 2 -m mim_torchrec.<module> --data DIR --out DIR …

A component is a function with arguments of its own, under a decorator that adds the arguments of the job
(`jobs.py`): resources, image, retries. What would fail on the node is refused here, where it can be known.
TorchX looks for `def <name>` in this file and checks the annotations that it finds there; what a component
takes it asks the function. It reads `Optional`, `List` and `Dict` in signatures, private ones too, but not
`X | None` and no postponed annotations. The part of a docstring under `Args:` is the component's `--help`.
"""

import argparse
from typing import Optional, Tuple  # noqa: UP035

import torchx.specs as specs

from mim_torchrec.errors import OptionError
from mim_torchrec.hosts import is_loopback
from mim_torchrec.launch.jobs import ENDLESS, distributed, process, service


@distributed(elastic=False, max_retries=3)
def pretrain(*script_args: str, data: str, out: str) -> specs.AppDef:
    """
    Adapt the towers to images and titles of the items (DDA) and align them with each other (DMA).

    Args:
        script_args: further flags of the stage, after a lone --
        data: dataset directory, or its URL
        out: directory or URL of the towers, metrics and config
    """
    return process("pretrain", "mim_torchrec.pretraining.main", script_args, data=data, out=out)


@distributed(elastic=False, max_retries=3)
def csft(*script_args: str, data: str, out: str) -> specs.AppDef:
    """
    Fine-tune the item encoder contrastively on what users bought (C-SFT).

    Args:
        script_args: further flags of the stage, after a lone --
        data: dataset directory, or its URL
        out: directory or URL of the encoder, history and config
    """
    return process("csft", "mim_torchrec.csft.main", script_args, data=data, out=out)


@distributed(elastic=False, max_retries=3)
def export(*script_args: str, data: str, encoder: str, out: str) -> specs.AppDef:
    """
    Encode every item and write the multi-modal table.

    Args:
        script_args: further flags of the stage, after a lone --
        data: dataset directory, or its URL
        encoder: encoder directory written by csft, or plain:<vision>+<text>, or plain:<directory of towers>
        out: directory or URL of the table; must not exist
    """
    module = "mim_torchrec.representation.export"
    return process("export", module, script_args, data=data, encoder=encoder, out=out)


@distributed(max_retries=3)
def ctr(*script_args: str, data: str, out: str, table: Optional[str] = None) -> specs.AppDef:  # noqa: UP045
    """
    Train a click-through-rate model, with content interest or (-- --mim off) without, and evaluate it.

    Args:
        script_args: further flags of the stage, after a lone --
        data: dataset directory, or its URL
        out: directory or URL of the metrics, predictions and checkpoint
        table: directory or URL of the multi-modal table; needed unless --mim is off
    """
    if table is None and _flag(script_args, "--mim") != "off":
        raise OptionError("mim.ctr needs --table DIR, which mim.export writes; Base needs none: -- --mim off")
    return process("ctr", "mim_torchrec.ctr.main", script_args, data=data, out=out, table=table)


@distributed(elastic=False, max_retries=3)
def evaluate(*script_args: str, model: str, out: str) -> specs.AppDef:
    """
    Score a split with a trained click-through-rate model.

    Args:
        script_args: further flags of the stage, after a lone --
        model: directory that ctr has written, or its URL
        out: directory or URL of the metrics and predictions
    """
    return process("evaluate", "mim_torchrec.ctr.evaluation", script_args, model=model, out=out)


@service(max_retries=ENDLESS)
def rim(*script_args: str, source: str, encoder: str, table: str, log: str, out: str) -> specs.AppDef:
    """
    Encode new items as they come and publish them in windows (RIM), until the job is cancelled.

    Args:
        script_args: further flags of the stage, after a lone --
        source: directory of Parquet files, or URL of a Redis stream, that items come to
        encoder: encoder directory written by csft, of which the table is
        table: directory of the base table
        log: directory or URL of the window log
        out: directory of the dead-letter file and the counts
    """
    module = "mim_torchrec.rim.main"
    return process("rim", module, script_args, source=source, encoder=encoder, table=table, log=log, out=out)


@service(max_retries=ENDLESS, cpu=1, memMB=2048)
def follow(*script_args: str, store: str, log: str, table_version: str) -> specs.AppDef:
    """
    Apply the windows of a log to a parameter store as they come, until the job is cancelled.

    Args:
        script_args: further flags of the stage, after a lone --
        store: URL of the store
        log: directory or URL of the window log
        table_version: of both
    """
    module = "mim_torchrec.embeddings.stores.main follow"
    return process("follow", module, script_args, store=store, log=log, table_version=table_version)


@service(max_retries=ENDLESS, memMB=4096)
def serve(
    *script_args: str,
    release: Optional[str] = None,  # noqa: UP045
    bundle: Optional[str] = None,  # noqa: UP045
    host: str = "0.0.0.0",
    port: int = 8080,
    replicas: int = 1,
) -> specs.AppDef:
    """
    Answer requests for scores over HTTP, until the job is cancelled.

    Args:
        script_args: further flags of the stage, after a lone --; --token-file unless host is loopback
        release: folder of releases, whose current one is served
        bundle: in place of release, directory that mim bundle has written; --store goes after a lone --
        host: address to bind to
        port: port to bind to
        replicas: servers, each with a copy of the dense weights; on kubernetes 1, see docs/cluster.md
    """
    if (release is None) == (bundle is None):
        raise OptionError("mim.serve: say what to serve, --release DIR or --bundle DIR")
    if not is_loopback(host) and _flag(script_args, "--token-file") is None:
        raise OptionError(
            f"mim.serve at --host {host} can be reached by others and starts with tokens only: add "
            "`-- --token-file FILE`, a token a line, or say --host 127.0.0.1"
        )
    if replicas < 1:
        raise OptionError(f"--replicas is {replicas}; it must be at least 1")
    module = "mim_torchrec.serving.main"
    app = process("serve", module, script_args, host=host, port=port, release=release, bundle=bundle)
    app.roles[0].num_replicas = replicas
    app.roles[0].port_map = {"http": port}
    return app


@service()
def bench(*script_args: str, name: str, out: str) -> specs.AppDef:
    """
    Run a benchmark, such as paper.efficiency.main (Table 6).

    Args:
        script_args: further flags of the benchmark, after a lone --
        name: module of mim_torchrec.benchmarks: paper.efficiency.main, speed.ctr_throughput, chaos.main, ...
        out: directory of the report
    """
    return process("bench", f"mim_torchrec.benchmarks.{name}", script_args, out=out)


@distributed(elastic=False, j="2x1")
def doctor(*script_args: str) -> specs.AppDef:
    """
    Check whether the nodes of a job reach each other, how fast, and their versions and clocks.

    Args:
        script_args: further flags, after a lone --
    """
    return process("doctor", "mim_torchrec.doctor --nodes", script_args)


def _flag(script_args: Tuple[str, ...], name: str) -> Optional[str]:  # noqa: UP006, UP045
    """The value of a flag among those of a stage; None where it is not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(name, "--" + name[2:].replace("-", "_"), dest="value")
    return parser.parse_known_args(script_args)[0].value
