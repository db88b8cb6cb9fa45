"""The frames between chaosd and its clients."""

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos import frames
from xenctypes.errors import ProtocolError

idents = st.integers(0, frames.ID_MAX)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(idents, st.text(max_size=64), st.dictionaries(st.text(), values, max_size=4))
def test_a_request_comes_back(ident: int, method: str, params: Any) -> None:
    frame = frames.pack_request(ident, method, params)
    (body,) = frames.Splitter().feed(frame)
    assert frames.read_request(body) == (ident, method, params)


@given(idents, st.integers(0, 3), values)
def test_a_reply_comes_back(ident: int, kind: int, value: Any) -> None:
    (body,) = frames.Splitter().feed(frames.pack_reply(ident, kind, value))
    assert frames.read_reply(body) == (ident, kind, value)


@given(st.lists(st.binary(max_size=40)), st.data())
def test_frames_survive_any_cut(bodies: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(frames.LENGTH.pack(len(body)) + body for body in bodies)
    splitter, got = frames.Splitter(), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        got += splitter.feed(stream[:size])
        stream = stream[size:]
    assert got == bodies
    assert not splitter.pending


@given(st.binary())
def test_garbage_is_refused_or_understood(body: bytes) -> None:
    for read in (frames.read_request, frames.read_reply):
        with contextlib.suppress(ProtocolError):
            read(body)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ([2, 1, "list", {}], "protocol version '2', this daemon speaks 1"),
        ("no", "protocol version"),
        ([1, 1, "list"], "3 values"),
        ([1, -1, "list", {}], "malformed id"),
        ([1, True, "list", {}], "malformed id"),
        ([1, 1, "x" * 65, {}], "method"),
        ([1, 1, "list", []], "not a map"),
    ],
)
def test_malformed_requests(value: Any, why: str) -> None:
    (body,) = frames.Splitter().feed(frames.pack(value))
    with pytest.raises(ProtocolError, match=why):
        frames.read_request(body)


def test_a_frame_too_long_is_refused_before_it_is_read() -> None:
    with pytest.raises(ProtocolError, match="at most 1048576"):
        list(frames.Splitter().feed(frames.LENGTH.pack(frames.FRAME_MAX + 1)))
    with pytest.raises(ProtocolError, match="at most 1048576"):
        frames.pack(b"x" * frames.FRAME_MAX)
