"""network-list, network-attach and network-detach: the vifs of a running domain."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from chaos import vif
from chaos.domconfig import VIFS_MAX
from chaos.netspec import parse_mac
from chaos.plug import changing
from chaos.verbs import devices
from chaos.vifspec import parse_vif
from xenctypes.errors import ConfigError, StateError

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from chaos.domconfig import DomainConfig
    from chaos.invocation import Invocation
    from chaos.plug import Change
    from chaos.registry import Record

WAITS = True
HEADER = "Idx BE Mac Addr.         handle state evt-ch   tx-/rx-ring-ref BE-path"  # xl's
LINE = (
    "{devid:<3} 0  {mac:<17} {handle:>6} {state:>5} {event-channel:>6} "
    "{tx-ring-ref:>5}/{rx-ring-ref:<11} {backend}"
)
BACK = ("mac", "handle", "bridge")
FRONT = ("state", "event-channel", "tx-ring-ref", "rx-ring-ref")


def configure(parser: ArgumentParser, name: str) -> None:
    """Add the options."""
    if name == "network-list":
        devices.configure_list(parser)
        return
    parser.add_argument("domain", metavar="DOMAIN", help="name, domid or UUID")
    if name == "network-attach":
        parser.add_argument(
            "settings", nargs="*", metavar="KEY=VALUE", help="as between the commas of vif="
        )
    else:
        parser.add_argument("vif", metavar="VIF", help="its number or its MAC address")


def run(call: Invocation) -> int:
    """List, attach or detach."""
    if call.args.verb == "network-list":
        devices.print_list(call, vif.KIND, BACK, FRONT, HEADER, LINE)
        return 0
    with changing(call.host, call.names, call.args.domain) as change:
        if call.args.verb == "network-attach":
            _attach(call, change)
        else:
            _detach(call, change)
    return 0


def _attach(call: Invocation, change: Change) -> None:
    config, record = change.config, change.record
    used = {each.devid for each in config.vifs}
    free = next(n for n in range(VIFS_MAX + 1) if n not in used)
    wanted, warnings = parse_vif(",".join(call.args.settings), free)
    for warning in warnings:
        call.warn(warning)
    if wanted.backend not in {"", "0", "Domain-0"}:
        raise ConfigError("vifs served by another domain than Domain-0 are not supported")
    grown = replace(config, vifs=(*config.vifs, wanted))  # which checks it beside the others
    vif.check(wanted)
    bus = call.host.bus
    mac = call.names.reserve_mac(wanted.mac, record.uuid, vif.taken_macs(bus))
    text, before = vif.mac_text(mac), record.macs
    change.keep(grown, macs=[*before, text])

    def forget() -> None:
        change.keep(config, macs=before)
        call.names.release_mac(text, record.uuid)

    (offered,) = vif.devices(record.name, [mac], [wanted])
    plugged = partial(vif.await_plugged, bus, record.domid, [wanted.devid])
    change.attach(offered, plugged, forget)


def _detach(call: Invocation, change: Change) -> None:
    config, record = change.config, change.record
    index = _index(config, record, call.args.vif)
    gone, mac = config.vifs[index], record.macs[index]
    change.ask(vif.KIND, gone.devid)  # it goes in any case, as with xl
    change.take(vif.KIND, gone.devid)
    left = tuple(each for each in config.vifs if each is not gone)
    change.keep(replace(config, vifs=left), macs=[each for each in record.macs if each != mac])
    call.names.release_mac(mac, record.uuid)


def _index(config: DomainConfig, record: Record, wanted: str) -> int:
    if wanted.isascii() and wanted.isdigit():
        found = [n for n, each in enumerate(config.vifs) if each.devid == int(wanted[:9])]
    else:
        text = vif.mac_text(parse_mac(wanted))
        found = [n for n, mac in enumerate(record.macs) if mac == text]
    if not found:
        raise StateError(
            f'domain "{record.name}" has no vif {wanted}', hint="chaos network-list shows them"
        )
    return found[0]
