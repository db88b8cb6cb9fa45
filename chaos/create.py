"""The create: a Creation carries one through the steps, CREATE_STEPS lists them.

State of a domain, and who moves it::

             reserve            domain ... channels             load, page
    (name) ----------> building ------------------> shell ------------------> paused
                                                                               | unpause
         ready event, on the store channel                                     v
    ready <------------------------------------------------------------- running
"""

from __future__ import annotations

import time
import uuid as uuid_module
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import TYPE_CHECKING

from chaos import device, disk, image, pvh, registry, store, vif, xenstored
from chaos.devicepage import DevicePage
from chaos.domains import reap
from chaos.domconfig import TSC_MODES
from chaos.signals import held
from chaos.steps import (
    BUS,
    CONFIG,
    DEVICES,
    EXECUTE,
    HYPERVISOR,
    IMAGE,
    PREPARE,
    TOOLSTACK,
    Step,
    Timing,
    perform,
    profile_of,
    roll_back,
    spent,
)
from noxs.abi import STATE_READY
from noxs.page import Page, more_pages
from xenctypes.errors import DeviceError, StateError, XenError
from xenctypes.public import HVM_PARAM_STORE_PFN, XEN_X86_EMU_LAPIC

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from chaos.builder import Builder, Loaded
    from chaos.config import DomainConfig
    from chaos.diskspec import DiskConfig
    from chaos.host import Host
    from chaos.registry import Entry, Record, Registry

MIB_SHIFT = 20
SLACK_KIB = 1024  # above maxmem, as libxl's LIBXL_MAXMEM_CONSTANT


@dataclass
class Creation:
    """One create under way: what was asked, and what the steps have made so far."""

    config: DomainConfig
    host: Host
    builder: Builder
    registry: Registry
    uuid: uuid_module.UUID = field(default_factory=uuid_module.uuid4)
    entry: Entry | None = None
    record: Record | None = None
    kernel: image.OpenImage | None = None
    ramdisk: image.OpenImage | None = None
    info: image.ImageInfo | None = None
    domid: int = -1
    console_port: int = 0  # the guest's end
    store_port: int = 0  # the guest's end
    store_local: int = 0  # Dom0's end, bound in this process
    loaded: Loaded | None = None
    reserved: list[int] = field(default_factory=list)  # frames of our pages at the top of memory
    macs: list[bytes] = field(default_factory=list)
    vifs: list[vif.PreparedVif] = field(default_factory=list)
    connecting: bool = False  # the bus may know of the vifs
    targets: list[disk.Target] = field(default_factory=list)
    disks: list[disk.PreparedDisk] = field(default_factory=list)
    connecting_disks: bool = False  # the bus may know of the disks
    announced: bool = False  # xenstored may know of the domain
    served: str = ""  # who serves its XenStore, see chaos.store
    tenancy: store.Tenancy | None = None
    page: DevicePage | None = None
    ready_ms: float | None = None
    unpaused_ns: int = 0
    timings: list[Timing] = field(default_factory=list)
    metadata_room: int = 0  # bytes, for metadata that comes later
    paused: bool = False  # it is to stay so

    def __post_init__(self) -> None:
        if self.config.uuid is not None:
            self.uuid = uuid_module.UUID(bytes=self.config.uuid)

    @property
    def noxs(self) -> bool:
        """Whether the image says that it speaks noxs."""
        return self.info is not None and self.info.noxs_abi is not None

    @property
    def stock(self) -> bool:
        """Whether the image is known, and says nothing of the kind."""
        return self.info is not None and self.info.noxs_abi is None

    @property
    def more_pages(self) -> int:
        """How many pages the device page needs beyond its first."""
        room = max(len(self.config.metadata), self.metadata_room)
        return more_pages(len(self.config.vifs) + len(self.config.disks), room)

    @property
    def device_pages(self) -> int:
        """How many pages at the top of the guest's memory are its devices': vifs', then disks'."""
        return len(self.config.vifs) * vif.PAGES + len(self.config.disks) * disk.PAGES

    @property
    def reserve(self) -> int:
        """How many pages at the top of the guest's memory are ours: devices', then more_pages."""
        return 0 if self.stock else self.device_pages + self.more_pages

    @property
    def top(self) -> int:
        """The first pfn behind the memory that has our pages at its end."""
        config = self.config
        return pvh.low_pages(config.memory) if config.type == "pvh" else config.memory << 8

    @property
    def page_frames(self) -> list[int]:
        """The frames of the device page's area."""
        assert self.loaded is not None
        return [self.loaded.store_frame, *self.reserved[self.device_pages :]]

    def describe(self) -> Page:
        """What the guest will read of itself."""
        first = self.top - len(self.reserved)
        return Page(
            self.config.name,
            self.domid,
            self.uuid.bytes,
            devices=(
                *(prepared.describe() for prepared in self.vifs),
                *(prepared.describe() for prepared in self.disks),
            ),
            metadata=self.config.metadata,
            first_free_gref=vif.FIRST_GREF + self.device_pages,
            more_pages=tuple(range(self.top - self.more_pages, self.top)),
            reserved=((first, len(self.reserved)),) if self.reserved else (),
        )

    def run(self, steps: Sequence[Step[Creation]] | None = None) -> Creation:
        """Do the steps; on a failure nothing stays behind. Raises StepError."""
        todo = CREATE_STEPS if steps is None else steps
        perform(todo, self, self.timings, subject=f'cannot create "{self.config.name}"')
        return self

    def undo(self) -> list[str]:
        """Take back a create that was done; returns a line for each step that resisted."""
        return roll_back(CREATE_STEPS, self)

    def close(self) -> None:
        """Let go of what only the create itself needed. The domain stays."""
        for opened in (self.kernel, self.ramdisk):
            if opened is not None:
                opened.close()
        if self.store_local:
            self.host.evtchn.unbind(self.store_local)
            self.store_local = 0
        if self.page is not None:
            self.page.close()
            self.page = None
        if self.entry is not None:
            self.entry.close()


def _reserve(creation: Creation) -> None:
    record = registry.Record(
        uuid=str(creation.uuid),
        name=creation.config.name,
        created=time.time(),
        config=creation.config.as_dict(),
    )
    creation.record = record
    with held():
        try:
            creation.entry = creation.registry.reserve(record)
        except StateError:
            # What holds the name may be dead; its record is, if nobody locks it.
            host, names = creation.host, creation.registry
            if not reap(host, names, host.ctrl.domain_list(), []):
                raise
            creation.entry = names.reserve(record)


def _release(creation: Creation) -> None:
    if creation.entry is not None and creation.record is not None:
        # Else a back end or a store still has its pages, and the record is for the reaper.
        held = creation.vifs or creation.disks
        if not held and (creation.tenancy is None or creation.tenancy.gone):
            creation.registry.forget(creation.entry, creation.record)
        creation.entry.close()
        creation.entry = None


def _open_images(creation: Creation) -> None:
    config = creation.config
    creation.kernel = image.open_image(config.kernel)
    # A bzImage is Linux, which does not speak noxs: unpacking it twice would cost seconds.
    creation.info = image.inspect(creation.kernel, payload=False)
    image.check_type(creation.info, config.type, path=config.kernel)
    image.check_abi(creation.info)
    if config.ramdisk:
        creation.ramdisk = image.open_ramdisk(config.ramdisk)


def _close_images(creation: Creation) -> None:
    for opened in (creation.kernel, creation.ramdisk):
        if opened is not None:
            opened.close()
    creation.kernel = creation.ramdisk = None


def _check_vifs(creation: Creation) -> None:
    if creation.stock:
        creation.served = store.service(creation.host)
        store.check(creation.config, creation.served)
    _check_vcpus(creation)
    for config in creation.config.vifs:
        vif.check(config)


def _check_vcpus(creation: Creation) -> None:
    """Who is told when vCPUs beyond the first are wanted is told so through a store."""
    config = creation.config
    if config.maxvcpus == config.vcpus or creation.info is None or creation.served:
        return
    why, hint = "guests that speak noxs bring none online later", "make them the same"
    if creation.stock:
        why, hint = (
            "storesd is not running",
            'start it, or make them the same (Linux: with extra = "maxcpus=N")',
        )
    raise config.error(f"maxvcpus is above vcpus: {why}", "maxvcpus", hint=hint)


def check_disks(
    host: Host, names: Registry, uuid: str, configs: Sequence[DiskConfig]
) -> list[disk.Target]:
    """What is to hold the disks of a domain, none of it another's. Raises DeviceError."""
    targets = [disk.look(config) for config in configs]
    pairs = list(zip(configs, targets, strict=True))
    try:
        disk.check_free(names, uuid, pairs)
    except DeviceError:
        # Whose disk it is may be dead; its record is, if nobody locks it.
        if not reap(host, names, host.ctrl.domain_list(), []):
            raise
        disk.check_free(names, uuid, pairs)
    return targets


def _check_disks(creation: Creation) -> None:
    configs = creation.config.disks
    if not configs:
        return
    creation.targets = check_disks(creation.host, creation.registry, str(creation.uuid), configs)
    assert creation.record is not None
    creation.record.disks = list(map(disk.entry, configs, creation.targets))


def _check_shell(creation: Creation) -> None:
    _check_vifs(creation)
    _check_disks(creation)


def _check_devices(creation: Creation) -> None:
    _check_shell(creation)
    if not creation.config.vifs:
        return
    assert creation.record is not None
    taken = vif.taken_macs(creation.host.bus)
    for config in creation.config.vifs:
        mac = creation.registry.reserve_mac(config.mac, str(creation.uuid), taken)
        creation.macs.append(mac)
        creation.record.macs.append(vif.mac_text(mac))  # the undo of "reserve" gives them back


def _create_domain(creation: Creation) -> None:
    host = creation.host
    flags = pvh.flags(creation.config.type, host.virt_caps)
    grant_version = host.grant_version
    with held():  # a signal must not come between the domain and our knowing of it
        creation.domid = host.ctrl.domain_create(
            uuid=creation.uuid.bytes,
            flags=flags,
            max_vcpus=creation.config.maxvcpus,
            max_evtchn_port=creation.config.max_event_channels,
            max_grant_frames=creation.config.max_grant_frames,
            max_maptrack_frames=creation.config.max_maptrack_frames,
            grant_opts=grant_version,
            emulation_flags=XEN_X86_EMU_LAPIC if creation.config.type == "pvh" else 0,
        )


def _destroy_domain(creation: Creation) -> None:
    if creation.domid >= 0:
        creation.host.ctrl.domain_destroy(creation.domid)
        creation.domid = -1


def _create_vcpus(creation: Creation) -> None:
    ctrl = creation.host.ctrl
    ctrl.domain_max_vcpus(creation.domid, creation.config.maxvcpus)
    ctrl.domain_set_tsc_info(creation.domid, TSC_MODES.index(creation.config.tsc_mode))
    if creation.config.type == "pvh":
        pvh.describe_vcpus(ctrl, creation.domid)
    for vcpu, cpus in enumerate(creation.config.affinity):
        if not cpus.everything:
            wanted = cpus.resolve(creation.host.nr_cpus)
            if not wanted:
                raise creation.config.error(
                    f"vCPU {vcpu} may run on no CPU: this host has {creation.host.nr_cpus}", "cpus"
                )
            ctrl.vcpu_setaffinity(creation.domid, vcpu, wanted)


def _populate(creation: Creation) -> None:
    config = creation.config
    ctrl = creation.host.ctrl
    ctrl.domain_setmaxmem(creation.domid, config.maxmem * 1024 + SLACK_KIB)
    if config.type == "pvh":
        ctrl.domain_set_memory_map(creation.domid, pvh.memory_map(config.memory))
    elif config.maxmem > config.memory:
        ctrl.domain_set_memmap_limit(creation.domid, config.maxmem * 1024 + SLACK_KIB)
    page_tables = 0
    if config.type == "pvh":
        size = pvh.paging_bytes(config, hap="hap" in creation.host.virt_caps)
        page_tables = -(-size >> MIB_SHIFT)
        if ctrl.physinfo().free_pages >> 8 < config.memory + page_tables:
            raise _too_little_memory(creation, page_tables)  # which Xen finds out page by page
        ctrl.set_paging_mempool_size(creation.domid, size)
    try:
        creation.reserved = creation.builder.populate(
            creation.domid, kind=config.type, mib=config.memory, reserved=creation.reserve
        )
    except XenError as error:
        if ctrl.physinfo().free_pages >> 8 < config.memory:
            raise _too_little_memory(creation, page_tables) from error
        raise


def _too_little_memory(creation: Creation, page_tables: int) -> XenError:
    free = creation.host.ctrl.physinfo().free_pages >> 8
    more = f" and {page_tables} for its page tables" if page_tables else ""
    return XenError(
        f"not enough memory: {creation.config.memory} MiB{more} asked for, {free} MiB free",
        hint="destroy a domain, or lower memory=",
    )


def _depopulate(creation: Creation) -> None:
    if creation.domid >= 0 and creation.builder.alive:
        creation.builder.drop(creation.domid)


def _open_channels(creation: Creation) -> None:
    ctrl = creation.host.ctrl
    creation.console_port = ctrl.evtchn_alloc_unbound(creation.domid, 0)
    creation.store_port = ctrl.evtchn_alloc_unbound(creation.domid, 0)


def _bind_store(creation: Creation) -> None:
    if not creation.noxs:
        return
    creation.store_local = creation.host.evtchn.bind_interdomain(
        creation.domid, creation.store_port
    )


def _unbind_store(creation: Creation) -> None:
    if creation.store_local:
        creation.host.evtchn.unbind(creation.store_local)
        creation.store_local = 0


def _write_down(creation: Creation) -> None:
    """Say in the record where the reaper would look for devices, and for a store."""
    record, entry = creation.record, creation.entry
    assert record is not None
    assert entry is not None
    record.domid, record.store = creation.domid, creation.served
    entry.write(record)


def _prepare_vifs(creation: Creation) -> None:
    if not creation.config.vifs or creation.stock:
        return
    _write_down(creation)
    top = creation.top - len(creation.reserved)
    for index, config in enumerate(creation.config.vifs):
        first = index * vif.PAGES
        creation.vifs.append(
            vif.PreparedVif(
                config=config,
                mac=creation.macs[index],
                pfn=top + first,
                frames=tuple(creation.reserved[first : first + vif.PAGES]),
                gref=vif.FIRST_GREF + first,
                port=creation.host.ctrl.evtchn_alloc_unbound(creation.domid, device.DOM0),
            )
        )
    vif.seed(creation.host, creation.domid, creation.vifs)


def _forget_vifs(creation: Creation) -> None:
    if not creation.connecting:
        creation.vifs = []


def _announce_vifs(creation: Creation) -> None:
    if creation.vifs:
        creation.connecting = True
        vif.announce(creation.host.bus, creation.domid, creation.config.name, creation.vifs)


def _connect_vifs(creation: Creation) -> None:
    if creation.vifs:
        creation.vifs = vif.connect(creation.host.bus, creation.domid, creation.vifs)


def _disconnect_vifs(creation: Creation) -> None:
    if creation.connecting:
        devids = [prepared.config.devid for prepared in creation.vifs]
        vif.disconnect(creation.host.bus, creation.domid, devids)
        creation.connecting = False


def _prepare_disks(creation: Creation) -> None:
    if not creation.config.disks or creation.stock:
        return
    _write_down(creation)
    first = len(creation.config.vifs) * vif.PAGES
    top = creation.top - len(creation.reserved)
    pairs = zip(creation.config.disks, creation.targets, strict=True)
    for index, (config, target) in enumerate(pairs, first):
        creation.disks.append(
            disk.PreparedDisk(
                config=config,
                target=target,
                pfn=top + index,
                frame=creation.reserved[index],
                gref=vif.FIRST_GREF + index,
                port=creation.host.ctrl.evtchn_alloc_unbound(creation.domid, device.DOM0),
            )
        )
    disk.seed(creation.host, creation.domid, creation.disks)


def _forget_disks(creation: Creation) -> None:
    if not creation.connecting_disks:
        creation.disks = []


def _announce_disks(creation: Creation) -> None:
    if creation.disks:
        creation.connecting_disks = True
        disk.announce(creation.host.bus, creation.domid, creation.disks)


def _connect_disks(creation: Creation) -> None:
    if creation.disks:
        creation.disks = disk.connect(creation.host.bus, creation.domid, creation.disks)


def _disconnect_disks(creation: Creation) -> None:
    if creation.connecting_disks:
        disk.disconnect_all(creation.host.bus, creation.domid)
        creation.connecting_disks = False


def _load(creation: Creation) -> None:
    assert creation.kernel is not None
    if creation.stock:
        if not creation.served:  # a generic shell's image is known only now
            creation.served = store.service(creation.host)
        if creation.served:
            _write_down(creation)
    _check_vcpus(creation)
    with_store = creation.noxs or bool(creation.served)
    creation.loaded = creation.builder.load(
        creation.domid,
        kernel=creation.kernel.fd,
        ramdisk=None if creation.ramdisk is None else creation.ramdisk.fd,
        cmdline=creation.config.cmdline.encode(),
        vcpus=creation.config.maxvcpus,
        console_port=creation.console_port,
        # A guest that does not speak noxs must not wait for a store that nobody serves.
        store_port=creation.store_port if with_store else 0,
        reserved=len(creation.reserved),
    )
    if creation.config.type == "pvh" and not with_store:
        # Nor look for one: Linux waits for whoever may serve a page that is there.
        creation.host.ctrl.hvm_param_set(creation.domid, HVM_PARAM_STORE_PFN, 0)


def _write_page(creation: Creation) -> None:
    if creation.noxs:
        creation.page = DevicePage(creation.host, creation.domid, creation.page_frames)
        creation.page.write(creation.describe())


def _close_page(creation: Creation) -> None:
    if creation.page is not None:
        creation.page.close()
        creation.page = None


def _open_store(creation: Creation) -> None:
    if creation.served:
        assert creation.loaded is not None
        creation.tenancy = store.Tenancy(
            creation.host,
            creation.served,
            creation.domid,
            str(creation.uuid),
            creation.config,
            creation.macs,
            creation.store_port,
            creation.loaded.store_frame,
            creation.targets,
        )
        store.open_store(creation.tenancy)


def _close_store(creation: Creation) -> None:
    if creation.tenancy is not None:
        store.close_store(creation.tenancy)


def _attach_devices(creation: Creation) -> None:
    if creation.tenancy is not None:
        store.attach_devices(creation.tenancy)


def _detach_devices(creation: Creation) -> None:
    if creation.tenancy is not None:
        store.detach_devices(creation.tenancy)


def _introduce(creation: Creation) -> None:
    if creation.tenancy is not None:
        store.introduce(creation.tenancy)


def _record(creation: Creation) -> None:
    record, entry, loaded = creation.record, creation.entry, creation.loaded
    assert record is not None
    assert entry is not None
    assert loaded is not None
    record.domid = creation.domid
    record.noxs = creation.noxs
    record.console_frame = loaded.console_frame
    record.console_port = creation.console_port
    record.store_frame = loaded.store_frame
    record.store_port = creation.store_port
    record.store = creation.served
    record.paused = creation.paused
    record.state = registry.RUNNING
    entry.write(record)


def _announce(creation: Creation) -> None:
    creation.announced = True
    xenstored.announce(creation.host, creation.domid, creation.config.name)


def _withdraw(creation: Creation) -> None:
    if creation.announced:
        xenstored.withdraw(creation.host, creation.domid)
        creation.announced = False


def _unpause(creation: Creation) -> None:
    creation.host.ctrl.domain_unpause(creation.domid)
    creation.unpaused_ns = perf_counter_ns()


CREATE_STEPS: tuple[Step[Creation], ...] = (
    Step("reserve", EXECUTE, TOOLSTACK, _reserve, _release),
    Step("open image", EXECUTE, CONFIG, _open_images, _close_images),
    Step("check devices", EXECUTE, CONFIG, _check_devices),
    Step("create domain", PREPARE, HYPERVISOR, _create_domain, _destroy_domain),
    Step("create vcpus", PREPARE, HYPERVISOR, _create_vcpus),
    Step("populate", PREPARE, HYPERVISOR, _populate, _depopulate),
    Step("open channels", PREPARE, HYPERVISOR, _open_channels),
    Step("bind channel", PREPARE, HYPERVISOR, _bind_store, _unbind_store),
    Step("prepare vifs", PREPARE, DEVICES, _prepare_vifs, _forget_vifs),
    Step("announce vifs", PREPARE, BUS, _announce_vifs, _disconnect_vifs),
    Step("connect vifs", PREPARE, DEVICES, _connect_vifs),
    Step("prepare disks", PREPARE, DEVICES, _prepare_disks, _forget_disks),
    Step("announce disks", PREPARE, BUS, _announce_disks, _disconnect_disks),
    Step("connect disks", PREPARE, DEVICES, _connect_disks),
    Step("load image", EXECUTE, IMAGE, _load),
    Step("write page", EXECUTE, TOOLSTACK, _write_page, _close_page),
    Step("open store", EXECUTE, BUS, _open_store, _close_store),
    Step("attach devices", EXECUTE, DEVICES, _attach_devices, _detach_devices),
    Step("introduce", EXECUTE, BUS, _introduce),
    Step("record", EXECUTE, TOOLSTACK, _record),
    Step("announce", EXECUTE, BUS, _announce, _withdraw),
    Step("unpause", EXECUTE, HYPERVISOR, _unpause),
)
UNPAUSED_STEPS = CREATE_STEPS[:-1]
SHELL_STEPS: tuple[Step[Creation], ...] = (
    Step("check devices", PREPARE, CONFIG, _check_shell),
    *(step for step in CREATE_STEPS if step.phase == PREPARE and step.name != "bind channel"),
)
"""A shell without an image, made elsewhere than in the process that owns it."""
IMAGE_STEPS: tuple[Step[Creation], ...] = tuple(
    step
    for step in CREATE_STEPS
    if step.name in {"load image", *(step.name for step in store.STEPS)}
)
"""What makes a shell warm: of a stock guest its store and its devices, too.

The device page is written by whoever will own the shell.
"""


def wait_ready(creation: Creation, timeout: float) -> float | None:
    """Wait for the guest's ready event; milliseconds since unpause, None if none came in time.

    The guest must also have set its state word: an event alone could be anything, the first
    is Xen's own. The result is kept in the domain's record. A guest that does not speak noxs
    has no way to say that it is ready.
    """
    if not creation.noxs:
        return None
    deadline = time.monotonic() + timeout
    evtchn = creation.host.evtchn
    while (left := deadline - time.monotonic()) > 0:
        if not evtchn.wait(creation.store_local, left):
            break
        seen = perf_counter_ns()
        if creation.page is not None and creation.page.words().state == STATE_READY:
            creation.ready_ms = (seen - creation.unpaused_ns) / 1e6
            break
    if creation.ready_ms is not None and creation.record and creation.entry:
        creation.record.ready_ms = creation.ready_ms
        creation.entry.write(creation.record)
    return creation.ready_ms


def profile_json(creation: Creation) -> dict[str, Any]:
    """A create's timings as plain values."""
    return profile_of(spent(creation.timings), creation.ready_ms)
