"""console: attach a terminal to a domain's console."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chaos.console import Console
from chaos.consolelog import HISTORY_MAX, ConsoleLog
from chaos.domains import owned
from xenctypes.errors import StateError

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from chaos.invocation import Invocation


def configure(parser: ArgumentParser, name: str) -> None:
    """Add the options."""
    del name
    parser.add_argument("domain", metavar="DOMAIN", help="name, domid or UUID")


def run(call: Invocation) -> int:
    """Show what the guest wrote before, then copy both ways until Ctrl-], end of input or death."""
    from chaos.terminal import attach

    _, record = owned(call.host, call.names, call.args.domain)
    if call.names.daemon_runs():
        raise StateError(
            f'chaosd holds the console of "{record.name}"', hint="leave --no-daemon out"
        )
    with Console(call.host, call.names, record) as console:
        attach(call, console)
    return 0


async def serve(call: Invocation) -> int:
    """The same in the daemon, where any number of terminals can be attached at once."""
    from chaos.daemon.attach import attach
    from chaos.daemon.streams import Outlet

    guest = await call.daemon.find(call.args.domain)
    hub = call.daemon.consoles
    if guest.uuid in hub:
        await attach(call, hub.attach(guest.uuid))
    else:  # dead, and kept: its history is all there is
        log = ConsoleLog(f"{call.names.path}/domains/{guest.uuid}")
        call.stdout.flush()
        with Outlet(call.stdout.fileno()) as out:
            await out.write(log.read(HISTORY_MAX))
    return 0
