"""What the parsers of the commands say, as plain values."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import NamedTuple

DOMAIN = "domain"
FILE = "file"


class Argument(NamedTuple):
    """An option (``flags``) or a positional (no flags).

    ``metavar`` is "" for an option without a value; ``completes`` is DOMAIN, FILE or "".
    """

    flags: tuple[str, ...]
    metavar: str
    text: str
    choices: tuple[str, ...] = ()
    completes: str = ""
    required: bool = False
    many: bool = False


class Command(NamedTuple):
    """A command or a verb: options, positionals, and verbs of its own."""

    name: str
    summary: str
    options: tuple[Argument, ...]
    positionals: tuple[Argument, ...]
    verbs: tuple[Command, ...] = ()


def of_parser(parser: argparse.ArgumentParser, name: str, summary: str = "") -> Command:
    """What a parser takes."""
    options: list[Argument] = []
    positionals: list[Argument] = []
    verbs: list[Command] = []
    for action in parser._actions:  # noqa: SLF001 - argparse has no other way to ask
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 - as above
            texts = {choice.dest: choice.help or "" for choice in action._choices_actions}  # noqa: SLF001
            verbs += [
                of_parser(sub, sub_name, texts.get(sub_name, ""))
                for sub_name, sub in action.choices.items()
            ]
        elif action.help != argparse.SUPPRESS:
            found = _argument(parser, action)
            (options if found.flags else positionals).append(found)
    summary = summary or (parser.description or "").partition(". ")[0].rstrip(".")
    return Command(name, summary, tuple(options), tuple(positionals), tuple(verbs))


def _argument(parser: argparse.ArgumentParser, action: argparse.Action) -> Argument:
    takes_value = action.nargs != 0
    shown = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    metavar = (shown if isinstance(shown, str) else " ".join(shown)) if takes_value else ""
    if action.choices is not None and action.metavar is None:
        metavar = "|".join(map(str, action.choices))
    formatter = parser._get_formatter()  # noqa: SLF001 - it alone fills in the defaults
    text = formatter._expand_help(action) if action.help else ""  # noqa: SLF001 - as above
    return Argument(
        flags=tuple(action.option_strings),
        metavar=metavar,
        text=text,
        choices=tuple(map(str, action.choices or ())),
        completes=_completes(action),
        required=action.required,
        many=action.nargs in {"*", "+"},
    )


def _completes(action: argparse.Action) -> str:
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    if action.dest in {"domain", "domains"} and not action.option_strings:
        return DOMAIN
    if action.dest in {"config", "defconfig"} or metavar in {"FILE", "DIR", "PATH", "SOCKET"}:
        return FILE
    return ""


def chaos() -> Command:
    """The command and its verbs, each with the options that the command adds to all."""
    from chaos.cli import VERBS, verb_parser

    verbs = []
    for name, verb in VERBS.items():
        module = import_module(f"chaos.verbs.{verb.module}")
        verbs.append(of_parser(verb_parser(name, module), name, verb.summary))
    options = (
        Argument(("-h", "--help"), "", "list the verbs"),
        Argument(("-V", "--version"), "", "print the version"),
        Argument(("-v", "--verbose"), "", "show the chain of causes of a failure"),
    )
    return Command("chaos", "a Xen toolstack", options, (), tuple(verbs))


DAEMONS = {
    "noxsd": "noxs.noxsd",
    "storesd": "noxs.storesd",
    "xendevd": "xendevd.xendevd",
    "chaosd": "chaos.daemon.main",
}
"""Modules with a function ``parser`` that returns the daemon's ArgumentParser."""


def daemon(name: str) -> Command | None:
    """A daemon's options; None if it is not in the tree, or has no function ``parser``."""
    try:
        module = import_module(DAEMONS[name])
    except ModuleNotFoundError:
        return None
    parser = getattr(module, "parser", None)
    return of_parser(parser(), name) if parser is not None else None
