"""Writes manual pages and completions below a directory: python3 -m man DIR."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path

from man import commands, completion, mdoc

HERE = Path(__file__).parent
DAEMON_PAGES = ("noxsd", "storesd", "xendevd", "chaosd")


def outputs() -> dict[str, str]:
    """All files: the path below an installation's prefix, and the text."""
    chaos = commands.chaos()
    found = {
        "share/man/man1/chaos.1": _page("chaos.1", verbs=mdoc.verbs(chaos.verbs, _prose(chaos))),
        "share/man/man5/chaos.toml.5": _page("chaos.toml.5", **_settings()),
        "share/bash-completion/completions/chaos": completion.bash(chaos),
        "share/zsh/site-functions/_chaos": completion.zsh(chaos),
        "share/fish/vendor_completions.d/chaos.fish": completion.fish(chaos),
    }
    for name in DAEMON_PAGES:
        command = commands.daemon(name)
        if command is not None:
            parts = {"options": mdoc.options(command.options)}
            found[f"share/man/man8/{name}.8"] = _page(f"{name}.8", **parts)
    return found


def _page(name: str, **parts: list[str]) -> str:
    return mdoc.fill((HERE / f"{name}.mdoc").read_text(encoding="utf-8"), parts)


def _prose(chaos: commands.Command) -> dict[str, str]:
    """What verbs.mdoc says of each verb. ValueError for a verb that does not exist."""
    text = (HERE / "verbs.mdoc").read_text(encoding="utf-8")
    parts = re.split(r'^\.\\" verb ', text, flags=re.MULTILINE)
    prose = {}
    for part in parts[1:]:
        name, _, said = part.partition("\n")
        prose[name.strip()] = said
    known = {verb.name for verb in chaos.verbs}
    for name in prose:
        if name.split(" ", maxsplit=1)[0] not in known:
            raise ValueError(f"verbs.mdoc: there is no verb {name}")
    return prose


def _settings() -> dict[str, list[str]]:
    try:
        module = import_module("chaos.daemon.settings")
    except ModuleNotFoundError:
        return {"daemon": [], "pool": [], "flavour": []}
    sections = {
        name: mdoc.settings(one for one in module.SETTINGS if one.section == name)
        for name in ("daemon", "pool")
    }
    return {**sections, "flavour": mdoc.settings(module.FLAVOUR_SETTINGS)}


def write(directory: Path) -> dict[str, str]:
    """Write all files; returns {absolute path: path below the prefix}, as hatchling wants it."""
    written = {}
    for name, content in outputs().items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        written[str(path)] = name
    return written


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python3 -m man DIR")
    write(Path(sys.argv[1]))
