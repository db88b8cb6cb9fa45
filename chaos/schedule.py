"""Which of the host's processes ran when, from the kernel's scheduler (tracefs, sched_switch).

The kernel's "mono" trace clock is CLOCK_MONOTONIC, that of every timing of ours. An instance of
the tracer's own is used, so that nobody else's tracing is touched.
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING, NamedTuple

from xenctypes.errors import ChaosError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

TRACEFS = "/sys/kernel/tracing"
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
def recorded() -> Iterator[Callable[[], list[Run]]]:
    """Record all switches within; what is yielded ends the recording and gives the runs.

    Raises ChaosError where the kernel does not let us.
    """
    instance = f"{TRACEFS}/instances/chaos-{os.getpid()}"
    with _explained():
        os.mkdir(instance)
    try:
        with _explained():
            _set(f"{instance}/trace_clock", "mono")
            _set(f"{instance}/buffer_size_kb", str(BUFFER_KB))
            _set(f"{instance}/events/sched/sched_switch/enable", "1")
        yield lambda: _read(instance)
    finally:
        os.rmdir(instance)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ChaosError(
            f"the kernel's scheduler cannot be traced: {error.strerror}: {error.filename}",
            hint=f"as root, with tracefs mounted at {TRACEFS}",
        ) from error


def _read(instance: str) -> list[Run]:
    """The runs of threads that may take part in a create: those of NAMES, and our own."""
    with open("/proc/self/comm", encoding="utf-8", errors="replace") as file:
        own = file.read().rstrip("\n")
    with _explained():
        _set(f"{instance}/tracing_on", "0")
        with open(f"{instance}/trace", encoding="utf-8", errors="replace") as file:
            return runs(file, lambda name: name == own or name.startswith(NAMES))


def _set(path: str, value: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(value)
