"""What a guest's console said: a bounded log in its domain's directory, and how it is shown.

::

    console.log      the newest, at most LOG_MAX bytes
    console.log.1    what came before it, at most LOG_MAX bytes

An append is one write(2) and a rotation one rename(2), so that a writer killed in between
loses nothing that it had appended, and a reader needs no lock. Files are opened for each
append: thousands of quiet guests cost no descriptor. There is one writer at a time.
"""

from __future__ import annotations

import codecs
import os
import re

LOG_MAX = 128 * 1024
LINE_MAX = 64 * 1024
CUT = b" [line cut]"
HISTORY_MAX = 64 * 1024  # what somebody who attaches is shown
LOG, OLD_LOG = "console.log", "console.log.1"

PIECE = re.compile(rb"[^\r\n]+|[\r\n]+")
# Controls but for \t \n \r, and the marks that reorder or break lines (Unicode, Bidi_Control).
UNSAFE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
)


class ConsoleLog:
    """The log in a domain's directory, for its one writer and any number of readers."""

    __slots__ = ("_column", "_directory", "_size")

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._size = -1  # not looked at yet
        self._column = 0  # bytes since the last line end; above LINE_MAX: the line was cut

    def append(self, data: bytes, limit: int = LOG_MAX) -> None:
        """Keep ``data``; of a line over LINE_MAX bytes the rest is dropped, with a mark.

        ``limit`` is how many bytes each of the two files may have, from here on.
        Raises OSError: FileNotFoundError when the domain's record is gone, ENOSPC and the like
        when it cannot be kept.
        """
        if self._size < 0:
            self._look()
        column = self._column
        try:
            kept = self._capped(data)
            while kept:
                if self._size >= limit:
                    os.rename(f"{self._directory}/{LOG}", f"{self._directory}/{OLD_LOG}")
                    self._size = 0
                count = self._write(kept[: limit - self._size])
                self._size += count
                kept = kept[count:]
        except OSError:
            self._size = -1
            self._column = column
            raise

    def read(self, limit: int = 2 * LOG_MAX) -> bytes:
        """The last ``limit`` bytes that are kept."""
        while True:
            inode, data = _slurp(f"{self._directory}/{LOG}")
            if len(data) < limit:
                data = _slurp(f"{self._directory}/{OLD_LOG}")[1] + data
            if inode == _inode(f"{self._directory}/{LOG}"):  # not rotated meanwhile
                return data[max(0, len(data) - limit) :]

    def _look(self) -> None:
        """Go on where the writer before us stopped."""
        try:
            self._size = os.stat(f"{self._directory}/{LOG}").st_size
        except FileNotFoundError:
            self._size = 0
        last = self.read(LINE_MAX + len(CUT))
        self._column = len(last) - _line_start(last)

    def _write(self, data: bytes) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(f"{self._directory}/{LOG}", flags, 0o600)
        try:
            return os.write(fd, data)
        finally:
            os.close(fd)

    def _capped(self, data: bytes) -> bytes:
        if self._column + len(data) <= LINE_MAX:
            start = _line_start(data)
            self._column = len(data) - start if start else self._column + len(data)
            return data
        kept = []
        for match in PIECE.finditer(data):
            piece = match[0]
            room = LINE_MAX - self._column
            if piece[0] in b"\r\n":
                self._column = 0
                kept.append(piece)
            elif len(piece) <= room:
                self._column += len(piece)
                kept.append(piece)
            elif room >= 0:
                self._column = LINE_MAX + len(CUT)
                kept += [piece[:room], CUT]
        return b"".join(kept)


class LogTail:
    """Reads a log that another process writes, across rotations. Close it.

    ``history`` is what it has now; ``read`` then gives what comes, once each.
    """

    def __init__(self, directory: str) -> None:
        self._path = f"{directory}/{LOG}"
        self._fd = -1
        while True:
            self._open()
            self.history = _slurp(f"{directory}/{OLD_LOG}")[1]
            if self._fd < 0 or _inode(self._path) == os.fstat(self._fd).st_ino:
                break
            self.close()  # rotated meanwhile
        if self._fd >= 0:
            self.history += _read_all(self._fd)

    def read(self) -> bytes:
        """What was appended since the last call; b"" when nothing was."""
        data = b""
        if self._fd >= 0:
            data = _read_all(self._fd)
            if _inode(self._path) in {None, os.fstat(self._fd).st_ino}:
                return data
            data += _read_all(self._fd)  # what came between the two calls
            self.close()
        self._open()
        return data + (_read_all(self._fd) if self._fd >= 0 else b"")

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> None:
        try:
            self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            self._fd = -1


class Escaper:
    r"""Makes a guest's output fit to be shown, piece by piece.

    Control characters other than tab, line feed and carriage return, bytes that are not
    UTF-8, and characters that reorder text appear as ``\xNN`` or ``\uNNNN``.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")

    def feed(self, data: bytes, *, final: bool = False) -> str:
        """The text of ``data``; a character cut at its end waits for the next piece."""
        return UNSAFE.sub(_escaped, self._decoder.decode(data, final))


def escape(data: bytes) -> bytes:
    """All of ``data`` as Escaper shows it, in UTF-8."""
    return Escaper().feed(data, final=True).encode()


def last_lines(data: bytes, count: int) -> bytes:
    """The last ``count`` lines of ``data``, with their ends; a last one may lack its own."""
    end = len(data)
    if data.endswith(b"\n"):
        end -= 1
    for _ in range(count):
        end = data.rfind(b"\n", 0, end)
        if end < 0:
            return data
    return data[end + 1 :] if count else b""


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _line_start(data: bytes) -> int:
    """Where the last line of ``data`` starts."""
    return max(data.rfind(b"\n"), data.rfind(b"\r")) + 1


def _slurp(path: str) -> tuple[int | None, bytes]:
    """The inode and content of a file; (None, b"") where there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None, b""
    try:
        return os.fstat(fd).st_ino, _read_all(fd)
    finally:
        os.close(fd)


def _read_all(fd: int) -> bytes:
    parts = []
    while part := os.read(fd, LOG_MAX):
        parts.append(part)
    return b"".join(parts)


def _inode(path: str) -> int | None:
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return None
