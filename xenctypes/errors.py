"""The error tree of the whole project.

::

    ChaosError                  what the command prints in one line
    +-- XenError                the hypervisor or its libraries
    |   +-- NoXen               not running on Xen, or not in Dom0
    |   +-- UnknownRelease      a Xen release without a record here
    |   +-- LibraryMissing      a shared library is not installed
    |   +-- SymbolMissing       a library lacks a function that we need
    |   +-- PermissionDenied    not root, or a device node is closed to us
    |   +-- CallFailed          a C function failed: its name, errno
    +-- UsageError              the command line is off
    +-- ConfigError             a domain configuration: file, line, column
    +-- ImageError              not a bootable image
    +-- StateError              names and files of the toolstack: taken, unknown, locked
    +-- StepError               a step of a create or destroy failed; its cause is chained
    +-- BusError                the store protocol or its server
    +-- PageError               the device page: what does not fit, or an ABI we do not speak
    +-- DeviceError             a vif or vbd could not be set up
    +-- ProtocolError           chaosd's socket: a frame that breaks the protocol, a lost connection
        +-- NoDaemon            nobody serves it

Every message is one line that names the cause; ``hint`` names the way out.
The classes live on the ground floor because every layer raises them.
"""

import os


class ChaosError(Exception):
    """Root of the tree.

    ``hint`` is a short sentence with the way out, or "".
    ``exit_code`` is what the command exits with (README.md lists them).
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class XenError(ChaosError):
    """The hypervisor or one of its libraries."""


class NoXen(XenError):
    """This is not a Xen host, or not its control domain."""


class UnknownRelease(XenError):
    """The running Xen release has no record in xenctypes.releases."""


class LibraryMissing(XenError):
    """A shared library could not be loaded."""


class SymbolMissing(XenError):
    """A library was loaded but lacks a required function."""


class PermissionDenied(XenError):
    """The process may not use the hypervisor's interface."""


class CallFailed(XenError):
    """A C function failed.

    ``function`` is the C name, ``errno`` the positive error number (0 when the
    function reported none), ``detail`` what the library said beyond it.
    """

    def __init__(self, function: str, errno: int, detail: str = "", *, hint: str = "") -> None:
        self.function = function
        self.errno = errno
        self.detail = detail
        reason = ": ".join(part for part in (os.strerror(errno) if errno else "", detail) if part)
        super().__init__(f"{function}: {reason or 'failed'}", hint=hint)


class UsageError(ChaosError):
    """The command line is wrong."""

    exit_code = 2


class ConfigError(ChaosError):
    """A domain configuration is wrong.

    ``cause`` is the message without its place.  ``filename``, ``line`` and ``column`` (both from 1,
    0 when unknown) say where; ``source`` is the part of that line worth showing, fit for a
    terminal, and ``caret`` the position in it, from 0.  ``key`` is the setting at fault, or "".
    """

    exit_code = 2

    def __init__(
        self,
        cause: str,
        *,
        hint: str = "",
        key: str = "",
        filename: str = "",
        line: int = 0,
        column: int = 0,
        source: str = "",
        caret: int = 0,
    ) -> None:
        self.cause = cause
        self.key = key
        self.filename = filename
        self.line = line
        self.column = column
        self.source = source
        self.caret = caret
        place = f"{filename}:{line}:{column}" if line else filename
        super().__init__(f"{place}: {cause}" if place else cause, hint=hint)

    @property
    def excerpt(self) -> str:
        """The source line with a caret on the next one, or "" when the place is unknown."""
        return f"{self.source}\n{' ' * self.caret}^" if self.line else ""


class ImageError(ChaosError):
    """A kernel or ramdisk cannot be booted."""


class StateError(ChaosError):
    """A name, identifier or state file: unknown, taken or locked."""


class StepError(ChaosError):
    """A step failed; ``step`` is its name, ``__cause__`` the reason."""

    def __init__(self, step: str, message: str, *, hint: str = "") -> None:
        self.step = step
        super().__init__(message, hint=hint)


class BusError(ChaosError):
    """The store: its protocol, its server or the way to it.

    ``path`` is the node concerned or "", ``errno`` the positive error number or 0.
    """

    def __init__(self, message: str, *, path: str = "", errno: int = 0, hint: str = "") -> None:
        self.path = path
        self.errno = errno
        super().__init__(message, hint=hint)


class PageError(ChaosError):
    """The device page: a value that does not fit, a malformed page, a foreign ABI."""


class DeviceError(ChaosError):
    """A vif or vbd could not be set up or torn down."""


class ProtocolError(ChaosError):
    """The daemon's socket: a frame or a request that breaks the protocol, or a lost connection."""


class NoDaemon(ProtocolError):
    """Nobody serves the daemon's socket."""
