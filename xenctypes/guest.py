"""libxenguest: building a domain from an image (xenguest.h, xc_dom_*).

A build goes through these steps in this order::

    boot_xen_init, kernel_file or kernel_mem, [ramdisk_file], parse_image,
    rambase_init, mem_init, boot_mem_init, build_image, boot_image, gnttab_init

That of an HVM container (PVH) sets ``container_type`` before parse_image, the layout of its
memory before boot_mem_init, ``memory_map`` and ``acpi`` before build_image.

The image is somebody else's, and the library reads it with pointers: build in
a process that may crash.
"""

from __future__ import annotations

import os
from ctypes import (
    addressof,
    c_char,
    c_char_p,
    c_int,
    c_uint32,
    c_uint64,
    c_void_p,
    cast,
    create_string_buffer,
    set_errno,
    string_at,
)

from xenctypes.errors import CallFailed
from xenctypes.handle import EINVAL, Handle
from xenctypes.loader import load
from xenctypes.public import INVALID_MFN
from xenctypes.structs import e820entry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from xenctypes.ctrl import Xenctrl
    from xenctypes.releases import Release

EFAULT, ECANCELED = 14, 125

# struct xc_dom_image, as far as we touch it: field, offset, type. The same in
# every release known; 4.22 appends "memflags". XEN_CAPS is an array in it.
DOM_IMAGE_SIZE = 1952
DOM_IMAGE: dict[str, tuple[int, Any]] = {
    "cmdline": (176, c_void_p),
    "guest_type": (208, c_void_p),
    "start_info_pfn": (376, c_uint64),
    "console_pfn": (384, c_uint64),
    "xenstore_pfn": (392, c_uint64),
    "shared_info_pfn": (400, c_uint64),
    "bootstack_pfn": (408, c_uint64),
    "pfn_alloc_end": (416, c_uint64),
    "virt_alloc_end": (424, c_uint64),
    "pv_p2m": (480, c_void_p),
    "p2m_size": (488, c_uint64),
    "rambase_pfn": (496, c_uint64),
    "total_pages": (504, c_uint64),
    "flags": (560, c_uint64),
    "console_evtchn": (568, c_uint32),
    "xenstore_evtchn": (572, c_uint32),
    "console_domid": (576, c_uint32),
    "xenstore_domid": (580, c_uint32),
    "shared_info_mfn": (584, c_uint64),
    "guest_domid": (600, c_uint32),
    "claim_enabled": (604, c_int),
    "xen_version": (608, c_int),
    "xen_caps": (612, c_char * 1024),
    "container_type": (1712, c_int),
    "target_pages": (1720, c_uint64),
    "mmio_start": (1728, c_uint64),
    "mmio_size": (1736, c_uint64),
    "lowmem_end": (1744, c_uint64),
    "highmem_end": (1752, c_uint64),
    "acpi_modules[0].data": (1800, c_void_p),
    "acpi_modules[0].length": (1808, c_uint32),
    "acpi_modules[0].guest_addr_out": (1816, c_uint64),
    "e820": (1920, c_void_p),
    "e820_entries": (1928, c_uint32),
    "max_vcpus": (1944, c_uint32),
}
DOM_IMAGE_MEMFLAGS = (1948, c_uint32)  # since 4.22


def dom_image(release: Release) -> dict[str, tuple[int, Any]]:
    """The fields of struct xc_dom_image of a release: {name: (offset, type)}."""
    return {**DOM_IMAGE, "memflags": DOM_IMAGE_MEMFLAGS} if release.dom_memflags else DOM_IMAGE


# What a step needs: of each tuple one. The library does not check, and crashes.
AFTER: dict[str, tuple[tuple[str, ...], ...]] = {
    "xc_dom_mem_init": (),
    "xc_dom_boot_mem_init": (("xc_dom_boot_xen_init",), ("xc_dom_mem_init",)),
    "xc_dom_build_image": (("xc_dom_parse_image",), ("xc_dom_boot_mem_init",)),
    "xc_dom_boot_image": (("xc_dom_build_image",),),
    "xc_dom_gnttab_init": (("xc_dom_build_image",),),
}


class _Field:
    """A number in struct xc_dom_image."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._offset, self._type = DOM_IMAGE[name]

    def __get__(self, builder: DomBuilder, kind: type | None = None) -> int:
        address = builder.field_address(self._name, self._offset)
        return int(self._type.from_address(address).value or 0)

    def __set__(self, builder: DomBuilder, value: int) -> None:
        address = builder.field_address(self._name, self._offset)
        self._type.from_address(address).value = value


class DomBuilder(Handle):
    """One build of one domain (struct xc_dom_image).

    A step that fails raises CallFailed with what the library said, and ends
    the build: each later step raises ECANCELED, because the library would
    follow pointers that the failed step left wild. For the same reason a step out
    of order is refused with EINVAL; that does not end the build. With ``Xenctrl(dummy=True)``
    the steps that need no domain run on any machine.
    """

    flags = _Field("flags")
    console_evtchn = _Field("console_evtchn")
    xenstore_evtchn = _Field("xenstore_evtchn")
    console_domid = _Field("console_domid")
    xenstore_domid = _Field("xenstore_domid")
    claim_enabled = _Field("claim_enabled")
    container_type = _Field("container_type")
    target_pages = _Field("target_pages")
    mmio_start = _Field("mmio_start")
    mmio_size = _Field("mmio_size")
    lowmem_end = _Field("lowmem_end")
    highmem_end = _Field("highmem_end")
    max_vcpus = _Field("max_vcpus")
    # Results
    start_info_pfn = _Field("start_info_pfn")
    console_pfn = _Field("console_pfn")
    xenstore_pfn = _Field("xenstore_pfn")
    shared_info_pfn = _Field("shared_info_pfn")
    shared_info_mfn = _Field("shared_info_mfn")
    bootstack_pfn = _Field("bootstack_pfn")
    pfn_alloc_end = _Field("pfn_alloc_end")
    virt_alloc_end = _Field("virt_alloc_end")
    total_pages = _Field("total_pages")
    p2m_size = _Field("p2m_size")
    rambase_pfn = _Field("rambase_pfn")
    guest_domid = _Field("guest_domid")
    xen_version = _Field("xen_version")

    def __init__(
        self, xenctrl: Xenctrl, cmdline: bytes | None = None, features: bytes | None = None
    ) -> None:
        self._lib = load("xenguest", xenctrl.release)
        self._xenctrl = xenctrl
        self._failed = ""
        self._done: dict[str, None] = {}
        self._blobs: list[Any] = []  # the library has pointers to them
        super().__init__(
            lambda _: self._lib.xc_dom_allocate(xenctrl.image_raw, cmdline, features),
            self._lib.xc_dom_release,
            owner=xenctrl,
            log=xenctrl.log,
        )

    def release(self) -> None:
        """xc_dom_release: free it all; the domain itself stays. The same as ``close()``."""
        self.close()

    def field_address(self, name: str, offset: int) -> int:
        """Where a field of struct xc_dom_image lies in this process."""
        address = self.raw.value
        assert address is not None, name
        return address + offset

    def _check_step(self, name: str) -> None:
        if self._failed:
            raise CallFailed(name, ECANCELED, f"this build ended when {self._failed} failed")
        self._check_open(name)
        if name in AFTER and name in self._done:
            raise CallFailed(name, EINVAL, "a second time")
        for needed in AFTER.get(name, ()):
            if not any(step in self._done for step in needed):
                raise CallFailed(name, EINVAL, f"needs {' or '.join(needed)} first")

    def _step(self, name: str, *arguments: Any) -> None:
        self._check_step(name)
        # Some failures set no errno and some log nothing: keep old ones out.
        self.log.clear()
        set_errno(0)
        try:
            getattr(self._lib, name)(self._raw, *arguments)
        except BaseException:
            self._failed = name
            raise
        self._done[name] = None

    # Steps, each a C function

    def boot_xen_init(self, domid: int) -> None:
        """Bind the build to an existing domain, and look at the hypervisor."""
        self._step("xc_dom_boot_xen_init", self._xenctrl.raw, domid)

    def kernel_max_size(self, size: int) -> None:
        """The most bytes that the kernel may have, unpacked too. Default 1 GiB."""
        self._step("xc_dom_kernel_max_size", size)

    def kernel_file(self, path: str | bytes | os.PathLike[str]) -> None:
        """Take the kernel from a file; it is unpacked if gzipped."""
        self._step("xc_dom_kernel_file", os.fsencode(path))

    def kernel_mem(self, image: bytes) -> None:
        """Take the kernel from memory; it is unpacked if gzipped."""
        self._blobs.append(image)
        self._step("xc_dom_kernel_mem", image, len(image))

    def ramdisk_max_size(self, size: int) -> None:
        """The most bytes that a module may have, unpacked too. Default 1 GiB."""
        self._step("xc_dom_module_max_size", size)

    def module_file(
        self, path: str | bytes | os.PathLike[str], cmdline: bytes | None = None
    ) -> None:
        """Add a module, such as a ramdisk, from a file."""
        self._step("xc_dom_module_file", os.fsencode(path), cmdline)

    def module_mem(self, module: bytes, cmdline: bytes | None = None) -> None:
        """Add a module, such as a ramdisk, from memory."""
        self._blobs.append(module)
        self._step("xc_dom_module_mem", module, len(module), cmdline)

    def ramdisk_file(self, path: str | bytes | os.PathLike[str]) -> None:
        """Add the ramdisk: the first module."""
        self.module_file(path)

    def parse_image(self) -> None:
        """Find out what the kernel is and where it wants to be."""
        self._step("xc_dom_parse_image")

    def rambase_init(self, base: int = 0) -> None:
        """The physical address at which memory starts: 0 on x86."""
        self._step("xc_dom_rambase_init", base)

    def mem_init(self, mb: int) -> None:
        """The memory of the domain, in MiB.

        Comes after ``parse_image``, or after ``guest_type`` was set to what the
        kernel will be, if memory is to be populated before it is known.
        """
        self._check_step("xc_dom_mem_init")
        if not self.guest_type:
            raise CallFailed("xc_dom_mem_init", EINVAL, "needs guest_type or parse_image first")
        if not 0 < mb < 1 << 24:
            # The library counts pages in 32 bits.
            raise CallFailed("xc_dom_mem_init", EINVAL, f"{mb} MiB")
        self._step("xc_dom_mem_init", mb)

    def boot_mem_init(self) -> None:
        """Populate the domain's memory."""
        self._step("xc_dom_boot_mem_init")

    def build_image(self) -> None:
        """Lay kernel, modules, page tables, start_info and rings out in its memory."""
        self._step("xc_dom_build_image")

    def boot_image(self) -> None:
        """Finish start_info and shared_info, pin page tables, set the first vcpu up."""
        self._step("xc_dom_boot_image")

    def gnttab_init(self) -> None:
        """Grant the console and store pages, in the first two grant entries."""
        self._step("xc_dom_gnttab_init")

    # What the image is, after parse_image

    @property
    def guest_type(self) -> bytes:
        """Like b"xen-3.0-x86_64"; b"" before ``parse_image``."""
        address = self._address("guest_type")
        return string_at(address) if address else b""

    @guest_type.setter
    def guest_type(self, kind: bytes) -> None:
        self._set_text("guest_type", kind)

    def virt_base(self) -> int:
        """The virtual address that the image is linked to."""
        self._check_parsed("xc_dom_virt_base")
        return int(self._lib.xc_dom_virt_base(self.raw))

    def virt_entry(self) -> int:
        """The virtual address of the image's entry point."""
        self._check_parsed("xc_dom_virt_entry")
        return int(self._lib.xc_dom_virt_entry(self.raw))

    def guest_os(self) -> bytes:
        """The name in the image's XEN_ELFNOTE_GUEST_OS."""
        self._check_parsed("xc_dom_guest_os")
        return bytes(self._lib.xc_dom_guest_os(self.raw) or b"")

    def feature_get(self, number: int) -> bool:
        """Whether the image supports a XENFEAT_* (features.h)."""
        self._check_parsed("xc_dom_feature_get")
        return bool(self._lib.xc_dom_feature_get(self.raw, number))

    def _check_parsed(self, name: str) -> None:
        if self._failed or "xc_dom_parse_image" not in self._done:
            raise CallFailed(name, EINVAL, "no image was parsed")

    @property
    def cmdline(self) -> bytes:
        """The kernel's command line."""
        address = self._address("cmdline")
        return string_at(address) if address else b""

    @cmdline.setter
    def cmdline(self, line: bytes) -> None:
        self._set_text("cmdline", line)

    @property
    def xen_caps(self) -> bytes:
        """The guest types that the hypervisor runs, separated by spaces."""
        offset, kind = DOM_IMAGE["xen_caps"]
        return bytes(kind.from_address(self.field_address("xen_caps", offset)).value)

    @xen_caps.setter
    def xen_caps(self, caps: bytes) -> None:
        offset, kind = DOM_IMAGE["xen_caps"]
        kind.from_address(self.field_address("xen_caps", offset)).value = caps

    @property
    def memflags(self) -> int:
        """XENMEMF_* for populating memory. Always 0 before 4.22."""
        if not self._xenctrl.release.dom_memflags:
            return 0
        offset, kind = DOM_IMAGE_MEMFLAGS
        return int(kind.from_address(self.field_address("memflags", offset)).value)

    # For an HVM container, before build_image

    def memory_map(self, ranges: Sequence[tuple[int, int, int]]) -> None:
        """What start_info tells of the memory: (address, bytes, XEN_HVM_MEMMAP_TYPE_*) each."""
        entries = (e820entry * len(ranges))(*(e820entry(*r) for r in ranges))
        self._point("e820", entries)
        self._put("e820_entries", len(ranges))

    def acpi(self, address: int, tables: bytes) -> None:
        """ACPI tables, to be placed at a physical address without memory: the RSDP first."""
        data = create_string_buffer(tables, len(tables))
        self._point("acpi_modules[0].data", data)
        self._put("acpi_modules[0].length", len(tables))
        self._put("acpi_modules[0].guest_addr_out", address)

    def _point(self, name: str, target: Any) -> None:
        self._blobs.append(target)
        self._put(name, addressof(target))

    def _put(self, name: str, value: int) -> None:
        offset, kind = DOM_IMAGE[name]
        kind.from_address(self.field_address(name, offset)).value = value

    # Frames, after boot_mem_init

    def p2m(self, *pfns: int) -> list[int]:
        """The frames behind pfns of this domain: mfns, and in an HVM container the pfns themselves.

        Raises CallFailed (EFAULT) if there is none. xc_dom_p2m in xenguest.h.
        """
        if self._failed:
            raise CallFailed(
                "xc_dom_p2m", ECANCELED, f"this build ended when {self._failed} failed"
            )
        if self._lib.xc_dom_translated(self.raw):
            return list(pfns)
        table = self._address("pv_p2m")
        end = min(self.total_pages, self.p2m_size)
        found = []
        for pfn in pfns:
            mfn = INVALID_MFN
            if table and 0 <= pfn < end:
                mfn = c_uint64.from_address(table + 8 * pfn).value
            if mfn == INVALID_MFN:
                raise CallFailed("xc_dom_p2m", EFAULT, f"pfn {pfn:#x}")
            found.append(mfn)
        return found

    @property
    def console_mfn(self) -> int:
        """The frame of the console ring, after ``build_image``."""
        return self.p2m(self.console_pfn)[0]

    @property
    def xenstore_mfn(self) -> int:
        """The frame of the store ring, after ``build_image``."""
        return self.p2m(self.xenstore_pfn)[0]

    @property
    def start_info_mfn(self) -> int:
        """The frame of start_info, after ``build_image``."""
        return self.p2m(self.start_info_pfn)[0]

    def _set_text(self, name: str, text: bytes) -> None:
        self._blobs.append(text)
        offset, _ = DOM_IMAGE[name]
        field = c_void_p.from_address(self.field_address(name, offset))
        field.value = cast(c_char_p(text), c_void_p).value

    def _address(self, name: str) -> int | None:
        offset, _ = DOM_IMAGE[name]
        return c_void_p.from_address(self.field_address(name, offset)).value
