"""What the benchmarks' JSON says: rows by their names, ratios, and the paper's figures. Pure."""

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

PROCESS = "spawn"
_ROW = re.compile(
    r"(?P<who>[a-z-]+)(/(?P<vifs>\d+)vif)?/(?P<end>[a-z]+?)(x(?P<at_once>\d+))?(@(?P<guests>\d+))?"
)


Samples = Sequence[Sequence[float]]
"""Pairs: when a sample was taken, in seconds, and the milliseconds that it took."""

NEIGHBOURS = 3


def milliseconds(samples: Samples) -> list[float]:
    """Without when."""
    return [each for _, each in samples]


def ratio(samples: Samples, over: Samples) -> float | None:
    """How many times as long ``samples`` took; None if one of them is empty.

    The median of each sample over the median of those of ``over`` that were taken nearest to it:
    when the machine slows down for a while, it does so for both.
    """
    if not samples or not over:
        return None
    ratios = []
    for at, took in samples:
        near = sorted(over, key=lambda pair: abs(pair[0] - at))[:NEIGHBOURS]
        ratios.append(took / statistics.median(milliseconds(near)))
    return statistics.median(ratios)


@dataclass(frozen=True)
class Row:
    """A row's name in bench/compare.py, taken apart; ``vifs`` is None for what can have none."""

    who: str
    vifs: int | None = None
    end: str = "returned"
    at_once: int = 1
    guests: int = 0

    @classmethod
    def parse(cls, name: str) -> Self:
        """Of a name such as "warm/1vif/returned@100". ValueError."""
        found = _ROW.fullmatch(name)
        if found is None:
            raise ValueError(f"{name!r} is the name of no row")
        vifs = found["vifs"]
        return cls(
            found["who"],
            None if vifs is None else int(vifs),
            found["end"],
            int(found["at_once"] or 1),
            int(found["guests"] or 0),
        )

    @property
    def name(self) -> str:
        """As in the JSON."""
        vifs = "" if self.vifs is None else f"/{self.vifs}vif"
        at_once = f"x{self.at_once}" if self.at_once > 1 else ""
        return f"{self.who}{vifs}/{self.end}{at_once}" + (f"@{self.guests}" if self.guests else "")

    @property
    def peer(self) -> "Row":
        """A process by posix_spawn, as many at once, beside as many guests."""
        return Row(PROCESS, None, "returned", self.at_once, self.guests)


class Comparison:
    """What one run of bench/compare.py found."""

    def __init__(self, result: Mapping[str, Any]) -> None:
        self.host: dict[str, Any] = result["host"]
        self.rows: dict[Row, Samples] = {
            Row.parse(name): samples for name, samples in result["rows"].items() if samples
        }
        self.growth: dict[str, list[tuple[int, float]]] = {
            who: [(int(before), float(ms)) for before, ms in pairs]
            for who, pairs in result["growth"].items()
            if pairs
        }
        self.categories: dict[str, list[dict[str, float]]] = result["categories"]

    def median(self, row: Row) -> float | None:
        """Milliseconds."""
        return statistics.median(milliseconds(self.rows[row])) if row in self.rows else None

    def p99(self, row: Row) -> float:
        """Milliseconds, nearest rank: of less than a hundred samples the largest."""
        ordered = sorted(milliseconds(self.rows[row]))
        return ordered[math.ceil(0.99 * len(ordered)) - 1]

    def times(self, row: Row) -> float | None:
        """In multiples of a process, as ``ratio`` has it."""
        return ratio(self.rows.get(row, ()), self.rows.get(row.peer, ()))

    def over_a_process(self, row: Row) -> float | None:
        """In multiples of a single process beside no guests: the paper has no other."""
        ours, process = self.median(row), self.median(Row(PROCESS))
        return ours / process if ours is not None and process is not None else None

    def levels(self) -> list[int]:
        """Numbers of guests beside which there are rows."""
        return sorted({row.guests for row in self.rows})

    def category_medians(self, row: str) -> dict[str, float]:
        """Milliseconds of each category of a create by the socket."""
        samples = self.categories.get(row, [])
        names = {name: None for sample in samples for name in sample}
        return {
            name: statistics.median([sample.get(name, 0.0) for sample in samples]) for name in names
        }

    def grown(self, who: str) -> tuple[float, float] | None:
        """Medians of the first and of the last tenth of the creates that made many guests."""
        pairs = self.growth.get(who, [])
        tenth = len(pairs) // 10
        if not tenth:
            return None
        times = [ms for _, ms in pairs]
        return statistics.median(times[:tenth]), statistics.median(times[-tenth:])


def smooth(pairs: Sequence[tuple[int, float]], pieces: int) -> list[tuple[float, float]]:
    """The medians of consecutive pieces of pairs, each at its middle."""
    size = max(1, len(pairs) // pieces)
    found = []
    for start in range(0, len(pairs), size):
        piece = pairs[start : start + size]
        middle = statistics.mean([x for x, _ in piece])
        found.append((middle, statistics.median([y for _, y in piece])))
    return found


@dataclass(frozen=True)
class Published:
    """A figure of the LightVM paper (SOSP 2017), and the row that is nearest to it here.

    ``approximate``: the paper's text says "around", or gives a range whose end this is.
    """

    figure: str
    what: str
    ms: float
    source: str
    host: str
    row: Row
    approximate: bool = False

    @property
    def claim(self) -> str:
        """In words."""
        about = "about " if self.approximate else ""
        return f"{self.what}: {about}{self.ms:g} ms ({self.source})"

    @property
    def over_a_process(self) -> str:
        """In multiples of a process, in words."""
        return times(self.ms / PAPER_PROCESS_MS)


PAPER_PROCESS_MS = 1.0
"""fork and exec on Linux, in the paper's abstract."""

THOUSANDTH = Published("9", "LightVM, daytime, the 1,000th guest", 4.1, "section 6.1", "noxs",
                       Row("command", 1, guests=1000))  # fmt: skip

PAPER = (
    Published("4", "Docker", 150, "section 4.2", "xenstored", Row("runc"), True),
    Published("9", "xl, the first guest", 100, "section 6.1", "xenstored", Row("xl", 1), True),
    Published("9", "xl, the 1,000th guest", 1000, "section 6.1", "xenstored",
              Row("xl", 1, guests=1000), True),
    Published("9", "chaos with XenStore, the first guest", 15, "section 6.1", "xenstored",
              Row("cold", 1), True),
    Published("9", "chaos with noxs, the first guest", 8, "section 6.1", "noxs",
              Row("cold", 1), True),
    Published("9", "LightVM, daytime, the first guest", 4, "section 6.1", "noxs",
              Row("command", 1)),
    THOUSANDTH,
    Published("9", "LightVM, no devices, a kernel that does nothing", 2.3,
              "abstract, section 6.1", "noxs", Row("command", 0, "ready")),
    Published("10", "Docker, the 3,000th container", 1000, "section 6.1", "xenstored",
              Row("runc", guests=3000), True),
)  # fmt: skip


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table, and an empty line."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return [*lines, ""]


def times(value: float | None) -> str:
    """A ratio in words, of two or three significant digits."""
    if value is None:
        return ""
    if value >= 100:
        return f"{value:,.0f}x"
    if value >= 10:
        return f"{value:.1f}x"
    return f"{value:.2f}x" if value >= 0.1 else f"{value:.2g}x"


def ms(value: float | None) -> str:
    """Milliseconds in words."""
    if value is None:
        return ""
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"
