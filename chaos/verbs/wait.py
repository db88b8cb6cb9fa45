"""wait: until a domain is ready or dead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chaos.cli import seconds
from chaos.death import Death
from chaos.domains import owned, shutdown_name
from chaos.readiness import DEAD, READY, Outcome, await_ready_or_dead, never_ready

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from chaos.invocation import Invocation

EXIT_DEAD = 3
EXIT_TIMEOUT = 124


def configure(parser: ArgumentParser, name: str) -> None:
    """Add the options."""
    del name
    parser.add_argument("domain", metavar="DOMAIN", help="name, domid or UUID")
    parser.add_argument(
        "--dead", action="store_true", help="wait for death, however ready the domain is"
    )
    parser.add_argument("--timeout", type=seconds, metavar="S", help="give up after S seconds")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")


async def serve(call: Invocation) -> int:
    """The same in the daemon, which hears of what is waited for."""
    args = call.args
    guest = await call.daemon.find(args.domain)
    if not args.dead and not guest.noxs:
        raise never_ready(guest.name)
    outcome = await call.daemon.wait(guest.uuid, args.timeout, dead=args.dead)
    info = guest.death or call.daemon.guests.info(guest.domid, guest.uuid)
    return _conclude(call, guest.name, guest.domid, Outcome(outcome, Death(info), guest.words()))


def run(call: Invocation) -> int:
    """Wait. Exit code 0: ready (with --dead: dead), 3: died before ready, 124: timed out."""
    args = call.args
    domain, record = owned(call.host, call.names, args.domain)
    outcome = await_ready_or_dead(call.host, record, until_dead=args.dead, timeout=args.timeout)
    return _conclude(call, domain.name, domain.domid, outcome)


def _conclude(call: Invocation, name: str, domid: int, outcome: Outcome) -> int:
    args = call.args
    info = outcome.death.info if outcome.death else None
    reason = shutdown_name(info) if info is not None and info.shutdown else None
    if args.json:
        call.print_json(
            {
                "name": name,
                "domid": domid,
                "outcome": outcome.kind,
                "shutdown_reason": reason,
                "exit_code": outcome.words.exit_code if outcome.words else None,
                "message": outcome.words.message if outcome.words else None,
            }
        )
    if outcome.kind == READY:
        return 0
    if outcome.kind == DEAD:
        return 0 if args.dead else EXIT_DEAD
    return EXIT_TIMEOUT
