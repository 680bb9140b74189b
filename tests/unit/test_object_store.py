"""Directories in an object store: published whole, fetched once, one writer, clear errors."""

import os
import pickle
from pathlib import Path

import pytest

from mim_torchrec.embeddings.holder import LeaseError
from mim_torchrec.embeddings.remote.fetching import FetchError, cache_folder, fetched
from mim_torchrec.embeddings.remote.lease import StoreLease
from mim_torchrec.embeddings.remote.outputs import written
from mim_torchrec.embeddings.remote.places import NoSuchPlace, StoreError, Url, place
from mim_torchrec.embeddings.remote.published import PublishedError, Publisher, read_index
from mim_torchrec.embeddings.windows.transport import open_log
from mim_torchrec.errors import OptionError, OutputExists, Status, explain
from tests.object_store import contents, upload

FIRST = {"a.txt": b"one", "folder/b": b"same"}
SECOND = {"a.txt": b"two", "folder/b": b"same", "c.json": b"{}"}


def publish(url: str, files: dict[str, bytes], replace: bool = False) -> None:
    with written(Url(url), replace=replace) as folder:
        fill(folder, files)


def fill(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_a_url_stays_whole_and_is_no_path():
    url = place("s3://bucket//odd/shop/")
    assert str(url) == "s3://bucket//odd/shop"
    assert pickle.loads(pickle.dumps(url)) == url
    with pytest.raises(TypeError):
        Path(url)  # type: ignore[arg-type]
    assert place("file:///data/shop") == Path("/data/shop")


@pytest.mark.parametrize("base", ["store", "memory://test"])
def test_what_is_published_is_fetched(base, store_url, tmp_path):
    url = f"{store_url if base == 'store' else base}/{tmp_path.name}"
    publish(url, FIRST)
    assert files_in(fetched(url)) == FIRST
    assert files_in(fetched(f"{url}/folder")) == {"b": b"same"}
    assert files_in(fetched(url, ["folder"])) == {"folder/b": b"same"}
    publish(url, SECOND, replace=True)
    assert files_in(fetched(url)) == contents(url) == SECOND


@pytest.mark.parametrize("base", ["store", "memory://test"])
def test_what_another_tool_has_put_there_is_fetched(base, store_url, tmp_path):
    url = Url(f"{store_url if base == 'store' else base}/{tmp_path.name}-external")
    for name, data in FIRST.items():
        (url / name).write_bytes(data)
    assert files_in(fetched(url)) == FIRST


def test_credentials_for_a_folder_are_enough_to_read_it(store_url, object_store, tmp_path):
    publish(f"{store_url}/ours/a", FIRST)
    fill(tmp_path / "external", FIRST)
    upload(tmp_path / "external", f"{store_url}/ours/b")
    object_store.hide = r"^\.mim/|^[0-9a-f]+/\.mim/"
    assert files_in(fetched(f"{store_url}/ours/a")) == files_in(fetched(f"{store_url}/ours/b")) == FIRST
    object_store.hide = r"/ours/"
    with pytest.raises(StoreError, match="access denied"):
        fetched(f"{store_url}/ours/a")


def test_a_replaced_directory_leaves_no_objects_of_the_old_one(store_url):
    publish(store_url, FIRST)
    publish(store_url, SECOND, replace=True)
    assert len([path for path in Url(store_url).walk() if not path.startswith(".mim/")]) == len(SECOND)


def test_what_is_unchanged_is_not_uploaded_again(store_url, object_store):
    publish(store_url, FIRST)
    object_store.puts.clear()
    publish(store_url, SECOND, replace=True)
    assert not [path for path in object_store.puts if "/folder/" in path]


@pytest.mark.parametrize("refused", [r"/c\.", r"/index-"])
def test_a_failed_upload_leaves_the_old_whole(store_url, object_store, refused):
    publish(store_url, FIRST)
    object_store.refuse = refused
    with pytest.raises(StoreError, match="access denied"):
        publish(store_url, SECOND, replace=True)
    assert files_in(fetched(store_url)) == FIRST
    object_store.refuse = None
    publish(store_url, SECOND, replace=True)
    assert contents(store_url) == SECOND


def test_leftovers_of_a_killed_publisher_are_removed(store_url):
    publish(store_url, FIRST)
    publish(f"{store_url}/inner", FIRST)
    left = Url(store_url) / "c.0123456789abcdef.json"
    left.write_bytes(b"half")
    publish(store_url, SECOND, replace=True)
    with pytest.raises(NoSuchPlace):
        left.stat()
    assert contents(f"{store_url}/inner") == FIRST


def test_an_output_that_exists_is_refused(store_url):
    publish(store_url, FIRST)
    with pytest.raises(OutputExists, match="exists; choose another"):
        publish(store_url, SECOND)
    assert contents(store_url) == FIRST


def test_files_of_other_origin_are_not_mixed_with(store_url, tmp_path):
    fill(tmp_path / "external", FIRST)
    upload(tmp_path / "external", store_url)
    with pytest.raises(OutputExists, match=r"by other means, such as a\.txt"):
        publish(store_url, SECOND, replace=True)
    assert files_in(fetched(store_url)) == FIRST


def test_a_second_writer_is_refused_by_the_name_of_the_first(store_url):
    with written(Url(store_url)) as folder:
        fill(folder, FIRST)
        with pytest.raises(LeaseError, match=f"is written by process {os.getpid()} on "):
            publish(store_url, SECOND)
    assert contents(store_url) == FIRST


def test_a_lease_whose_signs_have_stopped_is_taken_over(store_url):
    first, second = StoreLease(Url(store_url)), StoreLease(Url(store_url), expiry=0.0)
    first.take()
    publisher = Publisher(Url(store_url))
    second.take()
    with pytest.raises(LeaseError, match="was replaced by process"):
        first.check()
    second.check()
    first.give_back()
    second.check()  # what the first one writes now changes nothing
    Publisher(Url(store_url)).publish()
    with pytest.raises(PublishedError, match="by another process meanwhile"):
        publisher.publish()
    second.give_back()


def test_a_writer_that_was_overtaken_twice_publishes_nothing(store_url, tmp_path):
    publish(store_url, FIRST)
    stalled = Publisher(Url(store_url))
    publish(store_url, SECOND, replace=True)
    publish(store_url, FIRST, replace=True)
    fill(tmp_path / "late", {"late": b"late"})
    stalled.upload_all(tmp_path / "late")
    with pytest.raises(PublishedError, match="its results stay"):
        stalled.publish()  # the number that it takes is free again
    assert contents(store_url) == FIRST


def test_a_store_without_conditional_writes_is_refused(store_url, object_store):
    object_store.ignore_conditions = True
    with pytest.raises(StoreError, match="ignores conditional writes"):
        publish(store_url, FIRST)
    with pytest.raises(StoreError, match="hdfs has no conditional writes"):
        publish("hdfs://node/run", FIRST)


def test_what_is_half_written_is_not_read(store_url):
    with written(Url(store_url)) as folder:
        fill(folder, FIRST)
        with pytest.raises(FetchError, match="is being written"):
            fetched(store_url)


def test_a_damaged_object_is_found(store_url):
    publish(store_url, FIRST)
    index = read_index(Url(store_url))
    index.url_of("a.txt").write_bytes(b"two")
    with pytest.raises(FetchError, match="is damaged"):
        fetched(store_url)
    index.url_of("a.txt").write_bytes(b"longer")
    with pytest.raises(FetchError, match="6 bytes, not 3"):
        fetched(store_url)
    assert not list((cache_folder() / "fetched").rglob("a.txt*"))


def test_the_cache_removes_what_is_not_in_use(store_url, monkeypatch):
    publish(f"{store_url}/a", FIRST)
    publish(f"{store_url}/b", SECOND)
    old = cache_folder() / "fetched" / ("0" * 24)
    fill(old / "old", {"file": b"x" * 1000})
    monkeypatch.setenv("MIM_CACHE_GIB", str(40 / 2**30))
    used = fetched(f"{store_url}/a")
    assert not old.exists()
    fetched(f"{store_url}/b")
    monkeypatch.setenv("MIM_CACHE_GIB", str(8 / 2**30))
    publish(f"{store_url}/c", {"c": b"123"})
    with pytest.raises(StoreError, match="bytes in use, 3 more are needed"):
        fetched(f"{store_url}/c")
    assert used.is_dir()


@pytest.mark.parametrize(
    ("url", "message", "status"),
    [
        ("s3://no-such-bucket/shop", "s3://no-such-bucket/shop: no such bucket; check the URL", Status.DATA),
        ("s3://shops/nothing", "s3://shops/nothing: no such directory", Status.DATA),
        ("s4://shops/shop", "fsspec knows no scheme 's4'; check the URL", Status.DATA),
        ("gs://shops/shop", "python -m pip install gcsfs", Status.ENVIRONMENT),
    ],
)
def test_errors_are_one_line(object_store, url, message, status):
    with pytest.raises((NoSuchPlace, StoreError)) as raised:
        fetched(url)
    found = explain(raised.value)
    assert found is not None
    assert message in found[0]
    assert "\n" not in found[0]
    assert found[1] == status


def test_missing_credentials_are_one_line(object_store, monkeypatch):
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreError, match="credentials"):
        fetched("s3://shops/shop")
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_window_log_in_an_object_store_is_refused():
    with pytest.raises(OptionError, match="a hard link gives a window its number"):
        open_log("s3://shops/log", "v1", start=0)
