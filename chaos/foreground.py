"""create -F: stay with a domain until it is dead, and do what its configuration says then.

::

    running --dies--> shut down --on_poweroff, on_reboot, on_crash-->
        destroy           gone, the command ends
        preserve          kept as it is, the command ends
        restart           gone, created again under the same name and UUID
        rename-restart    kept under another name and UUID, created again

Meanwhile the console is drained into its history, so that a guest that talks much does not
wait for a reader.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from chaos import afterlife
from chaos.console import Console
from chaos.create import CREATE_STEPS, Creation
from chaos.destroy import destroy
from chaos.domains import find, shutdown_name
from chaos.signals import held
from xenctypes.errors import StateError

if TYPE_CHECKING:
    from chaos.builder import Builder
    from chaos.domconfig import DomainConfig
    from chaos.invocation import Invocation
    from chaos.registry import Record
    from xenctypes.ctrl import DomainInfo


def stay(call: Invocation, builder: Builder, creation: Creation) -> int:
    """Wait for the domain's end, again and again while it restarts. Ctrl-C destroys it."""
    failures = 0
    uuid = str(creation.uuid)
    if call.names.daemon_runs():
        destroy(call.host, call.names, find(call.host, call.names, uuid))
        raise StateError(
            "chaosd obeys on_poweroff and the like on this host, and two cannot",
            hint="leave --no-daemon out, or -F",
        )
    try:
        while True:
            born = time.monotonic()
            info = _watch(call, creation)
            if info is None or info.dying or call.names.read(uuid) is None:
                _say(call, creation, "destroyed by another command")
                return 0
            action = action_for(call, creation, info)
            if action == "preserve":
                return 0
            config = _take_away(call, creation, info.domid, action)
            if action == "destroy":
                return 0
            if config is None:
                _say(call, creation, "destroyed by another command")
                return 0
            failures = failures + 1 if time.monotonic() - born < afterlife.YOUNG else 0
            time.sleep(afterlife.delay(failures))
            creation = Creation(config, call.host, builder, call.names, creation.uuid)
            try:
                creation.run(CREATE_STEPS)
            finally:
                creation.close()
    except BaseException:  # Ctrl-C among them: what was started here ends here
        with held():
            if call.names.read(uuid) is not None:
                destroy(call.host, call.names, find(call.host, call.names, uuid))
        raise


def _take_away(
    call: Invocation, creation: Creation, domid: int, action: str
) -> DomainConfig | None:
    """Destroy the dead domain, or set it aside: what its successor is made from.

    That is what it had at its very end; None if another command was quicker.
    """
    uuid = str(creation.uuid)
    configs: list[DomainConfig] = []

    def ending(record: Record) -> None:
        configs.append(afterlife.successor(creation.config, record))

    if action == "rename-restart":
        with held():  # half of it would leave a name
            afterlife.set_aside(call.host, call.names, uuid, domid, ending)
    else:
        domain = find(call.host, call.names, uuid)
        destroy(call.host, call.names, domain, wait=True, ending=ending)
    return configs[0] if configs else None


def _watch(call: Invocation, creation: Creation) -> DomainInfo | None:
    """Drain the console until the domain is dead: what the hypervisor says of it then."""
    assert creation.record is not None
    with Console(call.host, call.names, creation.record) as console:
        console.attach(-1, lambda _: None)
    info = call.host.ctrl.domain_info(creation.domid)
    return info if info is not None and info.uuid == creation.uuid.bytes else None


def action_for(call: Invocation, creation: Creation, info: DomainInfo) -> str:
    """What the configuration wants done with a dead domain; says so, with the reason."""
    action, warning = afterlife.action_for(creation.config, info)
    if warning:
        call.warn(warning)
    _say(call, creation, f"{shutdown_name(info)}, {action}")
    return action


def _say(call: Invocation, creation: Creation, what: str) -> None:
    if not call.args.quiet:
        call.print(f"{creation.config.name}, domain {creation.domid}: {what}")
        call.stdout.flush()
