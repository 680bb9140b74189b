"""Files and directories are replaced whole, with the modes of the umask, and a full disk says so."""

import errno
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from mim_torchrec.embeddings import files
from mim_torchrec.embeddings.table.format import TableWriter
from mim_torchrec.embeddings.tensor_files import DamagedFile, read_tensors, write_tensors


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(root: Path) -> set[tuple[str, int]]:
    return {("d" if path.is_dir() else "f", stat.S_IMODE(path.stat().st_mode)) for path in root.rglob("*")}


def test_files_and_directories_have_the_modes_that_the_umask_allows(tmp_path, umask):
    with files.atomic_directory(tmp_path / "d") as folder:
        (folder / "sub").mkdir(0o700)
        (folder / "sub" / "f").write_text("a")
        (folder / "sub" / "f").chmod(0o600)  # as the writer of safetensors does
    files.write_json(tmp_path / "json", {})
    write_tensors(tmp_path / "tensors", {"a": torch.ones(2)})
    writer = TableWriter(tmp_path / "table", table_version="v", dim=2, encoder={})
    writer.write_shard(torch.arange(3), torch.ones(3, 2))
    writer.finish()
    assert modes(tmp_path) == {("f", 0o666 & ~umask), ("d", 0o777 & ~umask)}


@pytest.mark.parametrize("metadata", [None, {"table_version": "ä"}])
def test_tensors_are_written_byte_for_byte_as_the_library_writes_them(tmp_path, metadata):
    tensors = {
        "b": torch.arange(6).reshape(2, 3),
        "a": torch.randn(3, 5).bfloat16(),
        "c": torch.tensor(2.5),
        "empty": torch.empty(0, 4, dtype=torch.uint8),
        "strided": torch.randn(4, 6).t(),
    }
    write_tensors(tmp_path / "f", tensors, metadata)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert (tmp_path / "f").read_bytes() == save(contiguous, metadata)
    assert all(torch.equal(load_file(tmp_path / "f")[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("size", [0, 7, 20, -1])
def test_a_damaged_file_of_tensors_is_named(tmp_path, size):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.arange(9)})
    assert read_tensors(path)["a"].tolist() == list(range(9))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DamagedFile, match=rf"{path} is damaged"):
        read_tensors(path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_the_path_the_bytes_needed_and_the_bytes_free(tmp_path, monkeypatch, code):
    files.write_bytes(tmp_path / "f", b"old")

    def full(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("os.fsync", full)
    message = (
        rf"{tmp_path / 'f'} cannot be written: {os.strerror(code)}; 5000 bytes are needed, \d+ bytes are"
    )
    with pytest.raises(files.DiskFull, match=message) as caught:
        files.write_bytes(tmp_path / "f", b"x" * 5000)
    assert caught.value.errno == code
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_bytes() == b"old"


def write(root: Path, value: str) -> None:
    with files.atomic_directory(root / "d") as folder:
        (folder / "a").write_text(value)


def test_a_directory_that_fails_halfway_leaves_the_old_one(tmp_path):
    write(tmp_path, "first")
    with pytest.raises(RuntimeError), files.atomic_directory(tmp_path / "d") as folder:
        (folder / "a").write_text("second")
        raise RuntimeError
    assert (tmp_path / "d" / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


@pytest.fixture
def without_exchange(monkeypatch):
    """A file system that cannot exchange names, such as NFS."""
    monkeypatch.setattr(files, "_renameat2", lambda *_: False)


@pytest.mark.usefixtures("without_exchange")
def test_without_exchange_a_rename_that_fails_gives_the_old_name_back(tmp_path, monkeypatch):
    write(tmp_path, "first")
    plain, calls = os.rename, []

    def second_fails(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "broken")
        plain(source, target)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="broken"):
        patched.setattr("os.rename", second_fails)
        write(tmp_path, "second")
    assert (tmp_path / "d" / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


@pytest.mark.usefixtures("without_exchange")
def test_without_exchange_a_directory_that_a_kill_left_without_a_name_gets_it_back(tmp_path):
    write(tmp_path, "first")
    write(tmp_path, "second")
    assert (tmp_path / "d" / "a").read_text() == "second"
    (tmp_path / "d").rename(files.beside(tmp_path / "d", files.OLD))
    files.beside(tmp_path / "x").write_text("half")
    files.clear_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    assert (tmp_path / "d" / "a").read_text() == "second"


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_name_that_is_taken_is_not_replaced_where_it_must_be_free(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(files, "_renameat2", lambda *_: False)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()  # which a plain rename would replace
    with pytest.raises(FileExistsError):
        files.publish_directory(tmp_path / "one", tmp_path / "two", replace=False)
    assert (tmp_path / "one").is_dir()


def test_one_of_several_creates_a_file(tmp_path):
    assert files.create_file(tmp_path / "f", b"1")
    assert not files.create_file(tmp_path / "f", b"2")
    assert (tmp_path / "f").read_bytes() == b"1"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
