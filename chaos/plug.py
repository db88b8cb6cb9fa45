"""Devices that a guest is given while it runs, and that are taken from it again.

::

    attach   locked --> written down --> offered --> set up by xendevd
                             ^              |            |
                             +--- forgotten, taken away <+ it failed

    detach   locked --> guest closes it --> taken out of its store --> driver lets go --> forgotten

What the record says a domain has is taken away at its end, so it says so before there is anything;
and a domain that is created again has it again.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chaos import backend, disk, store, vif
from chaos.configjson import from_dict
from chaos.domains import living, owned
from chaos.registry import RUNNING
from xenctypes.errors import ChaosError, StateError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from chaos.device import Device
    from chaos.domconfig import DomainConfig
    from chaos.host import Host
    from chaos.registry import Entry, Record, Registry


@dataclass
class Change:
    """A stock guest that runs and that nobody else changes or destroys; ``config`` is its own."""

    host: Host
    entry: Entry
    record: Record
    config: DomainConfig

    def keep(
        self, config: DomainConfig, macs: list[str] | None = None, disks: list[Any] | None = None
    ) -> None:
        """Write down what the domain has from now on."""
        record = self.record
        record.config = config.as_dict()
        record.macs = record.macs if macs is None else macs
        record.disks = record.disks if disks is None else disks
        self.entry.write(record)

    def attach(self, offered: Device, wait: Callable[[], None], forget: Callable[[], None]) -> None:
        """Offer a device and ``wait`` until it is set up; else take it away and ``forget`` it.

        Raises BusError, and what ``wait`` raises.
        """
        try:
            store.attach_device(self.host, self.record, offered)
            wait()
        except BaseException as error:
            try:
                self.take(offered.kind, offered.devid)
                forget()
            except ChaosError as failure:
                error.add_note(f"what is left of it goes with the domain: {failure}")
            raise

    def ask(self, kind: str, devid: int) -> bool:
        """Have the guest close a device; False if it does not in time. Raises BusError."""
        return backend.ask_to_close(self.host.bus, self.record.domid, kind, devid)

    def take(self, kind: str, devid: int) -> None:
        """Take a device out of the guest's store, and have the driver let go of it. ChaosError."""
        try:
            store.detach_device(self.host, self.record, kind, devid)
        finally:
            disconnect = vif.disconnect if kind == vif.KIND else disk.disconnect
            disconnect(self.host.bus, self.record.domid, [devid])


@contextmanager
def changing(host: Host, names: Registry, wanted: str) -> Iterator[Change]:
    """Hold a guest whose devices are to change. StateError if they cannot, or not now."""
    domain, record = owned(host, names, wanted)
    if not record.store:
        raise StateError(
            f'domain "{record.name}" has no store, through which it could be given devices',
            hint="noxs guests have those that they are created with",
        )
    living(domain)
    if record.store == store.PRIVATE and not store.serves():
        raise StateError("storesd is not running, and has the guest's store", hint="start it")
    with names.entry(domain.uuid) as entry:
        if not entry.lock(wait=False):
            raise StateError(f'domain "{record.name}" is being changed or destroyed', hint="wait")
        now = names.read(domain.uuid)
        if now is None or now.state != RUNNING:
            raise StateError(f'domain "{record.name}" is gone')
        yield Change(host, entry, now, from_dict(now.config | {"name": now.name}))
