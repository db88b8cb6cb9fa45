"""scripts/bench: its parts, and a report made again from figures that are kept."""

from __future__ import annotations

import json
import re
from itertools import groupby
from typing import TYPE_CHECKING

import pytest

from lab import benchmarks
from lab.benchmarks import PARTS, QUICK, Part

if TYPE_CHECKING:
    from pathlib import Path


def test_the_command_line_that_is_shown_runs_the_part_alone() -> None:
    roomy = Part("x", "python3 bench/x.py -n 1", 1, {"memory": 8 << 30, "xenstored": True})
    assert roomy.shown("12") == "scripts/lab run --memory 8G --xenstored -- python3 bench/x.py -n 1"
    patient = Part("x", "true", 1, hang=600)
    assert patient.shown("12") == "scripts/lab run --hang-timeout 600 -- true"
    assert QUICK.shown("13").startswith("scripts/lab run --debian 13 --xenstored -- python3 bench/")


def test_parts_of_one_kind_of_host_share_a_boot() -> None:
    boots = [str(options) for options, _ in groupby(PARTS, key=lambda part: part.options)]
    assert len(boots) == len(set(boots))
    assert len({part.name for part in PARTS}) == len(PARTS)


def test_what_parts_run_is_there() -> None:
    for part in (*PARTS, QUICK):
        for script in re.findall(r"bench/\w+\.py", part.command):
            assert (benchmarks.cache.TREE / script).exists(), part.name


def test_a_report_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    raw = tmp_path / benchmarks.RAW
    part = {
        "result": {"spawn": [1.0], "samples": {}}, "seconds": 1, "date": "2026-01-02",
        "commit": "abc", "debian": "12", "machine": benchmarks.machine(), "command": "x",
        "options": {},
    }  # fmt: skip
    raw.write_text(json.dumps({"profile": part}))
    assert benchmarks.main(["-k", str(raw)]) == 0
    text = (tmp_path / benchmarks.REPORT).read_text()
    assert "2026-01-02" in text
    raw.write_text("{")
    assert benchmarks.main(["-k", str(raw)]) == 2


def quick(
    monkeypatch: pytest.MonkeyPatch, rows: dict[str, list[tuple[float, float]]] | None
) -> int:
    """The exit status of --quick that measured these rows, or failed to."""
    outcome = None if rows is None else {"seconds": 1, "result": {"rows": rows}}
    monkeypatch.setattr(benchmarks, "_measured", lambda *_: iter([(QUICK, outcome)]))
    return benchmarks.main(["--quick"])


def test_quick_fails_for_one_ratio_that_is_worse(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = benchmarks.bounds.parse(benchmarks.BOUNDS.read_text())
    # Each row as long as its place in the bounds wants, beginning at a process of 100 ms.
    length = {"spawn/returned": 100.0, "spawn/returned@20": 100.0, "crun/returned": 1e3}
    length |= {"xl/0vif/returned": 2e3, "xl/1vif/returned": 8e3}
    for bound in wanted:
        length.setdefault(bound.row, bound.measured * length[bound.over])
    rows = {name: [(0.0, each), (1.0, each)] for name, each in length.items()}
    assert quick(monkeypatch, rows) == 0
    told = capsys.readouterr().out
    assert "WORSE" not in told
    assert f"{len(wanted)} ratios within their bounds, 0 worse" in told

    worse = wanted[0]
    rows[worse.row] = [(0.0, worse.at_most * 1.01 * length[worse.over])]
    assert quick(monkeypatch, rows) == 1
    assert capsys.readouterr().out.count("WORSE") == 1

    del rows[worse.row]
    assert quick(monkeypatch, rows) == 1
    assert "missing" in capsys.readouterr().out


def test_quick_fails_when_nothing_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert quick(monkeypatch, None) == 1


@pytest.mark.parametrize(
    "words",
    ["--quick --only sizes", "--quick --output x", "--keep x --output y", "--keep x --quick"],
)
def test_options_that_would_be_ignored_are_refused(words: str) -> None:
    with pytest.raises(SystemExit):
        benchmarks.main(words.split())
