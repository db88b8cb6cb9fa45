"""The command: finds the verb, imports only that one, runs it, turns errors into one line.

Exit codes: 0 done; 1 it failed; 2 the command line or a configuration is wrong;
3 `wait`: the domain died before it was ready; 124 `wait`, `shutdown`, `reboot`: timed out;
130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from chaos import __version__
from chaos.signals import raise_on_end
from xenctypes.errors import ChaosError, ConfigError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_INTERRUPTED = 130
SECONDS_MAX = 10**6
NO_DAEMON = "--no-daemon"
"""Has the verb run here, whatever daemon there is (client/chaos.c heeds it too)."""


class Verb(NamedTuple):
    """A verb's module below chaos.verbs, and its line in the help."""

    module: str
    summary: str


VERBS = {
    "create": Verb("create", "create a domain from a configuration file"),
    "list": Verb("list", "list domains"),
    "destroy": Verb("destroy", "end domains at once"),
    "shutdown": Verb("shutdown", "ask domains to power off"),
    "reboot": Verb("shutdown", "ask domains to reboot"),
    "sysrq": Verb("targets", "send a SysRq key to a domain's kernel"),
    "mem-set": Verb("targets", "set how much memory a domain is to have"),
    "vcpu-set": Verb("targets", "set how many of a domain's vCPUs are to be online"),
    "network-list": Verb("network", "list a domain's vifs"),
    "network-attach": Verb("network", "give a running domain another vif"),
    "network-detach": Verb("network", "take a vif away from a running domain"),
    "block-list": Verb("block", "list a domain's disks"),
    "block-attach": Verb("block", "give a running domain another disk"),
    "block-detach": Verb("block", "take a disk away from a running domain"),
    "pause": Verb("pause", "stop a domain from running"),
    "unpause": Verb("pause", "let a paused domain run"),
    "console": Verb("console", "attach to a domain's console; Ctrl-] leaves"),
    "logs": Verb("logs", "show what a domain's console said"),
    "wait": Verb("wait", "wait until a domain is ready or dead"),
    "domid": Verb("names", "print the domid of a name"),
    "domname": Verb("names", "print the name of a domid"),
    "rename": Verb("names", "give a domain another name"),
    "top": Verb("top", "show what domains use, live"),
    "events": Verb("events", "print what happens to domains, as it happens"),
    "pool": Verb("pool", "list and change the shells that chaosd holds ready"),
    "profile": Verb("profile", "show where the time of a create goes, from many of them"),
    "info": Verb("info", "print information on the host"),
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError naming the command to ask for help."""
        raise UsageError(f"{self.prog}: {message}", hint=f"see {self.prog} --help")


def seconds(text: str) -> float:
    """An option's argument in seconds."""
    value = float(text)
    if not 0 <= value <= SECONDS_MAX:
        raise argparse.ArgumentTypeError(f"{text} is not within 0 to {SECONDS_MAX} seconds")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    _open_standard_streams()
    raise_on_end()
    arguments = list(sys.argv[1:] if argv is None else argv)
    verbose = False
    try:
        while arguments and arguments[0] in {"-v", "--verbose", NO_DAEMON}:
            if arguments.pop(0) == NO_DAEMON:
                os.environ["CHAOS_NO_DAEMON"] = "1"
            else:
                verbose = True
        return _run(arguments, verbose=verbose)
    except SystemExit as ending:  # --help and --version of argparse
        return ending.code if isinstance(ending.code, int) else 0
    except ChaosError as error:
        chain = verbose or "-v" in arguments or "--verbose" in arguments
        sys.stderr.write(describe_error(error, verbose=chain))
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        for note in getattr(interrupt, "__notes__", ()):
            sys.stderr.write(f"chaos: {note}\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; keep the interpreter from saying so at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        sys.stderr.write(f"chaos: {error.strerror or error}\n")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _open_standard_streams() -> None:
    """Put /dev/null where a standard stream is closed: the next file opened must not become it."""
    names = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))
    for fd, (name, mode) in enumerate(names):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
            setattr(sys, name, open(fd, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def _run(arguments: list[str], *, verbose: bool) -> int:
    if not arguments or arguments[0] in {"-h", "--help", "help"}:
        if arguments[1:2] and arguments[1] in VERBS:
            return _run([arguments[1], "--help"], verbose=verbose)
        sys.stdout.write(usage())
        return 0 if arguments else UsageError.exit_code
    name, *rest = arguments
    if name in {"-V", "--version"}:
        sys.stdout.write(f"chaos {__version__}\n")
        return 0
    verb = VERBS.get(name)
    if verb is None:
        raise UsageError(f'no verb "{name}"', hint=_nearest(name))
    gc.disable()  # a fifth of the import, which throws nothing away
    module = import_module(f"chaos.verbs.{verb.module}")
    gc.enable()
    args = verb_parser(name, module).parse_intermixed_args(rest)

    from chaos.host import Host
    from chaos.invocation import Invocation
    from chaos.registry import Registry

    with Host() as host:
        code: int = module.run(Invocation(args, host, Registry()))
        sys.stdout.flush()
        return code


def verb_parser(name: str, module: Any) -> Parser:
    """The parser of a verb's arguments; ``module`` is the verb's, imported."""
    parser = Parser(prog=f"chaos {name}", description=VERBS[name].summary, allow_abbrev=False)
    parser.set_defaults(verb=name)
    parser.add_argument("-v", "--verbose", action="store_true", help="show the chain of causes")
    module.configure(parser, name)
    return parser


def usage() -> str:
    """The text of `chaos --help`."""
    width = max(map(len, VERBS))
    lines = [f"  {name:{width}}  {verb.summary}" for name, verb in VERBS.items()]
    return (
        "usage: chaos [-v] [--no-daemon] VERB [OPTION...]\n\n"
        "Boots Xen domains faster than a process forks.\n\n"
        + "\n".join(lines)
        + "\n\nchaos VERB --help tells more. A domain is named by its name, domid or UUID.\n"
    )


def _nearest(name: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, VERBS, n=1)
    return f"did you mean {close[0]}?" if close else "see chaos --help"


def describe_error(error: ChaosError, *, verbose: bool) -> str:
    """What a user is told of a failure: one line, the place in a file, with -v the causes."""
    lines = [f"chaos: {error}"]
    if isinstance(error, ConfigError) and error.source:
        lines.append(error.excerpt)
    lines += [f"chaos: {note}" for note in getattr(error, "__notes__", ())]
    if verbose:
        cause = error.__cause__
        while cause is not None:
            lines.append(f"  caused by {type(cause).__name__}: {cause}")
            cause = cause.__cause__
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
