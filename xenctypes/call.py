"""libxencall: raw hypercalls (xencall.h).

For what no library function does. A pointer that a hypercall takes must point
into a ``Buffer``, which the kernel keeps in memory.
"""

from __future__ import annotations

from xenctypes.errors import CallFailed
from xenctypes.handle import EINVAL, PROT_READ, PROT_WRITE, Handle, Mapping
from xenctypes.loader import load, open_handle


class Xencall(Handle):
    """A handle to make hypercalls with (/dev/xen/privcmd)."""

    def __init__(self) -> None:
        self._lib = load("xencall")
        super().__init__(
            lambda log: open_handle(self._lib.xencall_open, log.logger, 0),
            self._lib.xencall_close,
        )
        self._calls = tuple(getattr(self._lib, f"xencall{count}") for count in range(6))

    @property
    def fd(self) -> int:
        """The file descriptor of the privcmd device."""
        return int(self._lib.xencall_fd(self.raw))

    def call(self, op: int, *arguments: int) -> int:
        """Make hypercall number ``op`` with up to five arguments, and return its result.

        Raises CallFailed with the hypervisor's error.
        """
        if len(arguments) >= len(self._calls):
            raise CallFailed("xencall", EINVAL, f"{len(arguments)} arguments to hypercall {op}")
        return int(self._calls[len(arguments)](self.raw, op, *arguments))

    def buffer(self, size: int) -> Buffer:
        """``size`` bytes of zeros that a hypercall may read and write."""
        return Buffer(self, size)


class Buffer(Mapping):
    """Memory that is safe to hand to a hypercall: give it ``address``."""

    def __init__(self, xencall: Xencall, size: int) -> None:
        lib = load("xencall")
        if size <= 0:
            raise CallFailed("xencall_alloc_buffer", EINVAL, f"{size} bytes")
        address = lib.xencall_alloc_buffer(xencall.raw, size)
        raw = xencall.raw
        super().__init__(
            xencall,
            address,
            size,
            PROT_READ | PROT_WRITE,
            lambda: lib.xencall_free_buffer(raw, address),
        )
        self.view[:] = bytes(size)
