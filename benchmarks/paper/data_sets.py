"""The data sets of the CTR experiments, with their tables: the synthetic shop, and films if there are any."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mim_torchrec.benchmarks.harness.stages import Run, Stage, Value, export_stage
from mim_torchrec.benchmarks.paper import films, shop
from mim_torchrec.benchmarks.paper.shop import ShopSizes

Options = Mapping[str, Value]


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set whose CTR models can be compared.

    Args:
        name: of its folder and in reports.
        title: what it is, in a line.
        data: stage that makes the data set.
        table: stage that makes the multi-modal table of its items.
        options: flags of every CTR run.
        grid: settings that are tried on validation, for Base and MIM alike; empty: none is.
    """

    name: str
    title: str
    data: Stage
    table: Stage
    options: Options
    grid: Sequence[Options] = ()


def make_all(run: Run, sizes: ShopSizes, source: Path | None, options: Options) -> list[DataSet]:
    """The synthetic shop, and films where there is a folder of them."""
    found = [make_shop(run, sizes, options)]
    return found if source is None else [*found, import_films(run, source.resolve(), options)]


def make_shop(run: Run, sizes: ShopSizes, options: Options) -> DataSet:
    """Make a synthetic shop and the table of its items, both on as many ranks as the sizes say."""
    root = run.root / "shop"
    data = shop.shop_stage(sizes, root, "data", 1.0)
    csft = shop.csft_stage(sizes, root, "csft", data)
    table = _named(export_stage(root, "table", data, csft, f"1x{sizes.nproc}"), "shop-table")
    run.run([data, csft, table], threads=1)
    title = f"A synthetic shop of {sizes.items:,} items, {sizes.users:,} users, {sizes.requests:,} requests"
    return DataSet(name="shop", title=title, data=data, table=table,
                  options={"epochs": sizes.ctr_epochs, **options})  # fmt: skip


def import_films(run: Run, source: Path, options: Options) -> DataSet:
    """Import MovieLens with posters, and make the table of its films."""
    root = run.root / "films"
    data = films.import_stage(source, root, "user")
    csft = films.csft_stage(root, data)
    table = _named(export_stage(root, "table", data, csft, "1x1"), "films-table")
    run.run([data, csft, table], threads=2)
    title = "MovieLens ml-latest-small with posters, divided by each user's time"
    return DataSet(name="films", title=title, data=data, table=table,
                  options={**films.TRAINING, **options}, grid=films.GRID)  # fmt: skip


def _named(stage: Stage, name: str) -> Stage:
    """A stage under a name that no other data set of the run has: its record goes by the name."""
    return dataclasses.replace(stage, name=name)
