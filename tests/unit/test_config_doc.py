"""docs/config.md against the code."""

import re
from pathlib import Path

import pytest

from chaos import config, diskspec, domconfig, vifspec
from chaos.diskspec import DiskConfig
from chaos.domconfig import DomainConfig
from chaos.vifspec import VifConfig
from chaos.xlkeys import IGNORED, REFUSED

DOC = (Path(__file__).parents[2] / "docs" / "config.md").read_text()


def table(heading: str) -> dict[str, list[str]]:
    """The rows of the first table after a heading, by each name in the first column."""
    section = DOC.split(f"\n{heading}\n", 1)[1].split("\n|---", 1)[1].split("\n\n", 1)[0]
    rows = {}
    for line in section.split("\n")[1:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for name in re.findall(r"`([^`]+)`", cells[0]):
            assert name not in rows, f"{name} is there twice"
            rows[name] = cells[1:]
    return rows


def test_every_setting_is_listed() -> None:
    assert set(table("## Settings")) == set(config.UNDERSTOOD)


def test_defaults() -> None:
    rows = table("## Settings")
    default = DomainConfig(name="x")
    for name in ("type", "ramdisk", "cmdline", *(key for key in rows if key.startswith("on_"))):
        assert rows[name][1] == f'`"{getattr(default, name)}"`', name
    assert rows["vcpus"][1] == str(default.vcpus)
    assert rows["memory"][1] == f"`maxmem`, or {default.memory}"


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("name", domconfig.NAME_MAX),
        ("cmdline", domconfig.CMDLINE_MAX),
        ("vcpus", domconfig.VCPUS_MAX["pv"]),
        ("vcpus", domconfig.VCPUS_MAX["pvh"]),
        ("vif", domconfig.VIFS_MAX),
        ("disk", domconfig.DISKS_MAX),
        ("noxs_metadata", domconfig.METADATA_MAX),
    ],
)
def test_limits(name: str, limit: int) -> None:
    assert re.search(rf"\b{limit}\b", table("## Settings")[name][0])


def test_actions() -> None:
    sentence = next(line for line in DOC.split("\n") if line.startswith("Actions are"))
    assert tuple(re.findall(r"`([^`]+)`", sentence)) == domconfig.ACTIONS


def test_vif() -> None:
    rows = table("## Network interfaces")
    assert set(rows) == {*vifspec._READERS, "trusted", "untrusted"}
    default = VifConfig()
    assert rows["bridge"][1] == f"`{default.bridge}`"
    assert rows["mtu"][0] == f"{vifspec.MTU_MIN} to {vifspec.MTU_MAX}"
    assert rows["devid"][0] == f"0 to {vifspec.MAX_DEVID}"
    assert set(default.as_dict()) == set(rows) - {"untrusted"}


def test_disk() -> None:
    rows = table("## Disks")
    default = DiskConfig(vdev="xvda", target="/x")
    flags = {"cdrom", "discard", "no-discard", "direct-io-safe", "trusted", "untrusted"}
    assert set(rows) == {*diskspec._KEYS, *flags}
    assert rows["format"][1] == f"`{default.format}`"
    assert rows["specification"][1] == f"`{default.specification}`"
    for key in ("format", "backendtype", "specification"):
        known = getattr(diskspec, {"backendtype": "BACKENDS"}.get(key, f"{key.upper()}S"))
        assert set(re.findall(r"`([^`]+)`", rows[key][0])) == set(known)


def test_what_is_refused_and_ignored() -> None:
    refused = table("### Refused")
    assert set(refused) == set(REFUSED)
    for name, (reason, harmless) in REFUSED.items():
        assert refused[name] == [reason, ", ".join(f"`{value}`" for value in harmless)]
    ignored = table("### Ignored")
    assert {name: row[0] for name, row in ignored.items()} == IGNORED
