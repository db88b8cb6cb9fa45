"""destroy: end domains at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chaos.destroy import destroy
from chaos.domains import find, list_domains
from chaos.restarts import Restarts
from xenctypes.errors import ChaosError, StateError, UsageError

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from chaos.invocation import Invocation


def configure(parser: ArgumentParser, name: str) -> None:
    """Add the options."""
    del name
    parser.add_argument("domains", nargs="*", metavar="DOMAIN", help="name, domid or UUID")
    parser.add_argument(
        "-a", "--all", action="store_true", help="every domain that chaos made on this host"
    )
    parser.add_argument(
        "-f", "--force", action="store_true", help="also a domain that another toolstack made"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="show no progress bar")
    parser.add_argument("--json", action="store_true", help="print what was destroyed as JSON")


def run(call: Invocation) -> int:
    """Destroy each; one that fails does not keep the others alive, and is reported last."""
    args = call.args
    if bool(args.domains) == args.all:
        raise UsageError("chaos destroy: name domains, or give --all")
    if args.all:
        made = (d for d in list_domains(call.host, call.names) if d.record is not None)
        targets = [domain.uuid for domain in made]
    else:
        targets = args.domains
    restarts = Restarts(call.names)
    called_off = {each.uuid: each.describe() for each in (restarts.call_off() if args.all else ())}
    failure: ChaosError | None = None
    gone: dict[str, dict[str, Any]] = {}
    with call.progress("destroying", len(targets)) as told:
        for done, wanted in enumerate(targets, 1):
            call.check()
            try:
                destroyed = _destroy(call, restarts, wanted)
            except ChaosError as error:
                # It was dead, and waited to be created again, or ended by itself since.
                waited = wanted in called_off and isinstance(error, StateError)
                if waited or (args.all and _is_gone(call, wanted)):
                    continue
                if failure is not None:
                    error.add_note(str(failure))
                failure = error
            else:
                told(destroyed["name"], done, len(targets))
                (called_off if destroyed["domid"] is None else gone)[destroyed["uuid"]] = destroyed
    if args.json:
        call.print_json([*(called_off | gone).values()])
    if failure is not None:
        raise failure
    return 0


def _is_gone(call: Invocation, uuid: str) -> bool:
    """Whether nothing is left of a domain: a record means that its devices may be there."""
    try:
        find(call.host, call.names, uuid)
    except StateError:
        return not call.names.has(uuid)
    return False


def _destroy(call: Invocation, restarts: Restarts, wanted: str) -> dict[str, Any]:
    """End a domain, or the wait of a dead one for its restart: what that was. ChaosError."""
    called_off = restarts.call_off(wanted)
    try:
        domain = find(call.host, call.names, wanted)
    except StateError:
        if not called_off and wanted.isascii() and wanted.isdigit():
            called_off = restarts.call_off_of(wanted)
        if not called_off:
            raise
        restarts.call_off(called_off[0].uuid)  # it may have been written anew meanwhile
        return called_off[0].describe()
    called_off += restarts.call_off(domain.uuid)
    try:
        destroy(call.host, call.names, domain, force=call.args.force)
    except ChaosError as error:
        refused = isinstance(error, StateError)  # nothing was begun: others are at work on it
        if not called_off or not (refused or _is_gone(call, domain.uuid)):
            raise
        restarts.call_off(domain.uuid)
        return called_off[0].describe()
    if call.daemon is not None:
        # What it has mapped of the domain keeps that from going.
        call.daemon.ended(domain.uuid, domain.domid)
    restarts.call_off(domain.uuid)  # its death may have been noticed meanwhile
    return {"name": domain.name, "domid": domain.domid, "uuid": domain.uuid}
