"""Looking into images with libxenguest, which needs no hypervisor for it."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


from xenctypes import ctrl, signatures
from xenctypes.call import Xencall
from xenctypes.ctrl import DomainInfo, Xenctrl
from xenctypes.devicemodel import DeviceModel
from xenctypes.errors import CallFailed, NoXen
from xenctypes.evtchn import Evtchn
from xenctypes.foreignmemory import ForeignMemory
from xenctypes.gnttab import Gnttab
from xenctypes.guest import DomBuilder
from xenctypes.loader import installed
from xenctypes.structs import xen_domctl_getdomaininfo

EINVAL, EFAULT, ECANCELED, EBADF, ENOENT, ENODEV = 22, 14, 125, 9, 2, 19
BASE = 0x100000

needs_no_xen = pytest.mark.skipif(
    os.path.exists("/sys/hypervisor/type"), reason="this machine runs on Xen"
)


def note(kind: int, value: int | bytes) -> bytes:
    """An ELF note of owner Xen (elfnote.h)."""
    if isinstance(value, int):
        value = struct.pack("<Q", value)
    padding = bytes(-len(value) % 4)
    return struct.pack("<III", 4, len(value), kind) + b"Xen\0" + value + padding


def image(*, notes: bytes | None = None, machine: int = 62) -> bytes:
    """The smallest PV kernel: an ELF header, one segment of 8 KiB, and its notes."""
    if notes is None:
        notes = (
            note(6, b"test\0")  # GUEST_OS
            + note(5, b"xen-3.0\0")  # XEN_VERSION
            + note(8, b"generic\0")  # LOADER
            + note(9, b"yes\0")  # PAE_MODE
            + note(3, BASE - BASE)  # VIRT_BASE
            + note(4, 0)  # PADDR_OFFSET
            + note(1, BASE)  # ENTRY
            + note(2, BASE + 0x1000)  # HYPERCALL_PAGE
        )
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01",
        *(2, machine, 1, BASE, 64, 0, 0, 64, 56, 2, 64, 0, 0),
    )
    segments = 4096 + 8192
    load = struct.pack("<IIQQQQQQ", 1, 7, 4096, BASE, BASE, 8192, 8192, 4096)
    noted = struct.pack("<IIQQQQQQ", 4, 4, segments, 0, 0, len(notes), len(notes), 4)
    return (header + load + noted).ljust(4096, b"\0") + bytes(8192) + notes


@pytest.fixture
def xenctrl() -> Iterator[Xenctrl]:
    with Xenctrl(dummy=True) as xenctrl:
        yield xenctrl


@pytest.fixture
def builder(xenctrl: Xenctrl) -> DomBuilder:
    return DomBuilder(xenctrl, b"console=hvc0 quiet", None)


def parse(builder: DomBuilder, kernel: bytes) -> None:
    builder.kernel_mem(kernel)
    builder.xen_caps = b"xen-3.0-x86_64"
    builder.parse_image()


def test_an_image_from_file_to_memory_layout(builder: DomBuilder, tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(image())
    builder.kernel_max_size(1 << 20)
    builder.kernel_file(kernel)
    builder.xen_caps = b"xen-3.0-x86_64"
    builder.parse_image()
    assert builder.guest_type == b"xen-3.0-x86_64"
    assert builder.guest_os() == b"test"
    assert builder.virt_base() == 0
    assert builder.virt_entry() == BASE
    assert not builder.feature_get(0)
    builder.rambase_init(0)
    builder.mem_init(8)
    assert builder.total_pages == 8 << 8
    builder.release()
    assert builder.closed


def test_an_image_from_memory(builder: DomBuilder) -> None:
    parse(builder, image())
    assert builder.guest_os() == b"test"


def test_a_compressed_image(builder: DomBuilder) -> None:
    parse(builder, gzip.compress(image()))
    assert builder.virt_entry() == BASE


def test_modules(builder: DomBuilder, tmp_path: Path) -> None:
    ramdisk = tmp_path / "initrd"
    ramdisk.write_bytes(b"070701")
    builder.kernel_mem(image())
    builder.ramdisk_max_size(1 << 20)
    builder.ramdisk_file(ramdisk)
    builder.module_mem(b"more", b"name=more")


def test_fields(builder: DomBuilder) -> None:
    assert builder.cmdline == b"console=hvc0 quiet"
    assert builder.container_type == 0
    numbers = {
        "console_evtchn": 1,
        "xenstore_evtchn": 2,
        "console_domid": 3,
        "xenstore_domid": 4,
        "max_vcpus": 5,
        "flags": 1 << 40,
        "claim_enabled": 1,
        "mmio_start": 0xF0000000,
    }
    for name, value in numbers.items():
        setattr(builder, name, value)
    for name, value in numbers.items():
        assert getattr(builder, name) == value
    assert builder.guest_type == b""
    builder.guest_type = b"xen-3.0-x86_64"
    assert builder.guest_type == b"xen-3.0-x86_64"
    assert builder.memflags == 0
    builder.cmdline = b"another"
    assert builder.cmdline == b"another"


def test_the_architecture_can_be_set_before_the_kernel(builder: DomBuilder) -> None:
    builder.guest_type = b"xen-3.0-x86_64"
    builder.rambase_init(0)
    builder.mem_init(4)
    parse(builder, image())


def test_an_unknown_architecture(builder: DomBuilder) -> None:
    builder.guest_type = b"xen-3.0-vax"
    with pytest.raises(CallFailed, match=r"xen-3\.0-vax"):
        builder.mem_init(4)


def test_a_file_that_is_not_there(builder: DomBuilder) -> None:
    with pytest.raises(CallFailed) as caught:
        builder.kernel_file("/nonexistent/kernel")
    assert caught.value.errno == ENOENT
    assert caught.value.function == "xc_dom_kernel_file"
    assert "failed to open file '/nonexistent/kernel'" in caught.value.detail


@pytest.mark.parametrize(
    "kernel",
    [
        b"",
        b"MZ" + bytes(600),
        b"\x7fELF",
        image()[:200],
        image(machine=183),
        image(notes=b""),
        image(notes=b"\xff" * 64),
        gzip.compress(b"nothing of use"),
    ],
    ids=["empty", "exe", "magic", "cut", "arm", "no notes", "bad notes", "packed"],
)
def test_what_is_not_an_image(builder: DomBuilder, kernel: bytes) -> None:
    with pytest.raises(CallFailed) as caught:
        parse(builder, kernel)
    assert caught.value.detail
    assert "\n" not in str(caught.value)


def test_a_file_that_is_too_large(builder: DomBuilder, tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(image())
    builder.kernel_max_size(4096)
    with pytest.raises(CallFailed, match=r"maximum|too large"):
        builder.kernel_file(kernel)


def test_what_unpacks_to_too_much(builder: DomBuilder) -> None:
    builder.kernel_max_size(4096)
    with pytest.raises(CallFailed, match="no loader found"):
        parse(builder, gzip.compress(image() + bytes(1 << 20)))


def test_nothing_follows_a_failed_step(builder: DomBuilder) -> None:
    with pytest.raises(CallFailed):
        parse(builder, b"junk")
    for step in (
        builder.parse_image,
        builder.boot_mem_init,
        builder.build_image,
        builder.boot_image,
        builder.gnttab_init,
        lambda: builder.mem_init(8),
        lambda: builder.p2m(0),
    ):
        with pytest.raises(CallFailed, match="this build ended when xc_dom_parse_image") as caught:
            step()
        assert caught.value.errno == ECANCELED
    with pytest.raises(CallFailed):
        builder.virt_entry()
    builder.release()
    builder.release()


def test_nothing_follows_release(builder: DomBuilder) -> None:
    builder.release()
    for step in (builder.parse_image, lambda: builder.flags, lambda: builder.p2m(0)):
        with pytest.raises(CallFailed) as caught:
            step()
        assert caught.value.errno == EBADF


def test_what_is_only_known_after_parsing(builder: DomBuilder) -> None:
    for ask in (builder.guest_os, builder.virt_base, builder.virt_entry):
        with pytest.raises(CallFailed) as caught:
            ask()
        assert caught.value.errno == EINVAL


def test_steps_out_of_order_are_refused_and_forgiven(builder: DomBuilder) -> None:
    steps: tuple[tuple[Callable[[], object], str], ...] = (
        (lambda: builder.mem_init(8), "guest_type or parse_image"),
        (builder.boot_mem_init, "xc_dom_boot_xen_init"),
        (builder.build_image, "xc_dom_parse_image"),
        (builder.boot_image, "xc_dom_build_image"),
        (builder.gnttab_init, "xc_dom_build_image"),
    )
    for step, needed in steps:
        with pytest.raises(CallFailed, match=f"needs {needed} first") as caught:
            step()
        assert caught.value.errno == EINVAL
    parse(builder, image())
    builder.rambase_init(0)
    for mb in (0, -1, 1 << 24, (1 << 32) + 8):
        with pytest.raises(CallFailed, match=f"{mb} MiB"):
            builder.mem_init(mb)
    builder.mem_init(8)
    with pytest.raises(CallFailed, match="a second time"):
        builder.mem_init(8)


def test_a_dummy_makes_no_hypercalls(xenctrl: Xenctrl, builder: DomBuilder) -> None:
    for call in (
        xenctrl.domain_list,
        xenctrl.physinfo,
        xenctrl.fmem_handle,
        lambda: ForeignMemory(xenctrl),
        lambda: xenctrl.domain_destroy(1),
        lambda: builder.boot_xen_init(1),
    ):
        with pytest.raises(CallFailed, match="without a hypervisor") as caught:
            call()
        assert caught.value.errno == ENODEV


def test_p2m_without_memory(builder: DomBuilder) -> None:
    parse(builder, image())
    with pytest.raises(CallFailed) as caught:
        builder.p2m(0)
    assert caught.value.errno == EFAULT


def test_closing_the_interface_releases_its_builders() -> None:
    with Xenctrl(dummy=True) as xenctrl:
        builder = DomBuilder(xenctrl)
    assert builder.closed
    with pytest.raises(CallFailed):
        DomBuilder(xenctrl)


def test_an_error_does_not_carry_the_last_ones_words(xenctrl: Xenctrl) -> None:
    with pytest.raises(CallFailed, match="nonexistent"):
        DomBuilder(xenctrl).kernel_file("/nonexistent/kernel")
    with pytest.raises(CallFailed) as caught:
        parse(DomBuilder(xenctrl), b"junk")
    assert "nonexistent" not in str(caught.value)


# Libraries that need a hypervisor, where there is none


@needs_no_xen
@pytest.mark.parametrize(
    "kind", [Xenctrl, Evtchn, ForeignMemory, Gnttab, Xencall, DeviceModel], ids=lambda k: k.__name__
)
def test_no_xen(kind: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NoXen) as caught:
        kind()
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@needs_no_xen
def test_no_xen_for_a_given_release() -> None:
    with pytest.raises(NoXen, match="xc_interface_open"):
        Xenctrl(release=installed())


# Arguments that never reach the library


@pytest.mark.parametrize("domid", [0, -1, 0x7FF0, 65537])
def test_domids_that_no_domain_can_have(xenctrl: Xenctrl, domid: int) -> None:
    with pytest.raises(CallFailed) as caught:
        xenctrl.domain_create(
            uuid=bytes(16),
            max_vcpus=1,
            max_evtchn_port=127,
            max_grant_frames=4,
            max_maptrack_frames=0,
            domid=domid,
        )
    assert caught.value.errno == EINVAL


def test_handles_are_of_sixteen_bytes(xenctrl: Xenctrl) -> None:
    with pytest.raises(CallFailed, match="15 bytes"):
        xenctrl.domain_sethandle(1, bytes(15))


@pytest.mark.parametrize("domid", [-1, 0x7FF0, 65536, 1 << 40])
def test_there_is_no_domain_out_of_range(xenctrl: Xenctrl, domid: int) -> None:
    assert xenctrl.domain_info(domid) is None


def test_domain_info() -> None:
    raw = xen_domctl_getdomaininfo(
        domain=5, flags=1 << 2 | 1 << 3 | 3 << 16, max_vcpu_id=0xFFFFFFFF, tot_pages=256
    )
    raw.handle[:] = range(16)
    info = DomainInfo(raw)
    assert (info.domid, info.tot_pages, info.uuid) == (5, 256, bytes(range(16)))
    assert info.shutdown
    assert info.paused
    assert (info.dying, info.blocked, info.running, info.hvm) == (False,) * 4
    assert info.shutdown_reason == 3
    assert info.max_vcpu_id is None
    raw.flags = 1 << 4 | 3 << 16
    assert DomainInfo(raw).shutdown_reason is None
    assert DomainInfo(raw).blocked


def test_every_wrapped_function_is_in_a_table() -> None:
    """And each one in a table is used: no dead rows."""
    text = "".join(
        path.read_text(encoding="utf-8")
        for path in Path(ctrl.__file__).parent.glob("*.py")
        if path.name != "signatures.py"
    )
    unused = [
        name
        for table in signatures.SIGNATURES.values()
        for name in table
        if name not in text and not name.startswith("xencall")
    ]
    assert unused == []
