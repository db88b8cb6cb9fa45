"""What domains use: the arithmetic of two looks, and the tables made of it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos import usage as usage_module
from chaos.domains import Domain
from chaos.registry import Record
from chaos.usage import (
    SORT_KEYS,
    Sampler,
    Usage,
    look,
    ordered,
    rate,
    traffic,
    usage,
    with_rates,
)
from chaos.verbs import top

UUIDS = {letter: bytes(15) + letter.encode() for letter in "abc"}


def domain(letter: str, domid: int, cpu: int) -> Domain:
    info: Any = SimpleNamespace(
        domid=domid,
        uuid=UUIDS[letter],
        cpu_time=cpu,
        nr_online_vcpus=1,
        tot_pages=1024,
        outstanding_pages=0,
        shutdown_reason=None,
        **dict.fromkeys(("running", "blocked", "paused", "shutdown", "dying"), False),
    )
    return Domain(info, f"domain {letter}", Record(str(letter), letter, ready_ms=1.5))


def test_percent_and_rates() -> None:
    before = usage(domain("a", 1, 5_000_000_000), (100, 1000), 0.0)
    used = with_rates(usage(domain("a", 1, 6_000_000_000), (300, 5000), 2.0), before, 2 * 10**9)
    assert used.cpu_percent == pytest.approx(50)
    assert (used.rx, used.tx) == (300, 5000)
    assert (used.rx_rate, used.tx_rate) == (100, 2000)
    assert (used.cpu_seconds, used.memory_mib, used.ready_ms, used.uptime) == (6, 4, 1.5, 2)


def test_the_first_look_knows_no_rates() -> None:
    used = usage(domain("a", 1, 10**9), (1, 1), None)
    assert used.cpu_percent is used.rx_rate is used.tx_rate is None
    assert "-" in top.cells(used)


@given(st.integers(0, 2**64), st.integers(0, 2**64), st.integers(-(10**10), 10**10))
def test_a_rate_is_never_negative(now: int, before: int, ns: int) -> None:
    got = rate(now, before, ns)
    assert got is None if ns <= 0 else got is not None and got >= 0


def test_a_domid_that_comes_round_again_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter(
        [
            [domain("a", 1, 10**9)],
            [domain("a", 1, 2 * 10**9), domain("b", 2, 5)],
            # The number 1 is another domain's now, and b was restarted under its UUID.
            [domain("c", 1, 3 * 10**9), domain("b", 3, 7)],
            [domain("c", 1, 4 * 10**9), domain("b", 3, 7)],
        ]
    )
    clock = iter(range(0, 10**11, 10**9))
    monkeypatch.setattr(usage_module, "list_domains", lambda *_: next(looks))
    monkeypatch.setattr(usage_module.time, "monotonic_ns", lambda: next(clock))
    monkeypatch.setattr(usage_module, "traffic", lambda: {1: (1, 2)})
    host: Any = None
    names: Any = None
    sampler = Sampler(lambda: look(host, names))
    percents = [[one.cpu_percent for one in sampler.sample()] for _ in range(4)]
    assert percents == [[None], [100, None], [None, None], [100, 0]]


def test_traffic_is_the_guest_s_view(tmp_path: Path) -> None:
    def interface(device: str, name: str, rx: str, tx: str) -> None:
        statistics = tmp_path / device / "net" / name / "statistics"
        statistics.mkdir(parents=True)
        (statistics / "rx_bytes").write_text(rx)
        (statistics / "tx_bytes").write_text(tx)

    interface("vif-7-0", "vif7.0", "100\n", "1\n")
    interface("vif-7-1", "a name of one's own", "200\n", "2\n")
    interface("vif-8-0", "vif8.0", "nonsense", "2\n")
    interface("vbd-9-51712", "none", "1", "1")
    (tmp_path / "vif-x-0").mkdir()
    (tmp_path / "vif-10-0").mkdir()
    assert traffic(str(tmp_path)) == {7: (3, 300)}
    assert traffic(str(tmp_path / "missing")) == {}


def used(name: str, **values: Any) -> Usage:
    base = dict.fromkeys(Usage._fields, 0)
    return Usage(**{**base, "name": name, "state": "r-----", "uuid": name, **values})


def test_orders() -> None:
    rows = [used("b", domid=1, cpu_percent=5.0), used("a", domid=2, cpu_percent=None)]
    rows.append(used("c", domid=3, cpu_percent=9.0))

    def names(key: str, *, reverse: bool = False) -> str:
        return "".join(one.name for one in ordered(rows, key, reverse=reverse))

    assert names("cpu") == "cba"
    assert names("cpu", reverse=True) == "bca"
    assert names("name") == "abc"
    assert names("domid", reverse=True) == "cab"
    assert set(SORT_KEYS.values()) <= set(Usage._fields)


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0"), (999, "999"), (1000, "1.0k"), (12_345_678, "12.3M"), (999_999, "1.0M")],
)
def test_amounts(count: int, shown: str) -> None:
    assert top.amount(count) == shown


@pytest.mark.parametrize(
    ("length", "shown"),
    [(0.9, "0s"), (59, "59s"), (65, "1m05s"), (7380, "2h03m"), (349_200, "4d01h")],
)
def test_spans(length: float, shown: str) -> None:
    assert top.span(length) == shown


def test_a_table_of_text() -> None:
    lines = top.text([used("one\x1b[2J"), used("a longer name", cpu_percent=12.34)])
    assert lines[0].startswith("NAME")
    assert lines[1].startswith("one?[2J")
    assert len({len(line) for line in lines}) == 1
    assert "12.3" in lines[2]


@given(length=st.floats(0, 10**9), count=st.floats(0, 2**66))
def test_cells_stay_narrow(length: float, count: float) -> None:
    assert len(top.span(length)) < 10
    assert len(top.amount(count)) < 10
    json.dumps(used("x")._asdict())
