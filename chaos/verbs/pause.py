"""pause and unpause: whether a domain may run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chaos.destroy import pooled
from chaos.domains import find, unfinished
from chaos.registry import BUILDING, ENDING
from xenctypes.errors import StateError

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from chaos.invocation import Invocation
    from xenctypes.ctrl import Xenctrl


def configure(parser: ArgumentParser, name: str) -> None:
    """Add the options."""
    del name
    parser.add_argument("domain", metavar="DOMAIN", help="name, domid or UUID")


def run(call: Invocation) -> int:
    """Pause or unpause, as the verb says. Both are idempotent, though Xen counts pauses."""
    domain = find(call.host, call.names, call.args.domain)
    if domain.domid == 0:
        raise StateError("Domain-0 is the host itself and cannot be paused")
    if domain.record is not None and domain.record.state in {BUILDING, ENDING}:
        raise StateError(unfinished(domain.record), hint="try again")
    if domain.is_shell:
        raise pooled(domain.domid)
    ctrl = call.host.ctrl
    pause = call.args.verb == "pause"
    if pause == domain.info.paused:
        return 0
    if pause:
        ctrl.domain_pause(domain.domid)
    elif domain.record is None:
        _unpause(ctrl, domain.domid)
    else:
        with call.names.entry(domain.uuid) as entry:
            # Without all of its devices a stock guest would wait for ever.
            if not entry.lock(wait=False):
                raise StateError(
                    f'domain "{domain.name}" is being created, changed or destroyed',
                    hint="try again",
                )
            _unpause(ctrl, domain.domid)
    if call.daemon is not None:
        kind = "paused" if pause else "unpaused"
        call.daemon.tell(kind, name=domain.name, domid=domain.domid, uuid=domain.uuid)
    return 0


def _unpause(ctrl: Xenctrl, domid: int) -> None:
    while (info := ctrl.domain_info(domid)) is not None and info.paused:
        ctrl.domain_unpause(domid)
