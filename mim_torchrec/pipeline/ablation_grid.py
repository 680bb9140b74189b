"""A grid of encoders as a pipeline: C-SFT, an image search, a table and the same click model for each."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, ValidationError, model_validator

from mim_torchrec.pipeline.spec import Job, Name, Pipeline, PipelineError, Stage, Value
from mim_torchrec.toml_files import Strict, explained, read_toml

Flags = dict[str, Value | list[Value]]
OURS = {
    "csft": ("data", "out", "seed", "validation-fraction"),
    "export": ("data", "out", "encoder"),
    "search": ("data", "out", "encoder", "held-out-fraction"),
    "ctr": ("data", "out", "seed", "mim", "table", "table-version"),
}
"""Flags that the grid sets, by stage."""
FIXED = "-"
"""In the place of a seed, of an encoder that has none."""


class Encoder(Strict):
    """One line of the comparison.

    Args:
        plain: towers that are not trained, `plain:<vision>+<text>`; by default C-SFT trains an encoder.
        csft: flags beyond those of all.
        export: likewise.
        search: likewise, of `mim retrieve`.
    """

    plain: str | None = None
    csft: Flags = Field(default_factory=dict)
    export: Flags = Field(default_factory=dict)
    search: Flags = Field(default_factory=dict)

    @model_validator(mode="after")
    def _trained_or_not(self) -> Self:
        if self.plain is not None and self.csft:
            raise ValueError("plain towers are not trained: leave out csft or plain")
        return self


class Grid(Strict):
    """What is compared.

    Args:
        name: of the comparison.
        seeds: of C-SFT and of the click model.
        held_out: fraction of the image searches, the last by time, that no encoder is trained on.
        ranks: `<nodes>x<processes>` of training and export.
        csft: flags of every C-SFT.
        export: flags of every export.
        search: flags of every `mim retrieve`.
        ctr: flags of the click model, the probe.
        encoders: by name.
    """

    name: Name
    seeds: list[int] = Field(default_factory=lambda: [0], min_length=1)
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    ranks: str = "1x1"
    csft: Flags = Field(default_factory=dict)
    export: Flags = Field(default_factory=dict)
    search: Flags = Field(default_factory=dict)
    ctr: Flags = Field(default_factory=dict)
    encoders: dict[Name, Encoder] = Field(min_length=1)

    @model_validator(mode="after")
    def _flags_are_free(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {self.seeds} has one twice")
        given = [(stage, stage, getattr(self, stage)) for stage in OURS]
        for name, encoder in self.encoders.items():
            given += [
                (f"encoders.{name}.{stage}", stage, getattr(encoder, stage))
                for stage in ("csft", "export", "search")
            ]
        for place, stage, flags in given:
            if taken := [flag for flag in flags if flag.replace("_", "-") in OURS[stage]]:
                raise ValueError(f"{place}.{taken[0]}: the grid sets it; leave it out")
        return self

    def seeds_of(self, name: str) -> list[str]:
        """Seeds of an encoder, as they are in the names of its stages."""
        return [FIXED] if self.encoders[name].plain is not None else [str(seed) for seed in self.seeds]


def load_grid(file: Path) -> Grid:
    """Read a grid.

    Raises:
        PipelineError: it is not TOML, or not a grid; the message names the file and the place.
    """
    try:
        return Grid.model_validate(read_toml(file, PipelineError))
    except ValidationError as error:
        fields = (Grid, Encoder)
        known = explained(error, lambda place: [*fields[len(place) > 2].model_fields])
        raise PipelineError(f"{file}: {known}") from None


def pipeline_of(grid: Grid, data: Path) -> Pipeline:
    """The stages of a grid.

    Args:
        grid: what is compared.
        data: directory of the data set; a change of its dataset.json runs every stage again.

    Returns:
        Stages `base.<seed>`, and for each encoder and seed `csft.…`, `search.…`, `table.…` and `ctr.…`.
    """
    job, files = Job(j=grid.ranks), [str(data / "dataset.json")]
    features: Flags = {"feature-cache": "${run}/features"}
    stages: dict[str, Stage] = {}

    def add(name: str, flags: Flags, *, command: str | None = None, component: str | None = None) -> None:
        stages[name] = Stage(
            command=command, component=component, job=job if component else Job(), files=files,
            flags={"data": str(data), **flags},
        )  # fmt: skip

    for seed in grid.seeds:
        add(f"base.{seed}", {**grid.ctr, "mim": "off", "seed": seed}, component="mim.ctr")
    for name, encoder in grid.encoders.items():
        for trained_seed in grid.seeds_of(name):
            place = f"{name}.{trained_seed}"
            if encoder.plain is None:
                trained: Flags = {"seed": int(trained_seed), "validation-fraction": grid.held_out}
                add(f"csft.{place}", features | grid.csft | encoder.csft | trained, component="mim.csft")
            source = encoder.plain or f"${{csft.{place}}}/encoder"
            searched: Flags = {"encoder": source, "held-out-fraction": grid.held_out}
            add(f"search.{place}", features | grid.search | encoder.search | searched, command="retrieve")
            exported: Flags = grid.export | encoder.export | {"encoder": source}
            if exported.get("precision", "fp32") == "fp32":  # that of the features which are kept
                exported = features | exported
            add(f"table.{place}", exported, component="mim.export")
        for number in grid.seeds:
            table = f"table.{name}.{number if encoder.plain is None else FIXED}"
            version = f"${{{table}/manifest.json#table_version}}"
            probe: Flags = {"mim": "on", "table": f"${{{table}}}", "table-version": version, "seed": number}
            add(f"ctr.{name}.{number}", grid.ctr | probe, component="mim.ctr")
    return Pipeline(name=grid.name, stages=stages)
