"""profile: where the time of a create goes, from many of them."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from chaos import config as configuration
from chaos import profiling
from chaos.cli import NO_DAEMON
from chaos.cli import seconds as duration
from chaos.progress import progress
from chaos.signals import held
from xenctypes.errors import ChaosError, NoDaemon, StateError, UsageError

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Callable, Iterator

    from chaos.client import Chaos
    from chaos.config import DomainConfig
    from chaos.invocation import Invocation

    Sampler = Callable[[], dict[str, Any]]

LOCAL = True  # it draws on its user's terminal
COUNT = 20
READY_TIMEOUT = 10.0
KEPT_FREE = 2  # shells of a flavour that is made for this
COLORS = {
    "configuration": "#E69F00", "toolstack": "#56B4E9", "hypervisor": "#009E73",
    "bus": "#F0E442", "devices": "#0072B2", "image": "#D55E00", "guest boot": "#CC79A7",
}  # fmt: skip
"""Okabe and Ito's palette, which the colour-blind tell apart."""


def configure(parser: ArgumentParser, name: str) -> None:
    """Add the options."""
    del name
    parser.add_argument("config", help="the configuration file, in xl.cfg(5) syntax")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that override the file's"
    )
    parser.add_argument(
        "-n", "--count", type=int, default=COUNT, metavar="N", help="creates (default %(default)s)"
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
    if args.count < 1:
        raise UsageError("chaos profile: --count needs a number from 1", hint="see --help")
    plotting = _plotting(args.plot) if args.plot else None
    path = os.path.join(call.directory, args.config)
    config, warnings = configuration.load(path, args.overrides)
    for warning in warnings if not args.quiet else ():
        call.warn(warning)
    configuration.supported(config)
    config = replace(config, name=f"{config.name}-profile", uuid=None)
    samples: list[dict[str, Any]] = []
    others: list[float] = []
    with ExitStack() as stack:
        sample = stack.enter_context(_sampler(call, config, path))
        advance = stack.enter_context(
            progress(call.stderr, "profiling", args.count, quiet=args.quiet)
        )
        for _ in range(args.count):
            samples.append(sample())
            if args.against:
                others.append(_xl(path, args.overrides, config.name))
            advance()
    shown = profiling.summary(samples)
    if others:
        against = profiling.spread(others)
        shown["against"] = {
            "toolstack": args.against,
            **against,
            "ratio": against["median_ms"] / shown["caller"]["median_ms"],
        }
    if args.trace:
        Path(call.directory, args.trace).write_text(json.dumps(profiling.trace(samples)))
    if plotting is not None:
        _plot(plotting, shown, Path(call.directory, args.plot))
    if args.json:
        call.print_json({**shown, "samples": samples})
    else:
        _show(call, shown)
    return 0


@contextmanager
def _sampler(call: Invocation, config: DomainConfig, path: str) -> Iterator[Sampler]:
    """What makes one guest, waits for it, and destroys it."""
    kind = call.args.kind
    with ExitStack() as stack:
        if kind != "cold":
            try:
                chaos = stack.enter_context(_daemon(call))
            except NoDaemon:
                if kind is not None:
                    raise
                kind = "cold"
        if kind == "cold":
            yield stack.enter_context(_cold(call, config))
        else:
            yield stack.enter_context(_pooled(call, config, path, chaos, kind or "warm"))


def _daemon(call: Invocation) -> Chaos:
    from chaos.client import Chaos

    if call.environ.get("CHAOS_NO_DAEMON"):
        raise NoDaemon(f"{NO_DAEMON} was given", hint="profile with --cold, or without it")
    return Chaos()


@contextmanager
def _cold(call: Invocation, config: DomainConfig) -> Iterator[Sampler]:
    from chaos.builder import Builder
    from chaos.create import Creation, profile_json, wait_ready

    with Builder() as builder:

        def sample() -> dict[str, Any]:
            creation = Creation(config, call.host, builder, call.names)
            start = perf_counter_ns()
            try:
                creation.run()
                elapsed = perf_counter_ns() - start
                wait_ready(creation, call.args.ready_timeout)
                made = {"name": config.name, "domid": creation.domid, "source": "cold"}
                made |= {"caller_ms": elapsed / 1e6, "profile": profile_json(creation)}
            finally:
                with held():
                    left = creation.undo() if creation.domid >= 0 else []
            if left:
                raise StateError("; ".join(left))
            return made

        yield sample


@contextmanager
def _pooled(
    call: Invocation, config: DomainConfig, path: str, chaos: Chaos, kind: str
) -> Iterator[Sampler]:
    """From a flavour of its own, which goes in the end."""
    flavour = f"profile-{os.getpid()}"
    chaos.call("pool.add", flavour=_flavour(config, flavour, kind))
    try:

        def sample() -> dict[str, Any]:
            (before,) = chaos.call("pool.wait", names=[flavour])
            start = perf_counter_ns()
            made = chaos.create(path, [*call.args.overrides], name=config.name)
            elapsed = perf_counter_ns() - start
            try:
                if made["noxs"]:
                    seconds = call.args.ready_timeout
                    outcome = chaos.call("wait", domain=made["uuid"], timeout=seconds)
                    made["profile"]["ready_ms"] = outcome["ready_ms"]
            finally:
                with held():
                    chaos.call("destroy", domains=[made["uuid"]])
            (after,) = (f for f in chaos.call("pool.list") if f["name"] == flavour)
            if after["served"] == before["served"]:
                raise StateError(
                    f'chaosd made "{config.name}" without the shells of its shape',
                    hint="vifs with more than a bridge need a flavour of chaos.toml: see --cold",
                )
            return made | {"caller_ms": elapsed / 1e6, "source": kind}

        yield sample
    finally:
        with held():
            chaos.call("pool.remove", name=flavour)


def _flavour(config: DomainConfig, name: str, kind: str) -> dict[str, Any]:
    """The flavour whose shells such a guest comes from, as in chaos.toml."""
    table: dict[str, Any] = {
        "name": name, "type": config.type, "memory": config.memory, "maxmem": config.maxmem,
        "vcpus": config.vcpus, "maxvcpus": config.maxvcpus, "size": KEPT_FREE,
        "metadata": len(config.metadata),
        "vif": [f"bridge={vif.bridge}" for vif in config.vifs],
    }  # fmt: skip
    if kind == "warm":
        table |= {"kernel": config.kernel, "ramdisk": config.ramdisk, "cmdline": config.cmdline}
    return table


def _xl(path: str, overrides: list[str], name: str) -> float:
    """Milliseconds that `xl create` takes."""
    command = ["xl", "create", "-q", path, f'name="{name}"', *overrides]
    start = perf_counter_ns()
    try:
        made = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ChaosError("xl is not installed", hint="profile without --against") from error
    elapsed = perf_counter_ns() - start
    if made.returncode:
        lines = made.stderr.strip().splitlines()
        raise ChaosError(f"xl create failed: {lines[-1] if lines else 'it does not say why'}")
    subprocess.run(["xl", "destroy", name], capture_output=True, check=False)
    return elapsed / 1e6


def _show(call: Invocation, shown: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(file=call.stdout, highlight=False, width=None if _wide(call) else 110)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("STEP")
    table.add_column("CATEGORY")
    table.add_column("MEDIAN", justify="right")
    table.add_column("P99 (ms)", justify="right")
    table.add_column("WHEN", no_wrap=True)
    phase = ""
    for row, bar in zip(shown["steps"], profiling.waterfall(shown["steps"]), strict=True):
        if row["phase"] != phase:
            table.add_section()
            phase = row["phase"]
        median, p99 = (f"{row[key]:.3f}" for key in ("median_ms", "p99_ms"))
        color = COLORS.get(row["category"], "")
        table.add_row(row["name"], row["category"], median, p99, f"[{color}]{bar}[/]")
    table.add_section()
    for category, times in shown["categories"].items():
        table.add_row("", category, f"{times['median_ms']:.3f}", f"{times['p99_ms']:.3f}", "")
    console.print(table)
    made = ", ".join(f"{count} {source}" for source, count in shown["sources"].items())
    lines = [f"{shown['count']} creates ({made}); the caller waited {_times(shown['caller'])}"]
    if shown["boot"]:
        lines.append(f"the guest was ready {_times(shown['boot'])} after it was unpaused")
    if against := shown.get("against"):
        lines.append(
            f"{against['toolstack']} create took {_times(against)}: {against['ratio']:.1f} times"
            " as long"
        )
    call.print(*lines)


def _wide(call: Invocation) -> bool:
    return call.stdout.isatty()


def _times(times: dict[str, float]) -> str:
    return f"{times['median_ms']:.3f} ms (p99 {times['p99_ms']:.3f})"


def _plotting(path: str) -> Any:
    """Pyplot of matplotlib, without a screen. ChaosError."""
    if Path(path).suffix not in {".png", ".svg"}:
        raise UsageError(f"chaos profile: --plot {path}: not a .png or .svg file")
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ChaosError(
            "--plot needs matplotlib", hint="on Debian: apt install python3-matplotlib"
        ) from error
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def _plot(pyplot: Any, shown: dict[str, Any], path: Path) -> None:
    """One bar of the categories' medians, stacked."""
    figure, axes = pyplot.subplots(figsize=(8, 2.4), layout="constrained")
    left = 0.0
    for category, times in shown["categories"].items():
        axes.barh(0, times["median_ms"], left=left, color=COLORS[category], label=category)
        left += times["median_ms"]
    axes.set_xlabel("median of the time that a create's caller waits, and the guest's boot (ms)")
    axes.set_yticks([])
    axes.legend(ncols=4, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, 1.35))
    figure.savefig(path, dpi=150)
