"""The device page of one guest, mapped: written from our own copy, read word by word."""

from __future__ import annotations

from typing import TYPE_CHECKING

from noxs.abi import PAGE_SIZE
from noxs.page import encode, read_guest_words, write_request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chaos.host import Host
    from noxs.page import GuestWords, Page


class DevicePage:
    """The pages of a guest's area, first the one that the guest finds by itself.

    ``frames`` are machine frames. Nothing that was written is ever read back: the guest can
    change all of it.
    """

    def __init__(self, host: Host, domid: int, frames: Sequence[int]) -> None:
        self._mapping = host.memory.map(domid, frames)
        self._view = self._mapping.view
        self._size = len(frames) * PAGE_SIZE

    def close(self) -> None:
        """Unmap. Idempotent."""
        self._mapping.close()

    def write(self, page: Page) -> None:
        """Write the whole area, for a guest that does not run yet. Raises PageError."""
        area = encode(page)
        self._view[: len(area)] = area

    def request(self, seq: int, code: int, argument: int = 0) -> None:
        """Write a request; the guest looks at it when its store channel is notified."""
        write_request(self._view, seq, code, argument)

    def words(self) -> GuestWords:
        """What the guest says of itself now: copied once, bounded."""
        return read_guest_words(self._view)
