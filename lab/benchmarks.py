"""scripts/bench: the benchmarks in the lab, the bounds that they must keep, and the report.

A part is one command in Dom0 that prints JSON. Parts that want the same kind of Dom0 share a
boot. What they printed is kept in raw.json, with the command, the machine and the commit of each,
and the report is made from that file alone, so that it can be made again, and a part measured
again, without the others.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from lab import bounds, cache, cli, plots, report
from lab.channel import HANG_SECONDS, Request, Session
from lab.errors import LabError, UsageError
from lab.machine import Options
from lab.progress import say
from lab.release import DEFAULT_RELEASE, RELEASES

BOUNDS = cache.TREE / "bench" / "bounds.toml"
OUTPUT = cache.TREE / "docs" / "results"
RAW = "raw.json"
REPORT = "README.md"
GIB = 1 << 30


@dataclass(frozen=True)
class Part:
    """One command, the Dom0 that it wants, and how many seconds it may take, or be silent."""

    name: str
    command: str
    seconds: float
    options: dict[str, Any] = field(default_factory=dict)
    hang: float = HANG_SECONDS

    def shown(self, debian: str) -> str:
        """The command line that runs it alone."""
        words = ["scripts/lab", "run"]
        words += ["--debian", debian] if debian != DEFAULT_RELEASE else []
        for name, value in self.options.items():
            option = f"--{name.replace('_', '-')}"
            is_size = isinstance(value, int) and value >= GIB
            words += [option] if value is True else [option, str(value)]
            if is_size:
                words[-1] = f"{value >> 30}G"
        words += [] if self.hang == HANG_SECONDS else ["--hang-timeout", f"{self.hang:g}"]
        return shlex.join([*words, "--", *shlex.split(self.command)])


XENSTORED = {"xenstored": True}
ROOMY = {"memory": 8 * GIB, "dom0_memory": 2 * GIB}
HUGE = {"memory": 17 * GIB, "dom0_memory": 3 * GIB}
PARTS = (
    Part("xenstored", "python3 bench/compare.py --guests 20 --guests 100 --guests 1000", 2400,
         {**XENSTORED, **ROOMY}),
    Part("profile", "python3 bench/breakdown.py", 900, {**XENSTORED, **ROOMY}),
    Part("sizes", "python3 bench/sizes.py", 1200,
         {**XENSTORED, "memory": 5 * GIB, "dom0_memory": 2 * GIB}),
    Part("noxs", "python3 bench/compare.py --guests 100 --guests 1000", 1800, ROOMY),
    # A thousand guests that each hear who asks for the others keep Dom0 busy for minutes.
    Part("density", "python3 bench/density.py --leave", 5400, HUGE, hang=600),
)  # fmt: skip
QUICK = Part("xenstored", "python3 bench/compare.py --quick", 400, XENSTORED)


def main(argv: list[str] | None = None) -> int:
    """Measure, render, check; 0 if all parts ran and no bound is broken."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    os.chdir(cache.TREE)
    if arguments.keep:
        if arguments.quick or arguments.only or arguments.output:
            parser.error("--keep measures nothing, and writes beside the file: not with --quick,"
                         " --only or --output")  # fmt: skip
        return cli.guarded(lambda: _render(arguments.keep, arguments.keep.parent))
    if arguments.quick:
        if arguments.only or arguments.output:
            parser.error("--quick is one part and no report: not with --only or --output")
        return cli.guarded(lambda: _quick(arguments.debian))
    return cli.guarded(lambda: _full(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Run the benchmarks in the lab and write docs/results/DATE/: the raw figures,"
        " plots and a report. With --quick: the ratios of bench/bounds.toml alone, in some three"
        " minutes, and fail if one is worse than its bound.",
    )
    parser.add_argument("--quick", action="store_true", help="check the bounds, write no report")
    parser.add_argument(
        "--debian", choices=RELEASES, default=DEFAULT_RELEASE, help="Dom0's (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where the report goes (default: docs/results/DATE); other parts' figures that"
        f" {RAW} has there stay",
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=[part.name for part in PARTS],
        help="measure this part (repeatable; default: all)",
    )
    parser.add_argument(
        "-k",
        "--keep",
        type=Path,
        metavar="JSON",
        help=f"keep the figures of this {RAW} and only make its report again, beside it",
    )
    return parser


def _quick(debian: str) -> int:
    wanted = bounds.parse(BOUNDS.read_text())
    ((_, outcome),) = _measured([QUICK], debian)
    verdicts = bounds.check(wanted, outcome["result"]["rows"] if outcome else {})
    print(*bounds.lines(verdicts), sep="\n", flush=True)
    worse = sum(not verdict.passed for verdict in verdicts)
    print(f"{'=' * 8} {len(verdicts) - worse} ratios within their bounds, {worse} worse, in"
          f" {outcome['seconds'] if outcome else 0:.0f} s {'=' * 8}")  # fmt: skip
    return 1 if worse else 0


def _full(arguments: argparse.Namespace) -> int:
    folder = arguments.output or OUTPUT / time.strftime("%Y-%m-%d", time.gmtime())
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    plots.ensure_matplotlib()
    chosen = [part for part in PARTS if not arguments.only or part.name in arguments.only]
    raw = folder / RAW
    failed = 0
    for part, outcome in _measured(chosen, arguments.debian):
        if outcome is None:
            failed += 1
            continue
        kept = json.loads(raw.read_text()) if raw.exists() else {}
        kept[part.name] = outcome
        _replace(raw, json.dumps(kept, separators=(",", ":")) + "\n")
    if not raw.exists():
        raise LabError("nothing was measured")
    return max(_render(raw, folder), 1 if failed else 0)


def _render(raw: Path, folder: Path) -> int:
    try:
        parts = json.loads(raw.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{raw}: {error}") from error
    plots.ensure_matplotlib()
    drawn = plots.draw(parts, folder)
    text = report.render(parts, bounds.parse(BOUNDS.read_text()), drawn)
    _replace(folder / REPORT, text)
    say(f"the report is {folder / REPORT}")
    return 0


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(path)


def _measured(parts: Sequence[Part], debian: str) -> Iterator[tuple[Part, dict[str, Any] | None]]:
    """Each part with its outcome, None if it failed; one boot for each kind of Dom0.

    Crash or LabError if the lab itself fails.
    """
    facts: dict[str, Any] = {"date": time.strftime("%Y-%m-%d", time.gmtime())}
    facts |= {"commit": _commit(), "machine": machine(), "debian": debian}
    numbers = {part.name: f"[{number}/{len(parts)}]" for number, part in enumerate(parts, 1)}
    for options, group in groupby(parts, key=lambda part: part.options):
        wanted = Options(debian=debian, **options)
        try:
            wanted.check()
        except UsageError as error:  # a machine too small for this one may do for the others
            say(str(error))
            yield from ((part, None) for part in group)
            continue
        with cli.booted("bench", wanted) as (_, session):
            for part in group:
                say(f"{numbers[part.name]} {part.name}: {part.command}")
                found = _run(session, part)
                if found is not None:
                    found |= {**facts, "command": part.shown(debian), "options": options}
                yield part, found


def _run(session: Session, part: Part) -> dict[str, Any] | None:
    """Run a part in Dom0; its figures, and how long it took; None if it failed."""
    target = cache.TREE / "lab-out" / "bench" / f"{part.name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    line = f"exec {part.command} >/out/bench/{target.name}"
    if status := session.run(Request(["sh", "-c", line], timeout=part.seconds, hang=part.hang)):
        say(f"{part.name}: failed with status {status}")
        return None
    seconds = time.monotonic() - start
    say(f"{part.name}: done in {seconds:.0f} s")
    return {"seconds": round(seconds), "result": json.loads(target.read_text())}


def _commit() -> str:
    """What was measured: the commit of the tree, and whether it had changes."""
    git = ["git", "-C", str(cache.TREE)]
    done = subprocess.run(
        [*git, "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def machine() -> dict[str, Any]:
    """What of the machine below the lab the figures depend on."""
    cpu = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    qemu = subprocess.run(
        ["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=False
    )
    return {
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "memory_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
        "linux": os.uname().release.partition("-")[0],
        "qemu": qemu.stdout.partition("\n")[0].removeprefix("QEMU emulator version "),
    }


if __name__ == "__main__":
    sys.exit(main())
