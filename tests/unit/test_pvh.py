"""What a PVH domain is made with."""

import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_xenctypes_guest import image, note

from chaos import builder, pvh
from chaos.domconfig import MEMORY_MAX, DomainConfig
from xenctypes.ctrl import Xenctrl
from xenctypes.errors import CallFailed, ImageError, XenError
from xenctypes.guest import DOM_IMAGE, DomBuilder
from xenctypes.public import (
    XC_DOM_HVM_CONTAINER,
    XC_DOM_PV_CONTAINER,
    XEN_DOMCTL_CDF_hap,
    XEN_DOMCTL_CDF_hvm,
)
from xenctypes.structs import e820entry

RAM = 1
PVH_NOTE = note(18, struct.pack("<I", 0x100000))  # PHYS32_ENTRY


@given(mib=st.integers(1, MEMORY_MAX))
def test_the_memory_map_has_all_memory_and_no_overlap(mib: int) -> None:
    ranges = pvh.memory_map(mib)
    assert sum(size for _, size, kind in ranges if kind == RAM) == mib << 20
    ends = [0, *(address + size for address, size, _ in ranges)]
    assert all(end <= address for end, (address, _, _) in zip(ends, ranges, strict=False))
    assert all(size > 0 for _, size, _ in ranges)
    assert ranges[0] == (0, pvh.low_pages(mib) << 12, RAM)
    assert pvh.high_end(mib) in {0, ends[-1]}


def test_a_guest_of_gigabytes_leaves_room_for_the_hole() -> None:
    assert pvh.memory_map(8192)[-1] == (1 << 32, (8192 << 20) - 0xFC000000, RAM)
    assert pvh.high_end(4032) == 0
    assert pvh.high_end(4033) == (1 << 32) + (1 << 20)


def test_which_container_a_host_offers() -> None:
    assert pvh.flags("pv", {"pv"}) == 0
    assert pvh.flags("pvh", {"hvm", "hap", "shadow"}) == XEN_DOMCTL_CDF_hvm | XEN_DOMCTL_CDF_hap
    assert pvh.flags("pvh", {"hvm", "shadow"}) == XEN_DOMCTL_CDF_hvm
    for kind, caps, message in (
        ("pvh", {"pv"}, "no PVH guests.*no hardware virtualisation"),
        ("pvh", {"pv", "hvm"}, "no PVH guests.*paging"),
        ("pv", {"hvm", "hap"}, "no PV guests"),
    ):
        with pytest.raises(XenError, match=message) as caught:
            pvh.flags(kind, caps)
        assert "type = " in caught.value.hint


def test_shadow_page_tables_take_more_memory() -> None:
    config = DomainConfig(name="a", type="pvh", memory=64, maxmem=128, vcpus=2)
    assert pvh.paging_bytes(config, hap=True) == (2 * 256 + 128) * 4096
    assert pvh.paging_bytes(config, hap=False) == (2 * 256 + 2 * 128) * 4096


def hvm(xenctrl: Xenctrl, kernel: bytes) -> DomBuilder:
    build = DomBuilder(xenctrl)
    build.guest_type = builder.GUEST_TYPES["pvh"]
    build.container_type = XC_DOM_HVM_CONTAINER
    build.rambase_init(0)
    build.mem_init(4)
    build.kernel_mem(kernel)
    build.xen_caps = b"xen-3.0-x86_64 hvm-3.0-x86_32"
    return build


def test_libxenguest_takes_an_image_for_the_container() -> None:
    with Xenctrl(dummy=True) as xenctrl:
        build = hvm(xenctrl, image(notes=note(6, b"test\0") + PVH_NOTE))
        build.parse_image()
        assert build.guest_type == builder.GUEST_TYPES["pvh"]
        assert build.p2m(5, 7) == [5, 7]
        build.release()
        build = hvm(xenctrl, image())
        with pytest.raises(CallFailed, match="xc_dom_parse_image"):
            build.parse_image()
        build.release()


def test_tables_and_map_reach_libxenguest() -> None:
    def field(name: str) -> int:
        offset, kind = DOM_IMAGE[name]
        return int(kind.from_address(build.field_address(name, offset)).value)

    with Xenctrl(dummy=True) as xenctrl:
        build = DomBuilder(xenctrl)
        build.acpi(0xFC000000, b"tables\0and more")
        assert field("acpi_modules[0].guest_addr_out") == 0xFC000000
        address, size = field("acpi_modules[0].data"), field("acpi_modules[0].length")
        data = e820entry * 1  # any ctypes type that can look at an address
        assert bytes(data.from_address(address))[:size] == b"tables\0and more"
        build.memory_map([(0, 1 << 20, 1), (0xFC000000, 4096, 3)])
        assert field("e820_entries") == 2
        entries = (e820entry * 2).from_address(field("e820"))
        assert [(e.addr, e.size, e.type) for e in entries] == [
            (0, 1 << 20, 1),
            (0xFC000000, 4096, 3),
        ]
        build.release()


@pytest.mark.parametrize(
    ("notes", "wanted", "message", "hint"),
    [
        (None, "pvh", "not a bootable image: a PV-only kernel", 'type = "pv" boots it'),
        (PVH_NOTE, "pv", "not a bootable image: a PVH-only kernel", 'type = "pvh" boots it'),
    ],
)
def test_an_image_of_the_other_type_is_named(
    notes: bytes | None, wanted: str, message: str, hint: str, tmp_path: Path
) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(image(notes=notes))
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(ImageError, match=message) as caught:
            builder._refuse(fd, wanted)
        assert caught.value.hint == hint
        builder._refuse(fd, "pv" if notes is None else "pvh")  # says nothing: another reason
    finally:
        os.close(fd)


class Built:
    """A built image: what of DomBuilder says where it ends."""

    flags = bootstack_pfn = 0
    container_type = XC_DOM_HVM_CONTAINER

    def __init__(self, end: int, mib: int) -> None:
        self.pfn_alloc_end = end
        self.total_pages = mib << 8
        self.lowmem_end = pvh.low_pages(mib) << 12


@pytest.mark.parametrize(
    ("end", "mib", "enough"),
    [(847, 4, None), (848, 4, 5), (1100, 4, 5), (1104, 4, 6), (1024, 8192, None)],
)
def test_the_image_stays_below_the_toolstack_s_pages(
    end: int, mib: int, enough: int | None
) -> None:
    built: Any = Built(end, mib)
    if enough is None:
        builder._check_reserved(built, 177)
        return
    with pytest.raises(XenError, match="need 708 KiB") as caught:
        builder._check_reserved(built, 177)
    assert caught.value.hint == f"raise memory= to {enough} or more"
    more: Any = Built(end, enough)
    builder._check_reserved(more, 177)


def test_the_toolstack_s_pages_lie_below_the_hole() -> None:
    class Low(Built):
        def p2m(self, *pfns: int) -> list[int]:
            return list(pfns)

    large: Any = Low(0, 8192)
    assert builder.last_frames(large, 2) == [0xFC000 - 2, 0xFC000 - 1]
    small: Any = Low(0, 4)
    assert builder.last_frames(small, 1) == [1023]
    small.container_type = XC_DOM_PV_CONTAINER
    assert builder.last_frames(small, 1) == [1023]
