"""Loading libraries, and the five ways in which that can fail."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from xenctypes.releases import Release


from xenctypes import loader, signatures
from xenctypes.errors import (
    CallFailed,
    LibraryMissing,
    NoXen,
    PermissionDenied,
    SymbolMissing,
)
from xenctypes.loader import SONAMES, bind, installed, load, open_handle
from xenctypes.releases import RELEASES


def test_every_library_has_a_table_and_a_number() -> None:
    assert set(SONAMES) == set(signatures.SIGNATURES)


@pytest.mark.parametrize("name", SONAMES)
def test_every_library_loads_with_all_its_functions(name: str) -> None:
    library = load(name, installed())
    for function in signatures.SIGNATURES[name]:
        assert vars(library)[function].__name__ == function
    assert load(name, installed()) is library


def test_library_missing() -> None:
    with pytest.raises(LibraryMissing, match=r"cannot load libxennone\.so\.9: ") as caught:
        bind("libxennone.so.9", {}, "libxennone9")
    assert "libxennone9" in caught.value.hint
    assert "\n" not in str(caught.value)


def test_library_broken(tmp_path: Path) -> None:
    broken = tmp_path / "libbroken.so"
    broken.write_bytes(b"\x7fELF" + bytes(100))
    with pytest.raises(LibraryMissing, match="cannot load") as caught:
        bind(str(broken), {}, "libbroken")
    assert "\n" not in str(caught.value)


def test_library_of_another_release_missing() -> None:
    newest = max(RELEASES)
    if installed().version == newest:
        pytest.skip("the newest known release is installed")
    with pytest.raises(LibraryMissing, match=r"libxenctrl\.so\.4\.22") as caught:
        load("xenctrl", RELEASES[newest])
    assert "libxenmisc4.22" in caught.value.hint


def test_symbol_missing() -> None:
    table = {"xc_no_such_function": (signatures.ZERO, ctypes.c_int)}
    with pytest.raises(SymbolMissing, match=r"libc\.so\.6 lacks the function xc_no_such") as caught:
        bind("libc.so.6", table, "libc6")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A library whose functions fail as told."""
    directory = tmp_path_factory.mktemp("library")
    source = directory / "fails.c"
    source.write_text(
        """
        #include <errno.h>
        #include <stddef.h>
        int zero(void *handle, int error) { errno = error; return error ? -1 : 0; }
        int count(void *handle, int error) { errno = error; return error ? -1 : 7; }
        int negative(void *handle, int error) { errno = 0; return -error; }
        void *address(void *handle, int error) { errno = error; return error ? NULL : handle; }
        """
    )
    path = directory / "libfails.so"
    try:
        subprocess.run(["gcc", "-shared", "-o", str(path), str(source)], check=True)
    except OSError:
        pytest.skip("gcc is not installed: scripts/test does that")
    arguments = (signatures.xc_interface, ctypes.c_int)
    return bind(
        str(path),
        {
            "zero": (signatures.ZERO, *arguments),
            "count": (signatures.COUNT, *arguments),
            "negative": (signatures.NEGATIVE_ERRNO, *arguments),
            "address": (signatures.handle(signatures.xc_interface), *arguments),
        },
        "libfails",
    )


HANDLE = signatures.xc_interface(16)


def test_success(library: Any) -> None:
    assert library.zero(HANDLE, 0) == 0
    assert library.count(HANDLE, 0) == 7
    assert library.negative(HANDLE, 0) == 0
    assert library.address(HANDLE, 0).value == 16
    assert type(library.address(HANDLE, 0)) is signatures.xc_interface


@pytest.mark.parametrize("name", ["zero", "count", "negative", "address"])
def test_failure_carries_name_and_errno(library: Any, name: str) -> None:
    with pytest.raises(CallFailed, match=f"{name}: No such process") as caught:
        getattr(library, name)(HANDLE, 3)
    assert (caught.value.function, caught.value.errno) == (name, 3)


@pytest.mark.parametrize(
    ("errno", "error"),
    [(2, NoXen), (6, NoXen), (19, NoXen), (13, PermissionDenied), (1, PermissionDenied)],
)
def test_what_keeps_a_handle_from_opening(library: Any, errno: int, error: Any) -> None:
    with pytest.raises(error) as caught:
        open_handle(library.address, HANDLE, errno)
    assert type(caught.value) is error
    assert caught.value.hint
    assert caught.value.__cause__.errno == errno


def test_other_failures_to_open(library: Any) -> None:
    with pytest.raises(CallFailed) as caught:
        open_handle(library.address, HANDLE, 24)
    assert caught.value.errno == 24


def test_handles_of_another_kind_are_refused(library: Any) -> None:
    with pytest.raises(ctypes.ArgumentError):
        library.zero(signatures.xengnttab_handle(16), 0)


@pytest.mark.parametrize("domid", [-1, 0x8000, 65536, 1 << 32])
def test_domids_out_of_range_never_reach_the_library(domid: int) -> None:
    library = load("xenevtchn")
    with pytest.raises(ctypes.ArgumentError, match="not a domain identifier"):
        library.xenevtchn_bind_unbound_port(signatures.xenevtchn_handle(16), domid)


def test_hints_of_libxenctrl() -> None:
    def xc_something() -> None:
        pass

    refused = signatures.failure(xc_something, (), 13)
    assert "versions" in refused.hint
    assert "Dom0" in signatures.failure(xc_something, (), 1).hint
    assert signatures.failure(xc_something, (), 3).hint == ""


def test_installed_needs_both_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, release: Release) -> None:
        raise LibraryMissing(f"{name} {release}")

    monkeypatch.setattr(loader, "load", missing)
    with pytest.raises(LibraryMissing, match=r"no libxenctrl of Xen 4\.17 to 4\.22"):
        installed()


def test_the_bindings_import_little() -> None:
    """Each command and builder process pays for it: bench/load_libraries.py."""
    script = """
import sys
import ctypes, select
before = set(sys.modules)
import xenctypes.call, xenctypes.ctrl, xenctypes.devicemodel, xenctypes.evtchn
import xenctypes.foreignmemory, xenctypes.gnttab, xenctypes.guest
print(*sorted(name for name in set(sys.modules) - before if not name.startswith("xenctypes")))
"""
    root = Path(loader.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-S", "-c", script], capture_output=True, text=True, check=True, cwd=root
    )
    assert set(done.stdout.split()) <= {"__future__", "time"}
