"""``mim table``: look at, check, convert and permute multi-modal tables."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from mim_torchrec.embeddings.table.convert import convert
from mim_torchrec.embeddings.table.format import Table
from mim_torchrec.embeddings.table.permute import permute
from mim_torchrec.embeddings.table.shards import CHUNK

Dtype = Literal["float32", "float16", "bfloat16", "int8"]


@dataclass(frozen=True, kw_only=True)
class Info:
    """Print the manifest of a table."""

    table: tyro.conf.Positional[Path]
    """The table's directory."""

    def run(self) -> None:
        manifest = Table.open(self.table, verify=False).manifest
        print(json.dumps(asdict(manifest), indent=2))


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check every checksum, id and vector of a table."""

    table: tyro.conf.Positional[Path]
    """The table's directory."""
    table_version: str | None = None
    """The version that the table must have."""

    def run(self) -> None:
        table = Table.open(self.table, expected_version=self.table_version)
        manifest = table.manifest
        with tqdm(total=manifest.rows, unit="row", unit_scale=True, desc="verify") as bar:
            for start in range(1, 1 + manifest.rows, CHUNK):
                stop = min(start + CHUNK, 1 + manifest.rows)
                table.rows_for(start, stop)
                bar.update(stop - start)
        print(
            f"{self.table}: {manifest.rows} x {manifest.dim} {manifest.dtype} in {len(manifest.shards)} "
            f"shards, table_version {manifest.table_version}: all checksums match, ids are unique, "
            f"vectors are finite"
        )


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write a copy in another storage type, with the same table_version, its shards in the order of ids.

    int8 is row-wise: at dim 128 a row takes 136 bytes against 256 of float16. The mean cosine error against
    the table converted is printed and kept in the manifest.
    """

    table: tyro.conf.Positional[Path]
    """The table to copy."""
    out: Path
    """Directory of the new table; must not exist."""
    dtype: Dtype
    """Type the vectors are stored in; the table's own puts shards in order and changes no vector."""

    def run(self) -> None:
        rows = Table.open(self.table, verify=False).manifest.rows
        with tqdm(total=rows, unit="row", unit_scale=True, desc="convert") as bar:
            made = convert(self.table, self.out, self.dtype, progress=bar.update)
        print(
            f"{self.out}: {rows} rows as {self.dtype}, {made.manifest.row_bytes} bytes a row, table_version "
            f"{made.manifest.table_version}, cosine error {made.mean_cosine_error:.2e} (mean), "
            f"{made.max_cosine_error:.2e} (largest)"
        )


@dataclass(frozen=True, kw_only=True)
class Permute:
    """Write a copy whose vectors are permuted among the ids (negative control)."""

    table: tyro.conf.Positional[Path]
    """The table to copy."""
    out: Path
    """Directory of the permuted table; must not exist."""
    seed: int = 0
    """Seed of the permutation."""

    def run(self) -> None:
        manifest = permute(self.table, self.out, self.seed)
        print(f"{self.out}: {manifest.rows} rows, table_version {manifest.table_version}")


Command = (
    Annotated[Info, tyro.conf.subcommand("info")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Permute, tyro.conf.subcommand("permute")]
)


def main(argv: list[str] | None = None) -> None:
    """Run ``mim table`` with the arguments ``argv`` (``None``: those of the process)."""
    tyro.cli(Command, args=argv, prog="mim table").run()


if __name__ == "__main__":
    main()
