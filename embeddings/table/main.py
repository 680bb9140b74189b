"""``mim table info|verify|permute``: look at, check and permute multi-modal tables."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mim_torchrec.embeddings.table.format import Table
from mim_torchrec.embeddings.table.permute import permute


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
        for ids in table.row_index().ids.split(65536):
            table.read(ids)
        manifest = table.manifest
        print(
            f"{self.table}: {manifest.rows} x {manifest.dim} {manifest.dtype} in {len(manifest.shards)} "
            f"shards, table_version {manifest.table_version}: all checksums match, ids are unique, "
            f"vectors are finite"
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
    | Annotated[Permute, tyro.conf.subcommand("permute")]
)


def main(argv: list[str] | None = None) -> None:
    """Run ``mim table`` with the arguments ``argv`` (``None``: those of the process)."""
    tyro.cli(Command, args=argv, prog="mim table").run()


if __name__ == "__main__":
    main()
