r"""The syntax of xl.cfg(5): bytes in, settings with their places out.  Pure.

The language is the one that libxlutil reads (Xen's tools/libs/util: libxlu_cfg_l.l,
libxlu_cfg_y.y, libxlu_cfg.c) since 4.13, which added ``+=``; tests/unit/test_xlcfg.py holds the
two against each other::

    file     = { [ setting ] ( newline | ";" ) } [ setting ]
    setting  = name ( "=" | "+=" ) value
    value    = string | number | "[" [ value { "," value } [ "," ] ] "]"
    name     = a-z { a-z 0-9 . _ }
    number   = 0-9 { 0-9 a-f x }
    string   = '...' or "..." on one line
    comment  = "#" up to and with the end of the line

Line ends are free inside a list and nowhere else.  Strings and numbers are one kind of value, an
*atom*: whoever asks for an integer gets the text through strtol(3) in base 0, so that ``010`` and
``"010"`` are both 8.  The last setting of a name counts.

libxlutil has two habits that we share and warn about: a single stray character at the very end
of the text is ignored, and an octal escape in a string adds nothing to it (``\x`` is always
refused).  We part from it where it is unsafe: a NUL in a string aborts it and is an error here;
lists nest to MAX_DEPTH instead of about 5000; the text is at most MAX_BYTES.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from chaos.xldoc import Atom, Document, ListValue, Setting, Source, Value, printable, quote
from xenctypes.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_BYTES = 1 << 20  # of the file and its overrides together
MAX_DEPTH = 32  # of nested lists; the deepest value that xl knows (vsnd) has 3
COMMAND_LINE = "command line"  # what errors call the overrides

_TOKEN = re.compile(
    rb"""
      (?P<space>   [ \t]+ )
    | (?P<newline> \n | \#[^\n]*\n )
    | (?P<name>    [a-z][._0-9a-z]* )
    | (?P<number>  [0-9][0-9a-fx]* )
    | (?P<string>  '[^'\\\n]*(?:\\[^\n][^'\\\n]*)*' | "[^"\\\n]*(?:\\[^\n][^"\\\n]*)*" )
    | (?P<mark>    \+= | [=,;\[\]] )
    """,
    re.VERBOSE,
)
_STRTOUL = re.compile(rb"[ \t\v\f\r]*[+-]?[0-9]+")
_ESCAPES = dict(zip(b"abtnvfr\"'\\", b"\a\b\t\n\v\f\r\"'\\", strict=True))
_MAX_WARNINGS = 20  # a hostile text could cause a million


def parse(text: bytes | str, filename: str, overrides: Sequence[str] = ()) -> Document:
    """Read a configuration and the ``key=value`` texts of the command line that follow it.

    xl appends a newline and the overrides, one a line, to the file's text, and so do we
    (tools/xl/xl_vmcontrol.c, create_domain).  Raise ConfigError at the first mistake.
    """
    data = _encode(text)
    pieces = [(0, printable(filename))]
    if overrides:
        data += b"\n"
        pieces.append((len(data), COMMAND_LINE))
        data += b"".join(_encode(override) + b"\n" for override in overrides) + b"\n"
    if len(data) > MAX_BYTES:
        raise ConfigError(f"longer than {MAX_BYTES} bytes", filename=printable(filename))
    return _Parser(Source(data, tuple(pieces))).document()


def _encode(text: bytes | str) -> bytes:
    return text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text


class _Parser:
    """One pass over the text with one token of look-ahead: ``kind`` and ``start``:``end``."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.text = source.text
        self.warnings: list[str] = []
        self.settings: list[Setting] = []
        self.sums: dict[str, list[Setting]] = {}  # by name: the last "=" and what was added to it
        self.kind = ""
        self.start = self.end = 0

    def document(self) -> Document:
        """Read it all: settings, separated by line ends and semicolons."""
        self.advance()
        while self.kind != "end":
            if self.kind == "name":
                self.setting()
                if self.kind not in {"newline", ";", "end"}:
                    raise self.unexpected("the end of the line")
            elif self.kind in {"newline", ";"}:
                self.advance()
            else:
                raise self.unexpected("a setting, name = value")
        last = {name: _join(parts) for name, parts in self.sums.items()}
        return Document(self.source, tuple(self.settings), last, tuple(self.warnings))

    def advance(self) -> None:
        """Step to the next token; a mark is its own kind."""
        while True:
            self.start = self.end
            match = _TOKEN.match(self.text, self.start)
            if match is None:
                self.stray()
                return
            self.end = match.end()
            kind = str(match.lastgroup)
            if kind != "space":
                self.kind = match[0].decode() if kind == "mark" else kind
                return

    def stray(self) -> None:
        """No token here: the end, or a character that starts none."""
        left = len(self.text) - self.start
        if left > 1:
            raise self.lexical()
        if left == 1:
            character = self.text[self.start :].decode("utf-8", "replace")
            self.warn(f"{quote(character)} at the very end is ignored, as xl does", self.start)
        self.kind = "end"
        self.end = len(self.text)

    def setting(self) -> None:
        """Name, operator, value; an addition joins what the name had before."""
        offset = self.start
        name = self.text[self.start : self.end].decode()
        self.advance()
        if self.kind not in {"=", "+="}:
            raise self.unexpected(f'"=" after {quote(name)}')
        added = self.kind == "+="
        self.advance()
        setting = Setting(name, self.value(1), offset, added)
        self.settings.append(setting)
        if not added:
            self.sums[name] = [setting]
            return
        parts = self.sums.setdefault(name, [])
        if parts and type(parts[0].value) is not type(setting.value):
            raise self.source.error("+= cannot join a list and a string", offset, key=name)
        parts.append(setting)

    def value(self, depth: int) -> Value:
        """A string, a number or a list; the token after it becomes the current one."""
        offset = self.start
        if self.kind == "number":
            text = self.text[offset : self.end].decode()
            self.advance()
            return Atom(text, offset, offset)
        if self.kind == "string":
            text, verbatim = self.dequote()
            self.advance()
            return Atom(text, offset, offset + 1 if verbatim else -1)
        if self.kind != "[":
            raise self.unexpected("a value: a string in quotes, a number or a [ list ]")
        if depth > MAX_DEPTH:
            raise self.source.error(f"lists are nested deeper than {MAX_DEPTH}", offset)
        items = []
        self.advance()
        self.skip_newlines()
        while self.kind != "]":
            items.append(self.value(depth + 1))
            self.skip_newlines()
            if self.kind == ",":
                self.advance()
                self.skip_newlines()
            elif self.kind != "]":
                line = self.source.place(offset).line
                raise self.unexpected(f'"," or "]" in the list that starts in line {line}')
        self.advance()
        return ListValue(tuple(items), offset)

    def skip_newlines(self) -> None:
        """Inside a list, line ends and comments mean nothing."""
        while self.kind == "newline":
            self.advance()

    def dequote(self) -> tuple[str, bool]:
        """The text of the current string, and whether the source holds it as it is."""
        raw = self.text[self.start + 1 : self.end - 1]
        if b"\0" in raw:
            raise self.source.error("a string holds a NUL", self.start + 1 + raw.index(b"\0"))
        if b"\\" not in raw:
            return raw.decode("utf-8", "surrogateescape"), True
        result = bytearray()
        done = 0
        while (at := raw.find(b"\\", done)) >= 0:
            result += raw[done:at]
            done = at + 2
            if raw[at + 1] in _ESCAPES:
                result.append(_ESCAPES[raw[at + 1]])
            else:
                done += self.octal(raw, at)
        result += raw[done:]
        return result.decode("utf-8", "surrogateescape"), False

    def octal(self, raw: bytes, at: int) -> int:
        """How many bytes an octal escape takes after its first digit; its value is dropped.

        libxlu_cfg.c (xlu__cfgl_dequote) hands up to three bytes to strtoul in base 10, wants
        two or more of them taken, and does not store what it read.
        """
        offset = self.start + 1 + at
        if raw[at + 1] not in b"01234567":
            escape = raw[at : at + 2].decode("utf-8", "replace")
            hint = r"those known are \\ \" \' \a \b \f \n \r \t \v"
            raise self.source.error(f"{quote(escape)} is no escape", offset, hint=hint)
        match = _STRTOUL.match(raw[at + 2 : at + 5])
        if match is None or match.end() < 2:
            raise self.source.error("an octal escape needs three digits", offset)
        self.warn("xl reads an octal escape as nothing, and so do we", offset)
        return match.end()

    def warn(self, cause: str, offset: int) -> None:
        """Keep one line for the reader."""
        if len(self.warnings) < _MAX_WARNINGS:
            self.warnings.append(f"{self.source.place(offset)}: {cause}")

    def unexpected(self, expected: str) -> ConfigError:
        """The current token is not what the grammar wants."""
        found = {"end": "the end of the text", "newline": "the end of the line"}.get(self.kind)
        if found is None:
            found = quote(self.text[self.start : self.end].decode("utf-8", "replace"))
        hint = "strings need quotes" if self.kind == "name" and "value" in expected else ""
        return self.source.error(f"expected {expected}, found {found}", self.start, hint=hint)

    def lexical(self) -> ConfigError:
        """The current character starts no token."""
        first = self.text[self.start : self.start + 4].decode("utf-8", "replace")[0]
        cause, hint = f"unexpected character {quote(first)}", ""
        if first in "\"'":
            cause, hint = "the string has no end", "a string ends on the line where it starts"
        elif first == "#":
            cause, hint = "the comment has no line end", "end the file with a newline"
        elif first == "\r":
            cause, hint = "unexpected carriage return", "the file has DOS line ends"
        elif first in "+-":
            hint = "write a signed number in quotes"
        elif first in ".():{%":
            hint = "a configuration is no Python program"
        elif first.isupper():
            hint = "names are lower case, strings need quotes, and yes and no are 1 and 0"
        return self.source.error(cause, self.start, hint=hint)


def _join(parts: list[Setting]) -> Setting:
    """What counts: the last value with what was added to it (xlu__cfg_concat_vals)."""
    last = parts[-1]
    if len(parts) == 1:
        return last
    value: Value
    if isinstance(last.value, Atom):
        text = "".join(part.value.text for part in parts if isinstance(part.value, Atom))
        value = Atom(text, last.value.offset)
    else:
        lists = (part.value.items for part in parts if isinstance(part.value, ListValue))
        value = ListValue(tuple(item for items in lists for item in items), last.value.offset)
    return Setting(last.name, value, last.offset, last.added)
