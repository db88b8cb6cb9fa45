"""libxenctrl: domains, their resources, and the host (xenctrl.h).

Methods carry the C function's name without its ``xc_``. Each raises CallFailed
with that name and errno. A hypercall that names a domain that does not exist
fails with ESRCH.
"""

from __future__ import annotations

import struct
from ctypes import (
    byref,
    c_char,
    c_int,
    c_uint,
    c_uint8,
    c_uint32,
    c_uint64,
    c_ulong,
    create_string_buffer,
    sizeof,
)

from xenctypes import public, structs
from xenctypes.errors import CallFailed
from xenctypes.handle import EINVAL, Handle
from xenctypes.loader import installed, load, open_handle
from xenctypes.record import Record
from xenctypes.releases import running
from xenctypes.signatures import xc_interface
from xenctypes.toollog import XTL_WARN, ToolLog

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Any

    from xenctypes.host import PhysInfo, XenVersion
    from xenctypes.releases import Release

ESRCH, ENODEV = 3, 19
LIST_CHUNK = 1024  # domains for one hypercall: 112 KiB of bounce buffer


def _state_layout() -> struct.Struct:
    """Domid, flags and handle of a struct xen_domctl_getdomaininfo."""
    raw = structs.xen_domctl_getdomaininfo
    before = raw.handle.offset - raw.flags.offset - raw.flags.size
    after = sizeof(raw) - raw.handle.offset - raw.handle.size
    return struct.Struct(f"=H{raw.flags.offset - 2}xI{before}x{raw.handle.size}s{after}x")


STATE = _state_layout()


class DomainInfo(Record):
    """A domain as the hypervisor sees it (xen_domctl_getdomaininfo, domctl.h).

    Pages are of 4 KiB. ``shutdown_reason`` (SHUTDOWN_*) is None unless
    ``shutdown``; ``max_vcpu_id`` is None while the domain has no vcpu;
    ``cpu_time`` is in nanoseconds, over all vcpus; ``shared_info_frame`` is
    the mfn of the shared info page of a PV domain.
    """

    __slots__ = (
        "blocked",
        "cpu_time",
        "cpupool",
        "domid",
        "dying",
        "flags",
        "hvm",
        "max_pages",
        "max_vcpu_id",
        "nr_online_vcpus",
        "outstanding_pages",
        "paused",
        "running",
        "shared_info_frame",
        "shutdown",
        "shutdown_reason",
        "ssidref",
        "tot_pages",
        "uuid",
    )
    domid: int
    uuid: bytes
    flags: int
    dying: bool
    shutdown: bool
    paused: bool
    blocked: bool
    running: bool
    hvm: bool
    shutdown_reason: int | None
    nr_online_vcpus: int
    max_vcpu_id: int | None
    tot_pages: int
    max_pages: int
    outstanding_pages: int
    shared_info_frame: int
    cpu_time: int
    cpupool: int
    ssidref: int

    def __init__(self, raw: Any) -> None:
        """From a ``structs.xen_domctl_getdomaininfo``."""
        self.domid = raw.domain
        self.uuid = bytes(raw.handle)
        self.flags = flags = raw.flags
        self.dying = bool(flags & public.XEN_DOMINF_dying)
        self.shutdown = bool(flags & public.XEN_DOMINF_shutdown)
        self.paused = bool(flags & public.XEN_DOMINF_paused)
        self.blocked = bool(flags & public.XEN_DOMINF_blocked)
        self.running = bool(flags & public.XEN_DOMINF_running)
        self.hvm = bool(flags & public.XEN_DOMINF_hvm_guest)
        self.shutdown_reason = (
            flags >> public.XEN_DOMINF_shutdownshift & public.XEN_DOMINF_shutdownmask
            if self.shutdown
            else None
        )
        self.nr_online_vcpus = raw.nr_online_vcpus
        max_vcpu_id = raw.max_vcpu_id
        self.max_vcpu_id = None if max_vcpu_id == public.XEN_INVALID_MAX_VCPU_ID else max_vcpu_id
        self.tot_pages = raw.tot_pages
        self.max_pages = raw.max_pages
        self.outstanding_pages = raw.outstanding_pages
        self.shared_info_frame = raw.shared_info_frame
        self.cpu_time = raw.cpu_time
        self.cpupool = raw.cpupool
        self.ssidref = raw.ssidref


class EvtchnStatus(Record):
    """One event channel of a domain (evtchn_status, event_channel.h).

    ``status`` is EVTCHNSTAT_*; ``remote_domid`` is set for unbound and
    interdomain channels, ``remote_port`` for interdomain, ``irq`` for pirqs
    and virqs.
    """

    __slots__ = ("irq", "port", "remote_domid", "remote_port", "status", "vcpu")
    port: int
    status: int
    vcpu: int
    remote_domid: int | None
    remote_port: int | None
    irq: int | None


class VcpuInfo(Record):
    """A vcpu (xen_domctl_getvcpuinfo, domctl.h); ``cpu_time`` is in nanoseconds."""

    __slots__ = ("blocked", "cpu", "cpu_time", "online", "running", "vcpu")
    vcpu: int
    online: bool
    blocked: bool
    running: bool
    cpu_time: int
    cpu: int


class Xenctrl(Handle):
    """A handle to the hypervisor's control interface. Not to be used after fork().

    ``dummy=True`` opens none, and lets ``DomBuilder`` look into images on any
    machine; the library is then that of the newest release installed, unless
    ``release`` says another.
    """

    def __init__(
        self,
        *,
        dummy: bool = False,
        release: Release | None = None,
        log_level: int = XTL_WARN,
    ) -> None:
        if release is None:
            release = installed() if dummy else running()
        self.release = release
        self.dummy = dummy
        self._lib = load("xenctrl", release)
        flags = public.XC_OPENFLAG_DUMMY if dummy else 0
        super().__init__(
            lambda log: open_handle(self._lib.xc_interface_open, log.logger, log.logger, flags),
            self._lib.xc_interface_close,
            log=None if log_level == XTL_WARN else ToolLog(log_level),
        )
        self._own_log = True

    @property
    def raw(self) -> xc_interface:
        """The C handle, to make hypercalls with.

        Raises CallFailed: EBADF once closed, ENODEV if a dummy, through which
        the library would follow a null pointer.
        """
        if self.dummy:
            raise CallFailed(type(self).__name__, ENODEV, "opened without a hypervisor")
        return self.image_raw

    @property
    def image_raw(self) -> xc_interface:
        """The C handle, to look into images with; a dummy's will do."""
        raw = super().raw
        assert isinstance(raw, xc_interface)
        return raw

    # Handles that libxenctrl has open anyway; valid as long as this one is.

    def xcall_handle(self) -> Any:
        """Its xencall_handle."""
        return self._lib.xc_interface_xcall_handle(self.raw)

    def fmem_handle(self) -> Any:
        """Its xenforeignmemory_handle: see ``ForeignMemory(xenctrl)``."""
        return self._lib.xc_interface_fmem_handle(self.raw)

    def dmod_handle(self) -> Any:
        """Its xendevicemodel_handle."""
        return self._lib.xc_interface_dmod_handle(self.raw)

    def _guest_lib(self) -> Any:
        # libxenguest is only loaded by those who build domains.
        return load("xenguest", self.release)

    # Domains: life and death

    def domain_create(
        self,
        *,
        uuid: bytes,
        flags: int = 0,
        max_vcpus: int,
        max_evtchn_port: int,
        max_grant_frames: int,
        max_maptrack_frames: int,
        grant_opts: int = 1,
        ssidref: int = 0,
        iommu_opts: int = 0,
        vmtrace_size: int = 0,
        cpupool_id: int = 0,
        emulation_flags: int = 0,
        misc_flags: int = 0,
        domid: int | None = None,
    ) -> int:
        """Create an empty, paused domain and return its domid.

        The fields are those of xen_domctl_createdomain (domctl.h): ``flags``
        XEN_DOMCTL_CDF_*, ``grant_opts`` the highest grant table version,
        ``emulation_flags`` XEN_X86_EMU_*. Negative frame limits mean the
        hypervisor's own. Without ``domid`` Xen chooses; one that is taken
        fails with EEXIST.
        """
        if len(uuid) != 16:
            raise CallFailed("xc_domain_create", EINVAL, f"a handle of {len(uuid)} bytes")
        if domid is not None and not 0 < domid < public.DOMID_FIRST_RESERVED:
            # Out of range means "choose one" to Xen, and 65537 would mean 1.
            raise CallFailed("xc_domain_create", EINVAL, f"no domain can have the domid {domid}")
        config = self.release.createdomain(
            ssidref=ssidref,
            handle=structs.xen_domain_handle_t(*uuid),
            flags=flags,
            iommu_opts=iommu_opts,
            max_vcpus=max_vcpus,
            max_evtchn_port=max_evtchn_port,
            max_grant_frames=max_grant_frames,
            max_maptrack_frames=max_maptrack_frames,
            grant_opts=grant_opts,
            vmtrace_size=vmtrace_size,
            cpupool_id=cpupool_id,
            arch=structs.xen_arch_domainconfig(emulation_flags, misc_flags),
        )
        result = c_uint32(self.release.any_domid if domid is None else domid)
        self._lib.xc_domain_create(self.raw, byref(result), byref(config))
        return result.value

    def domain_destroy(self, domid: int) -> None:
        """Destroy a domain; returns when all its memory is given back."""
        self._lib.xc_domain_destroy(self.raw, domid)

    def domain_pause(self, domid: int) -> None:
        """Pause once more: pauses are counted."""
        self._lib.xc_domain_pause(self.raw, domid)

    def domain_unpause(self, domid: int) -> None:
        """Take one pause back. A new domain has one."""
        self._lib.xc_domain_unpause(self.raw, domid)

    def domain_shutdown(self, domid: int, reason: int) -> None:
        """Stop a domain where it is, with a SHUTDOWN_* reason; it is not asked."""
        self._lib.xc_domain_shutdown(self.raw, domid, reason)

    def domain_resume(self, domid: int, *, fast: bool = True) -> None:
        """Continue a suspended domain; ``fast`` if its kernel cooperates."""
        self._guest_lib().xc_domain_resume(self.raw, domid, fast)

    # Domains: properties

    def domain_max_vcpus(self, domid: int, count: int) -> None:
        """Give the domain its vcpus; ``count`` is what it was created for."""
        self._lib.xc_domain_max_vcpus(self.raw, domid, count)

    def domain_setmaxmem(self, domid: int, kib: int) -> None:
        """The most memory that the domain may have, in KiB."""
        self._lib.xc_domain_setmaxmem(self.raw, domid, kib)

    def domain_set_memmap_limit(self, domid: int, kib: int) -> None:
        """What XENMEM_memory_map tells a PV domain about its size, in KiB."""
        self._lib.xc_domain_set_memmap_limit(self.raw, domid, kib)

    def domain_set_memory_map(self, domid: int, ranges: Sequence[tuple[int, int, int]]) -> None:
        """What XENMEM_memory_map tells a domain: (address, bytes, XEN_HVM_MEMMAP_TYPE_*) each."""
        entries = (structs.e820entry * len(ranges))(*(structs.e820entry(*r) for r in ranges))
        self._lib.xc_domain_set_memory_map(self.raw, domid, byref(entries), len(ranges))

    def domain_sethandle(self, domid: int, uuid: bytes) -> None:
        """Set the 16 bytes that the hypervisor keeps for the toolstack."""
        if len(uuid) != 16:
            raise CallFailed("xc_domain_sethandle", EINVAL, f"a handle of {len(uuid)} bytes")
        self._lib.xc_domain_sethandle(self.raw, domid, uuid)

    def domain_set_time_offset(self, domid: int, seconds: int) -> None:
        """The domain's wall clock, relative to the host's."""
        self._lib.xc_domain_set_time_offset(self.raw, domid, seconds)

    def domain_set_tsc_info(
        self,
        domid: int,
        tsc_mode: int = public.TSC_MODE_DEFAULT,
        elapsed_nsec: int = 0,
        gtsc_khz: int = 0,
        incarnation: int = 0,
    ) -> None:
        """How the domain sees the time stamp counter (TSC_MODE_*)."""
        self._lib.xc_domain_set_tsc_info(
            self.raw, domid, tsc_mode, elapsed_nsec, gtsc_khz, incarnation
        )

    def domain_get_guest_width(self, domid: int) -> int:
        """The width of the domain's addresses, in bytes: 4 or 8."""
        width = c_uint()
        self._lib.xc_domain_get_guest_width(self.raw, domid, byref(width))
        return width.value

    def cpuid_apply_policy(
        self, domid: int, *, pae: bool = True, itsc: bool = False, nested_virt: bool = False
    ) -> None:
        """Set the domain's CPUID policy as libxl does, before it has run.

        libxl calls this for every domain (libxl__cpuid_legacy). A new domain
        has Xen's default policy already. For a PV domain this only adds the
        host's HTT and CMP_LEGACY bits, because without CPUID faulting such a
        domain sees the host's topology, and ``itsc``; the others are for HVM
        and PVH (xc_cpuid_apply_policy in tools/libs/guest/xg_cpuid_x86.c).
        """
        self._guest_lib().xc_cpuid_apply_policy(
            self.raw, domid, False, None, 0, pae, itsc, nested_virt, None, None
        )

    def set_paging_mempool_size(self, domid: int, size: int) -> None:
        """The bytes set aside for the page tables of an HVM or PVH domain."""
        self._lib.xc_set_paging_mempool_size(self.raw, domid, size)

    # Domains: looking

    def domain_list(self, first: int = 0) -> list[DomainInfo]:
        """All domains from domid ``first`` on, in order of domid."""
        return [
            DomainInfo(raw[index]) for raw, count in self._chunks(first) for index in range(count)
        ]

    def domain_states(self) -> list[tuple[int, int, bytes]]:
        """(domid, XEN_DOMINF_* flags, UUID) of all domains, in order of domid.

        For those who look at thousands of domains for the few of which something is new: no
        object is made for each.
        """
        found: list[tuple[int, int, bytes]] = []
        for raw, count in self._chunks(0):
            found += STATE.iter_unpack(memoryview(raw).cast("B")[: count * STATE.size])
        return found

    def _chunks(self, first: int) -> Iterator[tuple[Any, int]]:
        """Arrays of xen_domctl_getdomaininfo, the same one again and again, and their lengths."""
        raw = (structs.xen_domctl_getdomaininfo * LIST_CHUNK)()
        while 0 <= first < public.DOMID_FIRST_RESERVED:
            count = self._lib.xc_domain_getinfolist(self.raw, first, LIST_CHUNK, byref(raw))
            last = raw[count - 1].domain if count else 0
            yield raw, count
            if count < LIST_CHUNK:
                break
            first = last + 1

    def domain_info(self, domid: int) -> DomainInfo | None:
        """One domain, or None if there is none of that domid."""
        if not 0 <= domid < public.DOMID_FIRST_RESERVED:
            return None
        raw = structs.xen_domctl_getdomaininfo()
        # The hypervisor answers with the next domain if this one is missing.
        count = self._lib.xc_domain_getinfolist(self.raw, domid, 1, byref(raw))
        return DomainInfo(raw) if count and raw.domain == domid else None

    def vcpu_getinfo(self, domid: int, vcpu: int) -> VcpuInfo:
        """What a vcpu does."""
        raw = structs.xen_domctl_getvcpuinfo()
        self._lib.xc_vcpu_getinfo(self.raw, domid, vcpu, byref(raw))
        return VcpuInfo(
            vcpu=vcpu,
            online=bool(raw.online),
            blocked=bool(raw.blocked),
            running=bool(raw.running),
            cpu_time=raw.cpu_time,
            cpu=raw.cpu,
        )

    # Vcpus

    def vcpu_setaffinity(self, domid: int, vcpu: int, hard: Iterable[int]) -> set[int]:
        """Let a vcpu run on the physical CPUs ``hard`` only.

        Returns those of them that are online, where it will run. EINVAL if
        there is none.
        """
        bitmap = self._cpumap(hard)
        self._lib.xc_vcpu_setaffinity(
            self.raw, domid, vcpu, byref(bitmap), None, public.XEN_VCPUAFFINITY_HARD
        )
        return _cpus(bitmap)

    def vcpu_getaffinity(self, domid: int, vcpu: int) -> set[int]:
        """The physical CPUs that a vcpu may run on."""
        bitmap = self._cpumap(())
        self._lib.xc_vcpu_getaffinity(
            self.raw, domid, vcpu, byref(bitmap), None, public.XEN_VCPUAFFINITY_HARD
        )
        return _cpus(bitmap)

    def _cpumap(self, cpus: Iterable[int]) -> Any:
        count = self._lib.xc_get_max_cpus(self.raw)
        bitmap = (c_uint8 * ((count + 7) // 8))()
        for cpu in cpus:
            if not 0 <= cpu < count:
                raise CallFailed(
                    "xc_vcpu_setaffinity", EINVAL, f"CPU {cpu}, where there are {count}"
                )
            bitmap[cpu // 8] |= 1 << cpu % 8
        return bitmap

    # Memory

    def domain_populate_physmap(
        self, domid: int, frames: Sequence[int], order: int = 0, mem_flags: int = 0
    ) -> list[int]:
        """Give the domain 2**order pages at each of ``frames`` (pfns).

        Returns the frames again: of a PV domain, the mfns that they became.
        ENOMEM if not all could be had; those that could are then the domain's.
        """
        extents = (c_ulong * len(frames))(*frames)
        self._lib.xc_domain_populate_physmap_exact(
            self.raw, domid, len(frames), order, mem_flags, extents
        )
        return list(extents)

    def domain_decrease_reservation(
        self, domid: int, frames: Sequence[int], order: int = 0
    ) -> None:
        """Take 2**order pages at each of ``frames`` (gfns) from the domain."""
        self._lib.xc_domain_decrease_reservation_exact(
            self.raw, domid, len(frames), order, (c_ulong * len(frames))(*frames)
        )

    def domain_add_to_physmap(self, domid: int, space: int, index: int, gfn: int) -> None:
        """Let a page of the hypervisor's (XENMAPSPACE_*) appear in the domain at ``gfn``."""
        self._lib.xc_domain_add_to_physmap(self.raw, domid, space, index, gfn)

    def domain_claim_pages(self, domid: int, pages: int) -> None:
        """Set pages aside for the domain, to be populated later; 0 lets go of them."""
        self._lib.xc_domain_claim_pages(self.raw, domid, pages)

    def get_tot_pages(self, domid: int) -> int:
        """The pages that the domain has."""
        return int(self._lib.xc_get_tot_pages(self.raw, domid))

    def maximum_ram_page(self) -> int:
        """The highest mfn of the host."""
        frame = c_ulong()
        self._lib.xc_maximum_ram_page(self.raw, byref(frame))
        return frame.value

    def gnttab_seed(
        self,
        domid: int,
        *,
        is_hvm: bool,
        console_gfn: int,
        xenstore_gfn: int,
        console_domid: int = 0,
        xenstore_domid: int = 0,
    ) -> None:
        """Grant the console and store pages, in the first two grant entries.

        From libxenguest; ``DomBuilder.gnttab_init`` does it for its own domain.
        """
        self._guest_lib().xc_dom_gnttab_seed(
            self.raw, domid, is_hvm, console_gfn, xenstore_gfn, console_domid, xenstore_domid
        )

    # Event channels

    def evtchn_alloc_unbound(self, domid: int, remote_domid: int) -> int:
        """A new port of ``domid`` that ``remote_domid`` may bind to."""
        return int(self._lib.xc_evtchn_alloc_unbound(self.raw, domid, remote_domid))

    def evtchn_reset(self, domid: int) -> None:
        """Close all event channels of a domain."""
        self._lib.xc_evtchn_reset(self.raw, domid)

    def evtchn_status(self, domid: int, port: int) -> EvtchnStatus:
        """One port of a domain. EINVAL beyond its last, ESRCH without the domain."""
        if not 0 <= domid <= public.DOMID_SELF:
            raise CallFailed("xc_evtchn_status", ESRCH, f"domain {domid}")
        raw = structs.evtchn_status(dom=domid, port=port)
        self._lib.xc_evtchn_status(self.raw, byref(raw))
        status, remote = raw.status, raw.u.interdomain
        interdomain = status == public.EVTCHNSTAT_interdomain
        return EvtchnStatus(
            port=port,
            status=status,
            vcpu=raw.vcpu,
            remote_domid=(
                remote.dom if interdomain or status == public.EVTCHNSTAT_unbound else None
            ),
            remote_port=remote.port if interdomain else None,
            irq=(
                raw.u.pirq if status in (public.EVTCHNSTAT_pirq, public.EVTCHNSTAT_virq) else None
            ),
        )

    def evtchn_list(self, domid: int) -> list[EvtchnStatus]:
        """All event channels in use by a domain. One hypercall for each port."""
        channels: list[EvtchnStatus] = []
        port = 0
        while True:
            try:
                channel = self.evtchn_status(domid, port)
            except CallFailed as error:
                if error.errno == EINVAL:
                    return channels
                raise
            if channel.status != public.EVTCHNSTAT_closed:
                channels.append(channel)
            port += 1

    def count_evtchns(self, domid: int) -> int:
        """How many event channels a domain has in use: a leak shows here."""
        return len(self.evtchn_list(domid))

    # HVM and PVH

    def hvm_param_set(self, domid: int, param: int, value: int) -> None:
        """Set a HVM_PARAM_* of an HVM or PVH domain."""
        self._lib.xc_hvm_param_set(self.raw, domid, param, value)

    def hvm_param_get(self, domid: int, param: int) -> int:
        """A HVM_PARAM_* of an HVM or PVH domain."""
        value = c_uint64()
        self._lib.xc_hvm_param_get(self.raw, domid, param, byref(value))
        return value.value

    # The host

    def physinfo(self) -> PhysInfo:
        """The host's processors and memory."""
        from xenctypes.host import PhysInfo

        raw = structs.xen_sysctl_physinfo()
        self._lib.xc_physinfo(self.raw, byref(raw))
        return PhysInfo(raw)

    def max_cpus(self) -> int:
        """The most physical CPUs that the hypervisor can have on this host."""
        return int(self._lib.xc_get_max_cpus(self.raw))

    def free_cpus(self) -> int:
        """The physical CPUs in no cpupool, as ``xl info`` counts them."""
        size = (self.max_cpus() + 7) // 8
        address = self._lib.xc_cpupool_freeinfo(self.raw)
        try:
            return len(_cpus((c_uint8 * size).from_address(address)))
        finally:
            load("c").free(address)

    def sharing(self) -> tuple[int, int]:
        """Memory sharing: (pages that it freed, frames that it uses)."""
        return (
            int(self._lib.xc_sharing_freed_pages(self.raw)),
            int(self._lib.xc_sharing_used_frames(self.raw)),
        )

    def sched_id(self) -> int:
        """The scheduler, as XEN_SCHEDULER_*."""
        scheduler = c_int()
        self._lib.xc_sched_id(self.raw, byref(scheduler))
        return scheduler.value

    def sched_name(self) -> str:
        """The scheduler, as ``xl info`` calls it."""
        scheduler = self.sched_id()
        return {
            public.XEN_SCHEDULER_CREDIT: "credit",
            public.XEN_SCHEDULER_CREDIT2: "credit2",
            public.XEN_SCHEDULER_ARINC653: "arinc653",
            public.XEN_SCHEDULER_RTDS: "rtds",
            public.XEN_SCHEDULER_NULL: "null",
        }.get(scheduler, f"unknown ({scheduler})")

    def xen_version(self) -> XenVersion:
        """The hypervisor's release and how it was built and started."""
        from xenctypes.host import XenVersion

        number = self._lib.xc_version(self.raw, public.XENVER_version, None)
        build = structs.xen_compile_info()
        self._lib.xc_version(self.raw, public.XENVER_compile_info, byref(build))
        start = c_uint64()
        self._lib.xc_version(self.raw, public.XENVER_platform_parameters, byref(start))
        return XenVersion(
            major=number >> 16,
            minor=number & 0xFFFF,
            extra=self._version_text(public.XENVER_extraversion, 16),
            compiler=_text(build.compiler),
            compile_by=_text(build.compile_by),
            compile_domain=_text(build.compile_domain),
            compile_date=_text(build.compile_date),
            capabilities=self._version_text(public.XENVER_capabilities, 1024).strip(),
            changeset=self._version_text(public.XENVER_changeset, 64),
            commandline=self._version_text(public.XENVER_commandline, 1024),
            virt_start=start.value,
            pagesize=self._lib.xc_version(self.raw, public.XENVER_pagesize, None),
            build_id=self._build_id(),
        )

    def _version_text(self, which: int, size: int) -> str:
        text = create_string_buffer(size + 1)
        self._lib.xc_version(self.raw, which, byref(text))
        return _text(text.value)

    def _build_id(self) -> str:
        # xen_build_id (version.h): the room that follows it, then the bytes.
        room = 64
        buffer = (c_char * (4 + room))()
        c_uint32.from_buffer(buffer).value = room
        try:
            length = self._lib.xc_version(self.raw, public.XENVER_build_id, byref(buffer))
        except CallFailed:
            return ""  # Xen was built without one.
        return bytes(buffer)[4 : 4 + length].hex()

    def readconsolering(self, *, clear: bool = False) -> bytes:
        """The hypervisor's messages, as ``xl dmesg`` prints them."""
        size = 16384
        while True:
            buffer = create_string_buffer(size)
            length, index = c_uint(size), c_uint32(0)
            self._lib.xc_readconsolering(
                self.raw, byref(buffer), byref(length), clear, 0, byref(index)
            )
            # A full buffer may be all there is, or not; clearing took what it got.
            if length.value < size or clear or size >= 1 << 24:
                return buffer.raw[: length.value]
            size *= 4

    def send_debug_keys(self, keys: str) -> None:
        """Press keys on the hypervisor's console: see ``h`` there."""
        self._lib.xc_send_debug_keys(self.raw, keys.encode("ascii"))


def _cpus(bitmap: Any) -> set[int]:
    return {
        index * 8 + bit for index, byte in enumerate(bitmap) for bit in range(8) if byte >> bit & 1
    }


def _text(raw: bytes) -> str:
    return raw.decode(errors="backslashreplace")
