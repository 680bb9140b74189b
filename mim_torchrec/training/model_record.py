"""Which model a set of weights is: `model.json` beside them, so that no other configuration reads them.

Weights of a model with another pooling or vocabulary have the same names and shapes. Read with the wrong
configuration, they give wrong scores without an error.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from mim_torchrec.embeddings.files import write_json
from mim_torchrec.errors import ExpectedError, Status

RECORD = "model.json"


class ModelMismatch(ExpectedError, ValueError):
    """Weights and configuration are not of one model."""

    status = Status.VERSION


def write_model_record(folder: Path, model: dict[str, Any]) -> None:
    """Write down what a model is, and its hash, in the directory of its weights."""
    model = _plain(model)
    write_json(folder / RECORD, {"sha256": _hash(model), "model": model})


def check_model_record(folder: Path, model: dict[str, Any]) -> None:
    """Compare the model whose weights are in a directory with one that is about to read them.

    Raises:
        ModelMismatch: they differ; it names what does. Or nothing says which model the weights are of.
    """
    file, model = folder / RECORD, _plain(model)
    try:
        found = json.loads(file.read_text())
        stated, trained = found["sha256"], found["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        text = f"{file} does not say which model the weights are of: {error}; train again"
        raise ModelMismatch(text) from None
    if _hash(trained) != stated:
        raise ModelMismatch(f"{file} is damaged: its content is not that of its hash {stated}")
    if stated == _hash(model):
        return
    names = sorted(trained.keys() | model.keys())
    other = [name for name in names if trained.get(name) != model.get(name)]
    changes = ", ".join(f"{name} {trained.get(name)!r} (config.json: {model.get(name)!r})" for name in other)
    raise ModelMismatch(
        f"{folder} was trained with {changes}; config.json or vocabulary/ has changed since: put it back, or "
        "train again"
    )


def _plain(model: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(model, default=str))


def _hash(model: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()
