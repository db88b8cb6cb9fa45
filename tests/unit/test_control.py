"""Requests to guests: their numbers, and how a domain's death is told from its successor's life."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos.control import Request, death_of, sequence
from chaos.registry import Record
from noxs.abi import ACK_OK, ACK_REFUSED, ACK_UNSUPPORTED, REQUEST_POWEROFF, REQUEST_REBOOT
from noxs.page import GuestWords, read_guest_words, write_request

UUID = "00000000-0000-0000-0000-000000000007"


class Page:
    """A guest's page in our own memory."""

    def __init__(self) -> None:
        self.memory = bytearray(4096)

    def words(self) -> GuestWords:
        return read_guest_words(self.memory)

    def request(self, seq: int, code: int) -> None:
        write_request(self.memory, seq, code)


def request(code: int = REQUEST_POWEROFF) -> Request:
    page: Any = Page()
    return Request(Record(UUID, "one", domid=5, noxs=True), code, page)


@given(last=st.integers(0, 0xFFFFFFFF))
def test_a_number_is_never_nought_nor_the_last(last: int) -> None:
    number = sequence(last)
    assert 0 < number <= 0xFFFFFFFF
    assert number != last


def test_a_number_that_meets_the_last_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = iter([b"\0\0\0\0", b"\7\0\0\0", b"\x08\0\0\0"])
    monkeypatch.setattr("os.urandom", lambda _: next(draws))
    assert sequence(7) == 8


def info(domid: int, uuid: int, *, shutdown: bool = False, dying: bool = False) -> Any:
    return SimpleNamespace(
        domid=domid, uuid=bytes(15) + bytes([uuid]), shutdown=shutdown, dying=dying
    )


def index(*infos: Any) -> dict[tuple[int, bytes], Any]:
    return {(one.domid, one.uuid): one for one in infos}


def test_deaths() -> None:
    asked = request()
    assert death_of(asked, index(info(5, 7), info(6, 8))) is None
    for ended in (info(5, 7, shutdown=True), info(5, 7, dying=True)):
        death = death_of(asked, index(ended))
        assert death is not None
        assert death.info is ended
    # Its number, or its UUID, has come round again: it is gone all the same.
    for successors in ((info(5, 9),), (info(6, 7),), ()):
        death = death_of(asked, index(*successors))
        assert death is not None
        assert death.info is None


def test_problems() -> None:
    asked = request(REQUEST_REBOOT)
    assert asked.problem() == "has not answered"
    asked.result = ACK_OK
    assert asked.problem() == ""
    asked.result = ACK_REFUSED
    assert asked.problem() == "refuses to reboot"
    asked.result = ACK_UNSUPPORTED
    assert asked.problem() == "cannot reboot"
    asked.result = 77
    assert asked.problem() == "refuses to reboot"
