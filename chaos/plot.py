"""The categories of a profile as a picture, by matplotlib, which is only there if wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xenctypes.errors import ChaosError, UsageError

FORMATS = {".png", ".svg"}
COLORS = {
    "configuration": "#E69F00", "toolstack": "#56B4E9", "hypervisor": "#009E73",
    "hypervisor or bus": "#999999", "bus": "#F0E442", "devices": "#0072B2", "image": "#D55E00",
    "guest boot": "#CC79A7",
}  # fmt: skip
"""Okabe and Ito's palette, which the colour-blind tell apart."""


def pyplot(option: str, path: str) -> Any:
    """Pyplot of matplotlib, without a screen. UsageError for another format, ChaosError."""
    if Path(path).suffix not in FORMATS:
        raise UsageError(f"{option} {path}: neither .png nor .svg")
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ChaosError(
            f"{option} needs matplotlib", hint="on Debian: apt install python3-matplotlib"
        ) from error
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def categories(plt: Any, bars: dict[str, dict[str, dict[str, float]]], path: str) -> None:
    """One stacked bar of medians for each toolstack, each on a scale of its own."""
    height = 1.1 + 1.1 * len(bars)
    figure, rows = plt.subplots(len(bars), figsize=(8, height), squeeze=False, layout="constrained")
    drawn: dict[str, Any] = {}
    for axes, (name, found) in zip(rows[:, 0], bars.items(), strict=True):
        left = 0.0
        for category, times in found.items():
            median = times["median_ms"]
            drawn[category] = axes.barh(
                0, median, left=left, color=COLORS[category], edgecolor="black", linewidth=0.4
            )
            left += median
        axes.set_yticks([0], [name])
        axes.set_xlim(0, left or 1)
        axes.set_xlabel("milliseconds (medians)")
    figure.legend(
        drawn.values(), drawn.keys(), ncols=4, fontsize="small", loc="outside upper center"
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)
