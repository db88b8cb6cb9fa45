"""A terminal on a console: raw while attached, restored whatever happens."""

from __future__ import annotations

import contextlib
import termios
import tty
from typing import TYPE_CHECKING

from chaos.consolelog import HISTORY_MAX

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chaos.console import Console
    from chaos.invocation import Invocation


def attach(call: Invocation, console: Console) -> str:
    """Show the history, then attach; returns how it ended (see Console.attach)."""
    out = call.stdout.buffer

    def show(data: bytes) -> None:
        out.write(data)
        out.flush()

    call.stdout.flush()
    show(console.log.read(HISTORY_MAX))
    stdin = call.stdin.fileno()
    with _raw(stdin):
        ending = console.attach(stdin, show)
    if call.stdin.isatty():
        show(b"\r\n")
    return ending


@contextlib.contextmanager
def _raw(fd: int) -> Iterator[None]:
    try:
        before = termios.tcgetattr(fd)
    except termios.error:  # not a terminal: nothing to change
        yield
        return
    tty.setraw(fd)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
