"""Errors on their way from the daemon to a client: as a map, and back as what they were.  Pure.

The map has "class", "message", "hint" and "exit_code", in this order; then "notes", and the
attributes of the class that ATTRIBUTES lists. All values are texts and numbers, so that a client
in C can skip what it does not know.
"""

from __future__ import annotations

from typing import Any

from xenctypes import errors
from xenctypes.errors import ChaosError, ProtocolError

ATTRIBUTES: dict[type[ChaosError], dict[str, Any]] = {
    errors.CallFailed: {"function": "", "errno": 0, "detail": ""},
    errors.ConfigError: {
        "cause": "",
        "key": "",
        "filename": "",
        "line": 0,
        "column": 0,
        "source": "",
        "caret": 0,
    },
    errors.StepError: {"step": ""},
    errors.BusError: {"path": "", "errno": 0},
}
"""What an error of each class has beside its message, and the values to assume."""
EXIT_CODES = range(1, 256)
TEXT_MAX = 1 << 16
"""Characters of a text in the map; longer ones are cut."""


def describe(error: Exception) -> dict[str, Any]:
    """An error as a map. What is none of ours becomes a ChaosError."""
    if not isinstance(error, ChaosError):
        strerror = error.strerror if isinstance(error, OSError) else None
        error = ChaosError(strerror or f"a bug in chaosd: {error!r}")
    value: dict[str, Any] = {
        "class": type(error).__name__,
        "message": _text(error.message) or type(error).__name__,
        "hint": _text(error.hint),
        "exit_code": error.exit_code if error.exit_code in EXIT_CODES else 1,
    }
    notes = getattr(error, "__notes__", ())
    if notes:
        value["notes"] = _text("\n".join(map(str, notes)))
    for name, default in ATTRIBUTES.get(type(error), {}).items():
        found = getattr(error, name, default)
        value[name] = _text(found) if isinstance(found, str) else found
    return value


def restore(value: Any) -> ChaosError:
    """The error that a map describes; of a class that is not ours: a ChaosError. ProtocolError."""
    if not isinstance(value, dict):
        raise ProtocolError("an error that is no map")
    name, message, hint = (value.get(key) for key in ("class", "message", "hint"))
    code = value.get("exit_code")
    if not (isinstance(name, str) and isinstance(message, str) and isinstance(hint, str)):
        raise ProtocolError("an error without a class, a message or a hint")
    if type(code) is not int or code not in EXIT_CODES:
        raise ProtocolError(f"an error with the exit code {str(code)[:20]}")
    kind = getattr(errors, name, None)
    if not (isinstance(kind, type) and issubclass(kind, ChaosError)):
        kind = ChaosError
    # Not by the constructor of its class: those make the message out of the attributes.
    error = kind.__new__(kind)
    ChaosError.__init__(error, message, hint=hint)
    error.exit_code = code
    for attribute, default in ATTRIBUTES.get(kind, {}).items():
        found = value.get(attribute, default)
        setattr(error, attribute, found if type(found) is type(default) else default)
    notes = value.get("notes")
    for note in notes.split("\n") if isinstance(notes, str) else ():
        error.add_note(note)
    return error


def _text(text: str) -> str:
    """Text that UTF-8 can hold: names of files may have bytes that it cannot."""
    return text[:TEXT_MAX].encode(errors="backslashreplace").decode()
