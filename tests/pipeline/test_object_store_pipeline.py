"""`mim pipeline` with outputs of stages at URLs of an object store, and with files there."""

import pytest

from mim_torchrec.embeddings.remote.places import Url
from mim_torchrec.pipeline.main import main
from mim_torchrec.pipeline.spec import Pipeline
from tests.object_store import contents

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_stages")]

FILE = """
name = "remote"

[stages.shop]
command = "shop"
out = "{url}/shop"
files = ["{url}/settings"]
flags = {{ items = 150, users = 40, requests = 100, searches = 50, browsing = 300, image-size = 32 }}

[stages.base]
component = "mim.ctr"
job.j = "1x1"
out = "{url}/base"
flags = {{ data = "${{shop}}", mim = "off", epochs = {epochs}, batch-size = 64 }}

[stages.chosen]
command = "choose"
arguments = ["${{base}}"]
flags.metric = "auc"
job.env.PRESET = "${{base/config.json#preset}}"
"""


def test_outputs_at_urls_are_kept_and_run_again(object_store, store_url, tmp_path, capsys):
    (Url(store_url) / "settings").write_bytes(b"1")

    def run(epochs: int = 1) -> str:
        (tmp_path / "run.toml").write_text(FILE.format(url=store_url, epochs=epochs))
        main(["run", str(tmp_path / "run.toml"), "--out", str(tmp_path / "run")])
        return capsys.readouterr().out

    assert "chosen: done" in run()
    first = contents(f"{store_url}/base")
    printed = run()
    assert "shop: already there" in printed and "base: already there" in printed
    assert (tmp_path / "run" / "chosen" / "best.json").is_file()
    printed = run(epochs=2)
    assert "shop: already there" in printed and "base: done" in printed
    assert contents(f"{store_url}/base")["history.jsonl"] != first["history.jsonl"]
    (Url(store_url) / "settings").write_bytes(b"22")
    main(["plan", str(tmp_path / "run.toml"), "--out", str(tmp_path / "run")])
    assert "settings has changed" in capsys.readouterr().out


def test_outputs_at_urls_must_not_overlap():
    stages = {
        name: {"command": "shop", "out": f"s3://bucket/{out}"} for name, out in (("a", "x"), ("b", "x/y"))
    }
    with pytest.raises(ValueError, match=r"s3://bucket/x/y and s3://bucket/x of a overlap"):
        Pipeline.model_validate({"name": "run", "stages": stages})


def test_the_directory_of_the_run_is_local(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "run.toml", "--out", "s3://bucket/run"])
    assert ended.value.code == 2
    assert "a local folder is needed" in " ".join(capsys.readouterr().err.split())
