"""Words of memory that a guest reads while we write them."""

from __future__ import annotations


def store_u32(memory: bytearray | memoryview, at: int, value: int) -> None:
    """Store an aligned u32 at once: whoever reads meanwhile sees the old value or the new one.

    struct.pack_into does not do that: it clears the bytes before it writes them, and a guest
    that sees an index of its ring at 0 takes leave of it.
    """
    memoryview(memory)[at : at + 4].cast("I")[0] = value
