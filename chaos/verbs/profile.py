"""profile: where the time of a create goes, from many of them."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from chaos import buscount, counting, countview, plot, profiling, schedule
from chaos import config as configuration
from chaos.buscount import BusCount
from chaos.cli import seconds as duration
from chaos.progress import progress
from chaos.sampler import own, xl_sampler
from xenctypes.errors import ChaosError, UsageError

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Callable, Iterator, Sequence

    from rich.table import Table

    from chaos.config import DomainConfig
    from chaos.counting import Counts
    from chaos.invocation import Invocation
    from chaos.profiling import Sample
    from chaos.schedule import Run

LOCAL = True  # it draws on its user's terminal
COUNT = 20
READY_TIMEOUT = 10.0
WIDTH = 110  # of what is not a terminal


def configure(parser: ArgumentParser, name: str) -> None:
    """Add the options."""
    del name
    parser.add_argument("config", help="the configuration file, in xl.cfg(5) syntax")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that override the file's"
    )
    parser.add_argument(
        "-n",
        "--creates",
        type=int,
        metavar="N",
        help=f"how many (default {COUNT})",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--cold",
        action="store_const",
        dest="kind",
        const="cold",
        help="everything made when it is asked for, without the daemon (the default without one)",
    )
    kind.add_argument(
        "--generic",
        action="store_const",
        dest="kind",
        const="generic",
        help="from shells that chaosd holds ready without an image",
    )
    kind.add_argument(
        "--warm",
        action="store_const",
        dest="kind",
        const="warm",
        help="from shells that have the image already (the default with a daemon)",
    )
    parser.add_argument(
        "--against", choices=("xl",), help="create it by this toolstack too, in turns"
    )
    parser.add_argument(
        "--ready-timeout",
        type=duration,
        default=READY_TIMEOUT,
        metavar="S",
        help="how long to wait for each guest's ready event (default %(default)s s)",
    )
    parser.add_argument(
        "--count",
        action="store_true",
        help="rather than time creates, count what one asks of the hypervisor and the kernel",
    )
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    parser.add_argument(
        "--trace", metavar="FILE", help="write Chrome trace events, which Perfetto opens"
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="draw the categories (.png, .svg; needs matplotlib)"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print no warnings, no bar")


def run(call: Invocation) -> int:
    """Create and destroy, again and again; show what it took."""
    args = call.args
    _check(args)
    plt = plot.pyplot("chaos profile: --plot", args.plot) if args.plot else None
    path = os.path.join(call.directory, args.config)
    config, warnings = configuration.load(path, args.overrides)
    for warning in warnings if not args.quiet else ():
        call.warn(warning)
    configuration.supported(config)
    config = replace(config, name=f"{config.name}-profile", uuid=None)
    if args.count:
        return _count(call, config, path)
    found = _sample(call, config, path)
    shown = profiling.summary(found.samples)
    if found.others:
        shown["against"] = profiling.against(found.others, found.commands)
    everything = found.samples + found.others
    if args.trace:
        _write_trace(call, found)
    if plt is not None:
        bars = {"chaos": shown["categories"]}
        if found.others:
            bars["xl"] = shown["against"]["categories"]
        with _writing(call, args.plot) as target:
            plot.categories(plt, bars, target)
    if args.json:
        call.print_json({**shown, "samples": everything})
    else:
        _show(call, shown, found.command)
    return 0


def _check(args: Namespace) -> None:
    if args.count:
        if args.creates is not None:
            raise UsageError("chaos profile: --count counts one create, not -n of them")
        if args.trace or args.plot:
            raise UsageError("chaos profile: --count has no times for --trace and --plot")
    args.creates = COUNT if args.creates is None else args.creates
    if args.creates < 1:
        raise UsageError("chaos profile: -n needs a number from 1", hint="see --help")


def _write_trace(call: Invocation, found: Found) -> None:
    if found.lost:
        call.warn(
            f"--trace: {found.lost} events did not fit the kernel's buffers, the first ones:"
            " it shows no processes there (a smaller -n fits)"
        )
    events = profiling.trace(found.samples + found.others, found.runs)
    with (
        _writing(call, call.args.trace) as target,
        open(target, "w", encoding="utf-8") as file,
    ):
        json.dump(events, file)


def _count(call: Invocation, config: DomainConfig, path: str) -> int:
    """Count what one create does; one before it makes all that is made once.

    With another toolstack, which is a process, our command is counted as well.
    """
    args = call.args
    found: dict[str, Counts] = {}
    with ExitStack() as stack:
        if args.against:
            other = xl_sampler(path, args.overrides, config.name)
            counts = _counted(other)
        ours = stack.enter_context(own(call, config, path))
        source = ours.sample()["source"]
        found[source] = _counted(ours.sample)
        if args.against:
            found |= {ours.shown: _counted(ours.command), "xl": counts}
    if args.json:
        call.print_json(found)
    else:
        call.print(*countview.lines(found))
    return 0


def _counted(create: Callable[..., object]) -> Counts:
    """What one create asks for, and what another one asks of the bus: to know that takes work."""
    with counting.counter() as (watched, counts):
        create(watched())
    bus = BusCount()
    create(buscount.counted(bus))
    counts["bus_requests"] = bus.requests
    counts["bus_requests_total"] = None if bus.requests is None else bus.requests.total()
    return counts


class Found(NamedTuple):
    """What was measured: chaos's creates, the other toolstack's, and who ran meanwhile.

    ``commands`` are the milliseconds of our own ``command``, which is measured beside another's;
    ``lost`` is how many events of who ran did not fit the kernel's buffers.
    """

    samples: list[Sample]
    others: list[Sample]
    runs: list[Run]
    command: str
    commands: list[float]
    lost: int = 0


def _sample(call: Invocation, config: DomainConfig, path: str) -> Found:
    """All creates, those of both toolstacks in turn."""
    args = call.args
    with ExitStack() as stack:
        recording = stack.enter_context(schedule.recorded()) if args.trace else None
        other = xl_sampler(path, args.overrides, config.name) if args.against else None
        others = [other()] if other else []  # first: it says at once if this is no host for it
        ours = stack.enter_context(own(call, config, path))
        found = Found([], others, [], ours.shown, [])
        advance = stack.enter_context(
            progress(call.stderr, "profiling", args.creates, quiet=args.quiet)
        )
        for _ in range(args.creates):
            found.samples.append(ours.sample())
            if other is not None:
                found.commands.append(ours.command())
                if len(found.others) < args.creates:
                    found.others.append(other())
            advance()
        if recording is not None:
            runs, lost = recording()
            found = found._replace(runs=runs, lost=lost)
    return found


@contextmanager
def _writing(call: Invocation, name: str) -> Iterator[str]:
    """Yield the path of a file to write; a failure is told in one line."""
    try:
        yield os.path.join(call.directory, name)
    except OSError as error:
        raise ChaosError(f"{name}: {error.strerror}") from error


def _show(call: Invocation, shown: dict[str, Any], command: str) -> None:
    from rich.console import Console

    width = None if call.stdout.isatty() else WIDTH
    console = Console(file=call.stdout, highlight=False, width=width)
    console.print(_table(shown["steps"], shown["categories"]))
    made = ", ".join(f"{count} {source}" for source, count in shown["sources"].items())
    call.print(f"{shown['count']} creates ({made}); the caller waited {_times(shown['caller'])}")
    if shown["boot"]:
        call.print(f"the guest was ready {_times(shown['boot'])} after it was unpaused")
    if against := shown.get("against"):
        console.print(_table(against["steps"], against["categories"]))
        call.print(
            f"`xl create` took {_times(against)}, `{command}` {_times(against['command'])}, both"
            f" with their processes: {against['ratio']:.2g} times as long",
            f"xl's steps are told from its log, with which it took {_times(against['logged'])};"
            ' "hypervisor or bus" is what the log does not tell apart, and when the guest was'
            " ready it does not say",
        )


def _table(steps: Sequence[dict[str, Any]], categories: dict[str, dict[str, float]]) -> Table:
    """The steps with their bars, and below them the sums of the categories."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("STEP", no_wrap=True)
    table.add_column("CATEGORY", no_wrap=True)
    table.add_column("MEDIAN ms", justify="right", no_wrap=True, min_width=9)
    table.add_column("P99 ms", justify="right", no_wrap=True, min_width=9)
    table.add_column("WHEN", no_wrap=True)
    phase = ""
    for row, bar in zip(steps, profiling.waterfall(steps), strict=True):
        if row["phase"] != phase:
            table.add_section()
            phase = row["phase"]
        color = plot.COLORS[row["category"]]
        table.add_row(row["name"], row["category"], *_pair(row), f"[{color}]{bar}[/]")
    table.add_section()
    for category, times in categories.items():
        table.add_row("", category, *_pair(times), "")
    return table


def _pair(times: dict[str, Any]) -> tuple[str, str]:
    return f"{times['median_ms']:.3f}", f"{times['p99_ms']:.3f}"


def _times(times: dict[str, float]) -> str:
    median, p99 = _pair(times)
    return f"{median} ms (p99 {p99})"
