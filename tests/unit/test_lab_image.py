"""What images are made of: archives, module order, the recipe's hash, the host's mirrors."""

from __future__ import annotations

import dataclasses
import lzma
import shutil
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab import debian, initramfs, release
from lab.errors import LabError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

names = st.text("abcdefgh.-_", min_size=1, max_size=20).filter(lambda n: n.strip("."))


def entries(data: bytes) -> dict[str, tuple[int, bytes]]:
    """Read an archive as the kernel does: {name: (mode, data)}."""
    found = {}
    at = 0
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        name = data[at + 110 : at + 110 + fields[11] - 1].decode()
        start = (at + 110 + fields[11] + 3) & ~3
        if name == "TRAILER!!!":
            return found
        found[name] = (fields[1], data[start : start + fields[6]])
        at = (start + fields[6] + 3) & ~3


@given(st.dictionaries(names, st.binary(max_size=200), max_size=6))
def test_an_archive_reads_back(files: dict[str, bytes]) -> None:
    data = initramfs.archive({name: initramfs.file(text) for name, text in files.items()})
    assert len(data) % 512 == 0
    assert entries(data) == {name: (0o100644, text) for name, text in files.items()}


def test_an_archive_is_newc_as_linux_documents_it() -> None:
    data = initramfs.archive(
        {"d": initramfs.folder(), "d/c": initramfs.device(5, 1), "l": initramfs.symlink("d")}
    )
    assert data[:6] == b"070701"
    fields = [int(data[6 + 8 * n : 14 + 8 * n], 16) for n in range(13)]
    assert (fields[1], fields[4], fields[11]) == (0o40755, 2, 2)
    assert data[110:112] == b"d\0"
    second = data[112:]
    fields = [int(second[6 + 8 * n : 14 + 8 * n], 16) for n in range(13)]
    assert (fields[1], fields[9], fields[10]) == (0o20600, 5, 1)
    assert b"TRAILER!!!\0" in data


DEPENDS = """\
kernel/fs/ext4/ext4.ko: kernel/lib/crc16.ko kernel/fs/mbcache.ko kernel/fs/jbd2/jbd2.ko
kernel/lib/crc16.ko:
kernel/fs/mbcache.ko:
kernel/fs/jbd2/jbd2.ko: kernel/lib/crc16.ko
kernel/drivers/xen/xen-evtchn.ko.xz:
"""


def test_modules_come_after_what_they_need() -> None:
    order = initramfs.module_order(DEPENDS, ["xen_evtchn", "not-there", "ext4"])
    assert order[0] == "kernel/drivers/xen/xen-evtchn.ko.xz"
    assert order[-1] == "kernel/fs/ext4/ext4.ko"
    assert order.index("kernel/lib/crc16.ko") < order.index("kernel/fs/jbd2/jbd2.ko")
    assert len(order) == len(set(order)) == 5


def test_compressed_modules_are_unpacked(tmp_path: Path) -> None:
    (tmp_path / "a.ko").write_bytes(b"ELF")
    (tmp_path / "b.ko.xz").write_bytes(lzma.compress(b"ELF"))
    assert initramfs.module(tmp_path / "a.ko") == initramfs.module(tmp_path / "b.ko.xz") == b"ELF"


def test_the_recipe_names_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    bookworm, trixie = release.release("12"), release.release("13")
    assert bookworm.digest("") == bookworm.digest("")
    others = {
        bookworm.digest(""),
        trixie.digest(""),
        bookworm.digest("a"),
        dataclasses.replace(bookworm, xen="4.16").digest(""),
    }
    monkeypatch.setattr(release, "PACKAGES", (*release.PACKAGES, "hello"))
    others.add(bookworm.digest(""))
    assert len(others) == 5


def test_an_unknown_release_is_refused() -> None:
    with pytest.raises(UsageError, match=r"Debian 11.*12 and 13"):
        release.release("11")


def test_mirrors_are_the_hosts_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        ("http://other.example/debian", "bookworm"),
        ("http://mirror.example/debian", "bookworm"),
        ("http://mirror.example/debian", "bookworm-updates"),
        ("http://mirror.example/security", "bookworm-security"),
    ]
    monkeypatch.setattr(debian, "_targets", lambda: rows)
    assert debian.sources(release.release("13")) == [
        "deb http://mirror.example/debian trixie main",
        "deb http://mirror.example/debian trixie-updates main",
        "deb http://mirror.example/security trixie-security main",
    ]
    monkeypatch.setattr(debian, "_targets", list)
    assert debian.mirrors() == (debian.DEFAULT_ARCHIVE, debian.DEFAULT_SECURITY)


def test_without_apt_the_missing_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "PATH", "/nonexistent")
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(LabError, match=r"not found: mmdebstrap .*apt-get install.* mmdebstrap"):
        debian.ensure(["mmdebstrap"])
