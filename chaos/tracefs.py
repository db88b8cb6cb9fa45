"""The kernel's tracer (tracefs): instances of our own, so that nobody else's tracing is touched.

The clock is "mono", CLOCK_MONOTONIC, that of every timing of ours.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from xenctypes.errors import ChaosError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TRACEFS = "/sys/kernel/tracing"


class Tracer:
    """An instance of the tracer; it is off when it is made."""

    def __init__(self, path: str) -> None:
        self._path = path

    def write(self, name: str, value: str) -> None:
        """Write one of the instance's files. ChaosError."""
        write(f"{self._path}/{name}", value)

    def switch(self, *, on: bool) -> None:
        """Record, or rest."""
        self.write("tracing_on", "1" if on else "0")

    def lines(self) -> Iterator[str]:
        """What was recorded, as text; it stays recorded."""
        path = f"{self._path}/trace"
        with explained(path), open(path, encoding="utf-8", errors="replace") as file:
            yield from file

    def lost(self) -> int:
        """Events that found no room: those of all processors."""
        total = 0
        with explained(self._path):
            for cpu in os.scandir(f"{self._path}/per_cpu"):
                with open(f"{cpu.path}/stats", encoding="ascii") as file:
                    rows = (line.partition(":") for line in file)
                    total += sum(
                        int(n) for key, _, n in rows if key in {"overrun", "dropped events"}
                    )
        return total


@contextlib.contextmanager
def tracer(events: Sequence[str], buffer_kb: int) -> Iterator[Tracer]:
    """An instance with ``events`` enabled ("sched:sched_switch", with wildcards). ChaosError.

    ``buffer_kb``: for each processor.
    """
    path = f"{TRACEFS}/instances/chaos-{os.getpid()}"
    with explained(path):
        os.mkdir(path)
    try:
        made = Tracer(path)
        made.switch(on=False)
        made.write("trace_clock", "mono")
        made.write("buffer_size_kb", str(buffer_kb))
        for event in events:
            write(f"{path}/set_event", event, append=True)
        yield made
    finally:
        os.rmdir(path)


@contextlib.contextmanager
def probes(definitions: Sequence[str]) -> Iterator[None]:
    """Probes of the kernel's functions while within, as in its kprobetrace.rst. ChaosError.

    ``definitions``: "p:GROUP/EVENT function ..." or "r:..."; instances that use them end first.
    """
    made: list[str] = []
    path = f"{TRACEFS}/kprobe_events"
    try:
        for definition in definitions:
            write(path, definition, append=True)
            made.append(definition.split()[0].partition(":")[2])
        yield
    finally:
        for name in made:
            write(path, f"-:{name}", append=True)


def write(path: str, value: str, *, append: bool = False) -> None:
    """Write a file of the tracer's; what it holds goes, unless ``append``. ChaosError."""
    with explained(path):
        # Not open(): to append that seeks to the end, which these files refuse.
        fd = os.open(path, os.O_WRONLY | (os.O_APPEND if append else os.O_TRUNC))
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)


@contextlib.contextmanager
def explained(path: str) -> Iterator[None]:
    """What the kernel refuses of a file, as a ChaosError."""
    try:
        yield
    except OSError as error:
        raise ChaosError(
            f"the kernel cannot be traced: {error.strerror}: {path}",
            hint=f"as root, with tracefs mounted at {TRACEFS}",
        ) from error
