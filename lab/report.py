"""The report of scripts/bench: the parts' JSON in, Markdown out. Pure; plots.py draws."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from chaos.profiling import categories
from lab import bounds
from lab.bounds import Bound
from lab.figures import (
    PAPER,
    PAPER_PROCESS_MS,
    PROCESS,
    THOUSANDTH,
    Comparison,
    Row,
    ms,
    table,
    times,
)

Parts = Mapping[str, Mapping[str, Any]]
HOSTS = {"noxs": "host without xenstored", "xenstored": "host with xenstored"}
WHO = {
    "warm": "chaos, the socket, a warm shell",
    "command": "`chaos create`, a warm shell",
    "generic": "chaos, the socket, a shell without an image",
    "cold": "chaos, the socket, no shell",
    "nodaemon": "`chaos --no-daemon create`",
    "xl": "`xl create`",
    "xl-xendevd": "`xl create`, vif plugged by xendevd",
    "crun": "`crun run`, a static true",
    "runc": "`runc run`, a static true",
    PROCESS: "posix_spawn of /bin/true",
    "python": "posix_spawn of `python3 -c pass`",
    "refill": "a shell, made in the background",
}
ENDS = {"returned": "returned", "ready": "guest ready", "ping": "first ping answered"}
INTRODUCTION = """\
Made by `scripts/bench`, which makes it again; `scripts/bench --keep raw.json` makes this text and
the plots alone, from the same figures. What each row is, and what is timed, is said in
`bench/compare.py`.

The lab is an emulated machine, some 20 to 30 times slower than a real one, and not to the same
degree everywhere. So everything is told in multiples of **one process**: posix_spawn of /bin/true
and the wait for its end, in the same boot, in turn with what it is compared to. Milliseconds show
the scale: medians, not to be compared with other machines', and the p99 of less than a hundred
samples is the largest of them. A multiple is the median of each sample over the median of the three
processes that were spawned nearest to it in time.
"""
BOUNDS = """\
The ratios that `scripts/bench --quick` holds on to, on the host with xenstored; smaller is better.
"""
SIDE_BY_SIDE = """\
A container and a process have come to their own end when their command returns. xl's guests are not
pinged: the one of this comparison gets its address from the device page, which xl does not give it.
"""
AT_ONCE = """\
Until the last of {number} has come to that end, in multiples of {number} processes at once, and
what one of them takes of the time of one alone.
"""
BESIDE = """\
Medians, and how many times what they are beside none.
"""
KERNEL = "dom0_kernel"
PUBLISHED = f"""\
Manco et al., *My VM is Lighter (and Safer) than your Container*, SOSP 2017, on a real machine of
its time. Its figures are set beside ours as multiples of a process, which takes
{PAPER_PROCESS_MS:g} ms there: fork and exec, in its abstract. (Its section 4.2 has 3.5 ms for
processes of which 1,000 are started one after the other; by that its multiples are a third or so.)
Where its text gives a range or a round number we say "about"; nothing is read off its plots. Its
toolstack is written in C; ours is in Python, whose start is what most of a command without the
daemon takes, so that the daemon's own cold create is set beside the paper's.

Here all are divided by a process beside no guests, as the paper's are. "Beside" are guests without
a vif that chaos made, whoever makes the next one, unless the row says otherwise; the paper's are
all of the kind whose next one is made.
"""
BREAKDOWN = """\
Figure 5, where a create's time goes: medians of each category, in multiples of a process, of what
somebody waits for. Of ours, what is in none of the daemon's steps (the request and the reply) is
the toolstack's, and no client is in them; of a cold one all steps are there. xl's are told from
when the lines of its log come (`chaos profile --against xl`), and scaled, for it takes longer when
it writes one: their sum is about what `xl create` takes without. The paper has this figure's
numbers only in the picture.
"""


def comparisons(parts: Parts) -> dict[str, Comparison]:
    """Those of the parts that are runs of bench/compare.py, by the kind of host."""
    return {name: Comparison(parts[name]["result"]) for name in HOSTS if name in parts}


def render(parts: Parts, wanted: Sequence[Bound], plots: Sequence[str]) -> str:
    """The report. ``plots`` are the names of the pictures that there are, without a suffix."""
    found = comparisons(parts)
    dates = sorted({part["date"] for part in parts.values()})
    lines = [f"# chaos beside xl, containers and processes, {dates[-1]}", "", INTRODUCTION]
    for section in (
        _bounds(found, wanted),
        _ends(found),
        _at_once(found),
        _guests(found),
        _sizes(parts),
        _density(parts),
        _paper(found, parts),
        _provenance(parts, found),
    ):
        lines += _with_plots(section, plots)
    return "\n".join(lines).rstrip() + "\n"


def _with_plots(lines: list[str], plots: Sequence[str]) -> list[str]:
    """A line that is "![WORDS](NAME)" goes, where there is no such picture."""
    shown = []
    for line in lines:
        if line.startswith("!["):
            name = line.rpartition("(")[2].rstrip(")")
            if name not in plots:
                continue
            line = f"{line.removesuffix(f'({name})')}({name}.svg)\n"  # noqa: PLW2901
        shown.append(line)
    return shown


def _bounds(found: Mapping[str, Comparison], wanted: Sequence[Bound]) -> list[str]:
    if "xenstored" not in found or not wanted:
        return []
    rows = {row.name: samples for row, samples in found["xenstored"].rows.items()}
    return [
        "## In short",
        "",
        BOUNDS,
        *table(
            ("ratio", "now", "bound"),
            (
                (
                    verdict.bound.what,
                    times(verdict.ratio) or "not measured",
                    times(verdict.bound.at_most),
                )
                for verdict in bounds.check(wanted, rows)
            ),
        ),
    ]


def _cell(comparison: Comparison, row: Row) -> str:
    ratio, median = comparison.times(row), comparison.median(row)
    if median is None:
        return ""
    spread = f"{ms(median)}, p99 {ms(comparison.p99(row))}"
    return spread if row.who == PROCESS else f"**{times(ratio)}** ({spread})"


def _cases() -> Iterator[tuple[Row, tuple[str, str, str]]]:
    """Everybody's rows of one at a time beside no guests, with the first cells of a table."""
    for who, words in WHO.items():
        for vifs in (None, 0, 1):
            for end, said in ENDS.items():
                yield Row(who, vifs, end), (words, "" if vifs is None else str(vifs), said)


def _ends(found: Mapping[str, Comparison]) -> list[str]:
    rows = []
    for row, first in _cases():
        cells = [_cell(comparison, row) for comparison in found.values()]
        if any(cells):
            rows.append((*first, *cells))
    if not rows:
        return []
    return [
        "## Side by side",
        "",
        "![Multiples of a process until the command returned](ends)",
        *table(("", "vifs", "until", *(HOSTS[name] for name in found)), rows),
        SIDE_BY_SIDE,
    ]


def _at_once(found: Mapping[str, Comparison]) -> list[str]:
    numbers = {row.at_once for comparison in found.values() for row in comparison.rows} - {1}
    lines = []
    for number in sorted(numbers):
        rows = []
        for row, first in _cases():
            cells = [_share(comparison, row, number) for comparison in found.values()]
            if any(cells):
                rows.append((*first, *cells))
        lines += [
            f"## {number} at once",
            "",
            AT_ONCE.format(number=number),
            *table(("", "vifs", "until", *(HOSTS[name] for name in found)), rows),
        ]
    return lines


def _share(comparison: Comparison, alone: Row, number: int) -> str:
    row = replace(alone, at_once=number)
    together, one = comparison.median(row), comparison.median(alone)
    if together is None:
        return ""
    said = f"{ms(together / number)} each, **{times(comparison.times(row))}**"
    return said + (f", {times(together / number / one)} of one alone" if one else "")


def _guests(found: Mapping[str, Comparison]) -> list[str]:
    lines: list[str] = []
    for name, comparison in found.items():
        levels = comparison.levels()
        rows = []
        for row, first in _cases():
            medians = [comparison.median(replace(row, guests=level)) for level in levels]
            if medians[0] is not None and any(medians[1:]):
                rows.append((*first, *_grown(medians[0], medians[1:])))
        if rows:
            heads = ("", "vifs", "until", *(f"{level} guests" for level in levels))
            lines += [f"On the {HOSTS[name]}:", "", *table(heads, rows)]
    lines += [f"{line}\n" for name, each in found.items() for line in _made(name, each)]
    if not lines:
        return []
    picture = "![Create time against the number of running guests](growth)"
    return ["## Beside running guests", "", BESIDE, picture, *lines]


def _grown(first: float, others: Sequence[float | None]) -> list[str]:
    cells = [ms(first)]
    cells += [f"{ms(each)}, **{times(each / first)}**" if each else "" for each in others]
    return cells


def _made(name: str, comparison: Comparison) -> Iterator[str]:
    for who, pairs in comparison.growth.items():
        if (ends := comparison.grown(who)) is not None:
            yield (
                f"{len(pairs)} guests made one after the other, {WHO[who]}, {HOSTS[name]}: the"
                f" first tenth took {ms(ends[0])} each, the last tenth {ms(ends[1])},"
                f" {times(ends[1] / ends[0])}."
                + (" The pool was filled before each; that is not in the time." * (who == "warm"))
            )


def _sizes(parts: Parts) -> list[str]:
    if "sizes" not in parts:
        return []
    result = parts["sizes"]["result"]
    lines = ["## The size of the image (LightVM, figure 2)", ""]
    lines += ["![Create time against the size of the image](sizes)"]
    fits = result.get("fits", {})
    spawn = [each["median_ms"] for each in result["rows"].get(PROCESS, {}).values()]
    process = sorted(spawn)[len(spawn) // 2] if spawn else None
    rows = []
    for who, fit in fits.items():
        slope, base = fit["ms_per_mib"], fit["base_ms"]
        in_processes = (
            f", {times(slope / process)} of a process" if process and who != PROCESS else ""
        )
        rows.append((WHO.get(who, who), ms(base), f"{ms(slope)}{in_processes}", f"{fit['r2']:.3f}"))
    lines += table(("", "an image of no size", "each MiB more", "r² of the line"), rows)
    return lines


def density_rounds(parts: Parts) -> dict[str, list[Any]]:
    """The rounds of bench/density.py, by kind of guest."""
    rounds = parts["density"]["result"]["rounds"] if "density" in parts else {}
    return {kind: each for kind, each in rounds.items() if each}


def _density(parts: Parts) -> list[str]:
    lines = []
    before = 0
    for kind, rounds in density_rounds(parts).items():
        columns = {
            "create, until the reply": [each["create"]["median_ms"] for each in rounds],
            "a shell, made ahead": [each["shell"] for each in rounds],
            "unpause until ready": [each["ready"]["median_ms"] for each in rounds],
        }
        spawned = [each["calls"]["spawn"] for each in rounds if "spawn" in each.get("calls", {})]
        if spawned:
            columns[WHO[PROCESS]] = spawned
        rows = [(what, *_quarters(each)) for what, each in columns.items()]
        made, step = rounds[-1]["guests"], rounds[0]["guests"]
        beside = f" beside the {before:,}" if before else ""
        before += made
        lines += [
            f"{made:,} guests `{kind}`{beside}, in rounds of {step}:",
            "",
            *table(
                ("", "first quarter of the rounds", "last quarter", ""),
                ((what, ms(begin), ms(end), times(end / begin)) for what, begin, end in rows),
            ),
        ]
    if not lines:
        return []
    result = parts["density"]["result"]
    for kind, shares in result["per_guest"].items():
        lines += [f"Memory of each guest `{kind}`, KiB:", ""]
        of_kernel = [name for name in shares if name.startswith(f"{KERNEL}_")]
        parts_of_it = ", ".join(
            f"{name.removeprefix(f'{KERNEL}_').replace('_', ' ')} {shares[name]:,.1f}"
            for name in of_kernel
        )
        cells = {
            name.replace("_", " "): f"{value:,.1f}"
            + (f", of which {parts_of_it}" if name == KERNEL and parts_of_it else "")
            for name, value in shares.items()
            if name not in of_kernel
        }
        lines += table([*cells], [[*cells.values()]])
    if ping := result.get("ping"):
        lines += [f"{ping['answered']} of {ping['asked']} guests with a vif answered a ping.", ""]
    picture = "![Create time with up to thousands of guests](density)"
    return ["## Density (LightVM, figure 10)", "", picture, *lines]


def _quarters(values: Sequence[float]) -> tuple[float, float]:
    """Medians of the first and of the last quarter: a single round is mostly noise."""
    quarter = max(1, len(values) // 4)
    return statistics.median(values[:quarter]), statistics.median(values[-quarter:])


def _paper(found: Mapping[str, Comparison], parts: Parts) -> list[str]:
    rows = []
    for claim in PAPER:
        comparison = found.get(claim.host)
        ours = comparison.over_a_process(claim.row) if comparison else None
        vifs = "" if claim.row.vifs is None else f", {claim.row.vifs} vif"
        beside = f", beside {claim.row.guests}" if claim.row.guests else ""
        rows.append((
            claim.figure, claim.claim, claim.over_a_process,
            f"{WHO[claim.row.who]}{vifs}{beside}" if ours else "",
            times(ours),
        ))  # fmt: skip
    rows += _crowded(parts)
    lines = [
        "## LightVM's figures",
        "",
        PUBLISHED,
        *table(("figure", "in the paper", "of a process", "here", "of a process"), rows),
    ]
    if shares := breakdown(found, parts):
        names = list(dict.fromkeys(name for share in shares.values() for name in share))
        lines += [
            BREAKDOWN,
            "![Where the time of a create goes](figure-5)",
            *table(
                ("", *names),
                [(who, *(times(share.get(name)) for name in names))
                 for who, share in shares.items()],
            ),
        ]  # fmt: skip
    return lines


def _crowded(parts: Parts) -> Iterator[tuple[str, str, str, str, str]]:
    """Of figures 9 and 10, what the rounds of bench/density.py have."""
    every = density_rounds(parts)
    process = density_process(parts)
    for figure, kind, paper, over in (
        (THOUSANDTH.figure, "daytime", THOUSANDTH.claim, THOUSANDTH.over_a_process),
        ("10", "tiny", "LightVM, 8,000 guests (section 6.1, no number in the text)", ""),
    ):
        if kind in every and process:
            last = every[kind][-1]
            beside = f" beside {every['tiny'][-1]['guests']:,} tiny" if kind == "daytime" else ""
            yield (
                figure, paper, over,
                f"{WHO['warm']}, the last of {last['guests']:,} {kind}{beside}",
                times(last["create"]["median_ms"] / process),
            )  # fmt: skip


def density_process(parts: Parts) -> float | None:
    """Milliseconds of a process beside the first guests of bench/density.py."""
    for rounds in density_rounds(parts).values():
        for each in rounds:
            if PROCESS in each.get("calls", {}):
                return float(each["calls"][PROCESS])
    return None


def breakdown(found: Mapping[str, Comparison], parts: Parts) -> dict[str, dict[str, float]]:
    """LightVM's categories of a create, in multiples of a process of the same part."""
    comparison = found.get("xenstored") or found.get("noxs")
    if comparison is None:
        return {}
    process = comparison.median(Row(PROCESS))
    if process is None:
        return {}
    shares = {
        f"{who}, {vifs} vif": {
            name: value / process for name, value in
            comparison.category_medians(f"{who}/{vifs}vif").items()
        }
        for who in ("warm", "generic", "cold") for vifs in (0, 1)
    }  # fmt: skip
    if "profile" in parts:
        result = parts["profile"]["result"]
        for vifs, samples in result["samples"].items():
            xl = [sample for sample in samples if sample["source"] == "xl"]
            shown = statistics.median([sample["caller_ms"] for sample in xl])
            logged = statistics.median([sample["logged_ms"] for sample in xl])
            scale = shown / logged / statistics.median(result[PROCESS])
            shares[f"xl, {vifs} vif"] = {
                name: spread["median_ms"] * scale for name, spread in categories(xl).items()
            }
    return {who: share for who, share in shares.items() if share}


def _provenance(parts: Parts, found: Mapping[str, Comparison]) -> list[str]:
    lines = ["## How it was measured", ""]
    lines += table(
        ("part", "command", "commit", "date", "took"),
        (
            (name, f"`{part['command']}`", part["commit"], part["date"], f"{part['seconds']} s")
            for name, part in parts.items()
        ),
    )
    for name, part in parts.items():
        if note := part.get("note"):  # written into the file by hand
            lines += [f"{name}: {note}", ""]
    lines += table(
        ("part", "machine below the lab"),
        ((name, _machine(part["machine"])) for name, part in parts.items()),
    )
    if found:
        lines += table(
            ("host", "versions"),
            (
                (HOSTS[name], f"Debian {parts[name]['debian']}, {_versions(comparison.host)}")
                for name, comparison in found.items()
            ),
        )
    return lines


def _machine(facts: Mapping[str, Any]) -> str:
    memory = f"{facts['memory_mib'] / 1024:.0f} GiB"
    below = f"{facts['cpu']}, {facts['cpus']} processors, {memory}, Linux {facts['linux']}"
    return f"{below}, QEMU {facts['qemu']}, emulation (TCG)"


def _versions(facts: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    dom0 = f"Dom0 of {facts['dom0_cpus']} processors, {facts['dom0_memory_mib']} MiB"
    return f"Xen {facts['xen']}, Linux {facts['linux']}, chaos {facts['chaos']}, {packages}; {dom0}"
