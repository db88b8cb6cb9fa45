"""destroy: end domains at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chaos.destroy import destroy
from chaos.domains import find, list_domains
from chaos.restarts import Restarts
from xenctypes.errors import ChaosError, UsageError

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
    called_off = restarts.call_off() if args.all else []
    failure: ChaosError | None = None
    gone: list[dict[str, Any]] = []
    for wanted in targets:
        called_off += restarts.call_off(wanted)
        try:
            domain = find(call.host, call.names, wanted)
            destroy(call.host, call.names, domain, force=args.force)
        except ChaosError as error:
            if any(wanted in {each.uuid, each.config.name} for each in called_off):
                continue  # it was dead, and waited to be created again
            if failure is not None:
                error.add_note(str(failure))
            failure = error
        else:
            gone.append({"name": domain.name, "domid": domain.domid, "uuid": domain.uuid})
    if args.json:
        call.print_json(gone + [each.describe() for each in called_off])
    if failure is not None:
        raise failure
    return 0
