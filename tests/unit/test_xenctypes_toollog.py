"""The logger that the libraries write to, through libxentoollog itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenctypes.toollog import XTL_DEBUG, XTL_DETAIL, XTL_ERROR, XTL_WARN, ToolLog

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def log() -> Iterator[ToolLog]:
    with ToolLog(XTL_WARN, size=256) as log:
        yield log


def test_messages_are_captured_and_none_reaches_stderr(
    log: ToolLog, capfd: pytest.CaptureFixture[str]
) -> None:
    log.write(XTL_ERROR, "it broke", context="xc")
    assert log.lines() == ["xc: error: it broke"]
    assert capfd.readouterr() == ("", "")


def test_lesser_messages_are_dropped(log: ToolLog) -> None:
    log.write(XTL_DETAIL, "chatter")
    assert log.lines() == []
    log.set_level(XTL_DEBUG)
    log.write(XTL_DETAIL, "chatter")
    assert log.lines() == ["chaos: detail: chatter"]


def test_take_leaves_nothing(log: ToolLog) -> None:
    log.write(XTL_ERROR, "panic: xg_dom_core.c:689: xc_dom_find_loader: no loader found")
    log.write(XTL_ERROR, "again")
    log.write(XTL_ERROR, "again")
    assert log.take() == "xc_dom_find_loader: no loader found; again"
    assert log.take() == ""


def test_shorter_messages_after_clear(log: ToolLog) -> None:
    log.write(XTL_ERROR, "a long message, to be followed by a short one")
    log.clear()
    log.write(XTL_ERROR, "short")
    assert log.lines() == ["chaos: error: short"]


def test_it_is_bounded_and_recovers(log: ToolLog) -> None:
    for number in range(1000):
        log.write(XTL_ERROR, f"message {number}")
    lines = log.lines()
    assert lines[0] == "chaos: error: message 0"
    assert sum(map(len, lines)) <= 256
    log.clear()
    log.write(XTL_ERROR, "after")
    assert log.lines() == ["chaos: error: after"]


def test_a_long_detail_is_cut() -> None:
    with ToolLog() as log:
        log.write(XTL_ERROR, "x" * 5000)
        assert len(log.take()) < 500


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=300))
def test_what_an_image_says_cannot_reach_the_terminal_raw(text: str) -> None:
    with ToolLog(size=4096) as log:
        log.write(XTL_ERROR, text)
        detail = log.take()
    assert detail.isprintable()


def test_percent_signs_are_text(log: ToolLog) -> None:
    log.write(XTL_ERROR, "100%s %n")
    assert log.lines() == ["chaos: error: 100%s %n"]


def test_closed(log: ToolLog) -> None:
    log.write(XTL_ERROR, "before")
    log.close()
    log.close()
    log.clear()
    log.set_level(XTL_DEBUG)
    log.write(XTL_ERROR, "after")
    assert log.lines() == ["chaos: error: before"]
