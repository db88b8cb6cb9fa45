"""shutdown and reboot: ask guests to end by themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chaos.cli import seconds
from chaos.control import Control, Request
from chaos.domains import list_domains, owned, shutdown_name
from chaos.registry import BUILDING, ENDING
from noxs.abi import REQUEST_POWEROFF, REQUEST_REBOOT
from xenctypes.errors import ChaosError, StateError, UsageError

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from chaos.invocation import Invocation, Report
    from chaos.registry import Record

ANSWER_SECONDS = 10.0
EXIT_TIMEOUT = 124
WAITS = True  # for guests; for such verbs the daemon has threads of their own
CODES = {"shutdown": REQUEST_POWEROFF, "reboot": REQUEST_REBOOT}
DOING = {"shutdown": "shutting down", "reboot": "rebooting"}


def configure(parser: ArgumentParser, name: str) -> None:
    """Add the options."""
    parser.add_argument("domains", nargs="*", metavar="DOMAIN", help="name, domid or UUID")
    parser.add_argument(
        "-a", "--all", action="store_true", help="every domain that chaos made on this host"
    )
    parser.add_argument("-w", "--wait", action="store_true", help="wait until they have shut down")
    parser.add_argument(
        "-F",
        action="store_true",
        dest="fallback",
        help="ignored: xl's fallback to an ACPI event, which PV and PVH guests do not have",
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        metavar="S",
        help=f"how long to wait: for the answer ({ANSWER_SECONDS:g} s if not given), with --wait"
        " for the end (no limit if not given)",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="show no progress bar")
    parser.add_argument("--json", action="store_true", help=f"print how each took the {name}")


def run(call: Invocation) -> int:
    """Ask all, then collect the answers. Exit code 0: all agreed, 1: some did not, 124: silence."""
    args = call.args
    if bool(args.domains) == args.all:
        raise UsageError(f"chaos {args.verb}: name domains, or give --all")
    failures: list[ChaosError] = []
    ring = call.daemon.guests.ring if call.daemon is not None else None
    with Control(call.host, cancel=call.cancel, ring=ring) as control:
        targets = _targets(call, failures)
        with call.progress(DOING[args.verb], len(targets)) as told:
            for record in targets:
                try:
                    control.ask(record, CODES[args.verb])
                except ChaosError as error:
                    failures.append(error)
            late = _collect(control, wait=args.wait, timeout=args.timeout, report=told)
        if args.json:
            call.print_json([_describe(request) for request in control.requests])
        failures += [_refusal(request) for request in control.requests if request.result]
    for request in late:
        call.stderr.write(f"chaos: {_lateness(request)}\n")
    if failures:
        *others, last = failures
        for other in others:
            last.add_note(str(other))
        raise last
    return EXIT_TIMEOUT if late else 0


def _targets(call: Invocation, failures: list[ChaosError]) -> list[Record]:
    """Who is to be asked: nobody twice, and none of the dead, who cannot reboot either."""
    found = {}
    if call.args.all:
        listed = list_domains(call.host, call.names)
        pairs = [(domain, domain.record) for domain in listed if domain.record is not None]
        pairs = [
            (domain, record) for domain, record in pairs if record.state not in {BUILDING, ENDING}
        ]
    else:
        pairs = []
        for wanted in call.args.domains:
            try:
                pairs.append(owned(call.host, call.names, wanted))
            except ChaosError as error:
                failures.append(error)
    for domain, record in pairs:
        if not (domain.info.shutdown or domain.info.dying):
            found[record.uuid] = record
        elif call.args.verb == "reboot" and not call.args.all:
            failures.append(
                StateError(
                    f'domain "{record.name}" has shut down already',
                    hint="chaos destroy it, then create it again",
                )
            )
    return list(found.values())


def _collect(
    control: Control, *, wait: bool, timeout: float | None, report: Report
) -> list[Request]:
    """Wait as the options have it; returns those that did not come to an end in time."""
    if not wait:
        control.wait(ANSWER_SECONDS if timeout is None else timeout, report=report)
        return [r for r in control.requests if r.result is None and r.death is None]
    control.wait(timeout, dead=True, report=report)
    return [r for r in control.requests if not r.result and r.death is None]


def _refusal(request: Request) -> StateError:
    return StateError(
        f'domain "{request.record.name}" {request.problem()}', hint="chaos destroy ends it at once"
    )


def _lateness(request: Request) -> str:
    name = request.record.name
    if not request.rung:
        return (
            f'domain "{name}" cannot be told of the request: another process has its channel'
            " (if that is chaosd, ask it: leave --no-daemon out)"
        )
    if request.result is None:
        return (
            f'domain "{name}" has not answered; the request stays until it does'
            f" (is it paused or busy? chaos destroy {name} ends it at once)"
        )
    return f'domain "{name}" has agreed and not shut down yet'


def _describe(request: Request) -> dict[str, Any]:
    info = request.death.info if request.death is not None else None
    return {
        "name": request.record.name,
        "domid": request.record.domid,
        "uuid": request.record.uuid,
        "answered": request.result is not None,
        "problem": request.problem() or None,
        "dead": request.death is not None,
        "shutdown_reason": shutdown_name(info) if info is not None and info.shutdown else None,
    }
