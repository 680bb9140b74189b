"""Pipelines from TOML files: parameters that a command line can set, and templates of stages."""

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from mim_torchrec.pipeline.spec import REFERENCE, Pipeline, PipelineError, Value, explained
from mim_torchrec.toml_files import read_toml

MERGED = ("flags", "job", "env")
"""Tables of a stage that a template's are merged with, key by key; all else replaces."""
PLACE = re.compile(r"(?<!\$)\{([\w.-]+)\}")
Parameter = Value | list[Value]


def load(file: str | Path, parameters: Mapping[str, Parameter] | None = None) -> Pipeline:
    """Read and check a pipeline.

    Args:
        file: TOML with `name`, `stages`, and optionally `parameters` and `templates`.
        parameters: values in place of those in the file; strings are read as the type that stands there.

    Raises:
        PipelineError: it is not TOML, or not a pipeline; the message names the file and the place.
    """
    path = Path(file)
    content = read_toml(path, PipelineError)
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
            merged = {name: _merged(stage, templates, name) for name, stage in stages.items()}
            content["stages"] = _multiplied(merged)
        return Pipeline.model_validate(content)
    except ValidationError as error:
        raise PipelineError(f"{path}: {explained(error)}") from None
    except PipelineError as error:
        raise PipelineError(f"{path}: {error}") from None


def _table(content: Any, place: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise PipelineError(f"{place}: a table is needed, but it is {content!r}")
    return content


def _replaced(own: dict[str, Any], given: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """Parameters of the file with the values that were given."""
    for name, value in own.items():
        for one in value if isinstance(value, list) else [value]:
            if not isinstance(one, get_args(Value)):
                what = "a string, number or boolean, or a list of such, is needed"
                raise PipelineError(f"parameters.{name}: {what}, not {one!r}")
        if value == []:
            raise PipelineError(f"parameters.{name}: an empty list has no type")
    for name, value in given.items():
        if name not in own:
            raise PipelineError(f"no parameter {name!r}; there are {', '.join(own) or 'none'}")
        if isinstance(own[name], list):
            values = (
                value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
            )
            own[name] = [_typed(name, one, type(own[name][0])) for one in values]
        elif isinstance(value, list):
            raise PipelineError(f"parameter {name} is {value!r}; it must be a single value")
        else:
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


def _filled(content: Any, values: Mapping[str, Parameter]) -> Any:
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


def _multiplied(stages: dict[str, Any]) -> dict[str, Any]:
    """Every stage with `each` as one stage for each combination of its values."""
    found: dict[str, Any] = {}
    for name, stage in stages.items():
        if not isinstance(stage, dict) or "each" not in stage:
            copies = {name: stage}
        else:
            stage = dict(stage)
            axes = _axes(_table(stage.pop("each"), f"stages.{name}.each"), f"stages.{name}.each")
            combined = [
                {k: v for one in chosen for k, v in one.items()} for chosen in itertools.product(*axes)
            ]
            copies = {str(_placed(name, values)): _placed(stage, values) for values in combined}
            if len(copies) < len(combined):
                raise PipelineError(
                    f"stages.{name}: two of its {len(combined)} stages have one name; put {{...}} in"
                )
        if clash := found.keys() & copies.keys():
            raise PipelineError(f"stages.{name}: there is a stage {min(clash)!r} already")
        found |= copies
    return found


def _axes(each: dict[str, Any], place: str) -> list[list[dict[str, Value]]]:
    """What each key stands for, value by value; a table stands for one value a key."""
    axes = []
    for key, values in each.items():
        if not isinstance(values, list) or not values:
            raise PipelineError(f"{place}.{key}: a list of values is needed, not {values!r}")
        axes.append([{f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
                     for value in values])  # fmt: skip
    return axes


def _placed(content: Any, values: Mapping[str, Value]) -> Any:
    """The content with values in the places `{key}`; a string that is one place takes its type."""
    if isinstance(content, dict):
        return {key: _placed(value, values) for key, value in content.items()}
    if isinstance(content, list):
        return [_placed(value, values) for value in content]
    if not isinstance(content, str):
        return content
    whole = PLACE.fullmatch(content)
    if whole and whole[1] in values:
        return values[whole[1]]
    return PLACE.sub(lambda found: str(values[found[1]]) if found[1] in values else found[0], content)
