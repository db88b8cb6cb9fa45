"""pause and unpause: whether a domain may run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chaos.domains import find
from xenctypes.errors import StateError

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from chaos.invocation import Invocation


def configure(parser: ArgumentParser, name: str) -> None:
    """Add the options."""
    del name
    parser.add_argument("domain", metavar="DOMAIN", help="name, domid or UUID")


def run(call: Invocation) -> int:
    """Pause or unpause, as the verb says. Both are idempotent."""
    domain = find(call.host, call.names, call.args.domain)
    if domain.domid == 0:
        raise StateError("Domain-0 is the host itself and cannot be paused")
    if call.args.verb == "pause":
        call.host.ctrl.domain_pause(domain.domid)
    elif domain.info.paused:
        call.host.ctrl.domain_unpause(domain.domid)
    return 0
