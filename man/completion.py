"""Shell completion for bash, zsh and fish."""

from __future__ import annotations

from typing import TYPE_CHECKING

from man.commands import DOMAIN, FILE

if TYPE_CHECKING:
    from man.commands import Argument, Command

NAMES = "chaos list --names 2>/dev/null"


def quoted(words: str) -> str:
    """A word for any of the shells, in single quotes."""
    return "'" + words.replace("'", "'\\''") + "'"


def _leaves(command: Command, above: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Command]]:
    """Every verb with its path: ("pool", "add"), after the verb that it belongs to."""
    found = []
    for verb in command.verbs:
        path = (*above, verb.name)
        found += [(path, verb), *_leaves(verb, path)]
    return found


def bash(chaos: Command) -> str:
    """For bash, with nothing of the bash-completion package needed."""
    cases = []
    for path, verb in _leaves(chaos):
        flags = [flag for one in verb.options for flag in one.flags]
        kinds = {one.completes for one in verb.positionals}
        words = [word for one in verb.positionals for word in one.choices]
        words += [sub.name for sub in verb.verbs]
        body = [f"        options={quoted(' '.join(flags))}"]
        body += [f"        words={quoted(' '.join(words))}"] if words else []
        body += ["        domains=1"] if DOMAIN in kinds else []
        body += ["        files=1"] if FILE in kinds else []
        values = [one for one in verb.options if one.metavar]
        if values:
            body.append('        case "$previous" in')
            body += [f"        {'|'.join(one.flags)}) {_bash_value(one)};;" for one in values]
            body.append("        esac")
        cases.append(f"    {quoted(' '.join(path))})\n" + "\n".join(body) + "\n        ;;")
    below = sorted({path[0] for path, _ in _leaves(chaos) if len(path) > 1})
    nested = (
        f'{"|".join(below)}) [[ -n ${{at[1]-}} ]] && verb="${{at[0]}} ${{at[1]}}" ;;'
        if below
        else ""
    )
    return f"""\
# bash completion for chaos, made from the command's own parsers
_chaos() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}}
    local options='' words='' domains='' files='' values='' filevalue='' novalue='' verb='' word
    local -a at=()
    COMPREPLY=()
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        [[ $word == -* ]] || at+=("$word")
    done
    verb=${{at[0]-}}
    case "$verb" in
    {nested or "'') ;;"}
    esac
    case "$verb" in
    '')
        options={quoted(" ".join(flag for one in chaos.options for flag in one.flags))}
        words={quoted(" ".join(verb.name for verb in chaos.verbs))}
        ;;
{chr(10).join(cases)}
    esac
    if [[ -n $novalue ]]; then
        return
    elif [[ -n $values ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$values" -- "$current")
        return
    elif [[ -n $filevalue ]]; then
        compopt -o filenames 2>/dev/null
        mapfile -t COMPREPLY < <(compgen -f -- "$current")
        return
    fi
    if [[ $current == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$options" -- "$current")
        return
    fi
    [[ -n $words ]] && mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current")
    if [[ -n $domains ]]; then
        while IFS= read -r word; do
            # Not through compgen -W, which would expand what a name may hold.
            [[ $word == "$current"* ]] && COMPREPLY+=("$(printf %q "$word")")
        done < <({NAMES})
    fi
    if [[ -n $files ]]; then
        compopt -o filenames 2>/dev/null
        while IFS= read -r word; do COMPREPLY+=("$word"); done < <(compgen -f -- "$current")
    fi
}}
complete -F _chaos chaos
"""


def _bash_value(one: Argument) -> str:
    if one.choices:
        return f"values={quoted(' '.join(one.choices))} "
    return "filevalue=1 " if one.completes == FILE else "novalue=1 "


def zsh(chaos: Command) -> str:
    """For zsh, as an autoloaded function."""
    verbs = "\n".join(f"        {quoted(_zsh_pair(one))}" for one in chaos.verbs)
    cases = "\n".join(_zsh_case(one) for one in chaos.verbs)
    return f"""\
#compdef chaos
# zsh completion for chaos, made from the command's own parsers
_chaos_domains() {{
    local -a names
    names=("${{(@f)$({NAMES})}}")
    compadd -a names
}}
_chaos() {{
    local curcontext=$curcontext state line
    local -a verbs
    verbs=(
{verbs}
    )
    _arguments -C {" ".join(quoted(spec) for one in chaos.options for spec in _zsh_specs(one))} \\
        '1: :->verb' '*:: :->rest'
    case $state in
    verb) _describe verb verbs ;;
    rest)
        case $words[1] in
{cases}
        esac
        ;;
    esac
}}
_chaos "$@"
"""


def _zsh_pair(one: Command) -> str:
    return f"{one.name}:{one.summary}"


def _zsh_case(verb: Command) -> str:
    if verb.verbs:
        inner = "\n".join(
            "    " + line for sub in verb.verbs for line in _zsh_case(sub).splitlines()
        )
        pairs = " ".join(quoted(_zsh_pair(sub)) for sub in verb.verbs)
        return f"""\
        {verb.name})
            if (( CURRENT == 2 )); then
                local -a below=({pairs})
                _describe verb below
            else
                shift words; (( CURRENT-- ))
                case $words[1] in
{inner}
                esac
            fi ;;"""
    specs = [spec for one in verb.options for spec in _zsh_specs(one)]
    specs += [_zsh_positional(one) for one in verb.positionals]
    return f"        {verb.name}) _arguments -s {' '.join(map(quoted, specs))} ;;"


def _zsh_specs(one: Argument) -> list[str]:
    said = _zsh_text(one.text)
    value = f":{_zsh_text(one.metavar)}:{_zsh_action(one)}" if one.metavar else ""
    others = f"({' '.join(one.flags)})" if len(one.flags) > 1 else ""
    return [f"{others}{flag}[{said}]{value}" for flag in one.flags]


def _zsh_positional(one: Argument) -> str:
    return f"{'*' if one.many else ''}:{_zsh_text(one.metavar)}:{_zsh_action(one)}"


def _zsh_action(one: Argument) -> str:
    if one.choices:
        return f"({' '.join(one.choices)})"
    return {DOMAIN: "_chaos_domains", FILE: "_files"}.get(one.completes, "")


def _zsh_text(words: str) -> str:
    for letter in "\\:[]":
        words = words.replace(letter, "\\" + letter)
    return words


def fish(chaos: Command) -> str:
    """For fish."""
    lines = [
        "# fish completion for chaos, made from the command's own parsers",
        "complete -c chaos -f",
    ]
    lines += [_fish_option("__fish_use_subcommand", one) for one in chaos.options]
    for verb in chaos.verbs:
        lines.append(_fish("__fish_use_subcommand", f"-a {verb.name} -d {quoted(verb.summary)}"))
    for path, verb in _leaves(chaos):
        here = " ; and ".join(f"__fish_seen_subcommand_from {one}" for one in path)
        if verb.verbs:
            names = " ".join(sub.name for sub in verb.verbs)
            lines += [
                _fish(
                    f"{here} ; and not __fish_seen_subcommand_from {names}",
                    f"-a {sub.name} -d {quoted(sub.summary)}",
                )
                for sub in verb.verbs
            ]
        lines += [_fish_option(here, one) for one in verb.options]
        for one in verb.positionals:
            if one.completes == DOMAIN:
                lines.append(_fish(here, f"-a {quoted(f'({NAMES})')}"))
            elif one.completes == FILE:
                lines.append(_fish(here, "-F"))
            elif one.choices:
                lines.append(_fish(here, f"-a {quoted(' '.join(one.choices))}"))
    return "\n".join(lines) + "\n"


def _fish(condition: str, rest: str) -> str:
    return f"complete -c chaos -n {quoted(condition)} {rest}"


def _fish_option(condition: str, one: Argument) -> str:
    names = [f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in one.flags]
    value = ""
    if one.choices:
        value = f" -x -a {quoted(' '.join(one.choices))}"
    elif one.metavar:
        value = " -r -F" if one.completes == FILE else " -x"
    return _fish(condition, f"{' '.join(names)}{value} -d {quoted(one.text)}")
