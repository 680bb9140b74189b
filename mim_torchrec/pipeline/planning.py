"""What a run would do with each stage, and why."""

from dataclasses import dataclass
from typing import Any

from mim_torchrec.pipeline.fingerprints import difference, digest, fingerprint
from mim_torchrec.pipeline.outputs import is_there
from mim_torchrec.pipeline.records import DONE, Record, Records
from mim_torchrec.pipeline.resolving import Resolver
from mim_torchrec.pipeline.spec import Stage

KEEP, RUN, RESUME = "keep", "run", "resume"
RESUMING = ("mim.pretrain", "mim.csft", "mim.ctr")
"""Components that continue in a directory which they left unfinished."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What is done with a stage.

    Args:
        action: keep, run or resume.
        why: in words.
        digest: of the fingerprint.
        fingerprint: of the stage, as things are.
        record: of the last attempt.
    """

    action: str
    why: str
    digest: str
    fingerprint: dict[str, Any]
    record: Record | None


class Planner:
    """Compares stages with their records, in the order of their dependencies.

    Args:
        resolver: of the run.
        records: of the run.
    """

    def __init__(self, resolver: Resolver, records: Records) -> None:
        self._resolver, self._records = resolver, records
        self._digests: dict[str, str] = {}

    def step(self, name: str) -> Step:
        """What is to be done with a stage, as things are now.

        Raises:
            MissingInput: a file that it, or one before it, reads is not there.
        """
        parts = fingerprint(self._resolver, name, self._digests_before(name))
        own = digest(parts)
        record = self._records.read(name)
        action, why = self._decide(name, parts, own, record)
        return Step(action=action, why=why, digest=own, fingerprint=parts, record=record)

    def _digests_before(self, name: str) -> dict[str, str]:
        return {other: self._digest(other) for other in self._resolver.pipeline.dependencies[name]}

    def _digest(self, name: str) -> str:
        """Digest of a stage that others depend on: of what is there, once it is done."""
        if name not in self._digests:
            parts = fingerprint(self._resolver, name, self._digests_before(name))
            if None in parts["values"].values():
                return digest(parts)  # it will have another when the stages before it are done
            self._digests[name] = digest(parts)
        return self._digests[name]

    def _decide(self, name: str, parts: dict[str, Any], own: str, record: Record | None) -> tuple[str, str]:
        out = self._resolver.output(name)
        if record is None:
            return RUN, "it never ran"
        if missing := [value for value, there in parts["values"].items() if there is None]:
            return RUN, f"{missing[0]} is not there yet"
        if record.digest != own:
            changed = difference(record.fingerprint, parts) or "its record is of another version"
            return RUN, changed
        if record.state == DONE:
            if out is not None and not is_there(out):
                return RUN, f"{out} is gone"
            return KEEP, f"already there ({record.seconds:.0f} s)"
        how = {"failed": "failed", "cancelled": "was cancelled"}.get(record.state, "was interrupted")
        if can_resume(self._resolver.pipeline.stages[name]) and out is not None and is_there(out):
            return RESUME, f"it {how}"
        return RUN, f"it {how}"


def can_resume(stage: Stage) -> bool:
    """Whether a stage continues in a directory that it left unfinished."""
    return stage.component in RESUMING
