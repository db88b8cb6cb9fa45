"""Manual pages and completion: complete, well-formed, and in real shells."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from chaos.cli import VERBS
from man import commands, mdoc
from man.__main__ import outputs, write

PAGES = ("share/man/man1/chaos.1", "share/man/man5/chaos.toml.5", "share/man/man8/noxsd.8")
BASH = "share/bash-completion/completions/chaos"
ZSH = "share/zsh/site-functions/_chaos"
FISH = "share/fish/vendor_completions.d/chaos.fish"


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return outputs()


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prefix with the files, and a chaos that knows three domains."""
    folder = tmp_path_factory.mktemp("prefix")
    write(folder)
    (folder / "bin").mkdir()
    stub = folder / "bin" / "chaos"
    stub.write_text(
        "#!/bin/sh\n"
        '[ "$*" = "list --names" ] || exit 9\n'
        "printf '%s\\n' Domain-0 web-1 web-2 'odd $(touch pwned)'\n"
    )
    stub.chmod(0o755)
    return folder


def test_every_verb_and_option_is_on_the_page(made: dict[str, str]) -> None:
    page = made[PAGES[0]]
    for verb in commands.chaos().verbs:
        assert f".Ss chaos {verb.name}\n" in page
        for one in verb.options:
            for flag in one.flags:
                if flag not in {"-h", "--help", "-v", "--verbose"}:
                    assert f"Fl {mdoc.word(flag.removeprefix('-'))}" in page, (verb.name, flag)
    assert [verb.name for verb in commands.chaos().verbs] == list(VERBS)


def test_every_daemon_in_the_tree_has_its_page(made: dict[str, str]) -> None:
    root = Path(commands.__file__).parents[1]
    for name, module in commands.DAEMONS.items():
        if (root / f"{module.replace('.', '/')}.py").exists():
            assert f"share/man/man8/{name}.8" in made, f"{module} needs a function parser()"


def test_every_setting_is_on_the_page(made: dict[str, str]) -> None:
    settings = pytest.importorskip("chaos.daemon.settings", reason="not in this tree")
    page = made[PAGES[1]]
    for one in (*settings.SETTINGS, *settings.FLAVOUR_SETTINGS):
        assert f".It Cm {mdoc.word(one.key)}\n" in page


BLOCKS = {"Bl": "El", "Bd": "Ed"}
MACROS = {
    *("Dd", "Dt", "Os", "Sh", "Ss", "Nm", "Nd", "Op", "Ar", "Fl", "Cm", "Pp", "It", "Xr"),
    *("Dq", "Ql", "Ev", "Pa", *BLOCKS, *BLOCKS.values()),
}


def faults(page: str) -> list[str]:
    """What is wrong with a page: macros that do not exist, blocks that do not match."""
    found = []
    open_blocks: list[str] = []
    for number, line in enumerate(page.splitlines(), 1):
        if not line:
            found.append(f"{number}: an empty line")
        if re.search(r"@\w+@", line):
            found.append(f"{number}: {line}: left over")
        if not line.startswith("."):
            continue
        macro = line[1:].split(" ")[0]
        if macro not in MACROS:
            found.append(f"{number}: no macro {macro}")
        if macro in BLOCKS:
            open_blocks.append(BLOCKS[macro])
        elif macro in BLOCKS.values() and (not open_blocks or open_blocks.pop() != macro):
            found.append(f"{number}: .{macro} closes nothing")
        if macro == "It" and "El" not in open_blocks:
            found.append(f"{number}: .It outside a list")
    names = re.findall(r"^\.Sh (.+)$", page, re.MULTILINE)
    if names[:3] != ["NAME", "SYNOPSIS", "DESCRIPTION"] or open_blocks:
        found.append(f"sections {names}, open {open_blocks}")
    return found


def test_the_pages_are_well_formed(made: dict[str, str]) -> None:
    pages = [name for name in made if "/man/" in name]
    assert set(PAGES) <= set(pages)
    for name in pages:
        assert not faults(made[name].replace("\n\n", "\n")), name


def test_a_malformed_page_is_noticed() -> None:
    head = ".Sh NAME\n.Sh SYNOPSIS\n.Sh DESCRIPTION\n"
    assert not faults(head + ".Bl -tag\n.It x\n.El\n")
    for wrong in (".It x\n", ".Bl -tag\n", ".El\n", ".Zz\n", "@verbs@\n", ".Bl -tag\n.Ed\n"):
        assert faults(head + wrong), wrong


@pytest.mark.parametrize("tool", ["mandoc", "groff"])
def test_formatters_do_not_complain(prefix: Path, tool: str) -> None:
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed; test_the_pages_are_well_formed has run")
    command = {
        "mandoc": ["mandoc", "-T", "lint", "-W", "warning"],
        "groff": ["groff", "-ww", "-b", "-z", "-mandoc", "-Tutf8"],
    }[tool]
    for page in (prefix / "share/man").rglob("*.[158]"):
        run = subprocess.run([*command, page], capture_output=True, text=True, check=False)
        assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_texts_are_taken_literally() -> None:
    assert mdoc.text(".Sh \\fB'") == "\\&.Sh \\efB'"
    assert mdoc.word("Ar") == "\\&Ar"
    assert mdoc.word('a "b"-c') == '"a ""b""\\-c"'
    with pytest.raises(KeyError):
        mdoc.fill("@nothing@\n", {})


def complete(prefix: Path, *words: str) -> list[str]:
    """What bash offers for a command line whose last word is being typed."""
    script = f"""
        PATH={shlex.quote(str(prefix / "bin"))}:$PATH
        . {shlex.quote(str(prefix / BASH))}
        COMP_WORDS=({" ".join(map(shlex.quote, words))})
        COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        _chaos
        [ ${{#COMPREPLY[@]}} = 0 ] || printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    run = subprocess.run(
        ["bash", "--norc", "-uc", script], capture_output=True, text=True, cwd=prefix, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout.splitlines()


def test_bash_completes(prefix: Path) -> None:
    assert complete(prefix, "chaos", "cre") == ["create"]
    assert set(complete(prefix, "chaos", "")) == set(VERBS)
    assert complete(prefix, "chaos", "destroy", "web-") == ["web-1", "web-2"]
    assert complete(prefix, "chaos", "destroy", "-a", "web-1", "D") == ["Domain-0"]
    assert complete(prefix, "chaos", "shutdown", "--ti") == ["--timeout"]
    assert complete(prefix, "chaos", "shutdown", "--timeout", "") == []
    assert "rx" in complete(prefix, "chaos", "top", "--sort", "")
    assert complete(prefix, "chaos", "-v", "lis") == ["list"]
    assert complete(prefix, "chaos", "--ver") == ["--version", "--verbose"]
    assert complete(prefix, "chaos", "nothing", "") == []


def test_bash_completes_files_for_create(prefix: Path) -> None:
    (prefix / "one.cfg").touch()
    assert complete(prefix, "chaos", "create", "on") == ["one.cfg"]
    assert complete(prefix, "chaos", "create", "--defconfig", "on") == ["one.cfg"]


def test_a_domain_s_name_is_never_run(prefix: Path) -> None:
    assert complete(prefix, "chaos", "pause", "odd") == ["odd\\ \\$\\(touch\\ pwned\\)"]
    assert not (prefix / "pwned").exists()


def test_the_other_shells_scripts(made: dict[str, str], prefix: Path) -> None:
    """Their words are balanced, and every verb and option is there; the shells read them."""
    for line in made[FISH].splitlines():
        words = shlex.split(line, comments=True)
        assert not words or words[:3] == ["complete", "-c", "chaos"]
    for verb in commands.chaos().verbs:
        assert f"-a {verb.name} " in made[FISH]
        assert re.search(rf"^ +{verb.name}\) _arguments", made[ZSH], re.MULTILINE)
        for flag in (flag for one in verb.options for flag in one.flags):
            assert re.search(rf"{flag}\[", made[ZSH])
            assert f"-{'l' if flag.startswith('--') else 's'} {flag.lstrip('-')} " in made[FISH]
    for shell, path in (("zsh", ZSH), ("fish", FISH)):
        if shutil.which(shell):
            run = subprocess.run(
                [shell, "-n", prefix / path], capture_output=True, text=True, check=False
            )
            assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.skipif(not shutil.which("fish"), reason="fish is not installed")
def test_fish_completes(prefix: Path) -> None:
    def offers(line: str) -> list[str]:
        setup = f"set -x PATH {prefix}/bin $PATH; source {prefix / FISH}"
        script = f"{setup}; complete -C {shlex.quote(line)}"
        run = subprocess.run(
            ["fish", "-N", "-c", script], capture_output=True, text=True, check=True, cwd=prefix
        )
        return [one.split("\t")[0] for one in run.stdout.splitlines()]

    assert offers("chaos cre") == ["create"]
    assert offers("chaos destroy web-") == ["web-1", "web-2"]
    assert offers("chaos shutdown --tim") == ["--timeout"]
    assert "rx" in offers("chaos top --sort ")
