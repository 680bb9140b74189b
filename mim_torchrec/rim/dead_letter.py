"""The dead-letter file: items that could not be encoded and the reason, one line of JSON each."""

import json
import logging
from datetime import UTC, datetime
from pathlib import Path

from mim_torchrec.embeddings.files import append_lines
from mim_torchrec.rim.sources import Arrival

log = logging.getLogger(__name__)


class DeadLetterFile:
    """A file to which each item is added once, however often it arrives.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: set[tuple[str, str]] = set()
        if path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    entry = json.loads(line)
                    self._known.add((entry["place"], entry["reason"]))
                except ValueError:  # an empty or unfinished line
                    continue

    def __len__(self) -> int:
        return len(self._known)

    def add(self, found: list[tuple[Arrival, str]]) -> None:
        """Add arrivals with their reasons; they are on the disk when this returns.

        Raises:
            OSError: the disk is full.
        """
        new = [(arrival, reason) for arrival, reason in found if (arrival.place, reason) not in self._known]
        if not new:
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        facts = [
            {"place": a.place, "item_id": a.item_name or a.item_id, "reason": reason, "at": now}
            for a, reason in new
        ]
        lines = [json.dumps(entry, ensure_ascii=False) for entry in facts]
        append_lines(self._path, lines)
        for arrival, reason in new:
            log.warning("in the dead-letter file: %s: %s", arrival.place, reason)
            self._known.add((arrival.place, reason))
