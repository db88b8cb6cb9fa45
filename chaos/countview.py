"""What was counted of creates, as a table with one column for each toolstack. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    Counts = Mapping[str, Any]

TOTALS = (
    ("hypercalls of programs", "hypercalls_total"),
    ("guest frames mapped", "frames_mapped"),
    ("requests to the bus", "bus_requests_total"),
    ("  of them the kernel's", "kernel_bus_requests"),
    ("system calls", "system_calls_total"),
    ("processes and threads forked", "forks"),
)


def lines(found: Mapping[str, Counts]) -> list[str]:
    """``found``: the counts of one create by each toolstack."""
    shown = [("", *found), *_rows(list(found.values()))]
    widths = [max(len(row[index]) for row in shown) for index in range(len(found) + 1)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in shown
    ]


def _rows(every: Sequence[Counts]) -> Iterator[tuple[str, ...]]:
    for text, key in TOTALS:
        found = [counts.get(key) for counts in every]
        yield text, *("-" if number is None else str(number) for number in found)
    yield ("",) * (len(every) + 1)
    yield "HYPERCALLS (number, ms)", *("" for _ in every)
    calls = [{row["name"]: row for row in counts["hypercalls"]} for counts in every]
    for name in _names(calls):
        yield (
            name,
            *(
                f"{rows[name]['count']}  {rows[name]['ms']:8.3f}" if name in rows else "-"
                for rows in calls
            ),
        )
    asked = [counts.get("bus_requests") or {} for counts in every]
    yield from _section("REQUESTS TO THE BUS", asked)
    processes = [counts["system_calls"] for counts in every]
    totals = [{name: sum(kinds.values()) for name, kinds in each.items()} for each in processes]
    yield from _section("SYSTEM CALLS, by process", totals)
    yield from _section("SYSTEM CALLS, by kind", [_by_kind(each) for each in processes])
    yield from _section("PROGRAMS RUN", [counts["programs"] for counts in every])


def _section(title: str, every: Sequence[Mapping[str, int]]) -> Iterator[tuple[str, ...]]:
    """An empty line, a title and a line for each name; nothing where there are no names."""
    if not any(every):
        return
    yield ("",) * (len(every) + 1)
    yield title, *("" for _ in every)
    for name in _names(every):
        yield name, *(str(found.get(name, "-")) for found in every)


def _names(every: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys of all, in the order in which they come."""
    return list(dict.fromkeys(name for found in every for name in found))


def _by_kind(processes: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for kinds in processes.values():
        for kind, number in kinds.items():
            sums[kind] = sums.get(kind, 0) + number
    return dict(sorted(sums.items(), key=lambda row: -row[1]))
