"""The systemd units: written with the right paths, and sound in systemd's own eyes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from chaos import units

ROOT = Path(__file__).parents[2]


@pytest.fixture
def daemons(tmp_path: Path) -> Path:
    """A directory with something executable under each daemon's name."""
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    for name in ("noxsd", "xendevd", "storesd", "chaosd"):
        (bin_directory / name).write_text("#!/bin/sh\n")
        (bin_directory / name).chmod(0o755)
    return bin_directory


def write(tmp_path: Path, daemons: Path, *more: str) -> int:
    return units.main(["--etc", str(tmp_path / "etc"), "--bin", str(daemons), *more])


def test_they_are_written_and_removed(tmp_path: Path, daemons: Path) -> None:
    assert write(tmp_path, daemons) == 0
    text = (tmp_path / "etc/systemd/system/noxsd.service").read_text()
    assert f"ExecStart={daemons}/noxsd\n" in text
    assert "g chaos -\n" in (tmp_path / "etc/sysusers.d/chaos.conf").read_text()
    assert write(tmp_path, daemons) == 0
    assert write(tmp_path, daemons, "--remove") == 0
    assert write(tmp_path, daemons, "--remove") == 0
    assert not [path for path in (tmp_path / "etc").rglob("*") if path.is_file()]


def test_daemons_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert write(tmp_path, tmp_path) == 2
    assert "there is no noxsd" in capsys.readouterr().err
    assert not (tmp_path / "etc").exists()


def test_a_path_that_systemd_would_read_otherwise(tmp_path: Path, daemons: Path) -> None:
    odd = daemons.rename(tmp_path / "100% odd")
    assert write(tmp_path, odd) == 2
    assert not (tmp_path / "etc").exists()


def test_every_daemon_has_its_script() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for name in units.UNITS:
        text = units.render(name, "/x", 254)
        found = re.search(r"^ExecStart=/x/(\S+)$", text, re.MULTILINE)
        assert found
        assert found[1] == name.removesuffix(".service")
        if name != "chaosd.service":
            assert found[1] in scripts


def directives(name: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in units.render(name, "/x", 254).splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).extend(value.split())
    return found


def test_the_order_of_their_start() -> None:
    noxsd, xendevd, storesd, chaosd = (directives(name) for name in units.UNITS)
    assert {"xendevd.service", "storesd.service", "chaosd.service"} <= set(noxsd["Before"])
    assert "noxsd.service" in xendevd["After"]
    assert "chaosd.service" in xendevd["Before"]
    assert "noxsd.service" in storesd["After"]
    assert "chaosd.service" in storesd["Before"]
    assert {"noxsd.service", "xendevd.service", "storesd.service"} <= set(chaosd["After"])
    for unit in (noxsd, xendevd, storesd, chaosd):
        assert "xenstored.service" in unit["After"]
        # A stop or a failure of one is passed on to none of the others.
        assert not unit.keys() & {"Requires", "BindsTo", "PartOf", "Conflicts", "Requisite"}
        assert unit["Type"] == ["notify"]
        assert unit["Restart"] == ["on-failure"]
    assert noxsd["RuntimeDirectoryPreserve"] == ["yes"]
    assert storesd["RuntimeDirectoryPreserve"] == chaosd["RuntimeDirectoryPreserve"] == ["yes"]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_finds_no_fault(tmp_path: Path, daemons: Path) -> None:
    assert write(tmp_path, daemons) == 0
    folder = tmp_path / "etc/systemd/system"
    run = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(path) for path in folder.iterdir())],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{folder}:"},
    )
    assert not [line for line in run.stderr.splitlines() if str(folder) in line], run.stderr


def test_an_older_systemd_is_spared_what_it_does_not_know() -> None:
    older, newer = (units.render("noxsd.service", "/x", release) for release in (252, 254))
    assert set(newer.splitlines()) - set(older.splitlines()) == {
        "RestartSteps=5",
        "RestartMaxDelaySec=30",
    }
