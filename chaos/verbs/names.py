"""domid, domname and rename: names and numbers of domains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chaos import store, xenstored
from chaos.config import check_name
from chaos.domains import find, owned
from xenctypes.errors import StateError

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from chaos.invocation import Invocation


def configure(parser: ArgumentParser, name: str) -> None:
    """Add the options."""
    parser.add_argument("domain", metavar="DOMAIN", help="name, domid or UUID")
    if name == "rename":
        parser.add_argument("name", metavar="NAME", help="the new name")
    else:
        parser.add_argument("--json", action="store_true", help="print name, domid and UUID")


def run(call: Invocation) -> int:
    """Print the domid or name, or rename."""
    args = call.args
    if args.verb == "rename":
        return _rename(call)
    domain = find(call.host, call.names, args.domain)
    if args.json:
        call.print_json({"name": domain.name, "domid": domain.domid, "uuid": domain.uuid})
    else:
        call.print(str(domain.domid) if args.verb == "domid" else domain.name)
    return 0


def _rename(call: Invocation) -> int:
    name = call.args.name
    check_name(name)
    domain, _ = owned(call.host, call.names, call.args.domain)
    with call.names.owning(domain.uuid) as entry:
        record = call.names.read(domain.uuid)
        if record is None:
            raise StateError(f'domain "{domain.name}" is gone')
        if record.name != name:
            call.names.rename(entry, record, name)
            xenstored.announce(call.host, domain.domid, name)
            store.rename(call.host, record)
            if call.daemon is not None:
                call.daemon.renamed(domain.uuid, name)
    return 0
