"""How many rows were read, and which were passed over, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TOO_LONG = "too long"
FIRST = 3
"""Rows that are named for each reason."""
REASONS = 20
"""Reasons that are told apart; what comes after them counts as `OTHER`."""
OTHER = "other reasons"


@dataclass
class Skipped:
    """Rows passed over for one reason: how many, and the ids of the first."""

    count: int = 0
    first: list[str] = field(default_factory=list)


@dataclass
class Tally:
    """rows: given to training. skipped: by reason, those that are too long among them."""

    rows: int = 0
    skipped: dict[str, Skipped] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Tally:
        """The inverse of `as_dict`; of nothing, an empty one."""
        skipped = {
            reason: Skipped(count, list(first))
            for reason, (count, *first) in values.get("skipped", {}).items()
        }
        return cls(values.get("rows", 0), skipped)

    def as_dict(self) -> dict[str, Any]:
        """Plain enough for JSON: {"rows": 7, "skipped": {reason: [count, id, ...]}}."""
        skipped = {reason: [found.count, *found.first] for reason, found in self.skipped.items()}
        return {"rows": self.rows, "skipped": skipped}

    def skip(self, id: str, reason: str) -> None:
        """Count a row that was passed over."""
        known = reason in self.skipped or len(self.skipped) < REASONS
        found = self.skipped.setdefault(reason if known else OTHER, Skipped())
        found.count += 1
        if len(found.first) < FIRST:
            found.first.append(id)

    def __add__(self, other: Tally) -> Tally:
        total = Tally.of(self.as_dict())
        total.rows += other.rows
        for reason, found in other.skipped.items():
            mine = total.skipped.setdefault(reason, Skipped())
            mine.count += found.count
            mine.first = [*mine.first, *found.first][:FIRST]
        return total

    def __str__(self) -> str:
        """One line: "7 rows; skipped 2 (too long: a.parquet:3, a.parquet:9)"."""
        reasons = [
            f"{found.count} ({reason}: {', '.join(found.first)})" for reason, found in self.skipped.items()
        ]
        return "; ".join([f"{self.rows} rows", *([f"skipped {', '.join(reasons)}"] if reasons else [])])
