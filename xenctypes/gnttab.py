"""libxengnttab: pages that other domains granted to this one (xengnttab.h)."""

from __future__ import annotations

from ctypes import c_uint32

from xenctypes.errors import CallFailed
from xenctypes.handle import EINVAL, PROT_READ, PROT_WRITE, Handle, Mapping
from xenctypes.loader import load, open_handle
from xenctypes.public import XC_PAGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class Gnttab(Handle):
    """A handle to map grants with (/dev/xen/gntdev)."""

    def __init__(self) -> None:
        self._lib = load("xengnttab")
        super().__init__(
            lambda log: open_handle(self._lib.xengnttab_open, log.logger, 0),
            self._lib.xengnttab_close,
        )

    def map_grant_refs(
        self, domid: int, refs: Sequence[int], prot: int = PROT_READ | PROT_WRITE
    ) -> Mapping:
        """Map the pages behind the grant references of one domain, in order.

        All of them or, with CallFailed, none.
        """
        count = len(refs)
        if not count:
            raise CallFailed("xengnttab_map_domain_grant_refs", EINVAL, "no references given")
        address = self._lib.xengnttab_map_domain_grant_refs(
            self.raw, count, domid, (c_uint32 * count)(*refs), prot
        )
        return Mapping(
            self,
            address,
            count * XC_PAGE_SIZE,
            prot,
            lambda: self._lib.xengnttab_unmap(self._raw, address, count),
        )
