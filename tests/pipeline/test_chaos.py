"""Chaos at a small size, and that what it compares with can fail."""

import json
from dataclasses import replace
from random import Random
from types import SimpleNamespace

import pytest
import torch

from mim_torchrec.benchmarks.chaos.inputs import Inputs
from mim_torchrec.benchmarks.chaos.main import main
from mim_torchrec.benchmarks.chaos.server import Clients
from mim_torchrec.benchmarks.chaos.verify import Audit, verify_dead_letter, verify_log, verify_rows
from mim_torchrec.benchmarks.chaos.workers import Place, Workers, context, embedded
from mim_torchrec.benchmarks.measures.arrivals import Arrival
from mim_torchrec.embeddings.table.writer import TableWriter
from mim_torchrec.embeddings.windows.transport import open_log
from mim_torchrec.embeddings.windows.window import Window

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_workers")]


def test_killed_processes_leave_every_row_right_over_both_transports(tmp_path):
    out = tmp_path / "run"
    main(["--out", str(out), "--kills", "8", "--items", "300", "--requests", "300", "--epochs", "1",
          "--pause", "0.1", "--limit", "400", "--injected", "1", "--slack", "60"])  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert report["kills"] >= 8 and report["rows"] > 4 * 270
    assert (report["wrong"], report["lost"], report["doubled"], report["problems"]) == (0, 0, 0, [])
    for outcome in report["transports"].values():
        assert len(set(outcome["watermarks"].values())) == 1 and outcome["faults"]
        assert set(outcome["readers"]) == {"dead_letter", "store", "embedded", "training"}
    assert "Watermarks" in (out / "report.md").read_text()
    # every kind of fault of a server once
    server = report["server"]
    assert len(server["injected"]) + len(server["left_out"]) == 20
    assert set(server["left_out"]) <= {"clock jump", "full disk"}
    assert report["server"]["answers"]["200"] > 0
    for name in ("late_answers", "wrong_scores", "unexplained_500", "unrecovered"):
        assert report[name] == 0, report["server"]["examples"]


def test_an_embedded_store_whose_base_has_every_window_says_so(tmp_path):
    writer = TableWriter(tmp_path / "base", table_version="v1", dim=2, encoder={}, seq=5)
    writer.write_shard(torch.tensor([7]), torch.ones(1, 2))
    writer.finish()
    open_log(str(tmp_path / "log"), "v1", start=5)
    place = Place(root=tmp_path, source="", log=str(tmp_path / "log"), store="", shop=tmp_path,
                  encoder=tmp_path, base=tmp_path / "base", version="v1")  # fmt: skip
    ours, theirs = context().Pipe()
    group = Workers("embedded", place, embedded, [(place.base, theirs)])
    try:
        assert ours.poll(120), group.says()
        assert ours.recv() == ("begun", 5)
    finally:
        assert group.kill(Random(0))


def test_chaos_that_does_not_end_says_who_is_still_at_work(tmp_path):
    with pytest.raises(TimeoutError, match="after 0 s still at work: rim; killed"):
        main(["--out", str(tmp_path / "run"), "--kills", "4", "--items", "300", "--requests", "100",
              "--transports", "directory", "--limit", "0"])  # fmt: skip


def test_answers_that_are_late_or_of_older_vectors_are_noticed():
    expected = {"m": [[[0.1]], [[0.2]], [[0.3]]]}  # of a request, by state of the vectors
    clients = Clients(SimpleNamespace(expected=expected), 0, seed=0, slack=2.0)
    for score, windows in ((0.1, range(0, 1)), (0.2, range(0, 2)), (0.1, range(3, 4))):
        body = {"model_version": "m", "outputs": [{"name": "score", "data": [score]}]}
        assert clients._note(0, 200, json.dumps(body).encode(), windows) == "m"
    assert clients.tally.wrong == 0
    clients._note(0, 200, json.dumps(body).encode(), range(4, 5))  # of the vectors before window 4
    assert clients.tally.wrong == 1 and "those of states [0]" in clients.tally.examples[0]
    clients._note_late(504, took=9.0, held_up=0.5)
    assert (clients.tally.late, clients.tally.held_up) == (1, 0)
    clients._note_late(504, took=3.5, held_up=2.0)  # this process was not let run itself
    assert (clients.tally.late, clients.tally.held_up) == (1, 1)
    body["outputs"][0]["data"] = [0.1, 0.1]
    others = [b"", b'{"model_version": "m", "outp', b"[]", b'{"model_version": "other", "outputs": []}']
    for said in (json.dumps(body).encode(), *others):  # no client may end at an answer that is none
        clients._note(0, 200, said, range(0, 1))
    clients._note(0, 503, b"<html>", range(0, 1))
    assert (clients.tally.wrong, clients.tally.unexplained) == (6, 0)


VECTORS = torch.arange(12, dtype=torch.float32).view(6, 2)
FED = [Arrival(item_id=1), Arrival(item_id=2), Arrival(item_id=3), Arrival(item_id=9, bad=True),
       Arrival(item_id=1, removed=True), Arrival(item_id=2)]  # fmt: skip


@pytest.fixture
def inputs(tmp_path) -> Inputs:
    return Inputs(shop=tmp_path, encoder=tmp_path, base=tmp_path, version="v1", arrivals=FED, vectors=VECTORS,
                  base_ids=torch.tensor([7]), base_vectors=torch.ones(1, 2))  # fmt: skip


def window(seq: int, items: dict[int, int], removed: tuple[int, ...] = ()) -> Window:
    """A window of items with the vectors of arrivals."""
    return Window.of(torch.tensor(list(items), dtype=torch.int64), VECTORS[list(items.values())], seq=seq,
                     table_version="v1", window_id=f"w{seq}", dtype="float32",
                     removed=torch.tensor(removed, dtype=torch.int64))  # fmt: skip


RIGHT = (window(1, {1: 0, 2: 1}), window(2, {3: 2}, removed=(1,)), window(3, {2: 5}))


def counts(found) -> tuple[int, int, int]:
    return found.wrong, found.lost, found.doubled


def test_a_log_that_is_right_passes(inputs):
    assert counts(verify_log(RIGHT, inputs)) == (0, 0, 0)


@pytest.mark.parametrize(
    "windows, expected",
    [
        ([RIGHT[0], window(2, {3: 1}, removed=(1,)), RIGHT[2]], (1, 0, 0)),
        ([RIGHT[0], window(2, {3: 2, 1: 0}), RIGHT[2]], (0, 1, 1)),
        ([RIGHT[0], RIGHT[1]], (0, 1, 0)),
        ([*RIGHT, window(4, {3: 2})], (0, 0, 1)),
        ([RIGHT[0], window(2, {2: 1, 3: 2}, removed=(1,)), RIGHT[2]], (0, 0, 1)),
        ([*RIGHT, window(4, {9: 3})], (1, 0, 0)),
        ([RIGHT[0], RIGHT[1], replace(RIGHT[2], window_id="w1")], (0, 0, 1)),
    ],
    ids=["wrong vector", "not deleted but again", "lost", "twice", "twice before the next", "bad item",
         "a name twice"],
)  # fmt: skip
def test_a_log_that_is_not_right_is_noticed(inputs, windows, expected):
    assert counts(verify_log(windows, inputs)) == expected


def test_rows_that_are_wrong_lost_or_too_many_are_noticed(inputs):
    audit = Audit(inputs.base_ids, inputs.base_vectors)
    audit.windows = list(RIGHT)
    state = audit.state(3)
    right = {2: VECTORS[5], 3: VECTORS[2], 7: torch.ones(2)}

    def check(rows: dict[int, torch.Tensor], held: int | None = None) -> tuple[int, int, int]:
        def lookup(ids):
            found = torch.tensor([item in rows for item in ids.tolist()])
            return torch.stack([rows.get(item, torch.zeros(2)) for item in ids.tolist()]), found

        return counts(verify_rows(lookup, state, "reader", held))

    assert check(right, held=3) == (0, 0, 0)
    assert check(right | {3: VECTORS[2] + 1e-6}) == (1, 0, 0)
    assert check(right | {1: VECTORS[0]}) == (1, 0, 0)  # was deleted
    assert check({2: VECTORS[5], 7: torch.ones(2)}) == (0, 1, 0)
    assert check(right, held=4) == (0, 0, 1)


def test_a_dead_letter_file_that_is_not_right_is_noticed(inputs):
    assert counts(verify_dead_letter(["a"], inputs, [9])) == (0, 0, 0)
    assert counts(verify_dead_letter([], inputs, [])) == (0, 1, 0)
    assert counts(verify_dead_letter(["a", "b"], inputs, [9, 3])) == (1, 0, 0)
    assert counts(verify_dead_letter(["a", "a"], inputs, [9, 9])) == (0, 0, 2)
