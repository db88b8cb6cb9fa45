from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noxs import wire
from noxs.wire import Decoder, StoreError, canonical, format_perms, parse_perms

u32 = st.integers(0, 0xFFFFFFFF)
messages = st.lists(st.tuples(u32, u32, u32, st.binary(max_size=300)), max_size=6)


def cut(data: bytes, at: list[int]) -> list[bytes]:
    points = [0, *sorted(p % (len(data) + 1) for p in at), len(data)]
    return [data[a:b] for a, b in pairwise(points)]


@given(messages, st.lists(st.integers(0, 10000), max_size=8))
def test_messages_survive_any_fragmentation(sent: list[Any], at: list[int]) -> None:
    decoder = Decoder()
    stream = b"".join(wire.pack(*message) for message in sent)
    got = [message for piece in cut(stream, at) for message in decoder.feed(piece)]
    assert got == sent
    assert decoder.pending == b""
    assert decoder.bad is None


@given(messages, st.integers(wire.PAYLOAD_MAX + 1, 0xFFFFFFFF), st.binary(max_size=50))
def test_a_long_message_ends_the_stream_after_those_before_it(
    sent: list[Any], length: int, rest: bytes
) -> None:
    decoder = Decoder()
    stream = b"".join(wire.pack(*message) for message in sent)
    got = decoder.feed(stream + wire.HEADER.pack(11, 7, 3, length) + rest)
    assert got == sent
    assert decoder.bad == (11, 7, 3, length)
    assert decoder.feed(wire.pack(1, 1, 0, b"/\0")) == []


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=4))
def test_decoding_rubbish_depends_on_the_bytes_alone(data: Any, at: list[int]) -> None:
    whole, pieces = Decoder(), Decoder()
    expected = whole.feed(data)
    assert [m for piece in cut(data, at) for m in pieces.feed(piece)] == expected
    assert pieces.bad == whole.bad


def test_a_decoder_goes_on_from_its_pending_bytes() -> None:
    stream = wire.pack(2, 5, 0, b"/a\0")
    first = Decoder()
    assert first.feed(stream[:9]) == []
    assert Decoder(first.pending).feed(stream[9:]) == [(2, 5, 0, b"/a\0")]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (b"/", b"/"),
        (b"/a/b", b"/a/b"),
        (b"memory/target", b"/local/domain/0/memory/target"),
        (b"/a-_@Z9", b"/a-_@Z9"),
        (b"/" + b"a" * 2047, b"/" + b"a" * 2047),
        (b"/local/domain/12/" + b"a" * 2048, b"/local/domain/12/" + b"a" * 2048),
    ],
)
def test_canonical(path: Any, expected: Any) -> None:
    assert canonical(path, b"/local/domain/0") == expected


@pytest.mark.parametrize(
    "path",
    [
        b"", b"/a/", b"//", b"/a//b", b"a/", b"/a b", b"/a\0", b"/\xff", b"@releaseDomain", b"/a.b",
        b"/" + b"a" * 2048, b"/local/domain/x/" + b"a" * 2048, b"/local/domain/1/" + b"a" * 2049,
    ],
)  # fmt: skip
def test_not_canonical(path: Any) -> None:
    with pytest.raises(StoreError, match="EINVAL"):
        canonical(path, b"/local/domain/0")


def test_special_paths_only_where_allowed() -> None:
    assert canonical(b"@releaseDomain", b"/x", special=True) == b"@releaseDomain"


@given(st.lists(st.tuples(st.integers(0, 65535), st.integers(0, 3)), min_size=1, max_size=6))
def test_perms_round_trip(perms: Any) -> None:
    encoded = format_perms(tuple(perms))
    assert parse_perms(wire.strings(encoded)) == tuple(perms)


@pytest.mark.parametrize("text", [b"", b"n", b"x0", b"r-1", b"r65536", b"r 1", b"0", b"r1 "])
def test_bad_perms(text: bytes) -> None:
    with pytest.raises(StoreError, match="EINVAL"):
        parse_perms([text])


@pytest.mark.parametrize(
    ("path", "above"),
    [(b"/", b"/"), (b"/a", b"/"), (b"/a/b", b"/a"), (b"@releaseDomain", b"/")],
)
def test_parent(path: Any, above: bytes) -> None:
    assert wire.parent(path) == above


@pytest.mark.parametrize("payload", [b"", b"/a", b"/a\0b", b"/a\0\0", b"a\0b\0"])
def test_one_string_wants_exactly_one_nul_at_the_end(payload: bytes) -> None:
    with pytest.raises(StoreError, match="EINVAL"):
        wire.one_string(payload)
