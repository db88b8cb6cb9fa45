"""Ratios that must not get worse: those of bench/bounds.toml, held against measured rows. Pure.

A ratio is of two rows of bench/compare.py, which were taken in turn in one boot; an absolute time
means nothing where machines are emulated. Smaller is better, always.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from lab.errors import UsageError
from lab.figures import Samples, ratio

Rows = Mapping[str, Samples]
"""Samples by the name of the row."""


@dataclass(frozen=True)
class Bound:
    """``row`` may take at most ``at_most`` times as long as ``over``."""

    what: str
    row: str
    over: str
    at_most: float
    measured: float
    """What it was when the bound was set."""
    why: str

    def __post_init__(self) -> None:
        for field in fields(self):
            value, wanted = getattr(self, field.name), field.type
            if not isinstance(value, (int, float) if wanted is float else str):
                raise UsageError(f"bound {self.what!r}: {field.name} is no {wanted}")
        if not 0 < self.measured < self.at_most:
            raise UsageError(f"bound {self.what!r}: not 0 < measured < at_most")


@dataclass(frozen=True)
class Verdict:
    """What a bound came to; ``ratio`` is None where a row is missing."""

    bound: Bound
    ratio: float | None

    @property
    def passed(self) -> bool:
        """What was not measured has not passed."""
        return self.ratio is not None and self.ratio <= self.bound.at_most


def parse(text: str) -> list[Bound]:
    """The bounds of a TOML text, a table ``[[bound]]`` each. UsageError."""
    try:
        tables = tomllib.loads(text).get("bound", [])
        return [Bound(**table) for table in tables]
    except (tomllib.TOMLDecodeError, TypeError) as error:
        raise UsageError(f"bounds: {error}") from error


def check(bounds: Sequence[Bound], rows: Rows) -> list[Verdict]:
    """Each bound's verdict."""
    return [
        Verdict(bound, ratio(rows.get(bound.row, ()), rows.get(bound.over, ()))) for bound in bounds
    ]


def lines(verdicts: Sequence[Verdict]) -> list[str]:
    """The verdicts for a terminal; why a bound exists is said where it is broken."""
    width = max(len(verdict.bound.what) for verdict in verdicts)
    shown = [f"{'ratio':<{width}}  {'now':>7} {'at most':>8} {'when set':>9}"]
    for verdict in verdicts:
        bound = verdict.bound
        now = "missing" if verdict.ratio is None else f"{verdict.ratio:.3g}"
        line = f"{bound.what:<{width}}  {now:>7} {bound.at_most:>8.3g} {bound.measured:>9.3g}"
        shown.append(line + ("" if verdict.passed else "  WORSE"))
        if not verdict.passed:
            shown.append(f"    {bound.row} over {bound.over}: {bound.why}")
    return shown
