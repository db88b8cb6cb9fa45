"""Which Xen is this? With sysfs directories made for the purpose."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenctypes.errors import NoXen, UnknownRelease
from xenctypes.releases import RELEASES, running, running_version

if TYPE_CHECKING:
    from pathlib import Path

    from xenctypes.releases import Release


class Sysfs(Protocol):
    def __call__(self, kind: str = ..., major: str = ..., minor: str = ...) -> str: ...


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    def make(kind: str = "xen", major: str = "4", minor: str = "17") -> str:
        (tmp_path / "version").mkdir(exist_ok=True)
        (tmp_path / "type").write_text(f"{kind}\n")
        (tmp_path / "version/major").write_text(f"{major}\n")
        (tmp_path / "version/minor").write_text(f"{minor}\n")
        return str(tmp_path)

    return make


@pytest.mark.parametrize("release", RELEASES.values(), ids=str)
def test_known_releases(sysfs: Sysfs, release: Release) -> None:
    assert running(sysfs(minor=str(release.version[1]))) is release


@pytest.mark.parametrize("minor", ["16", "23"])
def test_unknown_release(sysfs: Sysfs, minor: str) -> None:
    with pytest.raises(UnknownRelease, match=rf"Xen 4\.{minor}") as caught:
        running(sysfs(minor=minor))
    assert "4.17, 4.18, 4.19, 4.20, 4.21, 4.22" in caught.value.hint
    assert "\n" not in str(caught.value)


def test_no_hypervisor(tmp_path: Path) -> None:
    with pytest.raises(NoXen, match="does not run on Xen") as caught:
        running(str(tmp_path / "missing"))
    assert "boot Xen" in caught.value.hint


def test_another_hypervisor(sysfs: Sysfs) -> None:
    with pytest.raises(NoXen, match="not Xen"):
        running(sysfs(kind="qemu"))


@pytest.mark.skipif(os.path.exists("/sys/hypervisor/type"), reason="this machine runs on Xen")
def test_this_machine() -> None:
    with pytest.raises(NoXen):
        running()


@given(st.text(max_size=80), st.text(max_size=80))
def test_hostile_version_files(
    tmp_path_factory: pytest.TempPathFactory, major: str, minor: str
) -> None:
    directory = tmp_path_factory.mktemp("sysfs")
    (directory / "version").mkdir()
    (directory / "type").write_text("xen")
    (directory / "version/major").write_text(major, encoding="utf-8")
    (directory / "version/minor").write_text(minor, encoding="utf-8")
    digits = [text.strip() for text in (major, minor)]
    if all(text.isascii() and text.isdigit() for text in digits) and len(major + minor) <= 64:
        assert running_version(str(directory)) == tuple(map(int, digits))
    else:
        with pytest.raises(NoXen) as caught:
            running_version(str(directory))
        assert "\n" not in str(caught.value)


def test_a_release_is_a_value() -> None:
    release = RELEASES[4, 22]
    assert str(release) == "4.22"
    assert release == RELEASES[4, 22]
    assert release != RELEASES[4, 21]
    assert release.as_dict()["any_domid"] == 0x7FF5
    assert "any_domid=32757" in repr(release)
