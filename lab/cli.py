"""The command line of the lab.

Exit status: that of the command in Dom0 (128 + n if signal n ended it, 126 and 127 as
shells have it); 124 after --timeout; 125 if the lab itself failed; 2 for wrong usage.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lab import cache, image, machine, progress, project
from lab.channel import HANG_SECONDS, Request, Session
from lab.errors import ChaosError, Crash, LabError, UsageError
from lab.machine import Machine, Options
from lab.release import DEFAULT_RELEASE, RELEASES, release

DESCRIPTION = """\
A real Xen host in QEMU, built from Debian packages: a stock hypervisor, a stock Dom0.

The working tree is at /src in Dom0 (read-only), lab-out/ at /out, the project is installed
from its wheel, the bridge xenbr0 has 10.77.0.1/24. One lab runs on a host at a time, and
one more for each name that CHAOS_LAB is set to."""

EPILOG = """\
exit status: that of the command in Dom0; 128+n if signal n ended it; 124 after --timeout;
125 if the lab failed (the end of the serial log is on stderr); 2 for a wrong command line"""


def main(argv: list[str] | None = None) -> int:
    """Run one verb; return the exit status."""
    options = _parser().parse_args(argv)
    return guarded(lambda: int(options.call(options)))


def guarded(call: Callable[[], int]) -> int:
    """Call it, and return its exit status: with errors told, and labs ended by signals too."""
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGHUP, _terminate)
    try:
        return call()
    except Crash as error:
        if error.serial:
            print("--- end of the serial log ---", error.serial, "---", sep="\n", file=sys.stderr)
        progress.say(str(error))
        return error.exit_code
    except ChaosError as error:
        progress.say(str(error))
        return error.exit_code
    except BrokenPipeError:
        # Nobody reads our output any more; keep Python from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _terminate(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/lab",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, call: object, text: str, more: str = "") -> argparse.ArgumentParser:
        sub = verbs.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}. {more}".strip(),
            epilog=EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(call=call, verb=name)
        return sub

    sub = verb("build", _build, "make the Dom0 image, unless it is in the cache")
    _release_option(sub)
    sub = verb("run", _run, "boot a lab, run one command in it, power off")
    _machine_options(sub)
    _command_options(sub)
    sub = verb(
        "shell",
        _shell,
        "an interactive shell in Dom0",
        "Uses the lab that is up, or boots one for as long as the shell lasts.",
    )
    _machine_options(sub)
    sub = verb("up", _up, "boot a lab and keep it for exec, shell and down")
    _machine_options(sub)
    sub = verb(
        "exec",
        _exec,
        "run a command in the lab that is up",
        "Edits to the working tree are seen at once: the wheel is built and installed again"
        "\nwhen its sources changed. Several commands may run at a time.",
    )
    sub.add_argument("-t", "--tty", action="store_true", help="give the command a terminal")
    _command_options(sub)
    verb("down", _down, "power off the lab that is up")
    sub = verb("status", _status, "say what runs and which images there are")
    sub.add_argument("--json", action="store_true", help="as one JSON object")
    return parser


def _release_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--debian",
        choices=RELEASES,
        default=DEFAULT_RELEASE,
        help="Debian release of Dom0 (default: %(default)s)",
    )


def _machine_options(parser: argparse.ArgumentParser) -> None:
    _release_option(parser)
    default = Options()
    parser.add_argument(
        "--memory",
        type=_size,
        default=default.memory,
        metavar="SIZE",
        help="memory of the whole machine, like 512M or 17G (default: 4G)",
    )
    parser.add_argument(
        "--dom0-memory",
        type=_size,
        default=default.dom0_memory,
        metavar="SIZE",
        help="memory of Dom0 (default: 1G)",
    )
    parser.add_argument(
        "--cpus",
        type=int,
        default=min(default.cpus, os.cpu_count() or 1),
        metavar="N",
        help="CPUs of the machine (default: %(default)s)",
    )
    parser.add_argument(
        "--dom0-cpus",
        type=int,
        default=default.dom0_cpus,
        metavar="N",
        help="CPUs of Dom0 (default: all); with 1 it pays least for emulated interrupts"
        " between them, which is what benchmarks want",
    )
    parser.add_argument(
        "--xenstored",
        action="store_true",
        help="start xenstored and xenconsoled, so that xl works",
    )
    parser.add_argument(
        "--init",
        choices=("lab", "systemd"),
        default=default.init,
        help="first process of Dom0: the lab's own (fast) or systemd (default: %(default)s)",
    )


def _size(text: str) -> int:
    try:
        return machine.parse_size(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _command_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--timeout",
        type=_seconds,
        metavar="S",
        help="give up when the command runs longer than S seconds (exit status 124)",
    )
    parser.add_argument(
        "--hang-timeout",
        type=_seconds,
        default=HANG_SECONDS,
        metavar="S",
        help="give the lab up when Dom0 is silent for S seconds (default: %(default)g)",
    )
    parser.add_argument(
        "-e",
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="set a variable in the command's environment (repeatable)",
    )
    parser.add_argument("-C", "--cwd", default="/src", help="where it runs (default: %(default)s)")
    parser.add_argument("command", nargs="+", metavar="CMD", help="after --: command, arguments")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < 1e7:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def _options(arguments: argparse.Namespace) -> Options:
    options = Options(
        debian=arguments.debian,
        memory=arguments.memory,
        dom0_memory=arguments.dom0_memory,
        cpus=arguments.cpus,
        dom0_cpus=arguments.dom0_cpus,
        xenstored=arguments.xenstored,
        init=arguments.init,
    )
    options.check()
    return options


def _request(arguments: argparse.Namespace, *, terminal: bool = False) -> Request:
    env = {}
    for setting in arguments.env:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise UsageError(f"-e {setting}: not NAME=VALUE")
        env[name] = value
    return Request(
        argv=arguments.command,
        env=env | _terminal_env(terminal=terminal),
        cwd=arguments.cwd,
        terminal=terminal,
        timeout=arguments.timeout,
        hang=arguments.hang_timeout,
    )


def _terminal_env(*, terminal: bool) -> dict[str, str]:
    return {"TERM": os.environ.get("TERM", "dumb")} if terminal else {}


def _stdin() -> int | None:
    """Our standard input, unless reading it would stop us (a job in the background)."""
    try:
        if os.isatty(0) and os.tcgetpgrp(0) != os.getpgrp():
            return None
        os.fstat(0)
    except OSError:
        return None
    return 0


@contextmanager
def booted(verb: str, options: Options, *, keep: bool = False) -> Iterator[tuple[Machine, Session]]:
    """Boot a lab and install the project; yields it with a session.

    The machine ends with the block unless ``keep`` and the block succeeds.
    """
    home = image.ensure(release(options.debian))
    wheel = project.wheel()
    project.guests()
    before = time.monotonic()
    lab = machine.start(verb, home, project.wheels(), options, keep=keep)
    done = False
    try:
        progress.say(
            f"booting Debian {options.debian}, Xen {home.release.xen}"
            f"{', xenstored' if options.xenstored else ''}"
        )
        with Session(lab, booting=True) as session:
            booted = time.monotonic()
            _install(lab, session, wheel)
            progress.say(
                f"Dom0 is up ({booted - before:.1f} s),"
                f" the project installed ({time.monotonic() - booted:.1f} s)"
            )
            yield lab, session
            if not keep:
                session.power_off()
        done = True
    finally:
        if not (keep and done):
            lab.kill()


def _install(lab: Machine, session: Session, wheel: str) -> None:
    request = Request(["python3", "/run/lab/lab/dom0/install.py", f"/wheels/{wheel}"], cwd="/")
    if session.run(request, quiet=True):
        raise LabError(f"the wheel {wheel} does not install in Dom0")
    lab.wheel = wheel
    lab.save()


def _build(arguments: argparse.Namespace) -> int:
    chosen = release(arguments.debian)
    cached = image.find(chosen)
    before = time.monotonic()
    home = cached or image.ensure(chosen)
    how = "is in the cache" if cached else f"built in {time.monotonic() - before:.0f} s"
    progress.say(f"Debian {chosen.number} image {how}: {home.path}")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    options = _options(arguments)
    request = _request(arguments)
    with booted("run", options) as (_, session):
        return session.run(request, _stdin())


def _up(arguments: argparse.Namespace) -> int:
    with booted("up", _options(arguments), keep=True):
        pass
    progress.say("scripts/lab exec -- CMD runs commands in it, scripts/lab down ends it")
    return 0


def _running() -> Machine:
    lab = machine.current()
    if not lab or lab.verb != "up":
        raise LabError("no lab is up", hint="scripts/lab up boots one")
    return lab


@contextmanager
def _joined(lab: Machine) -> Iterator[Session]:
    """A session in the lab that is up, with the project as the working tree has it.

    A lab that turns out to be dead is removed.
    """
    if lab.tree != str(cache.TREE):
        raise LabError(f"the lab that is up is of another tree, {lab.tree}")
    wheel = project.wheel()
    project.guests()
    try:
        with Session(lab) as session:
            with cache.locked("install.lock"):
                lab = _running()
                if lab.wheel != wheel:
                    _install(lab, session, wheel)
            yield session
    except Crash as error:
        if error.exit_code == LabError.exit_code:
            lab.kill()
        raise


def _exec(arguments: argparse.Namespace) -> int:
    if arguments.tty and not os.isatty(0):
        raise UsageError("--tty: standard input is not a terminal")
    request = _request(arguments, terminal=arguments.tty)
    with _joined(_running()) as session:
        return session.run(request, _stdin())


def _shell(arguments: argparse.Namespace) -> int:
    if not os.isatty(0):
        raise UsageError("shell: standard input is not a terminal", hint="see run and exec")
    request = Request(["bash", "-l"], env=_terminal_env(terminal=True), terminal=True)
    lab = machine.current()
    if lab and lab.verb == "up":
        with _joined(lab) as session:
            return session.run(request, 0)
    with booted("shell", _options(arguments)) as (_, session):
        return session.run(request, 0)


def _down(_: argparse.Namespace) -> int:
    lab = machine.current()
    if not lab:
        progress.say("no lab is up")
        return 0
    if lab.verb != "up":
        raise LabError(f"the lab that runs is that of `lab {lab.verb}`", hint="wait for its end")
    try:
        with Session(lab, channel=0) as session:
            session.power_off()
    except LabError as error:
        progress.say(f"{error}: ending QEMU")
    finally:
        lab.kill()
    progress.say("the lab is down")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    lab = machine.current()
    images = {number: image.find(known) for number, known in RELEASES.items()}
    facts: dict[str, object] = {
        "running": None,
        "others": {name: other.pid for name, other in machine.others().items()},
        "images": {number: str(found.path) if found else None for number, found in images.items()},
    }
    if lab:
        facts["running"] = {
            "verb": lab.verb,
            "debian": lab.options.debian,
            "xen": release(lab.options.debian).xen,
            "xenstored": lab.options.xenstored,
            "init": lab.options.init,
            "memory": lab.options.memory,
            "dom0_memory": lab.options.dom0_memory,
            "cpus": lab.options.cpus,
            "dom0_cpus": lab.options.dom0_cpus or lab.options.cpus,
            "pid": lab.pid,
            "since": lab.since,
            "tree": lab.tree,
            "serial": str(lab.serial),
            "commands": machine.busy(lab),
        }
    if arguments.json:
        print(json.dumps(facts))
        return 0
    if lab:
        minutes = (time.time() - lab.since) / 60
        print(
            f"running: lab {lab.verb}, Debian {lab.options.debian},"
            f" Xen {release(lab.options.debian).xen}"
            f"{', xenstored' if lab.options.xenstored else ''},"
            f" {lab.options.memory >> 20} MB, for {minutes:.0f} min, QEMU's pid {lab.pid},"
            f" {machine.busy(lab)} commands\n  tree {lab.tree}\n  serial log {lab.serial}"
        )
    else:
        print("running: none")
    for name, other in machine.others().items():
        print(f"beside it: {name or 'the one without a name'}, QEMU's pid {other.pid}")
    for number, found in images.items():
        print(f"Debian {number}: {found.path if found else 'no image (scripts/lab build)'}")
    return 0
