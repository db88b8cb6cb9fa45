"""Who closes what, and in which order; and mappings over our own memory."""

from __future__ import annotations

import ctypes
import gc
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xenctypes.toollog import ToolLog


from xenctypes.errors import CallFailed
from xenctypes.handle import PROT_READ, PROT_WRITE, Handle, Mapping, Resource
from xenctypes.signatures import xenforeignmemory_handle

EBADF, EIO = 9, 5


class Noted(Resource):
    def __init__(
        self, name: str, closed: list[Any], owner: Resource | None = None, error: Any = None
    ) -> None:
        super().__init__(owner)
        self._name, self._closed, self._error = name, closed, error

    def _release(self) -> None:
        self._closed.append(self._name)
        if self._error:
            raise self._error


def opened(closed: list[Any], **options: Any) -> Handle:
    return Handle(lambda _: xenforeignmemory_handle(16), closed.append, **options)


def test_the_newest_is_closed_first_and_each_once() -> None:
    closed: list[Any] = []
    owner = Noted("owner", closed)
    first = Noted("first", closed, owner)
    Noted("second", closed, owner)
    Noted("inner", closed, first)
    with owner:
        pass
    assert closed == ["second", "inner", "first", "owner"]
    owner.close()
    first.close()
    assert len(closed) == 4
    assert owner.closed
    assert first.closed


def test_one_closed_early_is_not_closed_again() -> None:
    closed: list[Any] = []
    owner = Noted("owner", closed)
    Noted("first", closed, owner).close()
    owner.close()
    assert closed == ["first", "owner"]


def test_a_failure_to_close_keeps_nothing_open() -> None:
    closed: list[Any] = []
    owner = Noted("owner", closed, error=CallFailed("last", EIO))
    Noted("first", closed, owner)
    Noted("second", closed, owner, error=CallFailed("munmap", EIO))
    with pytest.raises(CallFailed, match="munmap"):
        owner.close()
    assert closed == ["second", "first", "owner"]
    owner.close()


def test_a_failed_block_closes_all() -> None:
    closed: list[Any] = []

    def work() -> None:
        with Noted("owner", closed) as owner:
            Noted("first", closed, owner)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        work()
    assert closed == ["first", "owner"]


def test_a_closed_handle_is_not_used() -> None:
    closed: list[Any] = []
    handle = opened(closed)
    raw = handle.raw
    assert raw.log is handle.log
    handle.close()
    assert [one.value for one in closed] == [16]
    with pytest.raises(CallFailed) as caught:
        _ = handle.raw
    assert caught.value.errno == EBADF
    with pytest.raises(CallFailed), handle:
        pass


def test_a_handle_that_does_not_open_leaves_nothing() -> None:
    logs = []

    def fails(log: ToolLog) -> xenforeignmemory_handle:
        logs.append(log)
        raise CallFailed("open", EIO)

    with pytest.raises(CallFailed):
        Handle(fails, None)
    assert logs[0]._stream is None


def test_a_forgotten_handle_is_closed_but_its_mapping_stays() -> None:
    closed: list[Any] = []
    unmapped: list[int] = []
    memory = ctypes.create_string_buffer(b"still there", 4096)
    handle = opened(closed)
    mapping = Mapping(handle, ctypes.addressof(memory), 4096, PROT_READ, lambda: unmapped.append(1))
    view = mapping.view
    del handle, mapping
    gc.collect()
    assert len(closed) == 1
    assert not unmapped
    assert bytes(view[:11]) == b"still there"


@pytest.fixture
def memory() -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(bytes(range(256)) * 16, 4096)


@pytest.fixture
def mapping(memory: Any) -> Iterator[Mapping]:
    owner = Noted("owner", [])
    with Mapping(
        owner, ctypes.addressof(memory), 4096, PROT_READ | PROT_WRITE, lambda: None
    ) as mapping:
        yield mapping


def test_view_reads_and_writes_the_memory(memory: Any, mapping: Mapping) -> None:
    assert len(mapping) == len(mapping.view) == 4096
    assert mapping.view[255] == 255
    mapping.view[0:4] = b"abcd"
    assert memory.raw[:4] == b"abcd"
    mapping.view.cast("I")[1] = 0x01020304
    assert memory.raw[4:8] == bytes([4, 3, 2, 1])


def test_a_mapping_without_write_is_read_only(memory: Any) -> None:
    mapping = Mapping(Noted("owner", []), ctypes.addressof(memory), 4096, PROT_READ, lambda: None)
    with pytest.raises(TypeError):
        mapping.view[0] = 1


def test_overlay_stays_inside(mapping: Mapping) -> None:
    mapping.overlay(ctypes.c_uint32, 4092).value = 7
    assert mapping.view[4092] == 7
    for offset in (4093, 4096, -1):
        with pytest.raises(CallFailed):
            mapping.overlay(ctypes.c_uint32, offset)


def test_a_view_does_not_survive_close(memory: Any) -> None:
    unmapped = []
    mapping = Mapping(
        Noted("owner", []),
        ctypes.addressof(memory),
        4096,
        PROT_READ,
        lambda: unmapped.append(1),
    )
    view = mapping.view
    mapping.close()
    with pytest.raises(ValueError, match="released"):
        view[0]
    with pytest.raises(CallFailed):
        _ = mapping.view
    with pytest.raises(CallFailed):
        mapping.overlay(ctypes.c_uint32)
    assert unmapped == [1]


def test_a_view_that_is_held_does_not_keep_pages(memory: Any) -> None:
    unmapped = []
    mapping = Mapping(
        Noted("owner", []),
        ctypes.addressof(memory),
        4096,
        PROT_READ | PROT_WRITE,
        lambda: unmapped.append(1),
    )
    held = ctypes.c_char.from_buffer(mapping.view)
    mapping.close()
    assert unmapped == [1]
    del held


def test_what_is_forgotten_twice_is_released_once() -> None:
    """The collector takes a cycle of owner and owned apart in any order."""
    closed: list[Any] = []
    owner = opened(closed)
    owned = opened(closed, owner=owner)
    owned.forget()
    owner.forget()
    del owned, owner
    gc.collect()
    assert len(closed) == 2
