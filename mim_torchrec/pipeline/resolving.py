"""References of a stage in the place of which stand paths, and values of JSON files of finished stages."""

import json
from dataclasses import dataclass
from pathlib import Path

from mim_torchrec.embeddings.remote.places import Url
from mim_torchrec.errors import ExpectedError
from mim_torchrec.pipeline.outputs import read_text
from mim_torchrec.pipeline.spec import OUT, REFERENCE, RUN, Pipeline, Stage, Value, references


class ReferenceFailed(ExpectedError, ValueError):
    """The output of a stage does not hold a value that another one refers to."""


@dataclass(frozen=True)
class Resolver:
    """The values of the references of a run.

    Args:
        pipeline: whose stages are resolved.
        root: absolute path of the run directory.
    """

    pipeline: Pipeline
    root: Path

    def output(self, name: str) -> Path | Url | None:
        """Absolute path of an output, or its URL; None where the stage has none."""
        out = self.pipeline.output(name)
        return out if out is None or isinstance(out, Url) else self.root / out

    def stage(self, name: str, foresee: bool = False) -> Stage:
        """A stage without references, its output among its flags.

        Args:
            name: of the stage.
            foresee: leave values in that are not there yet, as `<table/manifest.json#table_version>`.

        Raises:
            ReferenceFailed: a value is not there.
        """
        found = self.pipeline.stages[name].with_out()

        def one(value: Value) -> Value:
            return self._filled(value, name, foresee) if isinstance(value, str) else value

        flags = {
            flag: [one(v) for v in value] if isinstance(value, list) else one(value)
            for flag, value in found.flags.items()
        }
        env = {key: str(one(value)) for key, value in found.job.env.items()}
        return found.model_copy(
            update={
                "arguments": [one(value) for value in found.arguments],
                "flags": flags,
                "job": found.job.model_copy(update={"env": env}),
            }
        )

    def values(self, name: str) -> dict[str, Value | None]:
        """What the JSON references of a stage stand for; None where it is not there yet."""
        found: dict[str, Value | None] = {}
        for _, text in self.pipeline.stages[name].strings():
            for head, file, key in references(text):
                if file is not None and key is not None:
                    try:
                        found[f"{head}/{file}#{key}"] = self._value(name, head, file, key)
                    except ReferenceFailed:
                        found[f"{head}/{file}#{key}"] = None
        return found

    def _filled(self, text: str, name: str, foresee: bool) -> Value:
        whole = REFERENCE.fullmatch(text)
        if whole:
            return self._one(whole[1], name, foresee)
        filled = REFERENCE.sub(lambda found: str(self._one(found[1], name, foresee)), text)
        return filled.replace("$${", "${")

    def _one(self, content: str, name: str, foresee: bool) -> Value:
        ((head, file, key),) = references(f"${{{content}}}")
        if head == RUN:
            return str(self.root)
        if file is None or key is None:
            return str(self.output(name if head == OUT else head))
        try:
            return self._value(name, head, file, key)
        except ReferenceFailed:
            if not foresee:
                raise
            return f"<{content}>"

    def _value(self, name: str, head: str, file: str, key: str) -> Value:
        out = self.output(head)
        assert out is not None  # the pipeline has been checked
        where = f"stages.{name}: ${{{head}/{file}#{key}}}"
        try:
            value = json.loads(read_text(out, file))
        except (OSError, ValueError) as error:
            raise ReferenceFailed(f"{where}: {out}/{file} cannot be read: {error}") from None
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                raise ReferenceFailed(f"{where}: {out}/{file} has no {part!r} (of {key})")
            value = value[part]
        if not isinstance(value, str | int | float | bool):
            raise ReferenceFailed(f"{where}: it is {value!r} and neither a string, a number nor a boolean")
        return value
