"""What was counted of creates, as a table with one column for each toolstack. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    Counts = Mapping[str, Any]

TOTALS = (
    ("hypercalls of programs", "hypercalls_total"),
    ("guest frames mapped", "frames_mapped"),
    ("the kernel's requests to the bus", "kernel_bus_requests"),
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
        yield text, *(str(counts[key]) for counts in every)
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
    yield ("",) * (len(every) + 1)
    yield "SYSTEM CALLS, by process", *("" for _ in every)
    calls = [counts["system_calls"] for counts in every]
    for name in _names(calls):
        yield name, *(str(sum(kinds[name].values())) if name in kinds else "-" for kinds in calls)
    yield ("",) * (len(every) + 1)
    yield "SYSTEM CALLS, by kind", *("" for _ in every)
    sums = [_by_kind(kinds) for kinds in calls]
    for name in _names(sums):
        yield name, *(str(kinds.get(name, "-")) for kinds in sums)
    if any(counts["programs"] for counts in every):
        yield ("",) * (len(every) + 1)
        yield "PROGRAMS RUN", *("" for _ in every)
        runs = [counts["programs"] for counts in every]
        for name in _names(runs):
            yield name, *(str(programs.get(name, "-")) for programs in runs)


def _names(every: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys of all, in the order in which they come."""
    return list(dict.fromkeys(name for found in every for name in found))


def _by_kind(processes: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for kinds in processes.values():
        for kind, number in kinds.items():
            sums[kind] = sums.get(kind, 0) + number
    return dict(sorted(sums.items(), key=lambda row: -row[1]))
