"""The console ring and who may have it, against a guest that may write anything."""

import errno
from pathlib import Path
from struct import pack_into, unpack_from
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos.console import (
    IN_SIZE,
    INDEXES_AT,
    OUT_AT,
    OUT_SIZE,
    ConsoleLock,
    ConsoleRing,
    bind_console,
)
from xenctypes.errors import CallFailed, StateError
from xenctypes.public import EVTCHNSTAT_closed, EVTCHNSTAT_interdomain

index = st.integers(0, 0xFFFFFFFF)


def page(in_cons: int = 0, in_prod: int = 0, out_cons: int = 0, out_prod: int = 0) -> bytearray:
    data = bytearray(4096)
    pack_into("@4I", data, INDEXES_AT, in_cons, in_prod, out_cons, out_prod)
    return data


def guest_writes(data: bytearray, text: bytes) -> None:
    prod = unpack_from("@4I", data, INDEXES_AT)[3]
    for byte in text:
        data[OUT_AT + prod % OUT_SIZE] = byte
        prod = (prod + 1) & 0xFFFFFFFF
    pack_into("@I", data, INDEXES_AT + 12, prod)


@given(start=index, text=st.binary(max_size=OUT_SIZE))
def test_what_the_guest_wrote_is_read_once(start: int, text: bytes) -> None:
    data = page(out_cons=start, out_prod=start)
    ring = ConsoleRing(memoryview(data))
    assert not ring.pending()
    guest_writes(data, text)
    assert ring.pending() == bool(text)
    assert ring.read() == text
    assert ring.read() == b""


@given(indexes=st.tuples(index, index, index, index), text=st.binary(max_size=2 * IN_SIZE))
def test_absurd_indexes_stay_within_the_page(
    indexes: tuple[int, int, int, int], text: bytes
) -> None:
    data = page(*indexes)
    body = bytes(data[:INDEXES_AT])
    ring = ConsoleRing(memoryview(data))
    assert len(ring.read()) <= OUT_SIZE
    assert ring.read() == b""
    assert 0 <= ring.write(text) <= IN_SIZE
    assert len(data) == 4096
    assert bytes(data[IN_SIZE:INDEXES_AT]) == body[IN_SIZE:]


@given(start=index, text=st.binary(max_size=2 * IN_SIZE))
def test_input_stops_when_the_ring_is_full(start: int, text: bytes) -> None:
    data = page(in_cons=start, in_prod=start)
    ring = ConsoleRing(memoryview(data))
    count = ring.write(text)
    assert count == min(len(text), IN_SIZE)
    assert ring.write(b"x") == (1 if count < IN_SIZE else 0)
    assert bytes(data[(start + n) % IN_SIZE] for n in range(count)) == text[:count]


def test_one_command_at_a_time_is_attached(tmp_path: Path) -> None:
    lock = ConsoleLock(str(tmp_path), "web")
    with pytest.raises(StateError, match="attached elsewhere"):
        ConsoleLock(str(tmp_path), "web")
    lock.close()
    ConsoleLock(str(tmp_path), "web").close()


@pytest.mark.parametrize(
    ("error", "status", "port"),
    [
        (0, 0, 5),
        (errno.EINVAL, EVTCHNSTAT_interdomain, None),  # somebody else has it
        (errno.EINVAL, EVTCHNSTAT_closed, 0),  # the guest closed it
        (errno.ESRCH, -1, 0),  # the domain is gone
    ],
)
def test_who_has_the_channel(error: int, status: int, port: int | None) -> None:
    def bind(domid: int, remote: int) -> int:
        if error:
            raise CallFailed("xenevtchn_bind_interdomain", error)
        return 5

    def ask(domid: int, remote: int) -> SimpleNamespace:
        if status < 0:
            raise CallFailed("xc_evtchn_status", errno.ESRCH)
        return SimpleNamespace(status=status)

    host: Any = SimpleNamespace(ctrl=SimpleNamespace(evtchn_status=ask))
    assert bind_console(host, bind, 7, 2) == port
