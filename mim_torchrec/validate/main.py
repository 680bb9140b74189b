"""Everything that the readers check, before any training (`mim validate DATA`).

Items, pairs and the requests of all splits are read as the stages read them. Every kind of problem is a
line: how many rows have it, where the first one is, and what to do. Warnings name what the readers take and
is often a mistake. Ends with status 3 if a stage would stop at this data.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from mim_torchrec import program
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.features import Features
from mim_torchrec.data.schema import SPLITS, Dataset
from mim_torchrec.domains import Domain, Natural, check_domains
from mim_torchrec.embeddings.files import write_json
from mim_torchrec.embeddings.remote.places import LocalPath, Place
from mim_torchrec.validate.items import check_items, check_pairs
from mim_torchrec.validate.report import Report
from mim_torchrec.validate.requests import check_requests, compare_splits


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """Check a data set."""

    data: tyro.conf.Positional[Place]
    """Dataset directory."""
    sample: Annotated[float, Domain(above=0, most=1)] = 1.0
    """Fraction of the row groups that is read, spread evenly. Ids of items and pairs are read whole."""
    images: Natural = 1000
    """Images of items, and of queries, that are decoded."""
    train_days: str | None = None
    """Days of the training requests, as of `mim ctr`."""
    validation_days: str | None = None
    """Likewise, of the validation requests."""
    test_days: str | None = None
    """Likewise, of the test requests."""
    sparse_features: tuple[str, ...] = ()
    """Further columns of ids, as of `mim ctr`."""
    dense_features: tuple[str, ...] = ()
    """Further columns of numbers, likewise."""
    bucket_features: dict[str, str] = field(default_factory=dict)
    """Further columns of numbers with boundaries, likewise."""
    other_features: dict[str, str] = field(default_factory=dict)
    """Further columns of a kind of your own, likewise."""
    second_label: str | None = None
    """Name of the second label that the model will predict, as of `mim ctr`."""
    out: LocalPath | None = None
    """JSON file of the report."""


def validate(config: ValidateConfig) -> Report:
    """Check a data set; returns what was found.

    Raises:
        DataError: there is no such directory.
        OptionError: an option is out of its domain.
    """
    check_domains(config)
    days = {"train": config.train_days, "validation": config.validation_days, "test": config.test_days}
    features = Features(sparse=config.sparse_features, dense=config.dense_features,
                        buckets=config.bucket_features, other=config.other_features,
                        second_label=config.second_label)  # fmt: skip
    dataset, report = Dataset(config.data, days), Report()
    items = check_items(dataset, config.sample, config.images, report)
    try:
        dataset.pairs()
    except DataError as error:
        report.warn("pairs", f"{error}; mim csft needs them, mim ctr does not")
    else:
        if items is None:
            report.warn("pairs", "not checked, because the items cannot be read")
        else:
            check_pairs(dataset, items, config.images, report)
    found = {
        split: check_requests(dataset, split, features, config.sample, items, report) for split in SPLITS
    }
    compare_splits({split: seen for split, seen in found.items() if seen is not None}, report)
    return report


def main(argv: list[str] | None = None) -> None:
    """Entry point of `mim validate`."""
    config = tyro.cli(ValidateConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    report = validate(config)
    if config.out is not None:
        write_json(Path(config.out), asdict(report))
    print("\n".join(report.lines()))
    if report.errors:
        kinds = "problem" if len(report.errors) == 1 else "problems"
        raise DataError(f"{len(report.errors)} {kinds}, see above", file=config.data)


if __name__ == "__main__":
    program.run(main)
