"""Every command refuses what is wrong in one line that names it, with the status of its kind."""

import signal
from pathlib import Path

import pytest

from mim_torchrec import cli
from tests.programs import small_shop

FILE, OUT, SHOP = "{file}", "{out}", "{shop}"  # a path that is not there; one to write to; a data set
NO_REDIS = "redis://127.0.0.1:1"
RIM = f"--encoder {FILE} --table {FILE} --log {OUT} --out {OUT}"
TOO_SMALL = "it must be at least 1"
CASES = [
    ("shop", f"--out {OUT} --candidates 0", 2, f"--candidates is 0; {TOO_SMALL}"),
    ("shop", f"--out {OUT} --items 10", 2, "--items 10 is too few"),
    ("shop", f"--out {SHOP}", 5, "exists; choose another directory"),
    ("prepare", f"--mapping {FILE} --out {OUT}", 2, "no such file; `mim prepare --init"),
    ("prepare", f"--init {FILE}", 3, "no such directory; name the folder of your logs"),
    ("prepare", f"--mapping {FILE} --out {OUT} --threads 0", 2, f"--threads is 0; {TOO_SMALL}"),
    ("validate", str(FILE), 3, "no such directory; check the path"),
    ("validate", f"{FILE} --sample 0", 2, "--sample is 0.0; it must be above 0"),
    ("import movielens", f"--ratings {FILE} --posters {FILE} --out {OUT}", 3, "no such file; --ratings is"),
    ("import movielens", f"--ratings {FILE} --posters {FILE} --out {OUT} --negatives 0", 2, "--negatives is"),
    ("import taobao-mm", f"--source {FILE} --out {OUT}", 3, "put all files of the data set there"),
    ("import public", f"--layout hm --source {FILE} --out {OUT}", 3, "the folder of the unpacked data set"),
    ("import public", f"--layout hm --source {FILE} --out {OUT} --negatives 0", 2, "--negatives is 0"),
    ("pretrain", f"--data {FILE} --out {OUT}", 3, "no such directory; check the path"),
    ("pretrain", f"--data {SHOP} --out {OUT} --dma.batch-size 0", 2, "--dma.batch-size is 0"),
    ("csft", f"--data {FILE} --out {OUT}", 3, "no such directory; check the path"),
    ("csft", f"--data {SHOP} --out {OUT} --batch-size 0", 2, f"--batch-size is 0; {TOO_SMALL}"),
    ("csft", f"--data {SHOP} --out {OUT} --validation-fraction 2", 2, "--validation-fraction is 2.0"),
    ("csft", f"--data {SHOP} --out {OUT} --vision.name no_such", 2, "no model of timm"),
    ("retrieve", f"--data {SHOP} --encoder {FILE} --out {OUT}", 3, "is not an encoder"),
    ("retrieve", f"--data {SHOP} --encoder {FILE} --out {OUT} --held-out-fraction 0", 2, "be above 0 and"),
    ("export", f"--data {SHOP} --encoder {FILE} --out {OUT}", 3, "is not an encoder"),
    ("export", f"--data {SHOP} --encoder {FILE} --out {SHOP}", 5, "exists; choose another directory"),
    ("rim", f"--source {SHOP}/items {RIM}", 3, "is not an encoder"),
    ("rim", f"--source {SHOP} {RIM} --threads 0", 2, "--threads is 0"),
    ("ctr", f"--data {FILE} --out {OUT} --mim off", 3, "no such directory; check the path"),
    ("ctr", f"--data {SHOP} --out {OUT}", 2, "train Base with --mim off"),
    ("ctr", f"--data {SHOP} --out {OUT} --table {FILE}", 3, "no finished table"),
    ("ctr", f"--data {SHOP} --out {OUT} --mim off --sparse-features x", 3, "column x: the column is"),
    ("evaluate", f"--model {FILE} --out {OUT}", 3, "is no run: it has no config.json"),
    ("evaluate", f"--model {FILE} --out {OUT} --batch-size 0", 2, "--batch-size is 0"),
    ("explain", f"--model {FILE}", 3, "is no run: it has no config.json"),
    ("explain", f"--model {FILE} --behaviors 0", 2, "--behaviors is 0"),
    ("choose", f"{FILE} --out {OUT}", 3, "history.jsonl: No such file or directory; check the path"),
    ("ablate", f"{FILE} --data {SHOP} --out {OUT}", 3, "No such file or directory; check the path"),
    ("pipeline", f"run {FILE} --out {OUT}", 3, "No such file or directory; check the path"),
    ("pipeline", f"plan {FILE} --out {OUT}", 3, "No such file or directory; check the path"),
    ("pipeline", f"status {FILE}", 5, "is no directory of a pipeline"),
    ("pipeline", f"cancel {FILE}", 5, "is no directory of a pipeline"),
    ("bundle", f"--run {FILE} --out {OUT}", 3, "is no run: it has no config.json"),
    ("release", f"stage --root {OUT} --name a --bundle {FILE}", 3, "mim bundle writes one"),
    ("release", f"promote --root {OUT} --name a", 5, "has no release 'a'"),
    ("serve", f"--release {FILE}", 5, "stage one and promote it"),
    ("serve", f"--bundle {FILE}", 3, "mim bundle writes one"),
    ("serve", f"--bundle {FILE} --port 70000", 2, "--port is 70000"),
    ("plan", "--rows 0", 2, f"--rows is 0; {TOO_SMALL}"),
    ("plan", "--rows 1000000000000", 2, "the tables do not fit"),
    ("table", f"info {FILE}", 3, "no finished table"),
    ("table", f"import {FILE} --out {OUT}", 3, "not found"),
    ("store", f"load {FILE} --store {NO_REDIS}", 3, "no finished table"),
    ("store", f"follow --store {NO_REDIS} --log {OUT} --table-version v", 6, "does not answer"),
    ("store", f"follow --store http://x --log {OUT} --table-version v", 2, "http:// is none of"),
]  # fmt: skip


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    return small_shop(tmp_path_factory.mktemp("errors"))


@pytest.fixture
def handlers():
    """What `mim rim` and `mim store follow` do at signals ends with the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("command", "words", "status", "said"), CASES)
def test_a_command_ends_an_expected_error_in_one_line(
    command, words, status, said, shop, tmp_path, capsys, handlers
):
    paths = {FILE: tmp_path / "missing", OUT: tmp_path / "out", SHOP: shop}
    for name, path in paths.items():
        words = words.replace(name, str(path))
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split(), *words.split()])
    shown = capsys.readouterr().err.splitlines()
    mine = [line for line in shown if line.startswith(f"mim {command}: ")]
    assert len(mine) == 1 and said in mine[0], "\n".join(shown)
    assert not any(line.startswith("Traceback") for line in shown)
    assert ended.value.code == status


def test_every_command_has_a_case():
    assert {command for command, *_ in CASES} | {"doctor"} == set(cli.COMMANDS)


def test_debug_shows_where_a_command_has_failed(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--debug", "table", "info", str(tmp_path)])
    assert ended.value.code == 3
    assert "Traceback" in capsys.readouterr().err
