"""create -F: stay with a domain until it is dead, and do what its configuration says then.

::

    running --dies--> shut down --on_poweroff, on_reboot, on_crash-->
        destroy           gone, the command ends
        preserve          kept as it is, the command ends
        restart           gone, created again under the same name and UUID
        rename-restart    kept under another name and UUID, created again
"""

from __future__ import annotations

import time
import uuid as uuid_module
from typing import TYPE_CHECKING

from chaos import vif
from chaos.create import CREATE_STEPS, Creation
from chaos.death import DeathWatch
from chaos.destroy import destroy
from chaos.domains import find, shutdown_name
from chaos.readiness import wait_dead
from xenctypes.errors import StateError

if TYPE_CHECKING:
    from chaos.builder import Builder
    from chaos.death import Death
    from chaos.invocation import Invocation

RESTART_DELAYS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)  # seconds, for one that dies young
YOUNG = 10.0  # seconds


def stay(call: Invocation, builder: Builder, creation: Creation) -> int:
    """Wait for the domain's end, again and again while it restarts. Ctrl-C destroys it."""
    failures = 0
    while True:
        born = time.monotonic()
        uuid = creation.uuid
        try:
            death = _watch(call, creation)
            action = _action(creation, death)
            _say(call, creation, death, action)
            if death.info is None or action == "preserve":
                return 0
            if action == "rename-restart":
                uuid = _set_aside(call, creation)
            else:
                destroy(call.host, call.names, find(call.host, call.names, str(uuid)))
                if action == "destroy":
                    return 0
            failures = failures + 1 if time.monotonic() - born < YOUNG else 0
            time.sleep(RESTART_DELAYS[min(failures, len(RESTART_DELAYS) - 1)])
        except KeyboardInterrupt:
            creation.undo()
            raise
        creation = Creation(creation.config, call.host, builder, call.names, uuid)
        try:
            creation.run(CREATE_STEPS)
        finally:
            creation.close()


def _watch(call: Invocation, creation: Creation) -> Death:
    with DeathWatch(call.host, creation.domid, creation.uuid.bytes) as watch:
        return wait_dead(watch)


def _action(creation: Creation, death: Death) -> str:
    if death.info is None:
        return "destroy"
    config = creation.config
    actions = {
        "poweroff": config.on_poweroff,
        "reboot": config.on_reboot,
        "crash": config.on_crash,
        "watchdog": config.on_watchdog,
        "soft-reset": config.on_soft_reset,
    }
    return str(actions.get(shutdown_name(death.info), "preserve"))


def _say(call: Invocation, creation: Creation, death: Death, action: str) -> None:
    if not call.args.quiet:
        reason = "destroyed" if death.info is None else shutdown_name(death.info)
        call.print(f"{creation.config.name}, domain {creation.domid}: {reason}, {action}")
        call.stdout.flush()


def _set_aside(call: Invocation, creation: Creation) -> uuid_module.UUID:
    """Keep the dead domain under a name and UUID of its own; returns the UUID to restart with."""
    names = call.names
    old = str(creation.uuid)
    with names.locked(), names.entry(old) as entry:
        entry.lock(wait=True)
        record = names.read(old)
        if record is None:
            raise StateError(f'domain "{creation.config.name}" is gone')
        if record.macs:  # the successor has the same vifs
            vif.disconnect_all(call.host.bus, creation.domid)
            for mac in record.macs:
                names.release_mac(mac, old)
            record.macs = []
        kept = uuid_module.uuid4()
        call.host.ctrl.domain_sethandle(creation.domid, kept.bytes)
        names.rekey(entry, record, str(kept), names.free_name(record.name))
    return creation.uuid
