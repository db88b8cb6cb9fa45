"""top: what the domains use, again and again."""

from __future__ import annotations

import argparse
import json
import os
import select
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from chaos.cli import seconds
from chaos.usage import SORT_KEYS, Look, Sampler, Usage, look, ordered

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Callable, Iterator

    from rich.console import RenderableType

    from chaos.invocation import Invocation

LOCAL = True  # it draws on its user's terminal
DELAY = 3.0
DELAY_MIN = 0.1
COLUMNS = (
    ("NAME", "name"),
    ("ID", "domid"),
    ("STATE", "state"),
    ("CPU%", "cpu"),
    ("MEM(MiB)", "memory"),
    ("VCPUS", "vcpus"),
    ("RX/s", "rx"),
    ("TX/s", "tx"),
    ("RX", ""),
    ("TX", ""),
    ("READY(ms)", "ready"),
    ("UPTIME", "uptime"),
)
QUIT = b"qQ\x03\x04"
UNITS = ("", "k", "M", "G", "T", "P")


def configure(parser: ArgumentParser, name: str) -> None:
    """Add the options."""
    del name
    parser.add_argument(
        "-d",
        "--delay",
        type=delay,
        default=DELAY,
        metavar="S",
        help=f"seconds between two looks, at least {DELAY_MIN:g} (default %(default)g)",
    )
    parser.add_argument(
        "-n",
        "--iterations",
        type=int,
        metavar="N",
        help="end after N looks; 0: never (default: 0 on a terminal, else 1)",
    )
    parser.add_argument(
        "-s", "--sort", choices=sorted(SORT_KEYS), default="cpu", help="the order of the rows"
    )
    parser.add_argument("-r", "--reverse", action="store_true", help="the other way round")
    parser.add_argument("--json", action="store_true", help="print one JSON document a look")


def delay(text: str) -> float:
    """The argument of --delay."""
    value = seconds(text)
    if value < DELAY_MIN:
        raise argparse.ArgumentTypeError(f"{text} is less than {DELAY_MIN:g} seconds")
    return value


def run(call: Invocation) -> int:
    """Show it live on a terminal, else as plain text or JSON. Being told to end is no failure."""
    try:
        if not call.args.json and call.stdout.isatty():
            return _live(call)
        return _plain(call)
    except KeyboardInterrupt:
        return 0


def _looking(call: Invocation) -> Callable[[], Look]:
    """How this user may look: root at the host itself, others through the daemon. NoDaemon."""
    if os.geteuid() == 0:
        return lambda: look(call.host, call.names)
    from chaos.client import Chaos

    return Chaos().usage


def _plain(call: Invocation) -> int:
    """One table or document a look; the first comes after a delay, so that it has rates."""
    args = call.args
    left = 1 if args.iterations is None else args.iterations
    sampler = Sampler(_looking(call))
    sampler.sample()
    number = 0
    while not left or number < left:
        if _pause(args.delay, call.cancel):
            break
        usages = ordered(sampler.sample(), args.sort, reverse=args.reverse)
        if args.json:
            document = {"time": time.time(), "domains": [one._asdict() for one in usages]}
            call.print(json.dumps(document))
        else:
            if number:
                call.print("")
            call.print(*text(usages))
        call.stdout.flush()
        number += 1
    return 0


def text(usages: list[Usage]) -> list[str]:
    """The table in lines of text, columns apart by spaces."""
    rows = [[title for title, _ in COLUMNS], *(cells(one) for one in usages)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = []
    for row in rows:
        shown = [row[0].ljust(widths[0])]
        shown += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(shown))
    return lines


def cells(one: Usage) -> list[str]:
    """A domain's row, in the order of COLUMNS."""
    return [
        "".join(letter if letter.isprintable() else "?" for letter in one.name),
        str(one.domid),
        one.state,
        "-" if one.cpu_percent is None else f"{one.cpu_percent:.1f}",
        str(one.memory_mib),
        str(one.vcpus),
        "-" if one.rx_rate is None else amount(one.rx_rate),
        "-" if one.tx_rate is None else amount(one.tx_rate),
        amount(one.rx),
        amount(one.tx),
        "-" if one.ready_ms is None else f"{one.ready_ms:.1f}",
        "-" if one.uptime is None else span(one.uptime),
    ]


def amount(count: float) -> str:
    """Bytes, in units of 1000: 999, 1.0k, 12.3M."""
    unit = 0
    while count >= 999.95 and unit < len(UNITS) - 1:
        count /= 1000
        unit += 1
    return f"{count:.1f}{UNITS[unit]}" if unit else f"{count:.0f}"


def span(length: float) -> str:
    """Seconds as 12s, 3m05s, 2h03m or 4d01h."""
    whole = int(length)
    for size, big, part, small in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "m"),
        (60, "m", 1, "s"),
    ):
        if whole >= size:
            return f"{whole // size}{big}{whole % size // part:02}{small}"
    return f"{whole}s"


def _live(call: Invocation) -> int:
    """The view on a terminal: q or Ctrl-C leaves, s changes the order, r turns it round."""
    from rich.console import Console
    from rich.live import Live

    args = call.args
    keys = sorted(SORT_KEYS)
    sampler = Sampler(_looking(call))
    usages = sampler.sample()
    number = 1
    with ExitStack() as stack:
        stdin = stack.enter_context(_keys(call.stdin.fileno()))
        console = Console(file=call.stdout, force_terminal=True)
        live = stack.enter_context(Live(console=console, screen=True, auto_refresh=False))
        due = time.monotonic() + args.delay
        while True:
            shown = ordered(usages, args.sort, reverse=args.reverse)
            live.update(_table(shown, args.sort, console.height), refresh=True)
            key = _key(stdin, call.cancel, due - time.monotonic())
            if key is None:
                return 0
            if key == b"s":
                args.sort = keys[(keys.index(args.sort) + 1) % len(keys)]
            elif key == b"r":
                args.reverse = not args.reverse
            elif not key:
                if args.iterations and number >= args.iterations:
                    return 0
                usages = sampler.sample()
                number += 1
                due = time.monotonic() + args.delay


def _table(usages: list[Usage], sort: str, height: int) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    busy = sum(one.cpu_percent or 0 for one in usages)
    table = Table(
        title=f"{len(usages)} domains, {busy:.1f}% CPU, {sum(u.memory_mib for u in usages)} MiB",
        caption="q leaves  s changes the order  r turns it round",
        box=None,
        expand=True,
    )
    for index, (title, key) in enumerate(COLUMNS):
        table.add_column(
            title,
            justify="right" if index else "left",
            style="bold" if key == sort else "",
            no_wrap=True,
        )
    for one in usages[: max(1, height - 3)]:
        table.add_row(*(Text(cell) for cell in cells(one)))
    return table


@contextmanager
def _keys(stdin: int) -> Iterator[int]:
    """The descriptor to read single keys from, -1 if it is no terminal; restored at the end."""
    import termios
    import tty

    try:
        before = termios.tcgetattr(stdin)
    except termios.error:
        yield -1
        return
    tty.setcbreak(stdin)
    try:
        yield stdin
    finally:
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)


def _key(stdin: int, cancel: int, timeout: float) -> bytes | None:
    """The next key; b"" when there was none for ``timeout`` seconds, None when it is to end."""
    ready = select.select([fd for fd in (stdin, cancel) if fd >= 0], [], [], max(0, timeout))[0]
    if cancel in ready:
        return None
    if not ready:
        return b""
    key = os.read(stdin, 1)
    return None if not key or key in QUIT else key


def _pause(length: float, cancel: int) -> bool:
    """Wait; whether it is to end."""
    return _key(-1, cancel, length) is None
