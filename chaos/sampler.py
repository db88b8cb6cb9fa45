"""Creates made to be measured: each makes a guest, waits for it, and destroys it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, NamedTuple

from chaos import config as configuration
from chaos import xllog
from chaos.cli import NO_DAEMON
from chaos.signals import held
from chaos.steps import CONFIG, EXECUTE, Timing
from xenctypes.errors import ChaosError, NoDaemon, StateError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from chaos.client import Chaos
    from chaos.config import DomainConfig
    from chaos.invocation import Invocation

    Sample = dict[str, Any]
    Sampler = Callable[..., Sample]
    """Takes a sample; ``around`` is entered for just as long as the create takes."""
    Command = Callable[..., float]
    """The milliseconds of a whole command that creates; ``around`` as above."""

UNWATCHED = nullcontext()
KEPT_FREE = 2  # shells of a flavour that is made for this


class Own(NamedTuple):
    """Chaos's creates: by what makes them alone, and by the command as its users run it."""

    sample: Sampler
    command: Command
    shown: str


@contextmanager
def own(call: Invocation, config: DomainConfig, path: str) -> Iterator[Own]:
    """Chaos's: cold, generic or warm, as the command line wants."""
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
            yield stack.enter_context(_cold(call, config, path))
        else:
            yield stack.enter_context(_pooled(call, config, path, chaos, kind or "warm"))


def _daemon(call: Invocation) -> Chaos:
    from chaos.client import Chaos

    if call.environ.get("CHAOS_NO_DAEMON"):
        raise NoDaemon(f"{NO_DAEMON} was given", hint="profile with --cold, or without it")
    return Chaos()


def _command(call: Invocation, path: str, name: str, *options: str) -> Command:
    """`chaos create`, a process of its own."""
    program = shutil.which("chaos") or sys.argv[0]
    words = [program, *options]

    def command(around: AbstractContextManager[None] = UNWATCHED) -> float:
        try:
            with around:
                start = perf_counter_ns()
                settings = [*call.args.overrides, f'name="{name}"']
                done = _quiet(*words, "create", "-q", path, *settings)
                elapsed = perf_counter_ns() - start
            if done.returncode:
                raise ChaosError(f"chaos create failed: {done.stderr.strip()}")
        finally:
            with held():
                _quiet(*words, "destroy", name)
        return elapsed / 1e6

    return command


def _quiet(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )


@contextmanager
def _cold(call: Invocation, config: DomainConfig, path: str) -> Iterator[Own]:
    from chaos.builder import Builder
    from chaos.create import Creation, profile_json, wait_ready

    with Builder() as builder:

        def sample(around: AbstractContextManager[None] = UNWATCHED) -> Sample:
            creation = None
            try:
                with around:
                    start = perf_counter_ns()
                    read, _ = configuration.load(path, call.args.overrides)
                    configuration.supported(read)
                    wanted = replace(read, name=config.name, uuid=None)
                    took = perf_counter_ns() - start
                    creation = Creation(wanted, call.host, builder, call.names)
                    creation.timings.append(
                        Timing("read configuration", EXECUTE, CONFIG, start, took)
                    )
                    creation.run()
                    elapsed = perf_counter_ns() - start
                wait_ready(creation, call.args.ready_timeout)
                made = {"name": config.name, "domid": creation.domid, "source": "cold"}
                made |= {"caller_ms": elapsed / 1e6, "profile": profile_json(creation)}
            finally:
                with held():
                    left = creation.undo() if creation and creation.domid >= 0 else []
            if left:
                raise StateError("; ".join(left))
            return made

        command = _command(call, path, config.name, NO_DAEMON)
        yield Own(sample, command, f"chaos {NO_DAEMON} create")


@contextmanager
def _pooled(
    call: Invocation, config: DomainConfig, path: str, chaos: Chaos, kind: str
) -> Iterator[Own]:
    """From a flavour of its own, which goes in the end."""
    flavour = f"profile-{os.getpid()}"
    overrides = [*call.args.overrides, f'name="{config.name}"']
    with held():  # not given up while it is added: what is below removes it
        chaos.call("pool.add", flavour=_flavour(config, flavour, kind))
    try:

        def sample(around: AbstractContextManager[None] = UNWATCHED) -> Sample:
            (before,) = chaos.call("pool.wait", names=[flavour])
            wanted = None
            try:
                with around:
                    start = perf_counter_ns()
                    wanted = chaos.submit("create", path=os.fsencode(path), overrides=overrides)
                    made: Sample = wanted.result()
                    elapsed = perf_counter_ns() - start
            except (KeyboardInterrupt, SystemExit):
                with held(), suppress(ChaosError):
                    if wanted is not None:  # the daemon makes it all the same
                        _last("destroy", domains=[wanted.result()["uuid"]])
                raise
            try:
                if made["noxs"]:
                    seconds = call.args.ready_timeout
                    outcome = chaos.call("wait", domain=made["uuid"], timeout=seconds)
                    made["profile"]["ready_ms"] = outcome["ready_ms"]
            finally:
                _last("destroy", domains=[made["uuid"]])
            (after,) = (f for f in chaos.call("pool.list") if f["name"] == flavour)
            if after["served"] == before["served"]:
                raise StateError(
                    f'chaosd made "{config.name}" without the shells of its shape',
                    hint="vifs with more than a bridge need a flavour of chaos.toml: see --cold",
                )
            return made | {"caller_ms": elapsed / 1e6, "source": kind}

        whole = _command(call, path, config.name)

        def command(around: AbstractContextManager[None] = UNWATCHED) -> float:
            chaos.call("pool.wait", names=[flavour])
            return whole(around)

        yield Own(sample, command, "chaos create")
    finally:
        _last("pool.remove", name=flavour)


def _last(method: str, **params: Any) -> None:
    """Tidy up, on a connection of its own: a Ctrl-C may have cost the other one."""
    from chaos.client import Chaos

    with held(), Chaos() as chaos:
        chaos.call(method, **params)


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


def xl_sampler(path: str, overrides: Sequence[str], name: str) -> Sampler:
    """xl's: the whole command as it is, and once more with its log, for the steps."""

    def sample(around: AbstractContextManager[None] = UNWATCHED) -> Sample:
        start, end, _ = _xl(["create", "-q"], path, overrides, name, around)
        begun, ended, log = _xl(["-vvv", "create", "-q"], path, overrides, name)
        return {
            "name": name,
            "domid": _domid(log),
            "source": "xl",
            "caller_ms": (end - start) / 1e6,
            "logged_ms": (ended - begun) / 1e6,
            "profile": {"steps": xllog.steps(log, begun, ended), "ready_ms": None},
        }

    return sample


def _xl(
    verb: Sequence[str],
    path: str,
    overrides: Sequence[str],
    name: str,
    around: AbstractContextManager[None] = UNWATCHED,
) -> tuple[int, int, list[tuple[int, str]]]:
    """A guest made by xl, and destroyed: when xl began and ended, and the lines it wrote."""
    command = ["xl", *verb, path, *overrides, f'name="{name}"']
    status = None
    try:
        with around:
            start = perf_counter_ns()
            status, log = _run(command)
            end = perf_counter_ns()
    except FileNotFoundError as error:
        status = error.errno
        raise ChaosError("xl is not installed", hint="profile without --against") from error
    finally:
        if not status:  # made, or interrupted while it was
            with held():
                done = _quiet("xl", "destroy", name)
    if status:
        last = log[-1][1] if log else "it does not say why"
        raise ChaosError(f"xl create failed: {last}", hint="xl needs a host with xenstored")
    if done.returncode:
        raise ChaosError(f"xl destroy {name} failed: {done.stderr.strip()}")
    return start, end, log


def _run(command: Sequence[str]) -> tuple[int, list[tuple[int, str]]]:
    """Run it: its exit status, and what it wrote to its standard error, with the times."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as process:
        assert process.stderr is not None
        log = [(perf_counter_ns(), line.rstrip("\n")) for line in process.stderr]
        return process.wait(), log


def _domid(log: Sequence[tuple[int, str]]) -> int:
    """The domain that libxl's lines are about, or -1."""
    for _, line in log:
        before, found, after = line.partition("Domain ")
        if found and before and (number := after.partition(":")[0]).isdecimal():
            return int(number)
    return -1
