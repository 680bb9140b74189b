"""What a rehearsal counts: launches, waits of the host, uploads, and what would fail on a GPU."""

import sys
from collections import Counter
from dataclasses import dataclass, field, replace

OURS = ("/mim_torchrec/", "/embeddings/", "/benchmarks/measures/", "/launch/")
LIBRARIES = ("torchrec", "fbgemm_gpu", "transformers", "timm")
APART = "/benchmarks/rehearsal/"
HELPERS = ("torchrec/sparse/",)
"""Of libraries, what everybody calls: who called it is told instead."""


@dataclass
class Counts:
    """Counts of one process.

    There are two orders in which things run: that of the stream that computes, and that of all others, which
    copy and exchange beside it. A wait for what an earlier wait has seen done is none.

    Attributes:
        launches: operators on tensors of the GPU that run a kernel, by operator.
        syncs: waits of the host for the stream that computes, by kind and line.
        asides: waits for other streams, which leave that one busy.
        uploads: copies from memory to the GPU, by kind and line.
        pageable: those of them that are not from page-locked memory, for which the host waits as well.
        no_kernel: operators that have no kernel for a GPU.
        mixed: operators whose tensors lie on different devices, by operator and line.
        waited: how often the host asked to wait, whether or not there was anything to wait for.
        aside: 1 while another stream than the one that computes is the current one, else 0.
        launched: how much was launched, on the stream that computes and on others.
        done: how much of it the host knows to be done.
    """

    launches: Counter[str] = field(default_factory=Counter)
    syncs: Counter[str] = field(default_factory=Counter)
    asides: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)
    pageable: Counter[str] = field(default_factory=Counter)
    no_kernel: Counter[str] = field(default_factory=Counter)
    mixed: Counter[str] = field(default_factory=Counter)
    waited: int = 0
    aside: int = 0
    launched: list[int] = field(default_factory=lambda: [0, 0])
    done: list[int] = field(default_factory=lambda: [0, 0])

    def launch(self, operator: str) -> None:
        """An operator runs a kernel."""
        self.launches[operator] += 1
        self.launched[self.aside] += 1

    def sync(self, kind: str, until: int | None = None, aside: int | None = None) -> None:
        """The host waits for a stream, by default the current one, until a moment, by default all of it."""
        self.waited += 1
        aside = self.aside if aside is None else aside
        until = self.launched[aside] if until is None else until
        if until > self.done[aside] or kind in ("item", "tolist", "to cpu"):
            (self.asides if aside else self.syncs)[f"{kind} {where()}"] += 1
        self.done[aside] = max(self.done[aside], until)

    def upload(self, kind: str, pinned: bool = False) -> None:
        """Something is copied from memory to the GPU."""
        self.uploads[f"{kind} {where()}"] += 1
        if not pinned:
            self.pageable[f"{kind} {where()}"] += 1
        self.launched[self.aside] += 1

    def totals(self) -> dict[str, int]:
        """The numbers of a step's budget."""
        return {
            "launches": self.launches.total(),
            "syncs": self.syncs.total(),
            "asides": self.asides.total(),
            "uploads": self.uploads.total(),
        }

    def of_fbgemm(self) -> list[str]:
        """Operators of fbgemm that ran on the GPU."""
        return sorted(name for name in self.launches if name.startswith("fbgemm::"))

    def copy(self) -> "Counts":
        """What has been counted up to now."""
        return replace(
            self,
            **{
                name: getattr(self, name).copy() for name, of in vars(self).items() if isinstance(of, Counter)
            },
        )


def where() -> str:
    """The innermost line of this project that is running, or of a library that it uses."""
    library = ""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if APART not in file:
            inside = file.rpartition("site-packages/")[2]
            if "site-packages" not in file:
                for folder in OURS:
                    if folder in file:
                        line = f"{folder[1:]}{file.rpartition(folder)[2]}:{frame.f_lineno}"
                        return f"{line} ({library})" if library else line
            elif not library and inside.startswith(LIBRARIES) and not inside.startswith(HELPERS):
                library = f"{inside}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return library or "?"
