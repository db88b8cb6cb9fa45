"""create: from a configuration file to a running domain."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from chaos import config as configuration
from chaos.builder import Builder
from chaos.cli import describe_error, seconds
from chaos.create import CREATE_STEPS, UNPAUSED_STEPS, Creation, profile_json, wait_ready
from chaos.destroy import destroy
from chaos.domains import find
from chaos.progress import progress
from chaos.signals import held
from xenctypes.errors import ChaosError, UsageError

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Iterator

    from chaos.config import DomainConfig
    from chaos.invocation import Invocation

READY_TIMEOUT = 10.0
NUMBER = "{n}"
_NAMES = re.compile(r"\s*name\s*=")
COUNT_MAX = 32751  # domids that a host has for guests: DOMID_FIRST_RESERVED of xen.h, less Dom0's


def configure(parser: ArgumentParser, name: str) -> None:
    """Add the options."""
    del name
    parser.add_argument("config", nargs="?", help="the configuration file, in xl.cfg(5) syntax")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that override the file's"
    )
    parser.add_argument("-f", "--defconfig", metavar="FILE", help="the configuration file")
    parser.add_argument("-p", "--paused", action="store_true", help="leave the domain paused")
    parser.add_argument("-c", "--console", action="store_true", help="attach to the console")
    parser.add_argument(
        "-F",
        "--foreground",
        action="store_true",
        help="stay until the domain is dead, obeying on_poweroff, on_reboot and on_crash",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument(
        "-n", "--dryrun", action="store_true", help="check the configuration, print it as JSON"
    )
    parser.add_argument(
        "--count",
        type=int,
        metavar="N",
        help="create N domains; {n} in the name and in key=value is the number; a name without it"
        " has -1 to -N appended",
    )
    parser.add_argument(
        "--name", metavar="NAME", help="the name, instead of the file's; {n} is the number"
    )
    parser.add_argument(
        "--keep-going",
        action="store_true",
        help="with --count: keep what was created when one fails, and go on",
    )
    parser.add_argument("--profile", action="store_true", help="print how long each step took")
    parser.add_argument("--json", action="store_true", help="print what was made as JSON")
    parser.add_argument(
        "--ready-timeout",
        type=seconds,
        default=READY_TIMEOUT,
        metavar="S",
        help="how long --profile and --json wait for the ready event (default %(default)s s)",
    )


async def serve(call: Invocation) -> int:
    """The same in the daemon, from its pool."""
    from chaos.daemon.creating import serve as serve_create

    return await serve_create(call)


def run(call: Invocation) -> int:
    """Create what the command line asks for."""
    args = call.args
    configs = _configs(call)
    if args.dryrun:
        shown = [config.as_dict() for config in configs]
        call.print_json(shown if args.count else shown[0])
        return 0
    made: list[Creation] = []
    failed = 0
    with Builder() as builder:
        try:
            with progress(call.stderr, "creating", len(configs), quiet=args.quiet) as advance:
                for config in configs:
                    try:
                        made.append(_create(call, builder, config))
                    except ChaosError as error:
                        if not args.keep_going:
                            raise
                        failed += 1
                        call.stderr.write(describe_error(error, verbose=args.verbose))
                    advance()
        except BaseException as error:
            with held():
                for creation in reversed(made):  # all or nothing
                    _take_back(call, creation, error)
            raise
        if args.foreground:
            from chaos.foreground import stay

            return stay(call, builder, made[0])
    status = 1 if failed else 0
    if args.console:
        return status
    return report(call, [_describe(creation) for creation in made]) or status


def _configs(call: Invocation) -> list[DomainConfig]:
    """The configurations to create, checked; warnings are printed."""
    args = call.args
    path, overrides = sources(args)
    directory = os.getcwd()
    text = configuration.read(path, directory, regular=False)
    found: list[DomainConfig] = []
    for member in members(args, overrides):
        if not found or member.overrides != overrides:
            config, warnings = configuration.interpret(
                text, path, member.overrides, directory=directory, regular=False
            )
            if not (args.quiet or found):
                for warning in warnings:
                    call.warn(warning)
            configuration.supported(config)
        found.append(replace(config, name=member.name(config.name)))
    return found


class Member(NamedTuple):
    """One of the domains to create: its ``overrides``, and what its name is made from.

    ``number`` is 0 for the only one of a command without --count; ``given`` is --name or "".
    """

    number: int
    overrides: list[str]
    given: str
    named: bool  # the overrides number its name

    def name(self, configured: str) -> str:
        """Its name, where the configuration says ``configured``."""
        name = self.given or configured
        if not self.number or (self.named and not self.given):
            return name
        return numbered(name, self.number) if NUMBER in name else f"{name}-{self.number}"


def members(args: Namespace, overrides: list[str]) -> Iterator[Member]:
    """The domains to create, with --count numbered in their names and in their overrides."""
    given = args.name or ""
    if not args.count:
        yield Member(0, overrides, given, named=False)
        return
    named = any(NUMBER in text and _NAMES.match(text) for text in overrides)
    for n in range(1, args.count + 1):
        yield Member(n, [numbered(text, n) for text in overrides], given, named)


def numbered(text: str, n: int) -> str:
    """The text of the n-th."""
    return text.replace(NUMBER, str(n))


def sources(args: Namespace) -> tuple[str, list[str]]:
    """The file and the overrides, the combination of options checked."""
    path, overrides = args.config, list(args.overrides)
    if args.defconfig:
        if path is not None:
            overrides.insert(0, path)
        path = args.defconfig
    problem = ""
    if path is None:
        problem = "no configuration file"
    elif args.count is not None and not 1 <= args.count <= COUNT_MAX:
        problem = f"--count needs a number from 1 to {COUNT_MAX}"
    elif args.keep_going and not args.count:
        problem = "--keep-going goes with --count"
    elif args.count and (args.console or args.foreground):
        problem = "--count goes with neither --console nor --foreground"
    elif args.console and args.foreground:
        problem = "--console does not go with --foreground"
    elif (args.console or args.foreground) and (args.json or args.profile):
        problem = "--json and --profile go with neither --console nor --foreground"
    if problem:
        raise UsageError(f"chaos create: {problem}", hint="see chaos create --help")
    return path, overrides


def _create(call: Invocation, builder: Builder, config: DomainConfig) -> Creation:
    args = call.args
    creation = Creation(config, call.host, builder, call.names, paused=args.paused)
    try:
        creation.run(UNPAUSED_STEPS if args.paused or args.console else CREATE_STEPS)
        if args.console:
            _console(call, creation, start=not args.paused)
        elif (args.profile or args.json) and not args.paused:
            wait_ready(creation, args.ready_timeout)
    except BaseException as error:
        creation.close()
        if creation.domid >= 0:
            with held():
                _take_back(call, creation, error)
        raise
    finally:
        creation.close()
    return creation


def _take_back(call: Invocation, creation: Creation, error: BaseException) -> None:
    """Destroy what was created; another command may have done so already."""
    uuid = str(creation.uuid)
    try:
        if call.names.read(uuid) is not None:
            destroy(call.host, call.names, find(call.host, call.names, uuid))
    except ChaosError as failure:
        error.add_note(str(failure))


def _console(call: Invocation, creation: Creation, *, start: bool) -> None:
    from chaos.console import Console
    from chaos.terminal import attach

    assert creation.record is not None
    with Console(call.host, call.names, creation.record) as console:
        if start:
            creation.run(CREATE_STEPS[len(UNPAUSED_STEPS) :])
        creation.close()  # its lock above all: others may rename or destroy the domain now
        ending = attach(call, console)
    if ending == "dead":
        _conclude(call, creation)


def _conclude(call: Invocation, creation: Creation) -> None:
    """Do what the configuration wants for a domain that died under its console."""
    from chaos.foreground import action_for

    info = call.host.ctrl.domain_info(creation.domid)
    if info is None or info.uuid != creation.uuid.bytes or info.dying:
        return
    if action_for(call, creation, info) == "destroy":
        destroy(call.host, call.names, find(call.host, call.names, str(creation.uuid)))


def report(call: Invocation, made: list[dict[str, Any]]) -> int:
    """Print what was made, as the options want it."""
    args = call.args
    if args.json:
        call.print_json(made if args.count else made[0])
    elif args.profile:
        for one in made:
            call.print(*_profile_lines(one))
    elif not args.quiet:
        for one in made:
            call.print(f"created {one['name']}, domain {one['domid']}")
    return 0


def _describe(creation: Creation) -> dict[str, Any]:
    return {
        "name": creation.config.name,
        "domid": creation.domid,
        "uuid": str(creation.uuid),
        "type": creation.config.type,
        "memory_mib": creation.config.memory,
        "vcpus": creation.config.vcpus,
        "noxs": creation.noxs,
        "paused": not creation.unpaused_ns,
        "profile": profile_json(creation),
    }


def _profile_lines(made: dict[str, Any]) -> list[str]:
    profile = made["profile"]
    lines = [f"{made['name']}, domain {made['domid']}"]
    lines += [
        f"  {step['phase']:8} {step['name']:<17} {step['ms']:9.3f} ms  {step['category']}"
        for step in profile["steps"]
    ]
    lines.append(f"  {'':8} {'create':<17} {profile['create_ms']:9.3f} ms")
    ready = profile["ready_ms"]
    if ready is not None:
        lines.append(f"  {'':8} {'unpause to ready':<17} {ready:9.3f} ms")
    elif not made["paused"]:
        lines.append(f"  {'':8} {'unpause to ready':<17} {'none':>9}     no ready event came")
    return lines
