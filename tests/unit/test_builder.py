"""What a builder process may take, and that libxenguest is stopped by it."""

from __future__ import annotations

import ctypes
import gzip
import os
import resource
import traceback
from typing import TYPE_CHECKING, Any

import pytest

from chaos import builder
from xenctypes.ctrl import Xenctrl
from xenctypes.errors import CallFailed, XenError
from xenctypes.guest import DomBuilder
from xenctypes.public import XC_DOM_PV_CONTAINER

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20


def in_child(what: Callable[[], None]) -> None:
    """Run it where its limits and its allocations are nobody else's."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            what()
            status = 0
        except BaseException:  # noqa: BLE001 - the parent has only the status
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0


def test_memory_is_limited_for_a_while() -> None:
    def take() -> None:
        before = resource.getrlimit(resource.RLIMIT_DATA)
        with builder.memory_limit(64 * MIB):
            taken = bytearray(32 * MIB)
            with pytest.raises(MemoryError):
                bytearray(64 * MIB)
            del taken
        assert resource.getrlimit(resource.RLIMIT_DATA) == before
        bytearray(64 * MIB)

    in_child(take)


def test_a_lower_limit_that_is_there_stays() -> None:
    def take() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (256 * MIB, 256 * MIB))
        with builder.memory_limit(1 << 40):
            assert resource.getrlimit(resource.RLIMIT_DATA) == (256 * MIB, 256 * MIB)

    in_child(take)


def test_maps_of_others_memory_do_not_count() -> None:
    """A guest of many GB is mapped, shared, while its kernel is loaded."""

    def take() -> None:
        import mmap

        with builder.memory_limit(16 * MIB), mmap.mmap(-1, 1 << 30) as pages:
            pages[0] = 1

    in_child(take)


def test_libxenguest_s_allocations_fail_in_the_end() -> None:
    """A kernel that says how large it is is refused by that; the limit is for what is not asked."""
    bomb = gzip.compress(bytes(200 * MIB), 1)

    def load() -> None:
        ctypes.CDLL(None).mallopt(-1, 0)  # M_TRIM_THRESHOLD: what is free counts no more
        with Xenctrl(dummy=True) as ctrl:
            build = DomBuilder(ctrl)
            with builder.memory_limit(64 * MIB), pytest.raises(CallFailed, match="kernel_mem"):
                build.kernel_mem(bomb)
            build.release()
            build = DomBuilder(ctrl)
            with builder.memory_limit(256 * MIB):
                build.kernel_mem(bomb)
            build.release()

    in_child(load)


@pytest.mark.parametrize(
    ("size", "pages", "most"),
    [
        (10_000, 1024, builder.KERNEL_FLOOR),
        (8 * MIB, 1 << 18, builder.KERNEL_MAX),  # Debian's, into 1 GiB
        (8 * MIB, 200 << 8, 200 * MIB),
        (300 * MIB, 1024, 300 * MIB),  # with its symbols
    ],
)
def test_a_kernel_is_hardly_larger_than_its_guest(size: int, pages: int, most: int) -> None:
    assert builder._kernel_max(size, pages) == most


class Built:
    """A built image: what of DomBuilder says where it ends."""

    container_type = XC_DOM_PV_CONTAINER

    def __init__(self, end: int, mib: int) -> None:
        self.bootstack_pfn = end - 1
        self.total_pages = mib << 8
        self.flags = 0


@pytest.mark.parametrize(
    ("end", "enough"), [(847, None), (848, 5), (1024, 5), (1100, 6), (4000, 17)]
)
def test_what_is_too_little_memory_says_what_is_enough(end: int, enough: int | None) -> None:
    built: Any = Built(end, 4)
    if enough is None:
        builder._check_reserved(built, 177)
        return
    with pytest.raises(XenError, match="devices and metadata need 708 KiB") as caught:
        builder._check_reserved(built, 177)
    assert caught.value.hint == f"raise memory= to {enough} or more"
    # A MiB more makes its tables a page longer, at most.
    more: Any = Built(end + enough - 4, enough)
    builder._check_reserved(more, 177)


def test_too_little_for_the_first_mapping_is_no_fault_of_the_image() -> None:
    detail = "count_pgtables: not enough memory for initial mapping (0x3ff > 0x100): Out of memory"
    assert builder.explain(CallFailed("xc_dom_build_image", 0, detail)) == (
        "its first mapping needs 4 MiB",
        "raise memory= to 4 or more",
    )
    detail = "xc_dom_chk_alloc_pages: segment {} too large (0x3ff > 0x2000 - 0x1c00 pages)"
    for segment, what in (("kernel", "its kernel"), ("module0", "its ramdisk"), ("padding", "it")):
        assert builder.explain(CallFailed("xc_dom_build_image", 0, detail.format(segment))) == (
            f"{what} does not fit into its memory",
            "raise memory= to more than 32",
        )
    failed = CallFailed("xc_dom_parse_image", 0, "no loader")
    assert builder.explain(failed) == ("not a bootable image: no loader", "")
