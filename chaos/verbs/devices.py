"""What network-list and block-list share; not a verb."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chaos import backend
from chaos.domains import find

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Sequence

    from chaos.invocation import Invocation


def configure_list(parser: ArgumentParser) -> None:
    """Add the options of a listing."""
    parser.add_argument("domains", metavar="DOMAIN", nargs="+", help="name, domid or UUID")
    parser.add_argument("--json", action="store_true", help="print as JSON")


def print_list(
    call: Invocation, kind: str, back: Sequence[str], front: Sequence[str], header: str, line: str
) -> None:
    """Print the domains' devices of a kind, keys as in backend.rows; ``line`` formats a row."""
    found = []
    for wanted in call.args.domains:
        domain = find(call.host, call.names, wanted)
        rows = backend.rows(call.host.bus, domain.domid, kind, back, front)
        found += [{"domain": domain.name, "domid": domain.domid} | row for row in rows]
    if call.args.json:
        call.print_json(found)
        return
    call.print(header)
    for row in found:
        shown = {key: -1 if value is None else value for key, value in row.items()}
        call.print(line.format_map(shown))
