"""Stores to memory that a guest reads at the same time."""

from __future__ import annotations

import mmap
import os
import time
from struct import Struct, pack_into
from typing import TYPE_CHECKING

import pytest

from chaos.console import INDEXES_AT, OUT_SIZE, ConsoleRing
from noxs import page as device_page
from xenctypes.shared import store_u32

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ONES = 0xFFFFFFFF
SECONDS = 0.3


@pytest.fixture
def shared() -> Iterator[memoryview]:
    with mmap.mmap(-1, 8192) as memory, memoryview(memory) as view:
        yield view


def seen(view: memoryview, at: int, write: Callable[[], None]) -> set[int]:
    """The values that another process reads of the word at ``at`` while this one writes."""
    read, out = os.pipe()
    pid = os.fork()
    if pid == 0:
        values: set[int] = set()
        with view[at : at + 4].cast("I") as words:
            os.write(out, b"!")
            end = time.monotonic() + SECONDS
            while time.monotonic() < end:
                for _ in range(1000):
                    values.add(words[0])
        os.write(out, ",".join(map(str, values)).encode())
        os._exit(0)
    os.close(out)
    assert os.read(read, 1) == b"!"
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        for _ in range(100):
            write()
    os.waitpid(pid, 0)
    text = os.read(read, 65536)
    os.close(read)
    return {int(value) for value in text.split(b",")}


def test_a_store_is_one_store(shared: memoryview) -> None:
    store_u32(shared, 16, ONES)
    assert seen(shared, 16, lambda: store_u32(shared, 16, ONES)) == {ONES}


def test_a_console_ring_s_indexes_never_jump(shared: memoryview) -> None:
    """Else a guest reads input that nobody wrote, and is deaf afterwards."""
    start = 1 << 20
    pack_into("@4I", shared, INDEXES_AT, start, start, start, start + 1)
    ring = ConsoleRing(shared)
    prods = Struct("@I")

    def write() -> None:
        ring.write(b"x" * OUT_SIZE)  # full after the first time: the same is stored again

    assert min(seen(shared, INDEXES_AT + 4, write)) >= start
    assert min(seen(shared, INDEXES_AT + 8, lambda: ring.read() and None)) >= start
    assert prods.unpack_from(shared, INDEXES_AT + 8)[0] == start + 1


def test_a_request_s_number_never_jumps(shared: memoryview) -> None:
    device_page.write_request(shared, ONES, 1)
    at = device_page.REQUEST_OFFSET
    assert seen(shared, at, lambda: device_page.write_request(shared, ONES, 1)) == {ONES}
