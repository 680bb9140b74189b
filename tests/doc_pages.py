"""Runs the code of documentation pages as a reader would: block after block, in an empty folder."""

import os
import re
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# ([\w/]+\.py)\n")


def script(page: Path) -> str:
    """The `bash` and `python` blocks of a page as one shell script.

    A Python block that begins with a comment such as `# my_models.py` is that file. Other adjacent Python
    blocks are one program.
    """
    parts: list[tuple[str, str]] = []
    for language, code in BLOCK.findall(page.read_text(encoding="utf-8")):
        file = FILE.match(code) if language == "python" else None
        if file:
            parts.append(("file", f"cat > {file.group(1)} <<'END_OF_BLOCK'\n{code}END_OF_BLOCK\n"))
        elif language == "python" and parts and parts[-1][0] == "python":
            parts[-1] = ("python", parts[-1][1] + "\n" + code)
        else:
            parts.append((language, code))
    program = "python - <<'END_OF_BLOCK'\n{}END_OF_BLOCK\n"
    return "\n".join(program.format(code) if kind == "python" else code for kind, code in parts)


def run_page(
    page: str, folder: Path, environment: Mapping[str, str], replace: Mapping[str, str] | None = None
) -> str:
    """Run a page of `docs/` in a folder, and end every process that it leaves.

    Args:
        page: path below `docs/`.
        folder: the working directory; `examples/` of the checkout is linked into it.
        environment: variables with which `python`, `mim` and `torchx` are found, as of `tests.forked`.
        replace: text of the page that differs here, such as ports, and what stands for it.

    Returns:
        What the page printed.

    Raises:
        AssertionError: a command failed; the message holds the trace and its errors.
    """
    code = script(ROOT / "docs" / page)
    assert code, f"docs/{page} has no bash or python block"
    for old, new in (replace or {}).items():
        assert old in code, f"docs/{page} no longer holds {old!r}"
        code = code.replace(old, new)
    if not (folder / "examples").exists():
        (folder / "examples").symlink_to(ROOT / "examples")
    shell = subprocess.Popen(
        ["bash", "-x", "-euo", "pipefail", "-c", code], cwd=folder, env={**os.environ, **environment},
        text=True, start_new_session=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, errors = shell.communicate(timeout=800)
    finally:
        try:
            os.killpg(shell.pid, signal.SIGKILL)
        except ProcessLookupError:  # all of them have ended
            pass
    assert shell.returncode == 0, (
        f"docs/{page} ended with {shell.returncode}:\n{errors[-4000:]}\n{out[-2000:]}"
    )
    return out
