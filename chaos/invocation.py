"""One run of a verb: its arguments, standard streams and working directory.

A verb touches no global of the process, so that it runs the same in the command
and in a daemon that serves a command.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Mapping

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

    async def drain(self) -> None:
        """In a daemon: wait until the standard output has taken what was written. OSError."""
        await cast("Output", self.stdout).drain()

    def warn(self, line: str) -> None:
        """Write a warning to the standard error."""
        self.stderr.write(f"chaos: warning: {line}\n")
