"""`mim prepare` from its mapping to a data set: which rule follows which."""

import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ibis
import numpy as np
from ibis import _
from ibis.expr.types import Table, Value

from mim_torchrec.data.ids import stable_ids
from mim_torchrec.data.schema import SPLITS
from mim_torchrec.data.writing import DatasetWriter
from mim_torchrec.embeddings.files import write_json
from mim_torchrec.errors import OptionError
from mim_torchrec.prepare import events, histories, labels
from mim_torchrec.prepare.assembly import KINDS, RequestSchema
from mim_torchrec.prepare.behaviors import Behaviors
from mim_torchrec.prepare.catalog import Items, make_items
from mim_torchrec.prepare.collisions import refuse_collisions
from mim_torchrec.prepare.config import SECOND, Action, PrepareConfig, as_text
from mim_torchrec.prepare.content import write_items, write_pairs
from mim_torchrec.prepare.engines import ENGINES, Engine, numbers
from mim_torchrec.prepare.manifest import write_manifest
from mim_torchrec.prepare.mapping import Events, Mapping, load_mapping
from mim_torchrec.prepare.reading import Raw, Reader
from mim_torchrec.prepare.requests import Candidates, RequestsWriter, write_users
from mim_torchrec.prepare.splits import choose_split
from mim_torchrec.prepare.writing import FolderWriter

log = logging.getLogger(__name__)
Counts = dict[str, Any]
SHOWN = ("request", "user", "item", "ts")
ACTED = ("user", "item", "ts")
ROWS = 200_000
"""Of a batch of values without lists."""


def prepare(config: PrepareConfig) -> Counts:
    """Make the data set; returns what `prepare.json` holds.

    Raises:
        OptionError: an option or the mapping cannot be used.
        DataError: files cannot be read, or nothing is left of a part.
        OutputExists: `out` exists.
    """
    config.check()
    mapping = load_mapping(config.mapping)
    for kind in {*config.labels(), *config.behaviors}:
        if mapping.actions(kind) is None:
            raise OptionError(
                f"{config.mapping} has no events.{kind}; --label, --second-label and --behaviors name others"
            )
    options = {
        name: value for name, value in asdict(config).items() if name not in ("out", "scratch", "init")
    }
    source = {"command": "mim prepare", **options, "mapping": mapping.model_dump(exclude_none=True)}
    with DatasetWriter(config.out, name=mapping.name, source=source) as writer:
        with _scratch(config) as scratch:
            engine = ENGINES[config.engine](scratch, config.memory, config.threads)
            try:
                report = Preparation(config, mapping, engine, scratch, writer.partial).run()
            finally:
                engine.close()
        writer.description["counts"] = report["written"]
        writer.description["text_ids"] = [
            f"{name}_id" for name in ("user", "query", "item") if getattr(mapping.ids, name) == "text"
        ]
        write_json(writer.partial / "prepare.json", report)
    return report


class Preparation:
    """One run.

    Args:
        config: options.
        mapping: which column holds what.
        engine: that runs the relational program.
        scratch: folder for intermediate results.
        root: of the data set that is being written.
    """

    def __init__(
        self, config: PrepareConfig, mapping: Mapping, engine: Engine, scratch: Path, root: Path
    ) -> None:
        self.config, self.mapping, self.engine = config, mapping, engine
        self.scratch, self.root = scratch, root
        self.base = config.mapping.parent.absolute()
        self._reader = Reader(engine, self.base, mapping.ids)
        self._last = 0
        self.report: Counts = {"input": {}}

    def run(self) -> Counts:
        """All rules in turn; returns the report."""
        catalog = self._read("catalog", self.mapping.catalog)
        items = make_items(catalog, self.engine, self.scratch)
        self.report["input"]["catalog"] = items.counts
        shown = self._shown(items)
        raw_searches = self._searches()
        kinds: set[Action] = {*self.config.behaviors, *self.config.labels()}
        if raw_searches is not None:
            kinds |= {kind for kind in KINDS if self.mapping.actions(kind) is not None}
        actions = {kind: self._actions(kind, items) for kind in KINDS if kind in kinds}
        end = self.config.time("log_end") or self._last
        self.report["log_end"] = as_text(end)
        found = {kind: self._attributed(kind, actions[kind], shown)
                 for kind in KINDS if kind in {*self.config.behaviors, *self.config.labels()}}  # fmt: skip
        shown = shown.filter(_.category.notnull())
        candidates = self._labelled(shown, found)
        requests = self._requests(shown, end)
        behaviors = self._behaviors(found)
        self._refuse_collisions(requests, behaviors, raw_searches)

        ts = np.sort(self._column(requests, "ts"))
        split = choose_split(ts, self.config)
        self.report["split"] = {
            "train_from": as_text(int(ts[0])), "validation_from": as_text(split.validation),
            "test_from": as_text(split.test), "test_to": as_text(int(ts[-1])),
        }  # fmt: skip
        schema = RequestSchema(
            categories=items.categories,
            has_query=self.mapping.events.impression.query is not None,
            has_kinds=len(self.config.behaviors) > 1,
            by_time=any(self._source(kind).arrived is not None for kind in self.config.behaviors),
            has_weights=self.config.negative_rate < 1,
            second=self.config.second_label,
        )
        with FolderWriter(self.root, self.config.row_group_rows) as files:
            writer = RequestsWriter(self.config, schema, split, files)
            self._write_requests(writer, requests, candidates, behaviors)
            self.report |= writer.finish(self.root)
            write_users(self.engine, self.mapping.ids, requests, files)
            self.report["items"] = write_items(
                self.config, self.mapping, self.base, self.engine, items, files
            )
            if raw_searches is not None:
                self.report["pairs"] = write_pairs(
                    self.config, self.mapping, self.base, self.engine, raw_searches, actions, items,
                    split.validation, files,
                )  # fmt: skip
            files.finish()
        self.report["written"] = written(files)
        write_manifest(self.root, files, self.report, self.mapping)
        return self.report

    def _read(self, place: str, source: Any, needed: Sequence[str] = ()) -> Raw:
        raw = self._reader.read(place, source, needed)
        self._last = max(self._last, raw.last)
        log.info("%s: %d rows of %d files", place, raw.counts["rows"], len(raw.files.paths))
        return raw

    def _source(self, kind: str) -> Events:
        source = self.mapping.actions(kind)
        assert source is not None
        return source

    def _by_request(self, kind: str) -> bool:
        return self._source(kind).request is not None and self.mapping.events.impression.request is not None

    def _shown(self, items: Items) -> Table:
        """What was shown; items that the catalogue does not have are there without a category."""
        source = self.mapping.events.impression
        raw = self._read("events.impression", source, SHOWN)
        table, counts = raw.table, raw.counts
        if source.request is None:  # what a user is shown at one moment is a request
            table = table.mutate(request=table.user.cast("string") + "@" + table.ts.cast("string"))
        whole = events.complete(table, SHOWN)
        once = events.shown_items(whole)
        if items.has_versions:  # whose rule reads the events twice
            once = self.engine.keep(once, "shown-once")
        shown = self.engine.keep(events.with_categories(once, items.versions, items.has_versions), "shown")
        found = numbers(self.engine, shown.agg(distinct=shown.count(), kept=shown.category.count()))
        self.report["input"]["impression"] = counts | {
            "incomplete": counts["rows"] - raw.complete, "repeated": raw.complete - found["distinct"],
            "of_unknown_items": found["distinct"] - found["kept"], "kept": found["kept"],
        }  # fmt: skip
        self.engine.forget("raw-events-impression")
        if items.has_versions:
            self.engine.forget("shown-once")
        return shown

    def _actions(self, kind: str, items: Items) -> Table:
        source = self._source(kind)
        needed = ACTED if source.id is None else (*ACTED, "id")
        raw = self._read(f"events.{kind}", source, needed)
        whole = events.complete(raw.table, needed)
        lag = self.config.log_lag * SECOND
        seen = whole.ts
        if source.arrived is not None:
            seen = ibis.greatest(whole.ts, whole.arrived.fill_null(whole.ts))
        timed = whole.mutate(known_at=seen + lag)
        timed = timed.drop("arrived") if source.arrived is not None else timed
        once = self.engine.keep(events.once(timed, source.id is not None), f"{kind}-once")
        known = self.engine.keep(
            events.of_known_items(once, items.versions, items.has_versions), f"{kind}-known"
        )
        complete, (distinct, kept) = raw.complete, self._counts(once, known)
        self.report["input"][kind] = raw.counts | {
            "incomplete": raw.counts["rows"] - complete, "repeated": complete - distinct,
            "of_unknown_items": distinct - kept, "kept": kept,
        }  # fmt: skip
        return known

    def _searches(self) -> Raw | None:
        source = self.mapping.events.image_search
        if source is None:
            return None
        raw = self._read("events.image_search", source)
        self.report["input"]["image_search"] = raw.counts
        return raw

    def _attributed(self, kind: Action, actions: Table, shown: Table) -> Table:
        """Actions with what they follow from, without those that clocks put before it."""
        by_request = self._by_request(kind)
        if not by_request and kind not in self.config.labels():
            return actions
        found = self.engine.keep(labels.attributed(actions, shown, by_request), f"{kind}-attributed")
        window = self.config.window_of(kind)
        delay = found.ts - found.shown_at
        asked = {
            "events": found.count(),
            "without_impression": found.shown_at.isnull().cast("int64").sum(),
            "before_their_impression": (delay < 0).fill_null(False).cast("int64").sum(),
            "after_the_window": (delay > window).fill_null(False).cast("int64").sum(),
        }
        self.report.setdefault("attribution", {})[kind] = numbers(self.engine, found.agg(**asked))
        return labels.not_early(found)

    def _labelled(self, shown: Table, found: dict[Action, Table]) -> Table:
        label, second = self.config.label, self.config.second_label
        hit = labels.hits(shown, found[label], self.config.window_of(label), self._by_request(label))
        hit = self.engine.keep(hit, "hits")
        candidates = labels.labelled(shown, hit, "label")
        if second is not None:
            window = self.config.window_of(second)
            both = labels.followed(hit, found[second], window, self._by_request(second))
            candidates = labels.labelled(candidates, both, "second")
        return candidates

    def _requests(self, shown: Table, end: int) -> Table:
        all_requests = self.engine.keep(labels.gathered(shown), "requests-gathered")
        one_user = labels.with_one_user(all_requests)
        kept = labels.old_enough(one_user, self.config.certain_after(), end)
        gathered, single, old = self._counts(all_requests, one_user, kept)
        self.report["requests"] = {
            "gathered": gathered, "of_several_users": gathered - single,
            "too_young_for_their_label": single - old, "kept": old,
        }  # fmt: skip
        # kept, because DuckDB takes filtered rows for few, and then hashes all that was shown to join them
        requests = self.engine.keep(kept.drop("last_user", "last_ts"), "requests")
        self.engine.forget("requests-gathered")
        return requests

    def _behaviors(self, found: dict[Action, Table]) -> Table:
        """What histories are made of."""
        parts = [
            found[kind].select("user", "item", "ts", "known_at", "category",
                               kind=ibis.literal(KINDS.index(kind), "int8"))
            for kind in self.config.behaviors
        ]  # fmt: skip
        return parts[0].union(*parts[1:]) if len(parts) > 1 else parts[0]

    def _refuse_collisions(self, requests: Table, behaviors: Table, searches: Raw | None) -> None:
        """See that text ids have numbers of their own, over all that is written (items: `item_rows`)."""
        columns: dict[str, list[Value]] = {
            "user": [requests.user, behaviors.user],
            "request": [requests.request],
            "query": [requests.query] if "query" in requests.columns else [],
        }
        if searches is not None:
            columns["request"].append(searches.table.request)
        for role, found in columns.items():
            if getattr(self.mapping.ids, role) == "text" and found:
                refuse_collisions(self.engine, role, [one.name("id").as_table() for one in found])

    def _write_requests(
        self, writer: RequestsWriter, requests: Table, candidates: Table, behaviors: Table
    ) -> None:
        """Requests in order of time, with their candidates and histories."""
        batch = self.config.row_group_rows
        ordered = histories.in_order(behaviors)
        stored = Behaviors(self.engine.batches(ordered, ROWS), self.scratch / "behaviors")
        places = ["position", "item"] if "position" in candidates.columns else ["item"]
        values = [name for name in ("item", "category", "label", "second") if name in candidates.columns]
        asked = candidates.inner_join(requests.select("request", at="ts"), "request")
        if "position" in places:
            asked = asked.mutate(position=asked.position.fill_null(0))
        shown = Candidates(self.engine.batches(
            asked.order_by("at", "request", *places).select("request", *values), ROWS
        ), values)  # fmt: skip
        for rows in self.engine.batches(requests.order_by("ts", "request"), batch):
            users, ts = stable_ids(rows["user"]).to_numpy(), rows["ts"].to_numpy()
            writer.write(rows, shown.of(rows), stored.last(users, ts, self.config.max_behaviors))
        shown.finish()
        self.report["histories"] = stored.counts

    def _column(self, table: Table, name: str) -> np.ndarray:
        parts = [batch[name].to_numpy() for batch in self.engine.batches(table.select(name), ROWS)]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _counts(self, *tables: Table) -> tuple[int, ...]:
        return tuple(self.engine.count(table) for table in tables)


def written(files: FolderWriter) -> dict[str, int]:
    """Rows by folder; those of requests by split."""
    counts: dict[str, int] = {}
    for one in files.files:
        top, _, rest = one["file"].partition("/")
        split = rest.split("/")[0].removeprefix("split=")
        name = f"{top}/{split}" if top == "requests" and split in SPLITS else top
        counts[name] = counts.get(name, 0) + one["rows"]
    return counts


@contextmanager
def _scratch(config: PrepareConfig) -> Iterator[Path]:
    """A folder for intermediate results, removed on every way out."""
    parent = config.scratch or config.out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix=f"{config.out.name}.scratch-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
