"""The bounds of scripts/bench --quick: they fail when the thing gets worse, and when it is gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab import bounds
from lab.bounds import Bound
from lab.errors import UsageError
from lab.figures import Row

TREE = Path(__file__).parents[2]
WARM = Bound("warm", "warm/0vif/returned", "spawn/returned", 0.5, 0.25, "the point of it all")


def verdict(row: list[float], over: list[float]) -> bounds.Verdict:
    """Samples that were taken in turn, one a second."""
    rows = {WARM.row: [*enumerate(row)], WARM.over: [*enumerate(over)]}
    (found,) = bounds.check([WARM], rows)
    return found


def test_outliers_do_not_count() -> None:
    found = verdict([25.0, 25.0, 900.0], [100.0, 100.0, 5.0])
    assert found.ratio == 0.25
    assert found.passed


def test_a_machine_that_slows_down_in_between_changes_nothing() -> None:
    """Where a ratio of medians would be 1.0: three slow creates of five, two slow processes."""
    creates = [25.0, 25.0, 100.0, 100.0, 100.0]
    processes = [100.0, 100.0, 400.0, 400.0, 400.0]
    found = verdict(creates, [*processes[:2], 100.0, *processes[3:]])
    assert found.ratio == 0.25


def test_what_gets_worse_fails() -> None:
    found = verdict([51.0, 51.0, 51.0], [100.0, 100.0, 100.0])
    assert found.ratio == 0.51
    assert not found.passed


def test_the_bound_itself_is_within() -> None:
    assert verdict([50.0], [100.0]).passed


def test_a_slower_machine_changes_nothing() -> None:
    rows = [20.0, 25.0, 30.0], [100.0, 110.0, 90.0]
    slow = [[each * 30 for each in row] for row in rows]
    assert verdict(*rows).ratio == pytest.approx(verdict(*slow).ratio)


@pytest.mark.parametrize(("row", "over"), [([], [100.0]), ([20.0], [])])
def test_what_was_not_measured_fails(row: list[float], over: list[float]) -> None:
    found = verdict(row, over)
    assert found.ratio is None
    assert not found.passed
    assert bounds.check([WARM], {})[0].passed is False


def test_lines_say_why() -> None:
    good, bad = verdict([20.0], [100.0]), verdict([60.0], [100.0])
    told = bounds.lines([good, bad])
    assert [line.endswith("WORSE") for line in told] == [False, False, True, False]
    assert "0.6" in told[2]
    assert WARM.why in told[3]
    assert "missing" in bounds.lines([verdict([], [])])[1]


def test_parse() -> None:
    text = """
    [[bound]]
    what = "a create"
    row = "warm/0vif/returned"
    over = "spawn/returned"
    at_most = 1
    measured = 0.3
    why = "because"
    """
    (found,) = bounds.parse(text)
    assert (found.what, found.at_most) == ("a create", 1)


@pytest.mark.parametrize(
    "text",
    [
        "[[bound]",
        '[[bound]]\nwhat = "x"',
        '[[bound]]\nwhat="x"\nrow="a"\nover="b"\nat_most="c"\nmeasured=1.0\nwhy=""',
        '[[bound]]\nwhat="x"\nrow="a"\nover="b"\nat_most=1.0\nmeasured=2.0\nwhy=""',
        '[[bound]]\nwhat="x"\nrow="a"\nover="b"\nat_most=1.0\nmeasured=0.5\nwhy=""\nmore=1',
    ],
)
def test_a_file_that_is_wrong(text: str) -> None:
    with pytest.raises(UsageError, match="bound"):
        bounds.parse(text)


def test_ours() -> None:
    """Those of the repository name rows that can be, and leave room for noise."""
    found = bounds.parse((TREE / "bench/bounds.toml").read_text())
    assert len({bound.what for bound in found}) == len(found) > 5
    for bound in found:
        assert Row.parse(bound.row).name == bound.row
        assert Row.parse(bound.over).name == bound.over
        assert 1.2 < bound.at_most / bound.measured < 4, bound.what
        assert bound.why
