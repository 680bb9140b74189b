"""Writes the reference pages: every flag from the parsers of `mim`, every public name from the docstrings.

The pages are generated at each build, so they cannot differ from the code.
"""

import configparser
import contextlib
import io
import os
import pkgutil
import re
import textwrap
from importlib import import_module
from pathlib import Path

from mim_torchrec import cli

ROOT = Path(__file__).parents[1]
WIDTH = 88  # columns of a help text, as many as a page shows
HIDDEN_COLON = "\ue000"  # of the private use area: no docstring has it
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def write(folder: Path) -> None:
    """Write `commands.md`, `api.md` and a page for each package into a folder."""
    folder.mkdir(exist_ok=True)
    pages = {"commands.md": commands_page()}
    modules = {package: modules_of(package) for package in packages()}
    pages |= {f"{package}.md": package_page(package, names) for package, names in modules.items()}
    pages["api.md"] = api_page(list(modules))
    for path in folder.glob("*.md"):
        if path.name not in pages:
            path.unlink()
    for name, text in pages.items():
        path = folder / name
        if (
            not path.exists() or path.read_text(encoding="utf-8") != text
        ):  # an unchanged page is not built again
            path.write_text(text, encoding="utf-8")


def commands_page() -> str:
    """Every subcommand of `mim` with its help text."""
    parts = ["# Every command and flag", "This page holds what `mim <command> --help` prints."]
    for command, (_, summary) in cli.COMMANDS.items():
        parts += [f"## mim {command}", f"{summary[0].upper()}{summary[1:]}."]
        parts += help_blocks(command.split())
    return "\n\n".join(parts) + "\n"


def help_blocks(words: list[str]) -> list[str]:
    """The help text of a command, and of its own subcommands."""
    text = help_text(words)
    blocks = [f"```text\n{text}\n```"]
    for name in subcommands(text):
        blocks += [f"### mim {' '.join([*words, name])}", *help_blocks([*words, name])]
    return blocks


def help_text(words: list[str]) -> str:
    """What `mim <words> --help` prints, without colors.

    Raises:
        RuntimeError: the command does not print a help text.
    """
    before, printed = dict(os.environ), io.StringIO()
    os.environ.update(COLUMNS=str(WIDTH), NO_COLOR="1")
    try:
        with contextlib.redirect_stdout(printed):
            cli.main([*words, "--help"])
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"mim {' '.join(words)} --help ended with status {end.code}") from None
    finally:
        os.environ.clear()
        os.environ.update(before)
    text = ESCAPES.sub("", printed.getvalue())
    if not text.strip():
        raise RuntimeError(f"mim {' '.join(words)} --help printed nothing")
    lines = [part for line in text.strip().splitlines() for part in textwrap.wrap(line, WIDTH) or [""]]
    return "\n".join(lines)


def subcommands(text: str) -> list[str]:
    """Names in the braces of a usage line, such as `mim table [-h] {import,info}`."""
    found = re.search(r"\] \{([\w-]+(?:,[\w-]+)+)\}", " ".join(text.split("\n\n")[0].split()))
    return found.group(1).split(",") if found else []


def packages() -> list[str]:
    """Packages of the library, as `setup.cfg` lists them; benchmarks are programs and no library."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    names = setup["options"]["packages"].split()
    return [name for name in names if not name.startswith("mim_torchrec.benchmarks")]


def modules_of(package: str) -> list[str]:
    """Modules that lie directly in a package."""
    found = pkgutil.iter_modules(import_module(package).__path__, f"{package}.")
    return [module.name for module in found if not module.ispkg]


def package_page(package: str, modules: list[str]) -> str:
    """A page with the names that a package exports, and the docstrings of its modules."""
    parts = [f"# {package}", automodule(package), *exports(package)]
    parts += [part for module in modules for part in (f"## {module}", automodule(module))]
    return "\n\n".join(parts) + "\n"


def exports(package: str) -> list[str]:
    """A list of the names in `__all__` of a package, each with a link to where it is defined."""
    module, lines = import_module(package), []
    for name in getattr(module, "__all__", ()):
        own = getattr(module, name)
        has_page = hasattr(own, "__qualname__") and own.__module__.startswith("mim_torchrec")
        target = f"{{py:obj}}`{name} <{own.__module__}.{own.__qualname__}>`" if has_page else f"`{name}`"
        lines.append(f"- {target}")
    return [f"`from {package} import`:", "\n".join(lines)] if lines else []


def automodule(name: str) -> str:
    """The directive that prints the docstrings of a module."""
    return f"```{{eval-rst}}\n.. automodule:: {name}\n```"


def api_page(names: list[str]) -> str:
    """The table of contents of the packages."""
    toctree = "\n".join(["```{toctree}", ":maxdepth: 1", "", *names, "```"])
    return f"# API reference\n\nThese pages are generated from the docstrings.\n\n{toctree}\n"


def keep_colons(
    _app: object, what: str, _name: str, _object: object, _options: object, lines: list[str]
) -> None:
    """Hide colons that napoleon would read as the end of a type, until `as_rst` restores them; in place."""
    hidden = [0] if what in ("attribute", "data", "property") else []
    hidden += [number + 1 for number, line in enumerate(lines) if line.strip() in ("Returns:", "Yields:")]
    for number in hidden:
        if number < len(lines):
            lines[number] = lines[number].replace(":", HIDDEN_COLON)


def as_rst(_app: object, _what: str, _name: str, _object: object, _options: object, lines: list[str]) -> None:
    """Make indented blocks and tables of a docstring literal blocks, and bars in it plain text; in place."""
    made: list[str] = []
    is_literal, last = False, ""
    for number, line in enumerate(lines):
        before = lines[number - 1] if number else ""
        if line.strip():
            own = line.startswith("|") or (
                line.startswith("    ") and not last.startswith((":", "..", " ", "-"))
            )
            begins = own and not is_literal and (not before.strip() or line.startswith("|"))
            is_literal = begins or (is_literal and line.startswith(("    ", "|")))
            if begins:
                made += ["", "::", ""]
            last = last if is_literal else line
        text = line if is_literal else re.sub(r"(?<!`)\|", r"\\|", line)
        text = text.replace(HIDDEN_COLON, ":")
        made.append(f"    {text}" if is_literal and line.startswith("|") else text)
    lines[:] = made
