"""Pictures for the report, by matplotlib, in colours that the colour-blind tell apart.

They are SVG with text as text and no dates, so that the same figures give the same file.
"""

import importlib.util
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chaos.plot import COLORS, pyplot
from lab import cache
from lab.errors import LabError
from lab.figures import PAPER, PAPER_PROCESS_MS, PROCESS, Comparison, Row, smooth
from lab.progress import say
from lab.report import (
    HOSTS,
    WHO,
    Parts,
    breakdown,
    comparisons,
    density_process,
    density_rounds,
)

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#999999", "#000000")
"""Okabe and Ito's."""
MARKS = "os^Dv*xP"
A_PROCESS = "one process (posix_spawn of /bin/true)"
MULTIPLES = "multiples of one process"


def ensure_matplotlib() -> None:
    """Install what pyproject.toml's ``bench`` asks for, beside the other tools. LabError."""
    if importlib.util.find_spec("matplotlib") is not None:
        return
    project = tomllib.loads((cache.TREE / "pyproject.toml").read_text())["project"]
    wanted = project["optional-dependencies"]["bench"]
    say(f"installing {' '.join(wanted)} for the plots")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", *wanted],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise LabError(f"matplotlib does not install: {done.stdout.strip()[-500:]}")
    importlib.invalidate_caches()


def draw(parts: Parts, folder: Path) -> list[str]:
    """Draw what there are figures for; the names of the pictures, without their suffix."""
    plt = pyplot("the report", "plots.svg")
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "chaos", "font.size": 9})
    found = comparisons(parts)
    made = []
    for name, figure in (
        ("ends", _ends(plt, found)),
        ("growth", _growth(plt, found)),
        ("figure-5", _breakdown(plt, breakdown(found, parts))),
        ("sizes", _sizes(plt, parts)),
        ("density", _density(plt, parts)),
    ):
        if figure is not None:
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)
            made.append(name)
    return made


def _ends(plt: Any, found: Mapping[str, Comparison]) -> Any:
    """Horizontal bars, longest at the top: who, how many processes' time until it returned."""
    bars: list[tuple[float, str, str]] = []
    for name, comparison in found.items():
        for who in WHO:
            for vifs in (None, 0, 1):
                row = Row(who, vifs)
                ratio = comparison.times(row)
                if ratio is None or who in {PROCESS, "refill"}:
                    continue
                said = "" if vifs is None else f", {vifs} vif"
                bars.append((ratio, WHO[who].replace("`", "") + said, name))
    if not bars:
        return None
    order: dict[str, float] = {}
    for ratio, words, _ in bars:
        order[words] = max(order.get(words, 0.0), ratio)
    places = {words: at for at, words in enumerate(sorted(order, key=lambda w: order[w]))}
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.32 * len(places)), layout="constrained")
    height = 0.8 / len(found)
    for number, name in enumerate(found):
        mine = [(ratio, places[words]) for ratio, words, host in bars if host == name]
        axes.barh(
            [at + 0.4 - height * (number + 0.5) for _, at in mine],
            [ratio for ratio, _ in mine],
            height,
            color=PALETTE[number],
            edgecolor="black",
            linewidth=0.4,
            label=HOSTS[name],
        )
    axes.axvline(1, color="black", linewidth=1, linestyle="--", label=A_PROCESS)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(left=0.05)
    axes.set_yticks(list(places.values()), list(places))
    axes.set_xlabel(f"until it returned, in {MULTIPLES} (medians, logarithmic)")
    axes.legend(loc="lower right", fontsize="small")
    return figure


def _growth(plt: Any, found: Mapping[str, Comparison]) -> Any:
    """LightVM's figures 4 and 9: the create against how many guests run.

    Every guest's own create, and the rows beside many of the host that had most.
    """
    lines = []
    for name, comparison in found.items():
        if process := comparison.median(Row(PROCESS)):
            for who, pairs in comparison.growth.items():
                points = [(x, y / process) for x, y in smooth(pairs, 25)]
                lines.append((f"{WHO[who]}, {HOSTS[name]}", points))
    name = max(found, key=lambda name: found[name].levels()[-1:], default="")
    if name and (process := found[name].median(Row(PROCESS))):
        for who in ("command", "generic", "cold", "crun", "runc", PROCESS):
            vifs = None if who in {"crun", "runc", PROCESS} else 0
            medians = (
                (level, found[name].median(Row(who, vifs, guests=level)))
                for level in found[name].levels()
            )
            points = [(float(level), median / process) for level, median in medians if median]
            if len(points) > 1:
                lines.append((f"{WHO[who]}, {HOSTS[name]}", points))
    if not lines:
        return None
    return _lines(
        plt,
        lines,
        "guests that run already",
        y_label="one create, in multiples of a process beside none (medians)",
        published=_published(),
    )


def _published() -> dict[str, list[tuple[float, float]]]:
    """What the paper's text has of its figures 4 and 9, by toolstack: guests, multiples."""
    found: dict[str, list[tuple[float, float]]] = {}
    for claim in PAPER:
        if claim.figure in {"4", "9"}:
            name = claim.what.partition(",")[0]
            point = (float(claim.row.guests), claim.ms / PAPER_PROCESS_MS)
            found.setdefault(name, []).append(point)
    return found


def _lines(
    plt: Any,
    lines: list[tuple[str, list[tuple[float, float]]]],
    x_label: str,
    *,
    logarithmic_x: bool = False,
    logarithmic_y: bool = True,
    y_label: str = f"one create, in {MULTIPLES} (medians)",
    published: Mapping[str, list[tuple[float, float]]] | None = None,
) -> Any:
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for number, (words, points) in enumerate(lines):
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=PALETTE[number % len(PALETTE)],
            marker=MARKS[number % len(MARKS)],
            markersize=4,
            linewidth=1.2,
            linestyle="-" if number < len(PALETTE) else "--",
            label=words.replace("`", ""),
        )
    for number, (words, points) in enumerate((published or {}).items()):
        axes.scatter(
            [x for x, _ in points],
            [y for _, y in points],
            marker=MARKS[number],
            s=60,
            facecolors="none",
            edgecolors="black",
            label=f"the paper's {words}",
        )
    if logarithmic_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    if logarithmic_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(visible=True, linewidth=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    return figure


def _breakdown(plt: Any, shares: Mapping[str, Mapping[str, float]]) -> Any:
    """LightVM's figure 5, a bar on a scale of its own for each way to create."""
    if not shares:
        return None
    figure, rows = plt.subplots(
        len(shares), figsize=(8, 0.9 + 0.8 * len(shares)), squeeze=False, layout="constrained"
    )
    drawn: dict[str, Any] = {}
    for axes, (who, share) in zip(rows[:, 0], shares.items(), strict=True):
        left = 0.0
        for name, value in share.items():
            drawn[name] = axes.barh(
                0, value, left=left, color=COLORS[name], edgecolor="black", linewidth=0.4
            )
            left += value
        axes.set_yticks([0], [who])
        axes.set_xlim(0, left or 1)
    rows[-1, 0].set_xlabel(f"{MULTIPLES}, each bar on a scale of its own (medians)")
    figure.legend(
        drawn.values(), drawn.keys(), ncols=4, fontsize="small", loc="outside upper center"
    )
    return figure


def _sizes(plt: Any, parts: Parts) -> Any:
    """LightVM's figure 2."""
    rows = parts.get("sizes", {}).get("result", {}).get("over_spawn", {})
    lines = []
    for who, by_size in rows.items():
        if who != PROCESS:
            points = [(int(size) / (1 << 20), ratio) for size, ratio in by_size.items()]
            lines.append((WHO.get(who, who), points))
    if not lines:
        return None
    return _lines(plt, lines, "size of the image, MiB", logarithmic_x=True)


def _density(plt: Any, parts: Parts) -> Any:
    """LightVM's figure 10: as many guests as the machine holds."""
    lines = []
    before = 0
    process = density_process(parts)
    if process is None:
        return None
    for kind, rounds in density_rounds(parts).items():
        spawned = [each for each in rounds if PROCESS in each.get("calls", {})]
        for words, points in (
            ("create", [(each["guests"], each["create"]["median_ms"]) for each in rounds]),
            ("a shell, made ahead", [(each["guests"], each["shell"]) for each in rounds]),
            (A_PROCESS, [(each["guests"], each["calls"][PROCESS]) for each in spawned]),
        ):
            lines.append((f"{kind}: {words}", [(before + x, y / process) for x, y in points]))
        before += rounds[-1]["guests"]
    return _lines(
        plt,
        lines,
        "guests that run, of all kinds",
        logarithmic_y=False,
        y_label="one of them, in multiples of a process beside the first (medians)",
    )
