"""Tokens of the server: read again when their file changes, and kept where it is damaged."""

import os

import pytest

from mim_torchrec.errors import OptionError
from mim_torchrec.serving.tokens import TokenFile
from tests.said import said


def write(path, text: str, mode: int = 0o600) -> None:
    """Replace the file, as Kubernetes and editors do."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.chmod(mode)
    os.replace(new, path)


def test_tokens_are_read_again_when_the_file_changes(tmp_path, monkeypatch):
    path, reads = tmp_path / "tokens", []
    write(path, "one\n\n two \n")
    tokens = TokenFile(path, lambda: reads.append(1))
    assert (
        tokens.accepts("Bearer one") and tokens.accepts("bearer two") and not tokens.accepts("Bearer three")
    )
    write(path, "three\n")
    assert tokens.accepts("Bearer one")  # it was looked at less than a second ago
    monkeypatch.setattr("mim_torchrec.serving.tokens.LOOK_EVERY", -1.0)
    assert tokens.accepts("Bearer three") and not tokens.accepts("Bearer one") and len(reads) == 2


def test_a_damaged_file_leaves_the_tokens_as_they_were(tmp_path, caplog):
    path = tmp_path / "tokens"
    write(path, "one\n")
    tokens = TokenFile(path)
    for damage in (lambda: write(path, "\n"), path.unlink, lambda: path.write_bytes(b"\xff")):
        damage()
        for _ in range(2):
            tokens.reread()
        assert tokens.accepts("Bearer one")
    assert len(said(caplog, "serving.tokens")) == 3  # one line for each change
    write(path, "two\n")
    tokens.reread()
    assert tokens.accepts("Bearer two")


def test_a_file_that_all_can_read_is_warned_of(tmp_path, caplog):
    path = tmp_path / "tokens"
    write(path, "one\n", 0o640)
    TokenFile(path)
    assert not said(caplog, "serving.tokens")
    write(path, "one\n", 0o644)
    TokenFile(path)
    assert "every user of this machine can read the tokens" in caplog.text
    write(path, "\n")
    with pytest.raises(OptionError, match="has no token"):
        TokenFile(path)


@pytest.mark.parametrize(
    "header", ["", "one", "Basic one", "Bearer", "Bearer ", "Bearer onee", "Bearer \xff"]
)
def test_other_headers_are_refused(tmp_path, header):
    write(tmp_path / "tokens", "one\n")
    assert not TokenFile(tmp_path / "tokens").accepts(header)
