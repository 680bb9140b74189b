"""What the documentation says of flags, names and sizes is what the code says."""

import inspect
import re
from pathlib import Path

import pytest

from mim_torchrec.csft import config as csft
from mim_torchrec.csft.config import CSFTConfig
from mim_torchrec.ctr import config as ctr
from mim_torchrec.ctr.config import CTRConfig
from mim_torchrec.launch import components
from mim_torchrec.pretraining import config as pretraining
from mim_torchrec.pretraining.config import PretrainConfig
from mim_torchrec.training.presets import differences

ROOT = Path(__file__).parents[2]
CONFIGS = {"mim pretrain": PretrainConfig, "mim csft": CSFTConfig, "mim ctr": CTRConfig}
PRESETS = {"mim pretrain": pretraining.PRESETS, "mim csft": csft.PRESETS, "mim ctr": ctr.PRESETS}
CELL = r"(`[^`]+`|–)"
ROW = re.compile(rf"^\| `(mim \w+)` \| `--([\w.-]+)` \| `([^`]+)` \| {CELL} \| {CELL} \|", re.MULTILINE)
DEVIATIONS = ROW.findall((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("command", CONFIGS)
def test_the_page_lists_every_difference_between_defaults_and_presets(command):
    config = CONFIGS[command](data=Path("data"), out=Path("out"))
    expected: dict[tuple[str, str], list[str]] = {}
    for place, name in enumerate(("paper", "recommended"), 1):
        for flag, (own, other) in differences(config, PRESETS[command][name]).items():
            row = expected.setdefault((flag, str(own)), ["–", "–"])
            row[place - 1] = f"`{other}`"
    listed = {(flag, own): list(others) for name, flag, own, *others in DEVIATIONS if name == command}
    assert listed == expected


def test_the_page_names_the_defaults_that_were_once_forgotten():
    flags = {flag for _, flag, *_ in DEVIATIONS}
    assert {"temperature", "balance-queue", "mask-same-item", "queue-batches", "ubm"} <= flags


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


OTHER_PROGRAMS = {
    "--no-deps", "--nproc_per_node", "--standalone", "--dryrun", "--max_restarts",
    "--scale",  # of the model that a tutorial writes
    "--silent", "--retry", "--retry-connrefused", "--retry-delay", "--help", "--debug", "--overrides",
    "--from-file",
}  # fmt: skip
OF_SLURM = {
    "--time", "--signal", "--requeue", "--dependency", "--chdir", "--nodes", "--ntasks-per-node", "--mem",
    "--cpus-per-task", "--gpus-per-task", "--container-image", "--container-mounts",
}  # fmt: skip
OF_TORCHX = {"--log_level", "--wait", "--nnodes", "--rdzv_backend", "--rdzv_id", "--rdzv_endpoint"}
FLAG = re.compile(r"(?<![\w-])--[a-z][\w.-]*\w")


def pages() -> list[Path]:
    """All pages that people write; a change log also names what is no longer there."""
    own = [path for path in (ROOT / "docs").rglob("*.md") if "_generated" not in path.parts]
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *own]


@pytest.mark.slow
def test_every_flag_that_a_page_names_is_one_of_a_program(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import reference

    of_components = {f"--{name}" for name in inspect.signature(components.ctr).parameters}
    known = (
        set(FLAG.findall(reference.commands_page())) | OTHER_PROGRAMS | OF_SLURM | OF_TORCHX | of_components
    )
    unknown = {
        (path.name, flag) for path in pages() for flag in FLAG.findall(path.read_text(encoding="utf-8"))
    }
    assert sorted(one for one in unknown if one[1] not in known) == []


def test_every_target_that_a_page_names_is_in_the_makefile():
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        (path.name, target)
        for path in pages()
        for target in re.findall(
            r"(?:`|^    )make ([a-z][\w-]*)", path.read_text(encoding="utf-8"), re.MULTILINE
        )
    }
    assert sorted(one for one in named if one[1] not in targets) == []


def test_every_folder_and_file_that_a_page_names_exists():
    begins = ("docs", "embeddings", "examples", "launch", "mim_torchrec", "requirements", "tests")
    named = {
        (path.name, name)
        for path in pages()
        for name in re.findall(r"`([\w./-]+/[\w./-]*)`", path.read_text(encoding="utf-8"))
        if name.split("/")[0] in begins
    }
    assert sorted(one for one in named if not (ROOT / one[1]).exists()) == []


def test_the_frozen_table_takes_fifteen_lines():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15


def test_every_image_of_a_page_is_there_and_small():
    for page in pages():
        for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / name).stat().st_size < 200_000, (page, name)
