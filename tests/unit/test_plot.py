"""Pictures of profiles, and what is said where they cannot be drawn."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from chaos import plot, profiling
from xenctypes.errors import ChaosError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

TIMES = {"median_ms": 2.0, "p99_ms": 3.0}


def test_every_category_has_a_color() -> None:
    assert set(profiling.CATEGORIES) == set(plot.COLORS)
    assert len(set(plot.COLORS.values())) == len(plot.COLORS)


def test_only_pictures() -> None:
    with pytest.raises(UsageError, match=r"--plot x\.txt: neither \.png nor \.svg"):
        plot.pyplot("--plot", "x.txt")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ChaosError, match="--plot needs matplotlib"):
        plot.pyplot("--plot", "x.png")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"profile.{suffix}"
    plt = plot.pyplot("--plot", str(path))
    chaos = dict.fromkeys(profiling.CATEGORIES, TIMES)
    plot.categories(plt, {"chaos": chaos, "xl": {"bus": TIMES}}, str(path))
    assert path.read_bytes()[:4] in {b"\x89PNG", b"<?xm"}
