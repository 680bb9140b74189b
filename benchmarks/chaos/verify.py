"""Whether everything came out right: the log against what was fed, and every reader against the log.

A vector in the log must be the encoder's, within the tolerance of other batches. A row of a reader must be
the log's, bit for bit.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mim_torchrec.benchmarks.chaos.inputs import TOLERANCE, Inputs
from mim_torchrec.embeddings.windows.transport import Transport
from mim_torchrec.embeddings.windows.window import Window

State = dict[int, Tensor | None]


@dataclass
class Findings:
    """Rows that were compared, and what is not as it must be.

    Args:
        rows: compared.
        wrong: rows with another vector, or of an item that was deleted.
        lost: rows that must be there and are not.
        doubled: rows that are there more often than they must be.
        examples: some of what is not right, in words.
    """

    rows: int = 0
    wrong: int = 0
    lost: int = 0
    doubled: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, other: "Findings") -> None:
        """Add what was found elsewhere."""
        self.rows += other.rows
        self.wrong += other.wrong
        self.lost += other.lost
        self.doubled += other.doubled
        self.examples += other.examples

    def note(self, kind: str, example: str) -> None:
        """Count one row that is not right: `wrong`, `lost` or `doubled`."""
        setattr(self, kind, getattr(self, kind) + 1)
        if len(self.examples) < 10:
            self.examples.append(f"{kind}: {example}")


class Audit:
    """Reads every window once, before anybody forgets it.

    Args:
        base_ids: (num_base,) int64.
        base_vectors: (num_base, dim).
    """

    def __init__(self, base_ids: Tensor, base_vectors: Tensor) -> None:
        self._base: State = dict(zip(base_ids.tolist(), base_vectors, strict=True))
        self.windows: list[Window] = []

    @property
    def seq(self) -> int:
        """The last window read."""
        return len(self.windows)

    def follow(self, log: Transport) -> None:
        """Read what is new.

        Raises:
            ValueError: a window has not the number that it must have.
        """
        for window in log.after(self.seq):
            if window.seq != self.seq + 1:
                raise ValueError(f"{log} has window {window.seq} after {self.seq}")
            self.windows.append(window)

    def state(self, seq: int) -> State:
        """The vector of every item that there ever was, None where it is deleted, after a window."""
        state = dict(self._base)
        for window in self.windows[:seq]:
            state |= dict(zip(window.ids.tolist(), window.vectors, strict=True))
            state |= dict.fromkeys(window.removed.tolist())
        return state


def verify_log(windows: Iterable[Window], inputs: Inputs) -> Findings:
    """Compare a log with what was fed: every arrival is in one window, and in the order of its item's."""
    found = Findings()
    due: dict[int, list[int]] = defaultdict(list)
    for number, arrival in enumerate(inputs.arrivals):
        if not arrival.bad:
            due[arrival.item_id].append(number)
    done: dict[int, int] = defaultdict(int)
    names: set[str] = set()

    def is_it(number: int, vector: Tensor | None) -> bool:
        if vector is None or inputs.arrivals[number].removed:
            return vector is None and inputs.arrivals[number].removed
        return bool((vector - inputs.vectors[number]).abs().max() <= TOLERANCE)

    for window in windows:
        if window.window_id in names:
            found.note("doubled", f"window {window.seq} has the name of an earlier one")
        names.add(window.window_id)
        changes = [*zip(window.ids.tolist(), window.vectors, strict=True),
                   *((item, None) for item in window.removed.tolist())]  # fmt: skip
        for item, vector in changes:
            found.rows += 1
            place = f"item {item} in window {window.seq}"
            before, left = due[item][: done[item]], due[item][done[item] :]
            if left and is_it(left[0], vector):
                done[item] += 1
            elif before and is_it(before[-1], vector):
                found.note("doubled", place)
            elif left:
                found.note("wrong", place)
                done[item] += 1
            else:
                found.note("wrong" if not before else "doubled", place)
    for item, numbers in due.items():
        for number in numbers[done[item] :]:
            found.note("lost", f"item {item}, arrival {number}")
    return found


def verify_rows(
    lookup: Callable[[Tensor], tuple[Tensor, Tensor]], state: State, where: str, held: int | None = None
) -> Findings:
    """Compare all rows of a reader with what the log says.

    Args:
        lookup: of the reader, see `ParameterStore.lookup`.
        state: what `Audit.state` says.
        where: the reader, for messages.
        held: rows that the reader holds in all, where that can be counted; more than there are items is
            doubled.
    """
    found = Findings(rows=len(state))
    ids = torch.tensor(sorted(state), dtype=torch.int64)
    vectors, is_there = lookup(ids)
    for item, vector, there in zip(ids.tolist(), vectors, is_there.tolist(), strict=True):
        expected = state[item]
        if expected is None and there:
            found.note("wrong", f"{where}: item {item} was deleted")
        elif expected is not None and not there:
            found.note("lost", f"{where}: item {item}")
        elif expected is not None and not torch.equal(vector, expected.float()):
            found.note("wrong", f"{where}: item {item}")
    there = sum(vector is not None for vector in state.values())
    for _ in range(max((held or 0) - there, 0)):
        found.note("doubled", f"{where}: {held} rows of {there} items")
    return found


def verify_dead_letter(places: list[str], inputs: Inputs, items: list[int | None]) -> Findings:
    """Compare the dead-letter file with the bad items: all of it is there once.

    Args:
        places: of its entries.
        inputs: what was fed.
        items: ids of its entries.
    """
    bad = [arrival.item_id for arrival in inputs.arrivals if arrival.bad]
    found = Findings(rows=len(bad))
    for item in bad:
        count = items.count(item)
        if count != 1:
            found.note(
                "lost" if count == 0 else "doubled", f"item {item} is {count} times in the dead-letter file"
            )
    for other in set(items) - set(bad):
        found.note("wrong", f"item {other} is in the dead-letter file")
    if len(set(places)) != len(places):
        found.note("doubled", "a place is twice in the dead-letter file")
    return found
