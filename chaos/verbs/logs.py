"""logs: what a domain's console said, as long as its record exists.

With -f it goes on until the domain is dead: in a daemon as an attachment like any other. Without
a daemon it drains the console meanwhile, as chaos console does; while another process has the
console, it looks at the log ten times a second.
"""

from __future__ import annotations

import argparse
import json
import time
import uuid as uuid_module
from contextlib import closing
from typing import TYPE_CHECKING

from chaos.console import Console
from chaos.consolelog import LOG_MAX, ConsoleLog, Escaper, LogTail, last_lines
from chaos.death import POLL_SECONDS, DeathWatch
from chaos.domains import as_uuid, owned
from xenctypes.errors import StateError, UsageError

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Callable

    from chaos.invocation import Invocation
    from chaos.registry import Record

LINES_MAX = 10**6
ALL = 2 * LOG_MAX


def configure(parser: ArgumentParser, name: str) -> None:
    """Add the options."""
    del name
    parser.add_argument("domain", metavar="DOMAIN", help="name, domid or UUID")
    parser.add_argument(
        "-f", "--follow", action="store_true", help="go on until the domain is dead"
    )
    parser.add_argument("-n", "--lines", type=_lines, metavar="N", help="only the last N lines")
    parser.add_argument(
        "--raw", action="store_true", help="as the guest wrote it, control characters and all"
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON: with -f, one object for each line"
    )


def run(call: Invocation) -> int:
    """Show the log; with -f, what comes as well."""
    record = _recorded(call) or owned(call.host, call.names, call.args.domain)[1]
    printer = Printer(call, record)

    def show(data: bytes) -> None:
        call.stdout.buffer.write(printer.feed(data))
        call.stdout.buffer.flush()

    call.stdout.flush()
    if call.args.follow and _alive(call, record):
        _follow(call, record, printer, show)
    else:
        show(printer.first(_log(call, record).read(ALL)))
    call.stdout.buffer.write(printer.end())
    call.stdout.buffer.flush()
    return 0


async def serve(call: Invocation) -> int:
    """The same in the daemon."""
    from chaos.daemon.streams import Outlet

    record = _recorded(call)
    if record is None:
        record = call.names.read((await call.daemon.find(call.args.domain)).uuid)
    if record is None:
        raise StateError(f'domain "{call.args.domain}" is gone')
    printer = Printer(call, record)
    call.stdout.flush()
    with Outlet(call.stdout.fileno()) as out:
        if call.args.follow and record.uuid in call.daemon.consoles:
            with closing(call.daemon.consoles.attach(record.uuid, ALL)) as attachment:
                await out.write(printer.feed(printer.first(attachment.history)))
                async for data in attachment:
                    await out.write(printer.feed(data))
        else:
            await out.write(printer.feed(printer.first(_log(call, record).read(ALL))))
        await out.write(printer.end())
    return 0


class Printer:
    """Turns a guest's output, piece by piece, into what the options want of it."""

    def __init__(self, call: Invocation, record: Record) -> None:
        args = call.args
        if args.raw and args.json:
            raise UsageError("chaos logs: --raw does not go with --json")
        self._count: int | None = args.lines
        self._raw: bool = args.raw
        self._json: bool = args.json
        self._follow: bool = args.follow
        self._record = record
        self._escaper = Escaper()
        self._lines: list[str] = []
        self._line = ""

    def first(self, history: bytes) -> bytes:
        """The part of the history that is wanted."""
        return history if self._count is None else last_lines(history, self._count)

    def feed(self, data: bytes) -> bytes:
        """What to print for ``data``."""
        if self._raw:
            return data
        text = self._escaper.feed(data)
        return self._feed_json(text) if self._json else text.encode()

    def end(self) -> bytes:
        """What to print at the end."""
        if self._raw:
            return b""
        text = self._escaper.feed(b"", final=True)
        if not self._json:
            return text.encode()
        rest = self._feed_json(text) + (self._feed_json("\n") if self._line else b"")
        if self._follow:
            return rest
        document = {
            "name": self._record.name,
            "domid": self._record.domid,
            "uuid": self._record.uuid,
            "lines": self._lines,
        }
        return json.dumps(document, indent=2).encode() + b"\n"

    def _feed_json(self, text: str) -> bytes:
        *lines, self._line = (self._line + text).split("\n")
        lines = [line.removesuffix("\r") for line in lines]
        if not self._follow:
            self._lines += lines
            return b""
        return "".join(json.dumps({"line": line}) + "\n" for line in lines).encode()


def _follow(
    call: Invocation, record: Record, printer: Printer, show: Callable[[bytes], None]
) -> None:
    try:
        console = Console(call.host, call.names, record)
    except StateError:  # attached elsewhere, or gone meanwhile
        _follow_file(call, record, printer, show)
        return
    with console:
        show(printer.first(console.log.read(ALL)))
        console.attach(-1, show)


def _follow_file(
    call: Invocation, record: Record, printer: Printer, show: Callable[[bytes], None]
) -> None:
    """Read what another process writes into the log."""
    uuid = uuid_module.UUID(record.uuid).bytes
    with (
        closing(LogTail(_directory(call, record))) as tail,
        DeathWatch(call.host, record.domid, uuid) as death,
    ):
        show(printer.first(tail.history))
        while death.check() is None:
            show(tail.read())
            time.sleep(POLL_SECONDS)
        time.sleep(POLL_SECONDS)  # its last words are being written
        show(tail.read())


def _alive(call: Invocation, record: Record) -> bool:
    info = call.host.ctrl.domain_info(record.domid) if record.domid >= 0 else None
    return info is not None and str(uuid_module.UUID(bytes=info.uuid)) == record.uuid


def _recorded(call: Invocation) -> Record | None:
    """The record of the domain that is asked for by name or UUID, be it dead: none is reaped."""
    wanted = call.args.domain
    if wanted.isascii() and wanted.isdigit():
        return None
    uuid = call.names.uuid_of(wanted) or as_uuid(wanted)
    return call.names.read(uuid) if uuid else None


def _log(call: Invocation, record: Record) -> ConsoleLog:
    return ConsoleLog(_directory(call, record))


def _directory(call: Invocation, record: Record) -> str:
    return f"{call.names.path}/domains/{record.uuid}"


def _lines(text: str) -> int:
    value = int(text)
    if not 0 <= value <= LINES_MAX:
        raise argparse.ArgumentTypeError(f"{text} is not within 0 to {LINES_MAX}")
    return value
