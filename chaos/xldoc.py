"""What a configuration text holds: values, settings, and the places they stand at.  Pure.

The accessors behave as those of libxlutil (Xen's tools/libs/util/libxlu_cfg.c) with two
differences: a value of the wrong kind is an error here, where xl warns and goes on as if the
setting were absent; and an error knows its place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from xenctypes.errors import ConfigError

_LONG_MAX = (1 << 63) - 1
_EXCERPT = 120  # characters of a source line worth showing
_SHOWN = 40  # characters of a value worth quoting in a message

_STRTOL = re.compile(r"[ \t\n\v\f\r]*([+-]?)(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)")


@dataclass(frozen=True, slots=True)
class Atom:
    """A string or a number: its ``text``, and the ``offset`` of its first byte in the document.

    Bytes that are not UTF-8 are kept as lone surrogates (PEP 383).  ``inner`` is the offset of
    the text itself when the source holds it verbatim, so that a position in the text is a
    position in the file; it is -1 when escapes or ``+=`` stand between the two.
    """

    text: str
    offset: int
    inner: int = -1

    def at(self, position: int) -> int:
        """The offset in the document of a position (in characters) in the text."""
        if self.inner < 0:
            return self.offset
        return self.inner + len(self.text[:position].encode("utf-8", "surrogateescape"))


@dataclass(frozen=True, slots=True)
class ListValue:
    """A list of values and the offset of its opening bracket."""

    items: tuple[Value, ...]
    offset: int


Value = Atom | ListValue


@dataclass(frozen=True, slots=True)
class Setting:
    """One ``name = value``, or ``name += value`` when ``added``.

    In ``Document.settings`` the value is what stands there; from ``Document.get`` it is what
    counts, additions joined.
    """

    name: str
    value: Value
    offset: int
    added: bool = False


class Place(NamedTuple):
    """A position: line and column count from 1; the rest is what ConfigError shows."""

    filename: str
    line: int
    column: int
    source: str
    caret: int

    def __str__(self) -> str:
        return f"{self.filename}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class Source:
    """A text and the files it was put together from: (first offset, filename), ascending."""

    text: bytes = field(repr=False)
    pieces: tuple[tuple[int, str], ...]

    def filename(self, offset: int) -> str:
        """The file that a byte of the text is from."""
        return next(name for first, name in reversed(self.pieces) if first <= offset)

    def place(self, offset: int) -> Place:
        """Where in which file a byte of the text is."""
        first, filename = next(piece for piece in reversed(self.pieces) if piece[0] <= offset)
        start = self.text.rfind(b"\n", first, offset) + 1 or first
        end = self.text.find(b"\n", offset)
        line = self.text[start : end if end >= 0 else len(self.text)].decode("utf-8", "replace")
        before = len(self.text[start:offset].decode("utf-8", "replace"))
        left = max(0, before - _EXCERPT // 2) if len(line) > _EXCERPT else 0
        return Place(
            filename,
            self.text.count(b"\n", first, start) + 1,
            before + 1,
            printable(line[left : left + _EXCERPT]),
            before - left,
        )

    def error(self, cause: str, offset: int, *, hint: str = "", key: str = "") -> ConfigError:
        """An error at a byte of the text, for the caller to raise."""
        return ConfigError(cause, hint=hint, key=key, **self.place(offset)._asdict())


@dataclass(frozen=True, slots=True)
class Document:
    """The settings in the order of the text, and the last of each name, which is what counts."""

    source: Source
    settings: tuple[Setting, ...]
    last: dict[str, Setting] = field(repr=False)
    warnings: tuple[str, ...] = ()

    def get(self, name: str) -> Setting | None:
        """The setting that counts, or None."""
        return self.last.get(name)

    def error(self, cause: str, offset: int, *, hint: str = "", key: str = "") -> ConfigError:
        """An error at a byte of the text, for the caller to raise."""
        return self.source.error(cause, offset, hint=hint, key=key)

    def string(self, name: str) -> str | None:
        """The text of an atom, None when not set (xlu_cfg_get_string)."""
        setting = self.last.get(name)
        if setting is None:
            return None
        if isinstance(setting.value, ListValue):
            cause = f"{name} is a list, expected one value"
            raise self.error(cause, setting.value.offset, key=name)
        return setting.value.text

    def integer(self, name: str) -> int | None:
        """The number of an atom, None when not set (xlu_cfg_get_long)."""
        text = self.string(name)
        if text is None:
            return None
        setting = self.last[name]
        if setting.added:
            cause = f"+= does not add numbers, and {name} is one"
            raise self.error(cause, setting.offset, key=name)
        try:
            return c_long(text)
        except OverflowError:
            cause = f"{name} {quote(text)} is out of range"
        except ValueError:
            cause = f"{name} {quote(text)} is not a number"
        raise self.error(cause, setting.value.offset, key=name)

    def items(self, name: str) -> tuple[Value, ...] | None:
        """The items of a list, None when not set (xlu_cfg_get_list)."""
        setting = self.last.get(name)
        if setting is None:
            return None
        if isinstance(setting.value, Atom):
            cause = f"{name} is one value, expected a list"
            raise self.error(cause, setting.value.offset, hint=f"{name} = [ ... ]", key=name)
        return setting.value.items


def c_long(text: str) -> int:
    """Strtol(3) in base 0 over the whole text, as xlu_cfg_get_bounded_long calls it.

    Raise OverflowError beyond 64 bits and ValueError for what is not a number.
    """
    match = _STRTOL.match(text)
    if match is None:
        raise ValueError(text)
    sign, digits = match.groups()
    base = 16 if digits[1:2] in {"x", "X"} else 8 if digits[0] == "0" else 10
    if len(digits.lstrip("0xX")) > 64:  # far out of range: no need to convert it
        raise OverflowError(text)
    value = int(f"{sign}{digits}", base)
    if not -_LONG_MAX - 1 <= value <= _LONG_MAX:
        raise OverflowError(text)
    if match.end() != len(text):
        raise ValueError(text)
    return value


def printable(text: str) -> str:
    """The text fit for one line of a terminal: as long, and nothing that moves the cursor."""
    return "".join(c if c.isprintable() else " " if c == "\t" else "\ufffd" for c in text)


def quote(text: str) -> str:
    """The text in quotes for a message, shortened when long."""
    return f'"{printable(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")}"'
