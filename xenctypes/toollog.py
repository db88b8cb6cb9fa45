"""libxentoollog: what the libraries have to say, kept out of stderr.

The libraries format their messages in C; so does this logger, into a block of
memory of fixed size. A logger written in Python would be called back for each
of the some fifty messages that building a domain gives rise to.
"""

from __future__ import annotations

from ctypes import create_string_buffer, memset

from xenctypes.loader import load

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

# xentoollog.h: enum xentoollog_level
XTL_DEBUG = 1
XTL_VERBOSE = 2
XTL_DETAIL = 3
XTL_PROGRESS = 4
XTL_INFO = 5
XTL_NOTICE = 6
XTL_WARN = 7
XTL_ERROR = 8
XTL_CRITICAL = 9

XTL_STDIOSTREAM_HIDE_PROGRESS = 0o04
XTL_STDIOSTREAM_PROGRESS_NO_CR = 0o20

_DETAIL_LIMIT = 400


class ToolLog:
    """A logger of libxentoollog that keeps the first ``size`` bytes it is told.

    ``logger`` is what the libraries' open functions take. Messages below
    ``level`` (XTL_*) are dropped. ``clear()`` makes room again.
    """

    def __init__(self, level: int = XTL_WARN, size: int = 8192) -> None:
        self._libc = load("c")
        # Python mangles a name like this one inside a class.
        self._purge = vars(self._libc)["__fpurge"]
        self._lib = load("xentoollog")
        self._size = size
        # Room for the zero that ends the text, whatever the stream does.
        self._buffer = create_string_buffer(size + 1)
        self._stream: int | None = self._libc.fmemopen(self._buffer, size, b"w")
        try:
            self.logger = self._lib.xtl_createlogger_stdiostream(
                self._stream,
                level,
                XTL_STDIOSTREAM_HIDE_PROGRESS | XTL_STDIOSTREAM_PROGRESS_NO_CR,
            )
        except BaseException:
            self._libc.fclose(self._stream)
            self._stream = None
            raise
        self.logger.log = self

    def set_level(self, level: int) -> None:
        """Drop messages below ``level`` (XTL_*) from now on."""
        if self._stream is not None:
            self._lib.xtl_stdiostream_set_minlevel(self.logger, level)

    def write(self, level: int, message: str, context: str = "chaos") -> None:
        """Log a message as the libraries do."""
        if self._stream is not None:
            text = message.replace("%", "%%").encode(errors="backslashreplace")
            self._lib.xtl_log(self.logger, level, -1, context.encode(), text)

    def lines(self) -> list[str]:
        """The messages since the last ``clear()``, as "context: level: text".

        They may quote an untrusted image: what is not printable becomes "?".
        """
        text = self._buffer.value.decode(errors="backslashreplace")
        return [
            "".join(char if char.isprintable() else "?" for char in line)
            for line in text.split("\n")
            if line.strip()
        ]

    def clear(self) -> None:
        """Forget all messages."""
        if self._stream is None:
            return
        # A full stream keeps what did not fit, and would not rewind with it.
        self._purge(self._stream)
        self._libc.rewind(self._stream)
        memset(self._buffer, 0, self._size)

    def take(self) -> str:
        """The messages in one line, without the libraries' decoration; then ``clear()``."""
        detail = "; ".join(dict.fromkeys(map(_plain, self.lines())))
        self.clear()
        return detail if len(detail) <= _DETAIL_LIMIT else f"{detail[:_DETAIL_LIMIT]}..."

    def close(self) -> None:
        """Free the logger, once no library holds it. Idempotent."""
        if self._stream is None:
            return
        self._lib.xtl_logger_destroy(self.logger)
        self._libc.fclose(self._stream)
        self._stream = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _plain(line: str) -> str:
    """Without "context: level: " and, if a panic, without "panic: file:line: "."""
    parts = line.split(": ", 2)
    text = parts[2] if len(parts) == 3 else line
    if text.startswith("panic: "):
        _, _, text = text.removeprefix("panic: ").partition(": ")
    return text.strip()
