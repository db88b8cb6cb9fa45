"""Manual pages in mdoc(7)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from man.commands import Argument, Command


def text(words: str) -> str:
    """A line of text that roff takes literally."""
    escaped = words.replace("\\", "\\e").replace("\n", " ")
    return "\\&" + escaped if escaped.startswith((".", "'")) else escaped


def word(one: str) -> str:
    """One argument of a macro: quoted, so that it is no macro's name, and with real hyphens."""
    escaped = one.replace("\\", "\\e").replace("-", "\\-").replace('"', '""')
    return f'"{escaped}"' if " " in escaped or '"' in escaped else f"\\&{escaped}"


def options(found: Iterable[Argument]) -> list[str]:
    """A list of options, or of anything else with names."""
    lines = []
    for one in found:
        if not one.text:
            continue  # the synopsis has it
        names = " , ".join(
            f"Fl {word(flag.removeprefix('-'))}"
            + (f" Ar {word(one.metavar)}" if one.metavar else "")
            for flag in one.flags
        )
        lines.append(f".It {names or f'Ar {word(one.metavar)}'}")
        lines.append(text(_sentence(one.text)))
    return [".Bl -tag -width Ds", *lines, ".El"] if lines else []


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:] + ("" if words.endswith(".") else ".")


def synopsis(command: Command, name: str) -> list[str]:
    """How a command is called, in one line."""
    lines = [f".Nm {name}" if not name.startswith("chaos ") else f".Nm chaos Cm {name[6:]}"]
    if any(one.flags[0] != "-h" for one in command.options):
        lines.append(".Op Ar options")
    for one in command.positionals:
        more = " ..." if one.many else ""
        macro = "Ar" if one.required and not one.many else "Op Ar"
        lines.append(f".{macro} {word(one.metavar)}{more}")
    if command.verbs:
        lines.append(".Ar verb ...")
    return lines


def verbs(found: Iterable[Command], prose: Mapping[str, str], above: str = "chaos") -> list[str]:
    """A section for each verb: how it is called, what is said of it, its options."""
    lines = []
    for verb in found:
        name = f"{above} {verb.name}"
        lines += [f".Ss {name}", *synopsis(verb, name), ".Pp", text(_sentence(verb.summary))]
        key = name.removeprefix("chaos ")
        if key in prose:
            lines += prose[key].strip().splitlines()
        lines += options(one for one in (*verb.positionals, *verb.options) if _worth_saying(one))
        lines += verbs(verb.verbs, prose, name)
    return lines


def _worth_saying(one: Argument) -> bool:
    return "-h" not in one.flags and "--verbose" not in one.flags


def settings(table: Iterable[Any]) -> list[str]:
    """The keys of chaos.toml that a table of chaos.daemon.settings has."""
    lines = [".Bl -tag -width Ds"]
    for one in table:
        kinds = {int: "a whole number", str: "a string", bool: "true or false", list: "a list"}
        lines.append(f".It Cm {word(one.key)}")
        said = [text(one.doc)]
        bounds = f", {one.low} to {one.high}" if one.kind is int and one.high < 1 << 31 else ""
        shown = {True: "true", False: "false"}.get(one.default) if one.kind is bool else one.default
        default = "" if shown in {"", ()} else f"; {shown} if not given"
        said.append(text(f"{kinds.get(one.kind, 'a value').capitalize()}{bounds}{default}."))
        lines += said
    return [*lines, ".El"]


def fill(page: str, parts: Mapping[str, list[str]]) -> str:
    """A page with every line that is ``@name@`` replaced. KeyError for a name that is unknown."""
    lines: list[str] = []
    for line in page.splitlines():
        if len(line) > 2 and line[0] == line[-1] == "@":
            lines += parts[line[1:-1]]
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"
