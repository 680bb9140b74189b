"""The container image is built without an environment, this one is mounted, and a stage runs inside."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TAG = "localhost/mim-test"

pytestmark = pytest.mark.slow


def without_buildah() -> str | None:
    """Why no image can be built here."""
    missing = [tool for tool in ("buildah", "mmdebstrap") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} missing: apt-get install buildah mmdebstrap"
    return None if os.geteuid() == 0 else "only root can build an image"


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Iterator[list[str]]:
    """Options of buildah for a storage of its own, with the image in it."""
    reason = without_buildah()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("storage")
    options = [f"--root={folder / 'root'}", f"--runroot={folder / 'run'}"]
    try:
        built = subprocess.run(
            ["sh", str(ROOT / "deploy" / "build_image.sh"), "none", TAG, "", *options],
            env={**os.environ, "MIM_PYTHON": sys.executable}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if built.returncode and "mmdebstrap" in built.stderr and "E: " in built.stderr:
            pytest.skip(f"no base can be made here: {built.stderr.strip().splitlines()[-1]}")
        assert built.returncode == 0, built.stderr[-3000:]
        yield options
    finally:
        subprocess.run(["buildah", "--storage-driver=vfs", *options, "rm", "--all"], capture_output=True)
        # not through what may still be mounted in it
        subprocess.run(["rm", "-rf", "--one-file-system", str(folder)], capture_output=True)


def environment() -> list[Path]:
    """Folders of which this environment consists; the image has Debian's Python itself."""
    of_debian = [Path("/usr"), Path("/usr/bin"), Path("/usr/lib")]
    places = {sys.prefix, sys.base_prefix, ROOT, *(path for path in sys.path if Path(path).is_dir())}
    found: list[Path] = []
    for place in sorted(Path(path) for path in places):
        if place in of_debian or Path("/usr/lib") in place.parents:
            continue
        if not any(place.is_relative_to(root) for root in found):
            found.append(place)
    return found


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """The folder in which commands run in the container."""
    folder = tmp_path_factory.mktemp("job")
    folder.chmod(0o777)
    return folder


@pytest.fixture(scope="module")
def inside(storage, job: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command in a container of the image."""
    buildah = ["buildah", "--storage-driver=vfs", *storage]
    made = subprocess.run([*buildah, "from", "--pull-never", TAG], capture_output=True, text=True, check=True)
    container = made.stdout.strip()
    mounts = [*(f"--volume={place}:{place}:ro" for place in environment()), f"--volume={job}:/job:rw"]
    above = sorted({str(parent) for place in environment() for parent in place.parents} - {"/"})
    entered = 'for folder; do mkdir -p "$folder" && chmod o+x "$folder"; done'  # the user is not root
    as_root = [*buildah, "run", "--isolation=chroot", "--user=0", container, "--"]
    subprocess.run([*as_root, "sh", "-c", entered, "sh", *above], check=True, capture_output=True)

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*buildah, "run", "--isolation=chroot", "--workingdir=/job", "--hostname=localhost",
             f"--env=VIRTUAL_ENV={sys.prefix}", "--env=OMP_NUM_THREADS=1", *mounts, container, "--",
             *command],
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    return run


def test_the_image_has_a_user_that_is_not_root(inside):
    done = inside("sh", "-c", "id -u; id -un; touch /usr/local/written")
    assert done.stdout.split() == ["1000", "mim"] and "Permission denied" in done.stderr


def test_the_image_holds_no_source_and_no_setting_of_this_machine(inside):
    done = inside("sh", "-c", "ls -A / ~; test ! -e /src && test ! -s /etc/pip.conf")
    assert done.returncode == 0, done.stdout
    assert "requirements" not in done.stdout


def test_a_stage_runs_in_the_image(inside, job):
    mim = [sys.executable, "-m", "mim_torchrec.cli"]
    sound = inside(*mim, "doctor", "--json")
    findings = {finding["check"]: finding for finding in json.loads(sound.stdout)}
    assert findings["lookup"]["ok"] and findings["gloo"]["ok"] and findings["package"]["ok"], sound.stdout
    shop = inside(
        *mim, "shop", "--out", "shop", "--items", "150", "--users", "30", "--requests", "60",
        "--searches", "20", "--browsing", "300", "--image-size", "32",
    )  # fmt: skip
    assert shop.returncode == 0, shop.stderr
    trained = inside(
        "bash", "-c",
        f'"{sys.executable}" -m torch.distributed.run --standalone --nproc_per_node 2 '
        "-m mim_torchrec.ctr.main --data shop --mim off --epochs 1 --batch-size 64 --out run",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr[-3000:]
    metrics = json.loads((job / "run" / "metrics.json").read_text())
    assert metrics["world_size"] == 2 and (job / "run").stat().st_uid == 1000


def test_a_build_that_is_stopped_leaves_nothing(tmp_path):
    reason = without_buildah()
    if reason:
        pytest.skip(reason)
    work, marker = tmp_path / "work", Path("/dev/shm") / f"mim-{os.getpid()}"
    work.mkdir()
    marker.touch()
    script = str(ROOT / "deploy" / "build_image.sh")
    options = [f"--root={tmp_path / 'root'}", f"--runroot={tmp_path / 'run'}"]
    build = subprocess.Popen(
        ["sh", script, "none", TAG, "", *options],
        env={**os.environ, "MIM_PYTHON": sys.executable, "TMPDIR": str(work)},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        while not list(work.glob("*/mmdebstrap.*/dev/shm")):  # what it has made of a system so far
            try:
                build.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                continue
            pytest.skip(f"no base can be made here: {build.communicate()[1][-300:]}")
        build.send_signal(signal.SIGTERM)
        assert build.wait() == 143
        assert list(work.iterdir()) == [] and marker.exists()
        assert str(work) not in Path("/proc/mounts").read_text()
    finally:
        build.kill()
        marker.unlink(missing_ok=True)
