"""One run of a verb: its arguments, standard streams and working directory.

A verb touches no global of the process, so that it runs the same in the command
and in a daemon that serves a command.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager

    from chaos.daemon.streams import Output
    from chaos.host import Host
    from chaos.registry import Registry


Report = Callable[[str, int, int], None]
"""Told of each thing that is done: what it was, how many were done, of how many."""


def unreported(what: str, done: int, total: int) -> None:
    """The Report for whoever does not want to know."""


@dataclass
class Invocation:
    """What a verb may use: ``args`` as parsed, streams, the directory that paths start from.

    ``cancel`` is a descriptor that becomes readable when the caller wants the verb to end (Ctrl-C
    at a client, or a client that is gone), or -1 where a signal says so: whoever waits long polls
    it too. ``environ`` is the caller's environment. ``daemon`` is the daemon that runs the verb.
    ``report`` wants to hear of each of several domains that the verb is done with.
    """

    args: Namespace
    host: Host
    names: Registry
    directory: str = field(default_factory=os.getcwd)
    stdin: TextIO = field(default_factory=lambda: sys.stdin)
    stdout: TextIO = field(default_factory=lambda: sys.stdout)
    stderr: TextIO = field(default_factory=lambda: sys.stderr)
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    cancel: int = -1
    daemon: Any = None
    peer: Any = None
    report: Report = unreported

    def print(self, *lines: str) -> None:
        """Write lines to the standard output."""
        self.stdout.write("".join(line + "\n" for line in lines))

    def print_json(self, value: Any) -> None:
        """Write one JSON document to the standard output."""
        self.stdout.write(json.dumps(value, indent=2) + "\n")

    @contextlib.contextmanager
    def progress(self, what: str, total: int) -> Iterator[Report]:
        """Yield a Report for ``total`` things: to ``report``, and as a bar if they take long.

        Each is told of once. For a verb's ``run``; -q is heeded.
        """
        with self._bar(what, total) as advance:

            def told(each: str, done: int, total: int) -> None:
                self.report(each, done, total)
                advance()

            yield told

    def _bar(self, what: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        if self.daemon is not None:
            from chaos.daemon.bar import bar_of_thread

            return bar_of_thread(self, what, total)
        from chaos.progress import progress

        return progress(self.stderr, what, total, quiet=self.args.quiet, environ=self.environ)

    def check(self) -> None:
        """Raise KeyboardInterrupt if the caller wants the verb to end: where it may stop."""
        if self.cancel >= 0:
            poll = select.poll()
            poll.register(self.cancel, select.POLLIN)
            if poll.poll(0):
                raise KeyboardInterrupt

    async def drain(self) -> None:
        """In a daemon: wait until the standard output has taken what was written. OSError."""
        await cast("Output", self.stdout).drain()

    def warn(self, line: str) -> None:
        """Write a warning to the standard error."""
        self.stderr.write(f"chaos: warning: {line}\n")
