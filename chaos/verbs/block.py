"""block-list, block-attach and block-detach: the disks of a running domain."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from chaos import disk
from chaos.diskspec import parse_disk
from chaos.plug import changing
from chaos.vdev import parse_vdev
from chaos.verbs import devices
from xenctypes.errors import PermissionDenied, StateError

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from chaos.domconfig import DomainConfig
    from chaos.invocation import Invocation
    from chaos.plug import Change

WAITS = True
HEADER = "Vdev  BE  handle state evt-ch ring-ref BE-path"  # xl's
LINE = "{devid:<5} 0   {frontend-id:<6} {state:<5} {event-channel:<6} {ring-ref:<8} {backend}"
BACK = ("dev", "params", "mode", "frontend-id")
FRONT = ("state", "event-channel", "ring-ref")


def configure(parser: ArgumentParser, name: str) -> None:
    """Add the options."""
    if name == "block-list":
        devices.configure_list(parser)
        return
    parser.add_argument("domain", metavar="DOMAIN", help="name, domid or UUID")
    if name == "block-attach":
        parser.add_argument(
            "settings", nargs="+", metavar="DISK", help="as in disk=, in one word or in several"
        )
    else:
        parser.add_argument("vdev", metavar="VDEV", help="its name in the guest, or its number")
        parser.add_argument(
            "-f", "--force", action="store_true", help="take it though the guest does not close it"
        )


def run(call: Invocation) -> int:
    """List, attach or detach."""
    if call.args.verb == "block-list":
        devices.print_list(call, disk.KIND, BACK, FRONT, HEADER, LINE)
        return 0
    attach = call.args.verb == "block-attach"
    if attach and call.peer is not None and call.peer.uid:
        raise PermissionDenied(
            "only root may give guests disks", hint="a disk is any file of the host"
        )
    with changing(call.host, call.names, call.args.domain) as change:
        if attach:
            _attach(call, change)
        else:
            _detach(call, change)
    return 0


def _attach(call: Invocation, change: Change) -> None:
    from chaos.create import check_disks

    config, record = change.config, change.record
    wanted, warnings = parse_disk(*call.args.settings)
    for warning in warnings:
        call.warn(warning)
    disk.check_supported(wanted)
    grown = replace(config, disks=(*config.disks, wanted))  # which checks it beside the others
    (target,) = check_disks(call.host, call.names, record.uuid, [wanted])
    had = [disk.target_of(entry) for entry in record.disks]
    disk.check_free(call.names, record.uuid, list(zip(grown.disks, [*had, target], strict=True)))
    before = record.disks
    change.keep(grown, disks=[*before, disk.entry(wanted, target)])
    (offered,) = disk.devices([wanted], [target])
    set_up = partial(disk.await_progress, call.host.bus, record.domid, [wanted], connected=False)
    change.attach(offered, set_up, partial(change.keep, config, disks=before))


def _detach(call: Invocation, change: Change) -> None:
    config, record = change.config, change.record
    index = _index(config, record.name, call.args.vdev)
    gone = config.disks[index]
    if not change.ask(disk.KIND, gone.devid) and not call.args.force:
        raise StateError(
            f'domain "{record.name}" does not close disk {gone.vdev}, which is left closing',
            hint="unmount it there and detach it again, or take it with --force",
        )
    change.take(disk.KIND, gone.devid)
    left = tuple(each for each in config.disks if each is not gone)
    kept = [entry for n, entry in enumerate(record.disks) if n != index]
    change.keep(replace(config, disks=left), disks=kept)


def _index(config: DomainConfig, name: str, wanted: str) -> int:
    devid = parse_vdev(wanted)
    found = [n for n, each in enumerate(config.disks) if each.devid == devid]
    if not found:
        raise StateError(
            f'domain "{name}" has no disk {wanted}', hint="chaos block-list shows them"
        )
    return found[0]
