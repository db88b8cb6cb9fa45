"""The bindings on the real hypervisor, in Dom0 of the lab; and that they leak nothing."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from waiting import POLL

from xenctypes import ctrl, pages, public, releases
from xenctypes.call import Xencall
from xenctypes.ctrl import Xenctrl
from xenctypes.devicemodel import DeviceModel
from xenctypes.errors import CallFailed
from xenctypes.evtchn import VIRQ_DOM_EXC, Evtchn
from xenctypes.foreignmemory import ForeignMemory
from xenctypes.gnttab import Gnttab
from xenctypes.guest import DomBuilder
from xenctypes.handle import PROT_READ, PROT_WRITE

pytestmark = pytest.mark.every_release

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ESRCH, EEXIST, EINVAL, ENOENT = 3, 17, 22, 2
HELLO = Path("guests/build/hello.elf")
PAGE = public.XC_PAGE_SIZE


class Host:
    """Domains to play with, destroyed in the end, and what the host holds."""

    def __init__(self) -> None:
        self.xenctrl = Xenctrl()
        self.domids: list[int] = []

    def domain(self, pages: int = 0, **options: Any) -> int:
        arguments: dict[str, Any] = {
            "uuid": os.urandom(16),
            "max_vcpus": 1,
            "max_evtchn_port": 127,
            "max_grant_frames": 4,
            "max_maptrack_frames": 0,
        }
        domid = self.xenctrl.domain_create(**arguments | options)
        self.domids.append(domid)
        if pages:
            self.xenctrl.domain_setmaxmem(domid, pages * 4 + 1024)
        return domid

    def destroy(self, domid: int) -> None:
        self.domids.remove(domid)
        self.xenctrl.domain_destroy(domid)

    def close(self) -> None:
        for domid in self.domids:
            self.xenctrl.domain_destroy(domid)
        self.xenctrl.close()

    def footprint(self) -> dict[str, int]:
        gc.collect()  # what an earlier test dropped is not to be closed between two countings
        return {
            "domains": len(self.xenctrl.domain_list()),
            "free pages": self.xenctrl.physinfo().free_pages,
            "event channels of Dom0": self.xenctrl.count_evtchns(0),
            "descriptors": len(os.listdir("/proc/self/fd")),
            "mappings": len(re.findall(r"privcmd|gntdev", Path("/proc/self/maps").read_text())),
        }


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    try:
        yield host
    finally:
        host.close()


# Xen's own allocator and Dom0's maptrack table grow by a page now and then.
SLACK = 4


def settled(host: Host, before: dict[str, int]) -> None:
    """Xen frees a domain's last pages after a grace period, so wait for the balance."""
    deadline = time.monotonic() + 30
    while True:
        after = host.footprint()
        lost = before["free pages"] - after["free pages"]
        if after | {"free pages": 0} == before | {"free pages": 0} and lost <= SLACK:
            return
        assert time.monotonic() < deadline, f"{before} became {after}"
        time.sleep(POLL)


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    with contextlib.closing(Host()) as watcher:
        before = watcher.footprint()
        yield
        settled(watcher, before)


@pytest.fixture
def memory(host: Host) -> Iterator[ForeignMemory]:
    with ForeignMemory() as memory:
        yield memory


# Domains


def test_a_domain_from_creation_to_destruction(host: Host) -> None:
    xenctrl = host.xenctrl
    uuid = os.urandom(16)
    domid = host.domain(uuid=uuid)
    info = xenctrl.domain_info(domid)
    assert info is not None
    assert (info.domid, info.uuid, info.paused, info.tot_pages) == (domid, uuid, True, 0)
    assert (info.max_vcpu_id, info.nr_online_vcpus) == (None, 0)
    assert (info.dying, info.shutdown, info.hvm) == (False, False, False)
    assert domid in {other.domid for other in xenctrl.domain_list()}
    host.destroy(domid)
    assert xenctrl.domain_info(domid) is None


def test_dom0_is_in_the_list(host: Host) -> None:
    dom0 = host.xenctrl.domain_list()[0]
    assert dom0.domid == 0
    assert dom0.running
    assert dom0.cpu_time > 0
    assert dom0.tot_pages > 10000


def test_properties(host: Host) -> None:
    xenctrl = host.xenctrl
    domid = host.domain(max_vcpus=2)
    xenctrl.domain_max_vcpus(domid, 2)
    xenctrl.domain_setmaxmem(domid, 8192)
    xenctrl.domain_sethandle(domid, bytes(range(16)))
    xenctrl.domain_set_tsc_info(domid)
    xenctrl.domain_set_time_offset(domid, 3600)
    xenctrl.domain_set_memmap_limit(domid, 8192)
    xenctrl.cpuid_apply_policy(domid)
    info = xenctrl.domain_info(domid)
    assert info is not None
    assert (info.max_vcpu_id, info.max_pages) == (1, 2048)
    assert info.uuid == bytes(range(16))
    assert xenctrl.domain_get_guest_width(domid) == 8
    assert xenctrl.vcpu_getinfo(domid, 1).vcpu == 1


def test_a_chosen_domid(host: Host) -> None:
    assert host.domain(domid=4321) == 4321
    with pytest.raises(CallFailed) as caught:
        host.domain(domid=4321)
    assert (caught.value.function, caught.value.errno) == ("xc_domain_create", EEXIST)


def test_a_domain_that_is_not_there(host: Host) -> None:
    xenctrl = host.xenctrl
    calls: tuple[Callable[[int], object], ...] = (
        xenctrl.domain_destroy,
        xenctrl.domain_pause,
        xenctrl.domain_unpause,
        xenctrl.count_evtchns,
        xenctrl.get_tot_pages,
        lambda domid: xenctrl.domain_shutdown(domid, public.SHUTDOWN_poweroff),
        lambda domid: xenctrl.domain_setmaxmem(domid, 4096),
        lambda domid: xenctrl.evtchn_alloc_unbound(domid, 0),
        lambda domid: xenctrl.vcpu_setaffinity(domid, 0, {0}),
    )
    for call in calls:
        with pytest.raises(CallFailed) as caught:
            call(30000)
        assert caught.value.errno == ESRCH, caught.value
    assert xenctrl.domain_info(30000) is None


def test_lists_longer_than_one_hypercall(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    created = [host.domain() for _ in range(9)]
    whole = [info.domid for info in host.xenctrl.domain_list()]
    monkeypatch.setattr(ctrl, "LIST_CHUNK", 2)
    assert [info.domid for info in host.xenctrl.domain_list()] == whole
    assert set(created) <= set(whole)
    assert [info.domid for info in host.xenctrl.domain_list(first=created[-1])] == created[-1:]
    lasting = public.XEN_DOMINF_dying | public.XEN_DOMINF_shutdown | public.XEN_DOMINF_paused
    assert [
        (domid, flags & lasting, uuid) for domid, flags, uuid in host.xenctrl.domain_states()
    ] == [(info.domid, info.flags & lasting, info.uuid) for info in host.xenctrl.domain_list()]


def test_shutdown_tells_the_reason_and_wakes_virq_dom_exc(host: Host) -> None:
    domid = host.domain()
    host.xenctrl.domain_max_vcpus(domid, 1)
    with Evtchn() as evtchn:
        try:
            port = evtchn.bind_virq(VIRQ_DOM_EXC)
        except CallFailed as error:
            if error.errno != EEXIST:
                raise
            pytest.skip("xenstored has this virtual interrupt")
        host.xenctrl.domain_shutdown(domid, public.SHUTDOWN_crash)
        assert evtchn.wait(port, 20)
    info = host.xenctrl.domain_info(domid)
    assert info is not None
    assert info.shutdown
    assert info.shutdown_reason == public.SHUTDOWN_crash


def test_affinity(host: Host) -> None:
    xenctrl = host.xenctrl
    domid = host.domain()
    xenctrl.domain_max_vcpus(domid, 1)
    assert 0 in xenctrl.vcpu_getaffinity(domid, 0)
    assert xenctrl.vcpu_setaffinity(domid, 0, {0}) == {0}
    assert xenctrl.vcpu_getaffinity(domid, 0) == {0}
    for impossible in (set(), {xenctrl.max_cpus()}, {-1}):
        with pytest.raises(CallFailed) as caught:
            xenctrl.vcpu_setaffinity(domid, 0, impossible)
        assert caught.value.errno == EINVAL


# Memory


def test_memory_populated_mapped_and_taken_back(host: Host, memory: ForeignMemory) -> None:
    domid = host.domain(pages=16)
    frames = host.xenctrl.domain_populate_physmap(domid, range(16))
    assert host.xenctrl.get_tot_pages(domid) == 16
    assert len(set(frames)) == 16
    with memory.map(domid, frames) as mapping:
        assert len(mapping) == 16 * PAGE
        mapping.view[PAGE : PAGE + 5] = b"hello"
        mapping.overlay(ctypes.c_uint32, 15 * PAGE).value = 42
    with memory.map(domid, [frames[15], frames[1]], PROT_READ) as mapping:
        assert mapping.overlay(ctypes.c_uint32).value == 42
        assert bytes(mapping.view[PAGE : PAGE + 5]) == b"hello"
    host.xenctrl.domain_decrease_reservation(domid, frames[:4])
    assert host.xenctrl.get_tot_pages(domid) == 12


def test_too_much_memory(host: Host) -> None:
    domid = host.domain(pages=1)
    with pytest.raises(CallFailed, match="xc_domain_populate_physmap_exact"):
        host.xenctrl.domain_populate_physmap(domid, range(4096))


def test_frames_that_cannot_be_mapped_leave_nothing_mapped(
    host: Host, memory: ForeignMemory
) -> None:
    domid = host.domain(pages=4)
    frames = host.xenctrl.domain_populate_physmap(domid, range(4))
    beyond = host.xenctrl.maximum_ram_page() + 1000
    for bad in ([beyond], [*frames, beyond], [beyond, *frames]):
        with pytest.raises(CallFailed, match=f"frame {beyond:#x} of domain {domid}") as caught:
            memory.map(domid, bad)
        assert caught.value.function == "xenforeignmemory_map"
        assert caught.value.errno
    with pytest.raises(CallFailed) as caught:
        memory.map(30000, frames)
    assert caught.value.errno == ESRCH
    with pytest.raises(CallFailed):
        memory.map(domid, [])


def test_closing_the_handle_unmaps(host: Host) -> None:
    domid = host.domain(pages=1)
    frames = host.xenctrl.domain_populate_physmap(domid, [0])
    with ForeignMemory() as memory:
        mapping = memory.map(domid, frames)
        view = mapping.view
    assert mapping.closed
    with pytest.raises(ValueError, match="released"):
        view[0]
    borrowed = ForeignMemory(host.xenctrl)
    other = borrowed.map(domid, frames)
    host.destroy(domid)
    host.xenctrl.close()
    assert borrowed.closed
    assert other.closed
    host.xenctrl = Xenctrl()


def test_a_mapping_of_a_destroyed_domain_keeps_only_its_page(
    host: Host, memory: ForeignMemory
) -> None:
    domid = host.domain(pages=1)
    mapping = memory.map(domid, host.xenctrl.domain_populate_physmap(domid, [0]))
    host.destroy(domid)
    info = host.xenctrl.domain_info(domid)
    assert info is None or info.dying
    mapping.view[0] = 1
    mapping.close()


# Grants


def test_a_granted_page(host: Host, memory: ForeignMemory) -> None:
    domid = host.domain(pages=2)
    frames = host.xenctrl.domain_populate_physmap(domid, range(2))
    size = memory.resource_size(
        domid,
        public.XENMEM_resource_grant_table,
        public.XENMEM_resource_grant_table_id_shared,
    )
    assert size == 4 * PAGE
    with memory.map_resource(
        domid, public.XENMEM_resource_grant_table, public.XENMEM_resource_grant_table_id_shared
    ) as table:
        for index, frame in enumerate(frames):
            entry = table.overlay(
                pages.grant_entry_v1, (8 + index) * ctypes.sizeof(pages.grant_entry_v1)
            )
            entry.domid, entry.frame = 0, frame
            entry.flags = public.GTF_permit_access
        with Gnttab() as gnttab:
            with gnttab.map_grant_refs(domid, [8, 9]) as granted:
                granted.view[PAGE : PAGE + 3] = b"two"
                flags = table.overlay(pages.grant_entry_v1, 8 * 8).flags
                assert flags & public.GTF_writing
            for refs in ([10], [8, 10], [], [5000]):
                with pytest.raises(CallFailed):
                    gnttab.map_grant_refs(domid, refs)
            with gnttab.map_grant_refs(domid, [9], PROT_READ) as granted:
                assert bytes(granted.view[:3]) == b"two"
            forgotten = gnttab.map_grant_refs(domid, [8])
        assert forgotten.closed
        assert not table.overlay(pages.grant_entry_v1, 8 * 8).flags & public.GTF_writing


def test_resources_that_are_not_there(host: Host, memory: ForeignMemory) -> None:
    domid = host.domain()
    for arguments in ((domid, 99, 0), (30000, public.XENMEM_resource_grant_table, 0)):
        with pytest.raises(CallFailed):
            memory.map_resource(*arguments)


# Event channels


def test_events_within_dom0() -> None:
    with Evtchn() as one, Evtchn() as other:
        port = one.bind_unbound_port(0)
        remote = other.bind_interdomain(0, port)
        assert other.wait(remote, 20), "Xen sends one event to a fresh binding"
        assert not other.wait(remote, 0)
        one.notify(port)
        assert other.wait(remote, 20)
        other.notify(remote)
        assert one.wait(port, 20)
        assert not one.wait(port, 0)
        # One at a time: of two that follow closely, the second may come after the first was taken.
        other.notify(remote)
        assert select.select([one.fd], [], [], 20)[0]
        assert one.drain() == [port]
        assert not one.wait(port, 0)


def test_a_wait_keeps_the_events_of_other_ports() -> None:
    with Evtchn() as one, Evtchn() as other:
        ports = [one.bind_unbound_port(0) for _ in range(3)]
        remotes = [other.bind_interdomain(0, port) for port in ports]
        for remote in remotes:
            assert other.wait(remote, 20)
        for port in ports:
            one.notify(port)
        assert other.wait(remotes[2], 20)
        assert other.wait(remotes[0], 20)
        assert other.pending() == remotes[1]
        other.unmask(remotes[1])
        assert other.drain() == []
        # Linux spreads channels over processors: only an event that is there comes before another.
        one.notify(ports[1])
        assert select.select([other.fd], [], [], 20)[0]
        one.notify(ports[0])
        assert other.wait(remotes[0], 20)
        assert other.drain() == [remotes[1]]


def test_a_wait_ends_on_time() -> None:
    with Evtchn() as evtchn:
        port = evtchn.bind_unbound_port(0)
        begin = time.monotonic()
        assert not evtchn.wait(port, 0.3)
        assert 0.3 <= time.monotonic() - begin < 10


def test_channels_of_a_new_domain(host: Host) -> None:
    xenctrl = host.xenctrl
    domid = host.domain()
    assert xenctrl.count_evtchns(domid) == 0
    before = xenctrl.count_evtchns(0)
    ports = [xenctrl.evtchn_alloc_unbound(domid, 0) for _ in range(3)]
    status = xenctrl.evtchn_status(domid, ports[0])
    assert (status.status, status.remote_domid) == (public.EVTCHNSTAT_unbound, 0)
    with Evtchn() as evtchn:
        local = [evtchn.bind_interdomain(domid, port) for port in ports]
        status = xenctrl.evtchn_status(domid, ports[1])
        assert status.status == public.EVTCHNSTAT_interdomain
        assert (status.remote_domid, status.remote_port) == (0, local[1])
        assert xenctrl.count_evtchns(0) == before + 3
        evtchn.unbind(local[0])
        assert xenctrl.count_evtchns(0) == before + 2
        with pytest.raises(CallFailed) as caught:
            evtchn.bind_interdomain(domid, ports[1])
        assert caught.value.errno == EINVAL
        with pytest.raises(CallFailed):
            evtchn.unbind(local[0])
        with pytest.raises(CallFailed):
            evtchn.notify(local[0])
    assert xenctrl.count_evtchns(0) == before
    xenctrl.evtchn_reset(domid)
    assert xenctrl.count_evtchns(domid) == 0


def test_the_last_port_of_a_domain(host: Host) -> None:
    domid = host.domain(max_evtchn_port=15)
    ports = [host.xenctrl.evtchn_alloc_unbound(domid, 0) for _ in range(15)]
    assert ports == list(range(1, 16))
    with pytest.raises(CallFailed, match="xc_evtchn_alloc_unbound"):
        host.xenctrl.evtchn_alloc_unbound(domid, 0)
    assert host.xenctrl.count_evtchns(domid) == 15


# PVH


def test_hvm_parameters(host: Host) -> None:
    xenctrl = host.xenctrl
    if not xenctrl.physinfo().capabilities & public.XEN_SYSCTL_PHYSCAP_hap:
        pytest.skip("no nested paging here")
    domid = host.domain(
        flags=public.XEN_DOMCTL_CDF_hvm | public.XEN_DOMCTL_CDF_hap,
        emulation_flags=public.XEN_X86_EMU_LAPIC,
    )
    xenctrl.set_paging_mempool_size(domid, 1 << 20)
    xenctrl.hvm_param_set(domid, public.HVM_PARAM_STORE_PFN, 0xFEFF)
    assert xenctrl.hvm_param_get(domid, public.HVM_PARAM_STORE_PFN) == 0xFEFF
    info = xenctrl.domain_info(domid)
    assert info is not None
    assert info.hvm
    with pytest.raises(CallFailed):
        xenctrl.hvm_param_get(domid, 9999)
    with DeviceModel() as model:
        model.restrict(domid)
        with pytest.raises(CallFailed):
            model.shutdown(0, public.SHUTDOWN_crash)


# Building


def build(
    xenctrl: Xenctrl, domid: int, kernel: bytes, mb: int, ports: tuple[int, int]
) -> DomBuilder:
    builder = DomBuilder(xenctrl, b"name=built")
    builder.boot_xen_init(domid)
    builder.kernel_mem(kernel)
    builder.parse_image()
    builder.rambase_init()
    builder.mem_init(mb)
    builder.boot_mem_init()
    builder.max_vcpus = 1
    builder.console_evtchn, builder.xenstore_evtchn = ports
    builder.build_image()
    builder.boot_image()
    builder.gnttab_init()
    return builder


@pytest.mark.skipif(not HELLO.exists(), reason="guests are not built: make -C guests")
def test_a_domain_is_built_and_speaks(host: Host, memory: ForeignMemory) -> None:
    xenctrl = host.xenctrl
    domid = host.domain(pages=8 << 8)
    xenctrl.domain_max_vcpus(domid, 1)
    console = xenctrl.evtchn_alloc_unbound(domid, 0)
    store = xenctrl.evtchn_alloc_unbound(domid, 0)
    with (
        build(xenctrl, domid, HELLO.read_bytes(), 8, (console, store)) as builder,
        Evtchn() as evtchn,
    ):
        frames = [builder.start_info_mfn, builder.console_mfn, builder.xenstore_mfn]
        assert builder.p2m(builder.console_pfn) == [frames[1]]
        with pytest.raises(CallFailed):
            builder.p2m(builder.total_pages)
        builder.release()
        with memory.map(domid, frames) as mapping:
            info = mapping.overlay(pages.start_info)
            assert info.magic == b"xen-3.0-x86_64"
            assert info.nr_pages == 8 << 8
            assert info.cmd_line == b"name=built"
            assert (info.console.domU.mfn, info.console.domU.evtchn) == (frames[1], console)
            assert (info.store_mfn, info.store_evtchn) == (frames[2], store)
            port = evtchn.bind_interdomain(domid, console)
            assert evtchn.wait(port, 20)
            ring = mapping.overlay(pages.xencons_interface, PAGE)
            assert ring.out_prod == 0
            xenctrl.domain_unpause(domid)
            while ring.out_prod == 0:
                assert evtchn.wait(port, 30), xenctrl.domain_info(domid)
            assert mapping.view[PAGE + 1024] != 0
        with memory.map_resource(domid, public.XENMEM_resource_grant_table, 0) as table:
            granted = [table.overlay(pages.grant_entry_v1, 8 * index).frame for index in (0, 1)]
            assert granted == frames[1:]


@pytest.mark.skipif(not HELLO.exists(), reason="guests are not built: make -C guests")
def test_a_build_without_enough_memory_fails_and_leaks_nothing(host: Host) -> None:
    domid = host.domain(pages=64)
    host.xenctrl.domain_max_vcpus(domid, 1)
    with pytest.raises(CallFailed, match="xc_dom_boot_mem_init") as caught:
        build(host.xenctrl, domid, HELLO.read_bytes(), 64, (1, 2))
    assert caught.value.detail


# The host


def test_version(host: Host) -> None:
    version = host.xenctrl.xen_version()
    assert (version.major, version.minor) == releases.running().version
    assert str(version).startswith(f"{version.major}.{version.minor}.")
    assert "xen-3.0-x86_64" in version.capabilities.split()
    assert version.pagesize == PAGE
    assert "gcc" in version.compiler
    assert "console=" in version.commandline
    assert version.virt_start > 1 << 63


def test_physinfo(host: Host) -> None:
    info = host.xenctrl.physinfo()
    assert 0 < info.free_pages < info.total_pages
    assert info.nr_cpus >= 1
    assert info.cpu_khz > 1000
    assert "pv" in info.virt_caps()
    assert len(info.hw_cap) == 8
    assert host.xenctrl.max_cpus() >= info.nr_cpus
    assert host.xenctrl.sched_name() in ("credit", "credit2")
    assert host.xenctrl.free_cpus() == 0
    assert host.xenctrl.sharing() == (0, 0)


def test_console_ring(host: Host) -> None:
    host.xenctrl.send_debug_keys("h")
    text = host.xenctrl.readconsolering()
    assert b"Xen version" in text or b"'h' pressed" in text


def test_raw_hypercalls() -> None:
    with Xencall() as xencall:
        major, minor = releases.running().version
        version = xencall.call(public.HYPERVISOR_xen_version, public.XENVER_version, 0)
        assert version == major << 16 | minor
        with xencall.buffer(1024) as buffer:
            assert not any(buffer.view)
            xencall.call(public.HYPERVISOR_xen_version, public.XENVER_capabilities, buffer.address)
            assert bytes(buffer.view).startswith(b"xen-")
        with pytest.raises(CallFailed) as caught:
            xencall.call(public.HYPERVISOR_xen_version, 9999, 0)
        assert caught.value.function == "xencall2"
        with pytest.raises(CallFailed):
            xencall.call(17, 1, 2, 3, 4, 5, 6)
        xencall.buffer(100)  # closed with its handle


# Opening


def test_handles_open_and_close(host: Host) -> None:
    for _ in range(20):
        with Xenctrl(), Evtchn(), ForeignMemory(), Gnttab(), Xencall(), DeviceModel():
            pass
        Xenctrl()  # forgotten, which closes it too
        Evtchn()


def test_without_permission() -> None:
    script = """
import os
from xenctypes.call import Xencall
from xenctypes.ctrl import Xenctrl
from xenctypes.devicemodel import DeviceModel
from xenctypes.errors import PermissionDenied
from xenctypes.evtchn import Evtchn
from xenctypes.foreignmemory import ForeignMemory
from xenctypes.gnttab import Gnttab
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
for kind in (Xencall, Xenctrl, DeviceModel, Evtchn, ForeignMemory, Gnttab):
    try:
        kind()
    except PermissionDenied as error:
        assert error.hint
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    assert all(line.startswith("not allowed to use the hypervisor: ") for line in lines)
    assert done.stderr == ""


def test_no_control_over_a_mapping_without_write(host: Host, memory: ForeignMemory) -> None:
    domid = host.domain(pages=1)
    frames = host.xenctrl.domain_populate_physmap(domid, [0])
    with memory.map(domid, frames, PROT_READ) as mapping, pytest.raises(TypeError):
        mapping.view[0] = 1
    with memory.map(domid, frames, PROT_READ | PROT_WRITE) as mapping:
        mapping.view[0] = 1


def test_a_missing_device_node_is_no_xen() -> None:
    script = """
import os
from xenctypes.errors import NoXen
from xenctypes.evtchn import Evtchn
from xenctypes.loader import load
load("xenevtchn"), load("xentoollog")
os.chroot("/proc/self/fdinfo")
try:
    Evtchn()
except NoXen as error:
    print(error.hint)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "Dom0" in done.stdout


# Leaks that one time would not show


def test_many_domains_leave_nothing(host: Host, memory: ForeignMemory) -> None:
    rounds = 10 * SLACK
    before = host.footprint()
    with Gnttab() as gnttab, Evtchn() as evtchn:
        for _ in range(rounds):
            domid = host.domain(pages=8)
            host.xenctrl.domain_max_vcpus(domid, 1)
            frames = host.xenctrl.domain_populate_physmap(domid, range(8))
            port = host.xenctrl.evtchn_alloc_unbound(domid, 0)
            local = evtchn.bind_interdomain(domid, port)
            with (
                memory.map(domid, frames) as mapping,
                memory.map_resource(domid, public.XENMEM_resource_grant_table, 0) as table,
            ):
                mapping.view[0] = 1
                entry = table.overlay(pages.grant_entry_v1, 8 * 8)
                entry.domid, entry.frame, entry.flags = 0, frames[0], public.GTF_permit_access
                with gnttab.map_grant_refs(domid, [8]) as granted:
                    assert granted.view[0] == 1
            with pytest.raises(CallFailed):
                memory.map(domid, [*frames, 1 << 40])
            evtchn.unbind(local)
            host.destroy(domid)
    settled(host, before)
