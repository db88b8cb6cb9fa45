"""console: attach a terminal to a domain's console."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chaos.console import Console
from chaos.domains import owned
from chaos.terminal import attach

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from chaos.invocation import Invocation


def configure(parser: ArgumentParser, name: str) -> None:
    """Add the options."""
    del name
    parser.add_argument("domain", metavar="DOMAIN", help="name, domid or UUID")


def run(call: Invocation) -> int:
    """Show what the guest wrote before, then copy both ways until Ctrl-], end of input or death."""
    _, record = owned(call.host, call.names, call.args.domain)
    with Console(call.host, call.names, record) as console:
        attach(call, console)
    return 0
