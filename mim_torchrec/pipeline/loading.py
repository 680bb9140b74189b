"""Pipelines from TOML files: parameters that a command line can set, and templates of stages.

TOML, because Python reads it without a package, its values have types, and a comment can say why.
"""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from mim_torchrec.pipeline.spec import REFERENCE, Pipeline, PipelineError, Value, explained

MERGED = ("flags", "job", "env")
"""Tables of a stage that a template's are merged with, key by key; all else replaces."""


def load(file: str | Path, parameters: Mapping[str, Value] | None = None) -> Pipeline:
    """Read and check a pipeline.

    Args:
        file: TOML with `name`, `stages`, and optionally `parameters` and `templates`.
        parameters: values in place of those in the file; strings are read as the type that stands there.

    Raises:
        PipelineError: it is not TOML, or not a pipeline; the message names the file and the place.
    """
    path = Path(file)
    try:
        content = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PipelineError(f"{path}: not TOML: {error}") from None
    try:
        own = _table(content.pop("parameters", {}), "parameters")
        values = _replaced(own, parameters or {})
        content = _filled(content, values)
        templates = _table(content.pop("templates", {}), "templates")
        stages = _table(content.get("stages", {}), "stages")
        if clash := sorted(values.keys() & stages.keys()):
            raise PipelineError(
                f"parameters.{clash[0]}: a stage has this name too; ${{{clash[0]}}} is ambiguous"
            )
        if stages:
            content["stages"] = {name: _merged(stage, templates, name) for name, stage in stages.items()}
        return Pipeline.model_validate(content)
    except ValidationError as error:
        raise PipelineError(f"{path}: {explained(error)}") from None
    except PipelineError as error:
        raise PipelineError(f"{path}: {error}") from None


def _table(content: Any, place: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise PipelineError(f"{place}: a table is needed, but it is {content!r}")
    return content


def _replaced(own: dict[str, Any], given: Mapping[str, Value]) -> dict[str, Value]:
    """Parameters of the file with the values that were given."""
    for name, value in own.items():
        if not isinstance(value, get_args(Value)):
            raise PipelineError(f"parameters.{name}: a string, number or boolean is needed, not {value!r}")
    for name, value in given.items():
        if name not in own:
            raise PipelineError(f"no parameter {name!r}; there are {', '.join(own) or 'none'}")
        own[name] = _typed(name, value, type(own[name]))
    return own


def _typed(name: str, value: Value, wanted: type) -> Value:
    if isinstance(value, wanted) and isinstance(value, bool) == (wanted is bool):
        return value
    if wanted is bool and value in ("true", "false"):
        return value == "true"
    try:
        if wanted is not bool:
            return wanted(value)
    except ValueError:
        pass
    what = "true or false" if wanted is bool else wanted.__name__
    raise PipelineError(f"parameter {name} is {value!r}; it must be {what}")


def _filled(content: Any, values: Mapping[str, Value]) -> Any:
    """The content with parameters filled in; a string that is nothing but a reference takes its type."""
    if isinstance(content, dict):
        return {key: _filled(value, values) for key, value in content.items()}
    if isinstance(content, list):
        return [_filled(value, values) for value in content]
    if not isinstance(content, str):
        return content
    whole = REFERENCE.fullmatch(content)
    if whole and whole[1] in values:
        return values[whole[1]]

    def text(found: re.Match[str]) -> str:
        return str(values[found[1]]) if found[1] in values else found[0]

    return REFERENCE.sub(text, content)


def _merged(stage: Any, templates: dict[str, Any], name: str) -> Any:
    """A stage over its template."""
    if not isinstance(stage, dict) or "like" not in stage:
        return stage
    stage = dict(stage)
    template = stage.pop("like")
    if template not in templates:
        known = ", ".join(templates) or "none"
        raise PipelineError(f"stages.{name}.like: no template {template!r}; there are {known}")
    return _over(_table(templates[template], f"templates.{template}"), stage)


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {**below, **above}
    for key in MERGED:
        if isinstance(below.get(key), dict) and isinstance(above.get(key), dict):
            both[key] = _over(below[key], above[key])
    return both
