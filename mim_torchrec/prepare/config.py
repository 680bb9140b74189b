"""Options of `mim prepare`."""

import datetime
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from mim_torchrec.domains import Count, Domain, Natural, check_domains
from mim_torchrec.embeddings.remote.places import LocalPath
from mim_torchrec.errors import OptionError

SECOND = 1_000_000
DAY = 86_400 * SECOND
Action = Literal["click", "purchase"]


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Make a data set of event logs and a catalogue."""

    mapping: LocalPath = Path("prepare.toml")
    """TOML file that says which file and column holds what; --init writes one."""
    out: LocalPath = Path("data/prepared")
    """Directory to make; must not exist."""
    init: LocalPath | None = None
    """Look at the files in this folder, write --mapping with comments, and stop."""
    engine: Literal["duckdb", "spark"] = "duckdb"
    """DuckDB in this process, or Spark: the session of spark-submit or a local one (extra `spark`)."""
    memory: str = "4GB"
    """Memory of the engine; DuckDB spills to --scratch beyond it."""
    threads: Count = len(os.sched_getaffinity(0))
    """Threads of the engine."""
    scratch: LocalPath | None = None
    """Folder for intermediate results, removed at the end; by default beside --out. Executors of Spark must
    see it."""
    label: Action = "click"
    """The action that makes the label 1."""
    label_window: Count = 3600
    """Seconds after an impression in which the action counts. A request whose window had not ended when the
    log did is left out."""
    second_label: Action | None = None
    """A label after the first one, such as purchase after click: `labels_<name>`, 1 where the label is 1 and
    this action follows it too. `mim ctr --second-label` trains on it."""
    second_window: Count = 7 * 86_400
    """Seconds after the first action of the label in which that of the second label counts. A request whose
    windows had not ended when the log did is left out."""
    log_end: str | None = None
    """When the log ends, ISO 8601 (UTC where it has no offset); by default the time of the last event."""
    log_lag: Natural = 60
    """Seconds until the serving system knows an event. A history holds what was known strictly before the
    request."""
    behaviors: tuple[Action, ...] = ("click", "purchase")
    """Actions that histories are made of."""
    max_behaviors: Count = 50
    """Longest history of a request, the last behaviors."""
    validation_from: str | None = None
    """When the validation part begins, ISO 8601; by default after 80 percent of the requests."""
    test_from: str | None = None
    """When the test part begins; by default after 90 percent of the requests."""
    negative_rate: Annotated[float, Domain(above=0, most=1)] = 1.0
    """Fraction of the training part's negatives that is kept; `candidate_weights` is 1 / rate for those."""
    pair_window: Natural = 7 * 86_400
    """Seconds after an image search in which a purchase or click makes a pair."""
    hard_negatives: Literal["sold", "category"] = "sold"
    """Hard negatives of pairs: of the same category, from the items of other pairs (drawn by `mim csft`, each
    epoch anew), or from all items of the category that were listed at the time (the paper's form)."""
    partition: Literal["day", "none"] = "day"
    """Folders of requests by day (`dt=2026-11-01/`), or none."""
    row_group_rows: Count = 20_000
    """Requests of a row group."""
    image_threads: Count = 16
    """Images that are read at a time."""
    seed: Natural = 0
    """Seed of the sampling and of hard negatives."""

    def check(self) -> None:
        """Refuse options that cannot be used. Raises OptionError."""
        check_domains(self)
        if not self.behaviors:
            raise OptionError("--behaviors is empty; name click, purchase or both")
        if (self.validation_from is None) != (self.test_from is None):
            raise OptionError("--validation-from and --test-from go together; give both or none")
        if self.second_label == self.label:
            raise OptionError(f"--second-label is {self.label}, as --label is; name another action or none")
        self.memory_bytes()
        for name in ("log_end", "validation_from", "test_from"):
            self.time(name)
        if self.validation_from is not None and not self.time("validation_from") < self.time("test_from"):
            raise OptionError("--validation-from is not before --test-from")

    def certain_after(self) -> int:
        """Microseconds after an impression at which its labels are certain."""
        second = 0 if self.second_label is None else self.second_window
        return (self.label_window + second) * SECOND

    def window_of(self, kind: Action) -> int:
        """Microseconds in which an action makes its label."""
        return (self.second_window if kind == self.second_label else self.label_window) * SECOND

    def labels(self) -> list[Action]:
        """Actions that make labels."""
        return [self.label] if self.second_label is None else [self.label, self.second_label]

    def time(self, name: str) -> int:
        """An option that is a time, in microseconds since 1970; 0 where it is not given."""
        text = getattr(self, name)
        if text is None:
            return 0
        try:
            return parse_time(text)
        except ValueError:
            flag = "--" + name.replace("_", "-")
            raise OptionError(f"{flag} is {text!r}; write a time such as 2026-11-01T00:00:00Z") from None

    def memory_bytes(self) -> int:
        """`memory` as a number."""
        found = re.fullmatch(r"(\d+(?:[.]\d+)?)\s*([KMGT])i?B", self.memory, re.IGNORECASE)
        if found is None:
            raise OptionError(f"--memory is {self.memory!r}; write a size such as 4GB")
        return int(float(found[1]) * 1024 ** (1 + "KMGT".index(found[2].upper())))


def parse_time(text: str) -> int:
    """Microseconds since 1970 of a time in ISO 8601, UTC where it has no offset.

    >>> parse_time("1970-01-02"), parse_time("1970-01-01T01:00:00+01:00")
    (86400000000, 0)
    """
    moment = datetime.datetime.fromisoformat(text)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return (moment - epoch) // datetime.timedelta(microseconds=1)


def as_text(micros: int) -> str:
    """A time in ISO 8601.

    >>> as_text(86_400_000_000)
    '1970-01-02T00:00:00.000000Z'
    """
    return f"{np.datetime64(micros, 'us')}Z"
