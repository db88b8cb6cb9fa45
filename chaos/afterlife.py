"""What becomes of a domain that shut down: on_poweroff, on_reboot, on_crash, on_watchdog."""

from __future__ import annotations

import uuid as uuid_module
from dataclasses import replace
from typing import TYPE_CHECKING

from chaos import domains
from chaos.configjson import from_dict
from chaos.destroy import strip
from chaos.domains import shutdown_name
from xenctypes.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Callable

    from chaos.domconfig import DomainConfig
    from chaos.host import Host
    from chaos.registry import Record, Registry
    from xenctypes.ctrl import DomainInfo

RESTART_DELAYS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
"""Seconds before a restart, by how many times in a row the domain died young."""
YOUNG = 10.0
"""Seconds of life below which a death counts as one of a loop."""
COREDUMP = "coredump-"
ENDINGS = ("on_poweroff", "on_reboot", "on_crash", "on_watchdog")


def delay(failures: int) -> float:
    """Seconds to wait before the next restart."""
    return RESTART_DELAYS[min(failures, len(RESTART_DELAYS) - 1)]


def action_for(config: DomainConfig, info: DomainInfo) -> tuple[str, str]:
    """What the configuration wants done with a dead domain, and a warning or ""."""
    actions = {
        "poweroff": config.on_poweroff,
        "reboot": config.on_reboot,
        "crash": config.on_crash,
        "watchdog": config.on_watchdog,
    }
    action = actions.get(shutdown_name(info), "preserve")
    if action.startswith(COREDUMP):
        return action.removeprefix(COREDUMP), f"{action}: no core is written"
    return action, ""


def successor(config: DomainConfig, record: Record) -> DomainConfig:
    """The configuration to create a domain again with: its name, addresses and devices of now."""
    if record.config:
        config = from_dict(record.config | {"name": record.name})
    macs = [bytes.fromhex(mac.replace(":", "")) for mac in record.macs]
    vifs = tuple(replace(each, mac=mac) for each, mac in zip(config.vifs, macs, strict=True))
    return replace(config, name=record.name, vifs=vifs)


def set_aside(
    host: Host,
    names: Registry,
    uuid: str,
    domid: int,
    ending: Callable[[Record], None],
) -> str:
    """Keep a dead domain under another name and UUID, which is returned.

    Its devices and its store are its successor's: ``ending`` is told what it had. Whatever its end
    was, it is preserved from now on. Raises StateError if it is gone, whoever has its UUID then;
    what it did before another error does no harm when it is called again.
    """
    with names.owning(uuid) as entry:
        record = names.read(uuid)
        if record is None or record.domid != domid:
            raise StateError(f"domain {uuid} is gone")
        if record.uuid == uuid:
            ending(record)
        if record.macs or record.disks or record.store:
            for take in strip(host, record.domid, record):
                take()
            for mac in record.macs:
                names.release_mac(mac, uuid)
            record.macs, record.disks, record.store = [], [], ""
        if record.uuid == uuid:
            record.config |= dict.fromkeys(ENDINGS, "preserve")
            names.begin_rekey(entry, record, str(uuid_module.uuid4()), names.free_name(record.name))
        domains.settle(host, names, entry, record)
    return record.uuid
