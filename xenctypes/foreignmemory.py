"""libxenforeignmemory: other domains' memory (xenforeignmemory.h)."""

from __future__ import annotations

from ctypes import byref, c_int, c_size_t, c_ulong, c_void_p

from xenctypes.errors import CallFailed
from xenctypes.handle import EINVAL, PROT_READ, PROT_WRITE, Handle, Mapping
from xenctypes.loader import load, open_handle
from xenctypes.public import XC_PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from xenctypes.ctrl import Xenctrl


class ForeignMemory(Handle):
    """A handle to map foreign memory with.

    ``ForeignMemory()`` opens its own. ``ForeignMemory(xenctrl)`` uses the one
    that a Xenctrl has anyway, and is closed with it.
    """

    def __init__(self, xenctrl: Xenctrl | None = None) -> None:
        self._lib = load("xenforeignmemory")
        if xenctrl is not None:
            super().__init__(lambda _: xenctrl.fmem_handle(), None, owner=xenctrl, log=xenctrl.log)
        else:
            super().__init__(
                lambda log: open_handle(self._lib.xenforeignmemory_open, log.logger, 0),
                self._lib.xenforeignmemory_close,
            )

    def map(self, domid: int, frames: Sequence[int], prot: int = PROT_READ | PROT_WRITE) -> Mapping:
        """Map frames of a domain, one after the other.

        ``frames`` are gfns; of a PV domain, mfns. If one of them cannot be
        mapped none is, and CallFailed names the first such frame.
        """
        count = len(frames)
        if not count:
            raise CallFailed("xenforeignmemory_map", EINVAL, "no frames given")
        errors = (c_int * count)()
        function = self._lib.xenforeignmemory_map
        address = function(self.raw, domid, prot, count, (c_ulong * count)(*frames), errors)
        for frame, error in zip(frames, errors, strict=True):
            if error:
                self._lib.xenforeignmemory_unmap(self.raw, address, count)
                self.log.clear()
                raise CallFailed(
                    "xenforeignmemory_map", abs(error), f"frame {frame:#x} of domain {domid}"
                )
        return Mapping(
            self,
            address,
            count * XC_PAGE_SIZE,
            prot,
            lambda: self._lib.xenforeignmemory_unmap(self._raw, address, count),
        )

    def map_resource(
        self,
        domid: int,
        type: int,  # noqa: A002 - its name in xenforeignmemory.h
        id: int,  # noqa: A002 - as above
        frame: int = 0,
        nr: int = 1,
        prot: int = PROT_READ | PROT_WRITE,
    ) -> Mapping:
        """Map ``nr`` frames of a resource (XENMEM_resource_*) from ``frame`` on."""
        address = c_void_p()
        resource = self._lib.xenforeignmemory_map_resource(
            self.raw, domid, type, id, frame, nr, byref(address), prot, 0
        )
        return Mapping(
            self,
            address.value or 0,
            nr * XC_PAGE_SIZE,
            prot,
            lambda: self._lib.xenforeignmemory_unmap_resource(self._raw, resource),
        )

    def resource_size(self, domid: int, type: int, id: int) -> int:  # noqa: A002 - as in C
        """The size in bytes of a resource (XENMEM_resource_*) of a domain; 0 if it has none."""
        size = c_size_t()
        self._lib.xenforeignmemory_resource_size(self.raw, domid, type, id, byref(size))
        return size.value
