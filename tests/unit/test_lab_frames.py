"""The channel codec: frames come out as they went in, whatever came before them."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.frames import (
    MAX_PAYLOAD,
    NONCE_SIZE,
    TOKEN_SIZE,
    Decoder,
    Frame,
    Kind,
    Sync,
    encode,
    encode_all,
)

TOKEN = bytes.fromhex("8f1d4be2a09c7735e6410dcb52f83a96")
NONCE = bytes(range(NONCE_SIZE))
frames = st.builds(Frame, st.sampled_from(Kind), st.binary(max_size=300))


def stream(items: list[Frame]) -> bytes:
    return b"".join(encode(item.kind, item.payload) for item in items)


def feed_in_pieces(decoder: Decoder, data: bytes, cuts: list[int]) -> list[Frame | Sync]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [item for start, end in pairwise(edges) for item in decoder.feed(data[start:end])]


@given(st.lists(frames, max_size=8), st.lists(st.integers(0, 10_000), max_size=12))
def test_any_cutting_of_the_stream_gives_the_same_frames(
    items: list[Frame], cuts: list[int]
) -> None:
    decoder = Decoder(TOKEN)
    found = feed_in_pieces(decoder, TOKEN + NONCE + stream(items), cuts)
    assert found == [Sync(NONCE), *items]
    assert not decoder.lost


@given(
    st.lists(frames, max_size=4),
    st.integers(0, 10_000),
    st.lists(frames, max_size=4),
    st.lists(st.integers(0, 10_000), max_size=6),
)
def test_a_sync_is_found_inside_an_unfinished_frame(
    before: list[Frame], cut: int, after: list[Frame], cuts: list[int]
) -> None:
    old = stream(before)
    old = old[: cut % (len(old) + 1)]
    data = TOKEN + NONCE + old + TOKEN + NONCE[::-1] + stream(after)
    found = feed_in_pieces(Decoder(TOKEN), data, cuts)
    assert found[0] == Sync(NONCE)
    at = found.index(Sync(NONCE[::-1]))
    assert found[at + 1 :] == after


@given(st.lists(st.binary(max_size=2000), max_size=8), st.lists(frames, max_size=4))
def test_noise_never_raises_and_a_sync_ends_it(noise: list[bytes], items: list[Frame]) -> None:
    decoder = Decoder(TOKEN)
    for piece in noise:
        decoder.feed(piece)
    found = decoder.feed(TOKEN + NONCE + stream(items))
    assert found[-1 - len(items) :] == [Sync(NONCE), *items]


def test_a_wrong_header_loses_the_decoder_until_the_next_sync() -> None:
    decoder = Decoder(TOKEN)
    decoder.feed(TOKEN + NONCE)
    assert decoder.feed(b"\xff\0\0\0\0" + encode(Kind.BEAT)) == []
    assert decoder.lost
    assert decoder.feed(TOKEN + NONCE + encode(Kind.BEAT)) == [Sync(NONCE), Frame(Kind.BEAT)]


def test_noise_is_not_kept() -> None:
    decoder = Decoder(TOKEN)
    for _ in range(100):
        decoder.feed(bytes(10_000))
    assert len(decoder._buffer) < TOKEN_SIZE


def test_long_data_becomes_several_frames() -> None:
    data = bytes(range(256)) * 1000
    found = Decoder(TOKEN).feed(TOKEN + NONCE + encode_all(Kind.STDOUT, data))
    assert b"".join(item.payload for item in found if isinstance(item, Frame)) == data
    assert encode_all(Kind.STDOUT, b"") == b""
    with pytest.raises(ValueError, match="payload"):
        encode(Kind.STDOUT, bytes(MAX_PAYLOAD + 1))


def test_a_token_has_its_size() -> None:
    with pytest.raises(ValueError, match="token"):
        Decoder(b"short")
