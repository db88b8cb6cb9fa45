"""Errors between daemon and client."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos import faults
from xenctypes import errors
from xenctypes.errors import ChaosError, ProtocolError

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=5,
)

CASES = [
    errors.ChaosError("plain", hint="go"),
    errors.UsageError("off"),
    errors.StateError('no domain "x"', hint="chaos list"),
    errors.CallFailed("xc_domain_create", 12, "detail", hint="less"),
    errors.ConfigError("bad", hint="so", key="vcpus", filename="a.cfg", line=3, column=7,
                       source="vcpus=x", caret=6),
    errors.StepError("unpause", "it failed"),
    errors.BusError("gone", path="/local", errno=2),
    errors.NoDaemon("nobody"),
]  # fmt: skip


@pytest.mark.parametrize("error", CASES, ids=lambda error: type(error).__name__)
def test_an_error_comes_back_as_it_was(error: ChaosError) -> None:
    error.add_note("and this")
    error.add_note("and that")
    value = faults.describe(error)
    assert list(value)[:4] == ["class", "message", "hint", "exit_code"]
    back = faults.restore(msgpack.unpackb(msgpack.packb(value)))
    assert type(back) is type(error)
    assert back.exit_code == error.exit_code
    # What __init__ sets, notes included.
    assert vars(back) == vars(error) | {"exit_code": error.exit_code}
    assert str(back) == str(error)


def test_what_an_error_has_beside_its_message_is_listed() -> None:
    """A class that gains an attribute gains it here."""
    base = set(vars(ChaosError("x")))
    for error in CASES:
        more = set(vars(error)) - base - {"__notes__"}
        assert more == set(faults.ATTRIBUTES.get(type(error), {})), type(error)


def test_every_class_with_attributes_is_tried() -> None:
    assert set(faults.ATTRIBUTES) <= {type(error) for error in CASES}


@given(words, st.text(max_size=20), st.integers(-300, 300))
def test_texts_and_codes(message: str, hint: str, code: int) -> None:
    error = ChaosError(message, hint=hint)
    error.exit_code = code
    packed = msgpack.packb(faults.describe(error))
    back = faults.restore(msgpack.unpackb(packed))
    assert back.message == message.encode(errors="backslashreplace").decode()
    assert back.exit_code == (code if 0 < code < 256 else 1)


def test_names_with_bytes_that_are_no_text() -> None:
    value = faults.describe(ChaosError("no file \udcff"))
    assert value["message"] == "no file \\udcff"
    assert len(faults.describe(ChaosError("x" * 10**6))["message"]) == faults.TEXT_MAX


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(2, "No such file or directory"), "No such file or directory"),
        (OSError("odd"), "a bug in chaosd: OSError('odd')"),
        (KeyError("x"), "a bug in chaosd: KeyError('x')"),
        (ChaosError(""), "ChaosError"),
    ],
)
def test_errors_that_are_not_ours(error: Exception, message: str) -> None:
    value = faults.describe(error)
    assert (value["class"], value["message"]) == ("ChaosError", message)


@given(values)
def test_garbage_is_refused(value: Any) -> None:
    with pytest.raises(ProtocolError, match="an error"):
        raise faults.restore(value)


GOOD = {"class": "BusError", "message": "m", "hint": "h", "exit_code": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"class": None},
        {"message": b"m"},
        {"hint": None},
        {"exit_code": 0},
        {"exit_code": 256},
        {"exit_code": True},
        {"exit_code": "x" * 1000},
    ],
)
def test_what_is_missing_or_off_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="an error with"):
        raise faults.restore(GOOD | change)


def test_attributes_of_the_wrong_kind_are_left_out() -> None:
    back = faults.restore(GOOD | {"errno": "x", "path": 3, "notes": 5, "more": [1]})
    assert isinstance(back, errors.BusError)
    assert (back.errno, back.path) == (0, "")
    assert not hasattr(back, "__notes__")


@pytest.mark.parametrize("name", ["os", "Exception", "__doc__", "nothing"])
def test_a_class_that_is_not_ours(name: str) -> None:
    assert type(faults.restore(GOOD | {"class": name})) is ChaosError
