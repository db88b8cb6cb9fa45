import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xenbus_peer import Peer

from noxs.ring import Ring, RingError


def ring_at(position: int) -> tuple[bytearray, Ring]:
    page = bytearray(4096)
    struct.pack_into("<4I", page, 2048, *[position] * 4)
    return page, Ring(memoryview(page))


positions = st.one_of(st.integers(0, 0xFFFFFFFF), st.integers(0xFFFFF000, 0xFFFFFFFF))


@given(positions, st.lists(st.binary(min_size=1, max_size=1500), max_size=5))
def test_requests_arrive_whole_wherever_the_indexes_are(position: int, chunks: list[bytes]) -> None:
    page, ring = ring_at(position)
    peer = Peer(page)
    got = b""
    for chunk in chunks:
        peer.to_send += chunk
        while peer.step() or ring.received():
            data = ring.received()
            assert len(data) <= 1024
            assert data == ring.received(), "looking does not consume"
            ring.consume(len(data))
            got += data
    assert got == b"".join(chunks)


@given(positions, st.binary(max_size=5000))
def test_responses_arrive_whole_wherever_the_indexes_are(position: int, data: Any) -> None:
    page, ring = ring_at(position)
    peer = Peer(page)
    left = data
    while left:
        left = left[ring.send(left) :]
        peer.step()
    assert peer.got == data


def test_a_full_ring_takes_nothing() -> None:
    _, ring = ring_at(7)
    assert ring.send(b"x" * 2000) == 1024
    assert ring.send(b"x") == 0


@pytest.mark.parametrize(
    ("index", "value", "call"),
    [
        (1, 1025, lambda ring: ring.received()),
        (1, 0xFFFFFFFF, lambda ring: ring.received()),
        (0, 4, lambda ring: ring.received()),
        (2, 1, lambda ring: ring.send(b"x")),
        (3, 4, lambda ring: ring.send(b"x")),
    ],
)
def test_impossible_indexes_are_refused(index: int, value: Any, call: Callable[..., Any]) -> None:
    page, ring = ring_at(0)
    Peer(page).set_index(index, value)
    with pytest.raises(RingError, match=r"(request|response) ring: consumer 0x"):
        call(ring)


def test_the_page_s_other_fields() -> None:
    page, ring = ring_at(0)
    assert ring.pristine
    ring.advertise()
    assert struct.unpack_from("<3I", page, 2064) == (3, 0, 0)
    ring.fail(2)
    assert struct.unpack_from("<I", page, 2072) == (2,)
    assert ring.error == 2
    struct.pack_into("<I", page, 2068, 1)
    assert ring.reconnecting
    ring.send(b"abc")
    assert not ring.pristine
    ring.empty()
    ring.connected()
    assert page[2048:2064] == bytes(16)
    assert not ring.reconnecting
    assert not ring.error
