"""The console log: whatever is appended in whatever pieces, its tail is there and it is bounded."""

from __future__ import annotations

import os
import tempfile
import unicodedata
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chaos.consolelog import (
    CUT,
    LINE_MAX,
    LOG_MAX,
    ConsoleLog,
    Escaper,
    LogTail,
    escape,
    last_lines,
)

if TYPE_CHECKING:
    from pathlib import Path

chunk = st.one_of(
    st.binary(max_size=64),
    st.sampled_from([b"\n", b"\r\n", b"a line\n"]),
    # Long ones of few bytes, that lines and files overflow.
    st.tuples(st.sampled_from([b"x", b"y\n", b"long line "]), st.integers(1, 3 * LINE_MAX)).map(
        lambda pair: (pair[0] * pair[1])[: pair[1]]
    ),
)
chunks = st.lists(st.tuples(chunk, st.booleans()), max_size=12)


def capped(data: bytes) -> bytes:
    """What a log keeps of a whole stream, said another way."""
    kept = bytearray()
    column = 0
    for byte in data:
        column = 0 if byte in b"\r\n" else column + 1
        if column <= LINE_MAX:
            kept.append(byte)
        elif column == LINE_MAX + 1:
            kept += CUT
    return bytes(kept)


@settings(max_examples=60, deadline=None)
@given(pieces=chunks)
def test_the_history_is_the_tail_whatever_the_pieces(pieces: list[tuple[bytes, bool]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        log = ConsoleLog(directory)
        for data, killed in pieces:
            log.append(data)
            if killed:  # its successor goes on where it stopped
                log = ConsoleLog(directory)
            for name in os.listdir(directory):
                assert os.stat(f"{directory}/{name}").st_size <= LOG_MAX
        assert set(os.listdir(directory)) <= {"console.log", "console.log.1"}
        whole = capped(b"".join(data for data, _ in pieces))
        kept = log.read()
        assert len(kept) >= min(len(whole), LOG_MAX)
        assert whole.endswith(kept)
        assert log.read(100) == whole[max(0, len(whole) - 100) :]
        assert all(
            len(line) <= LINE_MAX + len(CUT) for line in kept.replace(b"\r", b"\n").split(b"\n")
        )


@settings(max_examples=40, deadline=None)
@given(pieces=chunks)
def test_a_tail_sees_all_that_comes(pieces: list[tuple[bytes, bool]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        log = ConsoleLog(directory)
        log.append(b"before\n")
        tail = LogTail(directory)
        assert tail.history == b"before\n"
        seen = b""
        for data, _ in pieces:
            for at in range(0, len(data), LOG_MAX // 2):  # one rotation at most between two looks
                log.append(data[at : at + LOG_MAX // 2])
                seen += tail.read()
        assert seen == capped(b"before\n" + b"".join(data for data, _ in pieces))[7:]
        tail.close()


def test_a_kill_between_the_rotation_and_the_write_loses_nothing(tmp_path: Path) -> None:
    log = ConsoleLog(str(tmp_path))
    log.append(b"line\n" * 1000)
    os.rename(tmp_path / "console.log", tmp_path / "console.log.1")
    again = ConsoleLog(str(tmp_path))
    assert again.read() == b"line\n" * 1000
    again.append(b"more\n")
    assert again.read() == b"line\n" * 1000 + b"more\n"


def test_a_log_of_a_domain_that_is_gone(tmp_path: Path) -> None:
    log = ConsoleLog(str(tmp_path / "gone"))
    assert log.read() == b""
    with pytest.raises(FileNotFoundError):
        log.append(b"last words")
    assert LogTail(str(tmp_path / "gone")).read() == b""


def test_what_cannot_be_kept_is_said_and_does_not_spoil_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = ConsoleLog(str(tmp_path))
    log.append(b"before\n")

    def full(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            log.append(b"lost\n")
    log.append(b"after\n")
    assert log.read() == b"before\nafter\n"


def test_a_link_in_the_log_s_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "console.log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        ConsoleLog(str(tmp_path)).append(b"x")


@given(st.binary())
def test_what_is_shown_is_safe(data: bytes) -> None:
    text = escape(data).decode()
    assert all(
        character in "\t\n\r" or unicodedata.category(character) != "Cc" for character in text
    )
    assert not set(text) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@given(st.text(alphabet=st.characters(categories=["L", "N", "P", "S", "Zs"])))
def test_text_is_shown_as_it_is(text: str) -> None:
    assert escape(text.encode()) == text.encode()


@given(data=st.binary(), at=st.integers(0, 64))
def test_pieces_show_as_the_whole(data: bytes, at: int) -> None:
    escaper = Escaper()
    shown = escaper.feed(data[:at]) + escaper.feed(data[at:], final=True)
    assert shown.encode() == escape(data)


def test_escapes() -> None:
    assert escape(b"\x1b[31mred\x07\r\n\ttab") == b"\\x1b[31mred\\x07\r\n\ttab"
    assert escape(b"\xff\xc3\xa9\xc3") == b"\\xff\xc3\xa9\\xc3"
    assert escape("\x9b\u202e".encode()) == b"\\x9b\\u202e"


@pytest.mark.parametrize(
    ("count", "lines"), [(0, b""), (1, b"c"), (2, b"b\r\nc"), (3, b"a\nb\r\nc"), (9, b"a\nb\r\nc")]
)
def test_last_lines(count: int, lines: bytes) -> None:
    assert last_lines(b"a\nb\r\nc", count) == lines
    assert last_lines(b"a\nb\r\nc\n", count) == lines + (b"\n" if count else b"")
