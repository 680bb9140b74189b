"""RIM through its `main`: every item that comes is in one window, with the vector that an export gives it."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections import Counter
from pathlib import Path
from threading import Event

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mim_torchrec.benchmarks.cluster.nodes import wait_until
from mim_torchrec.benchmarks.harness.redis_server import RedisServer
from mim_torchrec.data.errors import DataError
from mim_torchrec.embeddings.holder import LeaseError
from mim_torchrec.embeddings.stores.embedded import EmbeddedStore
from mim_torchrec.embeddings.stores.store import catch_up
from mim_torchrec.embeddings.table.format import Table, TableWriter, VersionMismatch
from mim_torchrec.embeddings.table.main import main as table_command
from mim_torchrec.embeddings.windows.log import WindowLog
from mim_torchrec.embeddings.windows.redis_address import locate
from mim_torchrec.embeddings.windows.redis_connection import connect
from mim_torchrec.embeddings.windows.transport import open_log
from mim_torchrec.representation.export import TrainedEncoder
from mim_torchrec.rim.config import RIMConfig
from mim_torchrec.rim.main import RIM, main
from mim_torchrec.training.lease import Lease
from tests.pipeline.test_export_main import encoder, exported  # noqa: F401  fixtures

pytestmark = pytest.mark.usefixtures("forked_stages")

SCHEMA = pa.schema([("item_id", pa.int64()), ("title", pa.string()), ("image", pa.binary()),
                    ("removed", pa.bool_())])  # fmt: skip
CPU = torch.device("cpu")


def image(item: int) -> bytes:
    image = io.BytesIO()
    pixels = np.random.default_rng(item).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(image, "PNG")
    return image.getvalue()


def row(item: int, **words) -> dict:
    return {"item_id": item, "title": f"red hat {item}", "image": image(item), "removed": False} | words


def put(folder: Path, name: str, rows: list[dict]) -> None:
    """Move a whole file into the folder."""
    folder.mkdir(exist_ok=True)
    path = folder / f".{name}"
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, row_group_size=7)
    os.replace(path, folder / f"{name}.parquet")


@pytest.fixture
def place(tmp_path, encoder, exported):  # noqa: F811
    """Flags of a RIM, whose source is empty."""
    (tmp_path / "new").mkdir()
    return {"--source": str(tmp_path / "new"), "--encoder": str(encoder[0]), "--table": str(exported[1]),
            "--log": str(tmp_path / "log"), "--out": str(tmp_path / "rim"), "--batch-size": "4"}  # fmt: skip


def words(place: dict[str, str], *more: str) -> list[str]:
    """Words of the command line; windows are closed by count unless `more` says otherwise."""
    return [word for pair in place.items() for word in pair] + ["--window-seconds", "3600", *more]


def version(place: dict[str, str]) -> str:
    return Table.open(place["--table"]).manifest.table_version


def windows(place: dict[str, str]) -> list:
    return list(open_log(place["--log"], version(place)).after(0))


def reasons(place: dict[str, str]) -> dict[int | None, str]:
    lines = (Path(place["--out"]) / "dead-letter.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines if line]
    assert len({(e["place"], e["reason"]) for e in entries}) == len(entries)
    return {entry["item_id"]: entry["reason"] for entry in entries}


def test_items_of_files_become_windows_with_the_vectors_of_the_encoder(place, tmp_path):
    put(tmp_path / "new", "a", [row(k) for k in range(1000, 1020)])
    put(tmp_path / "new", "b", [row(k) for k in range(1020, 1025)])
    main(words(place, "--window-items", "8", "--once"))
    made = windows(place)
    assert [w.ids.numel() for w in made] == [8, 8, 8, 1]
    store = EmbeddedStore(Table.open(place["--table"]))
    assert catch_up(store, open_log(place["--log"], version(place))) == 4
    one = TrainedEncoder(place["--encoder"], CPU)
    for item in range(1000, 1025):
        with torch.inference_mode():
            expected = one([Image.open(io.BytesIO(image(item))).convert("RGB")], [f"red hat {item}"])
        found, is_there = store.lookup(torch.tensor([item]))
        assert is_there.item()
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)
    counts = json.loads((tmp_path / "rim" / "rim.json").read_text())
    assert (counts["windows"], counts["items"], counts["removed"], counts["dead_lettered"]) == (4, 25, 0, 0)


def test_again_publishes_nothing_twice_and_only_what_is_new(place, tmp_path):
    put(tmp_path / "new", "b", [row(k) for k in range(10)])
    for _ in range(2):
        main(words(place, "--once"))
    assert len(windows(place)) == 1
    put(tmp_path / "new", "a", [row(20)])  # before the other by name
    main(words(place, "--once"))
    assert [w.ids.tolist() for w in windows(place)] == [list(range(10)), [20]]


def test_bad_items_go_to_the_dead_letter_file_with_their_reason_and_the_others_on(
    place, tmp_path, monkeypatch
):
    bad = {1: {"image": image(1)[:60]}, 2: {"title": "  "}, 3: {"title": None}, 4: {"image": None},
           5: {"image": b"no image"}, 6: {"image": bytes(3000)}}  # fmt: skip
    put(tmp_path / "new", "a", [row(k, **bad.get(k, {})) for k in range(9)] + [row(0, item_id=None)])
    (tmp_path / "new" / "broken.parquet").write_bytes(b"PAR1 no")
    pq.write_table(pa.table({"title": ["x"]}), tmp_path / "new" / "columns.parquet")
    original = TrainedEncoder.__call__

    def bad(self, images, titles):
        vectors = original(self, images, titles).clone()
        vectors[[title.endswith(" 7") for title in titles]] = float("nan")
        return vectors

    monkeypatch.setattr(TrainedEncoder, "__call__", bad)
    for _ in range(2):
        main(words(place, "--max-image-bytes", "5000", "--once"))
    assert [w.ids.tolist() for w in windows(place)] == [[0, 8]]
    lines = (tmp_path / "rim" / "dead-letter.jsonl").read_text()
    found = reasons(place)
    assert "cannot be decoded" in found[1]
    assert found[5] == "image: the image of 8 bytes cannot be decoded (no known format); replace it"
    assert found[2] == found[3] == "the title is empty" and found[4] == "there is no image"
    assert "NaN or infinity" in found[7]
    assert "broken.parquet" in lines and "column item_id" in lines and "there is no item_id" in lines


def test_items_that_the_encoder_cannot_take_go_to_the_dead_letter_file_but_not_where_it_takes_none(
    place, tmp_path, monkeypatch
):
    put(tmp_path / "new", "a", [row(k) for k in range(5)])
    original, is_broken = TrainedEncoder.__call__, False

    def fail(self, images, titles):
        if is_broken or any(title.endswith(" 3") for title in titles):
            raise RuntimeError("no kernel for this")
        return original(self, images, titles)

    monkeypatch.setattr(TrainedEncoder, "__call__", fail)
    main(words(place, "--once"))
    assert [w.ids.tolist() for w in windows(place)] == [[0, 1, 2, 4]]
    assert reasons(place) == {3: "the encoder fails: RuntimeError: no kernel for this"}
    is_broken = True
    put(tmp_path / "new", "b", [row(7), row(8)])
    with pytest.raises(RuntimeError, match="no kernel"):
        main(words(place, "--once"))
    assert list(reasons(place)) == [3] and len(windows(place)) == 1


def test_an_image_that_is_too_large_goes_to_the_dead_letter_file(place, tmp_path):
    put(tmp_path / "new", "a", [row(1), row(2)])
    main(words(place, "--max-image-bytes", "100", "--once"))
    assert all("more than 100" in reason for reason in reasons(place).values())
    assert [w.ids.numel() for w in windows(place)] == [0]  # says that both were read


def test_a_file_that_was_broken_is_read_when_it_is_mended(place, tmp_path):
    (tmp_path / "new" / "a.parquet").write_bytes(b"PAR1 no")
    main(words(place, "--once"))
    assert windows(place) == []
    put(tmp_path / "new", "a", [row(3)])
    main(words(place, "--once"))
    assert [w.ids.tolist() for w in windows(place)] == [[3]]


def test_tombstones_and_items_that_come_twice(place, tmp_path):
    put(tmp_path / "new", "a", [row(1), row(2), row(1, title="blue"), row(2, removed=True),
                                {"item_id": 103, "title": None, "image": None, "removed": True}])  # fmt: skip
    main(words(place, "--once"))
    (made,) = windows(place)
    assert (made.ids.tolist(), sorted(made.removed.tolist())) == ([1], [2, 103])
    table_command(["delete", "1", "106", "--log", place["--log"], "--table", place["--table"]])
    store = EmbeddedStore(Table.open(place["--table"]))
    assert store.lookup(torch.tensor([103, 106]))[1].tolist() == [True, True]
    catch_up(store, open_log(place["--log"], version(place)))
    assert store.lookup(torch.tensor([1, 2, 103, 106, 109]))[1].tolist() == [False] * 4 + [True]
    put(tmp_path / "new", "b", [row(50)])
    main(words(place, "--once"))  # goes on behind a window that is not its own
    assert [w.seq for w in windows(place)] == [1, 2, 3]


def add(url: str, *rows: dict) -> None:
    at = locate(url)
    for r in rows:
        fields = {name: str(int(v)) if isinstance(v, bool) else v for name, v in r.items() if v is not None}
        connect(at).xadd(at.name, fields)


def test_items_of_a_stream(place, redis_url):
    source = f"{redis_url}:items"
    place |= {"--source": source, "--log": redis_url}
    add(source, *(row(k) for k in range(10)), row(3, removed=True), {"title": "x"}, {"item_id": "x"},
        {"item_id": 2**70, "title": "x"})  # fmt: skip
    main(words(place, "--window-items", "6", "--once"))
    made = windows(place)
    assert [w.ids.tolist() for w in made] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9], []]
    assert made[1].removed.tolist() == [3]
    lines = (Path(place["--out"]) / "dead-letter.jsonl").read_text()
    assert "there is no item_id" in lines and "invalid literal" in lines and "beyond 64 bits" in lines
    add(source, row(77))
    main(words(place, "--once"))
    assert [w.ids.tolist() for w in windows(place)[3:]] == [[77]]


def start(place: dict[str, str], *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "mim_torchrec.rim.main", *words(place, *more)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


KILLED = """
import os, signal, sys
from mim_torchrec.rim import main as rim
number, moment = int(sys.argv[1]), sys.argv[2]
plain, calls = rim.open_log, []

def open_log(*args, **words):
    log = plain(*args, **words)
    append = log.append

    def counted(*args, **words):
        calls.append(args)
        if len(calls) == number and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        seq = append(*args, **words)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return seq

    log.append = counted
    return log

rim.open_log = open_log
rim.main(sys.argv[3:])
"""


@pytest.mark.parametrize("kind", ["files", "stream"])
def test_whoever_is_killed_when_every_item_is_in_one_window(place, tmp_path, forked, redis_url, kind):
    items = range(500, 590)
    if kind == "files":
        for first in items[::30]:
            put(tmp_path / "new", f"f{first}", [row(k) for k in range(first, first + 30)])
    else:
        place |= {"--source": f"{redis_url}:items", "--log": redis_url}
        add(place["--source"], *(row(k) for k in items))
    line = words(place, "--window-items", "1", "--once")
    for number, moment in (("2", "before"), ("3", "after"), ("1", "before")):
        command, environment = ["python", "-c", KILLED, number, moment, *line], {**os.environ, **forked}
        rim = subprocess.run(command, env=environment, check=False)
        assert rim.returncode == -signal.SIGKILL
    assert len(windows(place)) == 4
    main(line)
    made = windows(place)
    assert [w.seq for w in made] == list(range(1, len(made) + 1))
    assert Counter(item for w in made for item in w.ids.tolist()) == Counter(items)


def test_sigterm_publishes_what_was_read_and_ends(place, tmp_path):
    put(tmp_path / "new", "a", [row(k) for k in range(6)])
    rim = start(place, "--batch-size", "2")
    dead_letter = Path(place["--out"])
    wait_until(dead_letter.exists, rim)
    rim.send_signal(signal.SIGTERM)
    said = rim.communicate()[1]
    assert rim.returncode == 0, said
    items = [item for w in windows(place) for item in w.ids.tolist()]
    assert items == list(range(len(items)))
    main(words(place, "--once"))
    assert sorted(item for w in windows(place) for item in w.ids.tolist()) == list(range(6))


def configure(place: dict[str, str], **more) -> RIMConfig:
    return RIMConfig(source=place["--source"], encoder=Path(place["--encoder"]), table=Path(place["--table"]),
                     log=place["--log"], out=Path(place["--out"]), **more)  # fmt: skip


def test_two_at_once_publish_every_item_once(place, tmp_path):
    for name in "abcd":
        first = 100 * ord(name)
        put(tmp_path / "new", name, [row(k) for k in range(first, first + 12)])
    both = [RIM(configure(place, window_items=5, batch_size=2, once=True), CPU) for _ in range(2)]
    threads = [threading.Thread(target=rim.run, args=(Event(),)) for rim in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = Counter(item for w in windows(place) for item in w.ids.tolist())
    assert set(counts.values()) == {1} and len(counts) == 48


def test_a_rim_whose_lease_was_taken_over_adds_no_window(place, tmp_path, monkeypatch):
    put(tmp_path / "new", "a", [row(k) for k in range(3)])
    successor, append = Lease(tmp_path / "rim" / "lease.json", expiry=-3600), WindowLog.append

    def last(self, *args, **words):
        seq = append(self, *args, **words)
        if seq == 1:
            successor.take()
        return seq

    monkeypatch.setattr(WindowLog, "append", last)
    with pytest.raises(LeaseError, match=f"was replaced by process {os.getpid()}.*Nothing more is written"):
        main(words(place, "--window-items", "1", "--once"))
    assert [w.seq for w in windows(place)] == [1]
    successor.check()
    successor.give_back()


def test_a_full_disk_is_waited_for(place, tmp_path, monkeypatch, caplog):
    put(tmp_path / "new", "a", [row(1)])
    append, calls = WindowLog.append, []

    def full(self, *args, **words):
        calls.append(args)
        if len(calls) < 3:
            raise OSError(28, "No space left on device")
        return append(self, *args, **words)

    monkeypatch.setattr(WindowLog, "append", full)
    monkeypatch.setattr("mim_torchrec.rim.main.LOOK", 0.01)
    RIM(configure(place, once=True), CPU).run(Event())
    assert len(calls) == 3 and [w.ids.tolist() for w in windows(place)] == [[1]]
    assert "No space left on device; trying again" in caplog.text


def test_a_server_that_is_gone_is_waited_for(place, tmp_path):
    server = RedisServer(tmp_path / "redis")
    try:
        url = f"{server.url}#{uuid.uuid4().hex}"
        place |= {"--source": f"{url}:items", "--log": url}
        add(place["--source"], row(1))
        rim = start(place, "--window-seconds", "0.1")
        log = open_log(url, version(place), start=0)
        while not log.wait(0, 5):
            assert rim.poll() is None
        server.kill()
        for line in rim.stderr:
            if "trying again until it works" in line:
                break
        server.start()
        add(place["--source"], row(2))
        while not log.wait(1, 5):
            assert rim.poll() is None
        rim.terminate()
        assert rim.wait() == 0
        assert [w.ids.tolist() for w in windows(place)] == [[1], [2]]
    finally:
        server.kill()


def test_the_wrong_encoder_a_missing_source_and_another_log_are_refused(place, tmp_path):
    other = TableWriter(tmp_path / "other", table_version="v9", dim=8, dtype="float16", encoder={})
    other.write_shard(torch.tensor([1]), torch.ones(1, 8))
    other.finish()
    with pytest.raises(VersionMismatch, match="v9.*use the encoder"):
        main(words(place | {"--table": str(tmp_path / "other")}, "--once"))
    with pytest.raises(DataError, match="no such directory"):
        main(words(place | {"--source": str(tmp_path / "nowhere")}, "--once"))
    open_log(tmp_path / "foreign", "v9", start=0)
    with pytest.raises(VersionMismatch, match="v9, expected"):
        main(words(place | {"--log": str(tmp_path / "foreign")}, "--once"))
