"""What the lab tells its user: always on stderr, so that stdout is the command's own."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


def say(message: str) -> None:
    """Print one line of the lab's own talk."""
    print(f"lab: {message}", file=sys.stderr, flush=True)


class Steps(Protocol):
    """Progress through a known number of steps."""

    def step(self, name: str) -> None:
        """Begin the step called ``name``; the one before it is done."""

    def note(self, line: str) -> None:
        """Show a passing detail of the current step."""


class _Plain:
    """One line for each step, with the seconds since the start."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, total, 0
        self._start = time.monotonic()

    def step(self, name: str) -> None:
        self._done += 1
        elapsed = time.monotonic() - self._start
        say(f"{self._title} [{self._done}/{self._total}] {name} ({elapsed:.0f} s)")

    def note(self, line: str) -> None:
        pass


@contextmanager
def steps(title: str, total: int) -> Iterator[Steps]:
    """Show the progress of ``total`` steps: a bar on a terminal, plain lines elsewhere."""
    if not sys.stderr.isatty():
        yield _Plain(title, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    with Progress(
        SpinnerColumn(),
        TextColumn("[bold]{task.fields[title]}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("{task.description}[dim]{task.fields[detail]}"),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task("", total=total, title=title, detail="", start=True)

        class _Rich:
            done = 0

            def step(self, name: str) -> None:
                bar.update(task, completed=self.done, description=name, detail="")
                self.done += 1

            def note(self, line: str) -> None:
                bar.update(task, detail=f": {line[:48]}")

        yield _Rich()
