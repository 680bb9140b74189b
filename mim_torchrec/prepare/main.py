"""Event logs and a catalogue in, items, pairs and requests out (`mim prepare`).

`--init DATA` looks at the files of a folder and writes a mapping, which says what file and column holds what.
With the mapping, events are freed of copies, requests get labels and point-in-time histories, and a data set
is written that all other commands read, with a report of what was left out and why (`prepare.json`).
"""

import logging
import time
from typing import Any

import tyro

from mim_torchrec import program
from mim_torchrec.prepare.config import PrepareConfig
from mim_torchrec.prepare.looking import write_mapping
from mim_torchrec.prepare.run import prepare

log = logging.getLogger("mim_torchrec.prepare")


def main(argv: list[str] | None = None) -> None:
    """Entry point of `mim prepare`."""
    config = tyro.cli(PrepareConfig, args=argv, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    if config.init is not None:
        write_mapping(config.init, config.mapping)
        print(f"{config.mapping}: check it, then run mim prepare --mapping {config.mapping} --out DATA")
        return
    started = time.time()
    report = prepare(config)
    for line in summary(report):
        log.info("%s", line)
    log.info("%s: %s in %.1f s", config.out,
             ", ".join(f"{count} in {folder}" for folder, count in report["written"].items()),
             time.time() - started)  # fmt: skip


def summary(report: dict[str, Any]) -> list[str]:
    """What was left out and why, a line each; `prepare.json` has all counts."""
    reasons = {"incomplete": "without an id or a time", "repeated": "copies", "of_unknown_items":
               "of items that the catalogue does not have"}  # fmt: skip
    lines = []
    for kind, counts in report["input"].items():
        for key, reason in reasons.items():
            if counts.get(key):
                lines.append(f"{kind}: {counts[key]} of {counts['rows']} left out: {reason}")
    for kind, counts in report.get("attribution", {}).items():
        if counts["before_their_impression"]:
            lines.append(f"{kind}: {counts['before_their_impression']} left out: before their impression")
    requests = report["requests"]
    for key in ("of_several_users", "too_young_for_their_label"):
        if requests[key]:
            lines.append(
                f"requests: {requests[key]} of {requests['gathered']} left out: {key.replace('_', ' ')}"
            )
    for folder in ("items", "pairs"):
        if report.get(folder, {}).get("without_image"):
            lines.append(f"{folder}: {report[folder]['without_image']} without an image")
    return lines


if __name__ == "__main__":
    program.run(main)
