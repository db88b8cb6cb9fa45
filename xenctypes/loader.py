"""From the tables in ``xenctypes.signatures`` to loaded libraries.

::

    load("xenevtchn").xenevtchn_unbind(handle, port)

A library is loaded once and whole: a function that it lacks is reported when
it is loaded, not when somebody first needs it.
"""

from __future__ import annotations

import ctypes

from xenctypes import releases
from xenctypes.errors import (
    CallFailed,
    LibraryMissing,
    NoXen,
    PermissionDenied,
    SymbolMissing,
)
from xenctypes.signatures import SIGNATURES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from xenctypes.releases import Release
    from xenctypes.signatures import Row

# The number after .so: the stable libraries' own, which Debian's package names
# repeat. None stands for the release of the hypervisor.
SONAMES: dict[str, str | None] = {
    "c": "6",
    "xencall": "1",
    "xenctrl": None,
    "xendevicemodel": "1",
    "xenevtchn": "1",
    "xenforeignmemory": "1",
    "xengnttab": "1",
    "xenguest": None,
    "xentoolcore": "1",
    "xentoollog": "1",
}

EPERM, ENOENT, ENXIO, EACCES, ENODEV = 1, 2, 6, 13, 19

_loaded: dict[str, ctypes.CDLL] = {}


def load(name: str, release: Release | None = None) -> Any:
    """The library ``name`` ("xenctrl", "xenevtchn", ...) with its prototypes.

    ``release`` decides which libxenctrl and libxenguest; it is the running one
    unless given. Raises LibraryMissing, SymbolMissing, NoXen or UnknownRelease.
    """
    number = SONAMES[name]
    if number is None:
        number = str(release if release is not None else releases.running())
    soname = f"lib{name}.so.{number}"
    library = _loaded.get(soname)
    if library is None:
        library = _loaded[soname] = bind(soname, SIGNATURES[name], _package(name, number))
    return library


def bind(soname: str, signatures: dict[str, Row], package: str) -> ctypes.CDLL:
    """Load ``soname`` and give the functions in ``signatures`` their prototypes."""
    try:
        library = ctypes.CDLL(soname, use_errno=True)
    except OSError as error:
        why = " ".join(str(error).split())
        raise LibraryMissing(
            f"cannot load {soname}: {why}", hint=f"Debian has it in the package {package}"
        ) from None
    for name, ((restype, check), *argtypes) in signatures.items():
        try:
            function = library[name]
        except AttributeError:
            raise SymbolMissing(
                f"{soname} lacks the function {name}",
                hint=f"install the package {package} of a release that chaos knows",
            ) from None
        function.restype = restype
        function.argtypes = argtypes
        if check is not None:
            function.errcheck = check
        setattr(library, name, function)
    return library


def installed() -> Release:
    """The newest release whose libxenctrl and libxenguest are installed.

    For what needs no hypervisor, such as looking into an image.
    """
    for release in reversed(releases.RELEASES.values()):
        try:
            load("xenctrl", release)
            load("xenguest", release)
        except LibraryMissing:
            continue
        return release
    known = list(releases.RELEASES.values())
    raise LibraryMissing(
        f"no libxenctrl of Xen {known[0]} to {known[-1]} is installed",
        hint=f"Debian has it in the package {_package('xenctrl', str(known[-1]))} or an older one",
    )


def open_handle(function: Any, *arguments: Any) -> Any:
    """Call a function that opens a handle; its failures say what the way out is.

    The libraries fail with ENOENT where the kernel offers no interface to the
    hypervisor, and with EACCES or EPERM where its device nodes are closed to us.
    """
    ctypes.set_errno(0)
    try:
        return function(*arguments)
    except CallFailed as error:
        if error.errno in (ENOENT, ENXIO, ENODEV):
            raise NoXen(
                f"no interface to the hypervisor: {error.message}",
                hint="this is not Dom0 of a Xen host, or its modules are not loaded",
            ) from error
        if error.errno in (EACCES, EPERM):
            raise PermissionDenied(
                f"not allowed to use the hypervisor: {error.message}", hint="try as root"
            ) from error
        raise


def _package(name: str, number: str) -> str:
    if name == "c":
        return "libc6"
    return f"lib{name}{number}" if SONAMES[name] else f"libxenmisc{number}"
