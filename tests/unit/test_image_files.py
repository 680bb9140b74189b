"""What goes into the container image, by its ignore file."""

import configparser
import subprocess
from pathlib import Path

from docker.utils.build import exclude_paths

ROOT = Path(__file__).resolve().parents[2]


def context() -> set[str]:
    """Files that a build gets of the checkout, if it held these as well."""
    patterns = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] not in ("", "#")
    ]
    return {path for path in exclude_paths(str(ROOT), patterns) if (ROOT / path).is_file()}


def test_the_image_gets_what_the_package_is_built_of_and_nothing_else():
    tracked = set(subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines())
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    folders = {line.split("=")[1].strip() for line in setup["options"]["package_dir"].strip().splitlines()}
    wanted = {path for path in tracked if path.split("/")[0] in folders | {"requirements"}}
    wanted |= {"LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.cfg", "Dockerfile"}
    assert wanted - context() == set()
    assert {path for path in context() - wanted if not path.endswith(".dockerignore")} & tracked == set()
    assert not [path for path in context() if path.startswith((".venv", "runs", "data/", "build", ".git/"))]
