"""What a check of `mim doctor` found. This module needs only Python."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """What one check found; `fix` is empty when all is well."""

    check: str
    ok: bool
    detail: str
    fix: str = ""

    def __str__(self) -> str:
        fix = f"; fix it: {self.fix}" if self.fix else ""
        return f"{'ok' if self.ok else 'FAIL':<5} {self.check:<14} {self.detail}{fix}"
