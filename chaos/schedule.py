"""Which of the host's processes ran when, from the kernel's scheduler."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, NamedTuple

from chaos.tracefs import tracer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

BUFFER_KB = 4096  # for each processor; the oldest events go first
NAMES = ("chaos", "noxsd", "storesd", "xendevd", "xenstored", "oxenstored", "xl", "xenbus",
         "xenwatch", "vif")  # fmt: skip
"""What the names of processes that take part in a create begin with, in Dom0."""

# kernel/trace/trace_output.c (the line), include/trace/events/sched.h (the event)
SWITCH = re.compile(
    r"\[(?P<cpu>\d+)\] +\S+ +(?P<s>\d+)\.(?P<us>\d{6}): sched_switch: prev_comm=(?P<prev>.*?)"
    r" prev_pid=(?P<prev_pid>\d+) .* ==> next_comm=(?P<next>.*) next_pid=(?P<next_pid>\d+) "
)


class Run(NamedTuple):
    """A thread that had a processor: ``start`` and ``us`` in microseconds, CLOCK_MONOTONIC."""

    name: str
    pid: int
    cpu: int
    start: int
    us: int


def runs(lines: Iterable[str], wanted: Callable[[str], bool]) -> list[Run]:
    """The runs of the threads whose names are wanted, from the text of a trace. Pure."""
    since: dict[int, tuple[int, int]] = {}  # processor -> who has it, since when
    found = []
    for line in lines:
        match = SWITCH.search(line)
        if match is None:
            continue
        cpu, when = int(match["cpu"]), int(match["s"]) * 1_000_000 + int(match["us"])
        pid, start = since.get(cpu, (-1, 0))
        if pid == int(match["prev_pid"]) and wanted(match["prev"]):
            found.append(Run(match["prev"], pid, cpu, start, when - start))
        since[cpu] = int(match["next_pid"]), when
    return found


@contextlib.contextmanager
def recorded() -> Iterator[Callable[[], tuple[list[Run], int]]]:
    """Record all switches within; what is yielded ends the recording and gives the runs.

    With them comes the number of events that found no room. The runs are those of threads that
    may take part in a create: of NAMES, and of our own. Raises ChaosError where the kernel does
    not let us.
    """
    with tracer(["sched:sched_switch"], BUFFER_KB) as found:
        found.switch(on=True)

        def end() -> tuple[list[Run], int]:
            with open("/proc/self/comm", encoding="utf-8", errors="replace") as file:
                own = file.read().rstrip("\n")
            found.switch(on=False)
            taken = runs(found.lines(), lambda name: name == own or name.startswith(NAMES))
            return taken, found.lost()

        yield end
