import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos.cpuspec import MAX_PCPUS, CpuSet, parse_cpus
from xenctypes.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", {0}),
        ("0-3,5,^1", {0, 2, 3, 5}),
        ("2,,3,", {2, 3}),
        ("0, 2- 3", {0, 2, 3}),
        ("^1,0-2", {0, 1, 2}),
        ("all", set(range(8))),
        ("all,^7", set(range(7))),
        ("all,^3-5,4", {0, 1, 2, 4, 6, 7}),
        ("1,all,^0", set(range(1, 8))),
        ("6-9", {6, 7}),
    ],
)
def test_lists(text: str, expected: set[int]) -> None:
    assert parse_cpus(text).resolve(8) == expected


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "no CPU is left"),
        ("^1", "no CPU is left"),
        ("1,^0-4", "no CPU is left"),
        ("^all", "leaves no CPU"),
        ("3-1", "no CPU or range"),
        ("x", "no CPU or range"),
        ("-1", "no CPU or range"),
        ("1-", "no CPU or range"),
        ("1 ,2", "no CPU or range"),
        (" ^1", "no CPU or range"),
        ("^^1", "no CPU or range"),
        ("0x1", "no CPU or range"),
        ("\u0661", "no CPU or range"),
        (str(MAX_PCPUS), "no CPU or range"),
        ("9" * 5000, "longer than"),
        ("node:1", "NUMA nodes are not supported"),
        ("0,^nodes:0-1", "NUMA nodes are not supported"),
    ],
)
def test_errors(text: str, cause: str) -> None:
    with pytest.raises(ConfigError, match=cause):
        parse_cpus(text)


def test_everything() -> None:
    assert parse_cpus("all").everything
    assert not parse_cpus("all,^1").everything
    assert not parse_cpus("0-7").everything


def test_sets_are_checked_however_they_are_made() -> None:
    for cpus in ((2, 1), (1, 1), (-1,), (MAX_PCPUS,), ()):
        with pytest.raises(ConfigError):
            CpuSet(cpus)


def words(n: int, m: int, mark: str) -> str:
    return f"{mark}{min(n, m)}-{max(n, m)}"


@given(
    st.lists(st.builds(words, st.integers(0, 70), st.integers(0, 70), st.sampled_from(["", "^"]))),
    st.booleans(),
)
def test_text_and_set_agree(parts: list[str], everything: bool) -> None:
    text = ",".join((["all"] if everything else []) + parts)
    expected = set(range(64)) if everything else set()
    for part in parts:  # what libxl does to its bitmap, one word after the other
        low, high = part.removeprefix("^").split("-")
        cpus = set(range(int(low), int(high) + 1))
        expected = expected - cpus if part[0] == "^" else expected | cpus
    try:
        parsed = parse_cpus(text)
    except ConfigError:
        assert not expected
        return
    assert parsed.resolve(64) == expected & set(range(64))
    assert parse_cpus(str(parsed)) == parsed
