"""A shell: a domain that waits in the pool, and the steps that make a guest of it.

The steps are the part of a create that somebody waits for. For a warm shell they open no file,
ask no store and fork nothing: a symbolic link for the name, one write into an open file for the
record, one page of guest memory, one hypercall.
"""

from __future__ import annotations

import errno
import os
import time
import uuid as uuid_module
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chaos.disk import target_of
from chaos.registry import RUNNING, SHELL, Record
from chaos.steps import EXECUTE, HYPERVISOR, PREPARE, TOOLSTACK, Spent, Step, Timing, spent
from chaos.store import Tenancy
from noxs.abi import PAGE_SIZE
from noxs.page import metadata_capacity, patch_identity, patch_metadata, patch_vif, publish
from xenctypes.errors import PageError, StateError

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from chaos.daemon.flavour import Flavour
    from chaos.daemon.rights import Peer
    from chaos.daemon.workers import Worker
    from chaos.domconfig import DomainConfig
    from chaos.host import Host
    from chaos.registry import Registry
    from chaos.shape import ImageKey, Shape
    from xenctypes.handle import Mapping


class Shell:
    """A domain without a name. Its ``image`` is None while it is generic.

    ``template`` is the device page as the guest has it, ``mapping`` that page in our memory,
    ``port`` our end of the store channel, ``store`` who is to serve a stock guest's XenStore (see
    chaos.store), ``digest`` that of the contents of its image, if it was made for a flavour,
    ``record_fd`` its record file, open for writing, ``pages`` how many its device page has
    beyond the first, ``worker`` the maker that must load a generic shell, ``spent`` its timings as
    a client is shown them.
    """

    __slots__ = (
        "console_frame", "console_port", "digest", "disks", "domid", "flavour", "host", "image",
        "macs", "mapping", "names", "noxs", "pages", "port", "record_fd", "record_size", "shape",
        "spent", "store", "store_frame", "store_port", "template", "timings", "uuid", "worker",
    )  # fmt: skip

    def __init__(
        self, host: Host, names: Registry, uuid: str, shape: Shape, macs: list[bytes], pages: int
    ) -> None:
        self.host = host
        self.names = names
        self.uuid = uuid
        self.shape = shape
        self.macs = macs
        self.pages = pages
        self.image: ImageKey | None = None
        self.worker: Worker | None = None
        self.flavour: Flavour | None = None
        self.digest = b""
        self.disks: list[dict[str, Any]] = []
        self.domid = -1
        self.noxs = False
        self.console_port = self.store_port = self.port = 0
        self.console_frame = self.store_frame = -1
        self.store = ""
        self.template = bytearray()
        self.mapping: Mapping | None = None
        self.record_fd = -1
        self.record_size = 0
        self.timings: list[Timing] = []
        self.spent = Spent([], 0, 0)

    def take_over(self, made: dict[str, Any]) -> None:
        """Hold what a maker made: its channel, its page, its record. Raises ChaosError, OSError."""
        self.domid = made["domid"]
        self.console_port, self.store_port = made["console_port"], made["store_port"]
        self.console_frame, self.store_frame = made["console_frame"], made["store_frame"]
        self.noxs = made["noxs"]
        self.disks = made["disks"]
        self.store = made["store"]
        self.spend([Timing(*timing) for timing in made["timings"]])
        if self.store_frame >= 0 and self.noxs:
            self.template = bytearray(made["page"])
            self.mapping = self.host.memory.map(self.domid, made["page_frames"])
            self.mapping.view[: len(self.template)] = self.template  # whatever was in that memory
            self.port = self.host.evtchn.bind_interdomain(self.domid, self.store_port)
        if self.store:
            self.close_record()  # the maker has replaced the file, to say so
        if self.record_fd < 0:
            path = f"{self.names.path}/domains/{self.uuid}/domain.json"
            self.record_fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            self.record_size = os.fstat(self.record_fd).st_size

    def spend(self, more: Sequence[Timing] = (), *, unawaited: bool = False) -> None:
        """Add to what its making took; ``unawaited``: all of it was work that nobody waited for."""
        self.timings += more
        if unawaited:
            self.timings = [timing._replace(phase=PREPARE) for timing in self.timings]
        self.spent = spent(self.timings)

    def let_go(self) -> None:
        """Close what this process holds of the domain. Idempotent."""
        if self.mapping is not None:
            self.mapping.close()
            self.mapping = None
        if self.port:
            self.host.evtchn.unbind(self.port)
            self.port = 0
        self.close_record()

    def close_record(self) -> None:
        """Close the record file. Idempotent."""
        if self.record_fd >= 0:
            os.close(self.record_fd)
            self.record_fd = -1

    def write_record(self, text: str) -> None:
        """Replace the record in place: one write, which a kill does not tear.

        Raises OSError if there is no room for all of it; a record that is no longer than before
        can be written then. One of more than a page, which Linux writes page by page, looking for
        a fatal signal before each (generic_perform_write, mm/filemap.c), gets a file of its own.
        """
        data = text.encode().ljust(self.record_size)
        if len(data) > PAGE_SIZE and self._replaced_record(text, must=len(data) > self.record_size):
            return
        written = os.pwrite(self.record_fd, data, 0)
        self.record_size = max(written, self.record_size)
        if written < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _replaced_record(self, text: str, *, must: bool) -> bool:
        """Have the record in a new file, if there is room for one; OSError if it ``must`` be."""
        try:
            fd = self.names.replace_record(self.uuid, text)
        except OSError:
            if must:
                raise
            return False
        self.close_record()
        self.record_fd, self.record_size = fd, os.fstat(fd).st_size
        return True


@dataclass(slots=True)
class Delivery:
    """A shell on its way to become the guest that ``config`` asks for.

    ``config_json`` is the configuration as the record keeps it; ``peer`` who asked, ``taken``
    are MAC addresses that Dom0 has itself. ``bare``: its store and devices are not made yet, and
    the record, if it says nothing of a guest that waits, has a daemon that finds it destroy it.
    ``recorded`` is what the registry has of it, ``running`` whether the guest was let go.
    """

    shell: Shell
    config: DomainConfig
    config_json: str
    peer: Peer
    taken: Container[str] = frozenset()
    paused: bool = False
    bare: bool = False
    created: float = field(default_factory=time.time)
    shell_uuid: str = ""
    reserved: list[bytes] = field(default_factory=list)
    given_up: list[bytes] = field(default_factory=list)
    linked: bool = False
    recorded: Record | None = None
    running: bool = False
    timings: list[Timing] = field(default_factory=list)

    @property
    def record(self) -> Record:
        """What the registry keeps of the guest."""
        shell = self.shell
        return Record(
            uuid=shell.uuid,
            name=self.config.name,
            state=RUNNING,
            domid=shell.domid,
            noxs=shell.noxs,
            paused=self.paused and not self.bare,
            console_frame=shell.console_frame,
            console_port=shell.console_port,
            store_frame=shell.store_frame,
            store_port=shell.store_port,
            store=shell.store,
            macs=[mac.hex(":") for mac in shell.macs],
            disks=shell.disks,
            created=self.created,
            owner=self.peer.owner,
        )

    def tenancy(self, host: Host) -> Tenancy:
        """The stock guest's place in its store, for a thread with a host of its own."""
        shell = self.shell
        return Tenancy(
            host,
            shell.store,
            shell.domid,
            shell.uuid,
            self.config,
            tuple(shell.macs),
            shell.store_port,
            shell.store_frame,
            [target_of(disk) for disk in shell.disks],
        )


def _identify(delivery: Delivery) -> None:
    shell, uuid = delivery.shell, delivery.config.uuid
    if uuid is None:
        return
    wanted = str(uuid_module.UUID(bytes=uuid))
    if wanted == shell.uuid:
        return
    shell.names.move_shell(shell.uuid, wanted)
    delivery.shell_uuid, shell.uuid = shell.uuid, wanted
    shell.host.ctrl.domain_sethandle(shell.domid, uuid)
    for mac in shell.macs:
        shell.names.move_mac(mac, delivery.shell_uuid, wanted)


def _unidentify(delivery: Delivery) -> None:
    shell, before = delivery.shell, delivery.shell_uuid
    if before:
        for mac in shell.macs:
            shell.names.move_mac(mac, shell.uuid, before)
        shell.host.ctrl.domain_sethandle(shell.domid, uuid_module.UUID(before).bytes)
        shell.names.move_shell(shell.uuid, before)
        shell.uuid, delivery.shell_uuid = before, ""


def _link(delivery: Delivery) -> None:
    delivery.shell.names.link_name(delivery.config.name, delivery.shell.uuid)
    delivery.linked = True


def _unlink(delivery: Delivery) -> None:
    if delivery.linked:
        delivery.shell.names.unlink_name(delivery.config.name, delivery.shell.uuid)


def _address(delivery: Delivery) -> None:
    shell = delivery.shell
    for index, vif in enumerate(delivery.config.vifs):
        if vif.mac is not None and vif.mac != shell.macs[index]:
            mac = shell.names.reserve_mac(vif.mac, shell.uuid, delivery.taken)
            delivery.reserved.append(mac)
            delivery.given_up.append(shell.macs[index])
            shell.macs[index] = mac
    for mac in delivery.given_up:
        shell.names.release_mac(mac.hex(":"), shell.uuid)


def _unaddress(delivery: Delivery) -> None:
    shell = delivery.shell
    for mac, before in zip(delivery.reserved, delivery.given_up, strict=True):
        shell.names.release_mac(mac.hex(":"), shell.uuid)
        try:
            again = shell.names.reserve_mac(before, shell.uuid)
        except StateError:  # somebody was quicker: any other random address will do
            again = shell.names.reserve_mac(None, shell.uuid)
        shell.macs[shell.macs.index(mac)] = again


def _write_page(delivery: Delivery) -> None:
    shell, config = delivery.shell, delivery.config
    if shell.mapping is None:
        return
    page = bytearray(shell.template)
    patch_identity(page, name=config.name, uuid=uuid_module.UUID(shell.uuid).bytes)
    for index, vif in enumerate(config.vifs):
        four, six = vif.ipv4, vif.ipv6
        patch_vif(
            page,
            index,
            mac=shell.macs[index],
            ipv4=(
                four.ip.packed if four else b"",
                four.network.prefixlen if four else 0,
                vif.gateway4.packed if vif.gateway4 else b"",
            ),
            ipv6=(
                six.ip.packed if six else b"",
                six.network.prefixlen if six else 0,
                vif.gateway6.packed if vif.gateway6 else b"",
            ),
        )
    if config.metadata:
        room = metadata_capacity(page)
        if len(config.metadata) > room:
            raise PageError(f"the shell has room for {room} bytes of metadata")
        patch_metadata(page, config.metadata)
    publish(shell.mapping.view, page)
    shell.template = page


def _record(delivery: Delivery) -> None:
    delivery.recorded = record = delivery.record
    delivery.shell.write_record(record.to_json(delivery.config_json))


def _unrecord(delivery: Delivery) -> None:
    if delivery.recorded is not None:
        shell = delivery.shell
        macs = [mac.hex(":") for mac in shell.macs]
        record = Record(
            shell.uuid,
            "",
            state=SHELL,
            domid=shell.domid,
            macs=macs,
            disks=shell.disks,
            store=shell.store,
        )
        shell.write_record(record.to_json())


def _unpause(delivery: Delivery) -> None:
    delivery.shell.host.ctrl.domain_unpause(delivery.shell.domid)
    delivery.running = True


DELIVERY_STEPS: tuple[Step[Delivery], ...] = (
    Step("identify", EXECUTE, TOOLSTACK, _identify, _unidentify),
    Step("reserve name", EXECUTE, TOOLSTACK, _link, _unlink),
    Step("reserve addresses", EXECUTE, TOOLSTACK, _address, _unaddress),
    Step("write page", EXECUTE, TOOLSTACK, _write_page),
    Step("record", EXECUTE, TOOLSTACK, _record, _unrecord),
    Step("unpause", EXECUTE, HYPERVISOR, _unpause),
)
PAUSED_STEPS, UNPAUSE_STEPS = DELIVERY_STEPS[:-1], DELIVERY_STEPS[-1:]
