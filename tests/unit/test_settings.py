"""chaos.toml."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from chaos.daemon.settings import FLAVOUR_SETTINGS, SETTINGS, Settings, from_data, read
from xenctypes.errors import ConfigError

FULL = """
[daemon]
builders = 3
group = "wheel"

[pool]
memory_floor = 128
adaptive = false

[[flavour]]
name = "net"
memory = 8
vcpus = 2
vif = ["bridge=xenbr0,rate=10Mb/s", "bridge=br1"]
kernel = "/images/app.elf"
cmdline = "quiet"
size = 32
low = 4
metadata = 4096
"""


def test_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "chaos.toml"
    path.write_text(FULL)
    settings = read(str(path))
    assert (settings.builders, settings.group, settings.memory_floor) == (3, "wheel", 128)
    assert not settings.adaptive
    (flavour,) = settings.flavours
    assert (flavour.name, flavour.size, flavour.low, flavour.metadata) == ("net", 32, 4, 4096)
    config = flavour.config
    assert (config.memory, config.vcpus, config.kernel) == (8, 2, "/images/app.elf")
    assert [(vif.devid, vif.bridge) for vif in config.vifs] == [(0, "xenbr0"), (1, "br1")]


def test_the_table_and_the_defaults_agree() -> None:
    documented = {setting.key: setting.default for setting in SETTINGS}
    defaults = {field.name: field.default for field in fields(Settings) if field.name != "flavours"}
    assert documented == defaults
    assert all(setting.doc.endswith(".") for setting in (*SETTINGS, *FLAVOUR_SETTINGS))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ({"deamon": {}}, r"unknown table \[deamon\] \(did you mean daemon\?\)"),
        ({"daemon": {"bilders": 1}}, "did you mean builders"),
        ({"daemon": {"builders": "two"}}, "is a text, not a number"),
        ({"daemon": {"builders": True}}, "is a truth value, not a number"),
        ({"daemon": {"builders": 0}}, "not within 1 to 64"),
        ({"pool": 3}, "pool is no table"),
        ({"flavour": {}}, "a list of tables"),
        ({"flavour": [{"memory": 4}]}, "a flavour has no name"),
        ({"flavour": [{"name": "a"}]}, 'flavour "a": memory is not set'),
        ({"flavour": [{"name": "a", "memory": 4, "vif": ["ip=10.0.0.1/8"]}]}, "belong to a guest"),
        ({"flavour": [{"name": "a", "memory": 4, "vif": [4]}]}, "a vif is a text"),
        ({"flavour": [{"name": "a", "memory": 4, "vif": ["bridge=x y"]}]}, 'flavour "a"'),
        ({"flavour": [{"name": "a", "memory": 4}] * 2}, 'two flavours are named "a"'),
        ({"flavour": [{"name": "a/b", "memory": 4}]}, "do not print"),
    ],
)
def test_what_is_refused(data: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        from_data(data)


@pytest.mark.parametrize(
    ("content", "why"), [(b"a = [", "not TOML"), (b"\xff", "not UTF-8"), (None, "cannot read it")]
)
def test_files_that_are_none(tmp_path: Path, content: bytes | None, why: str) -> None:
    path = tmp_path / "chaos.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"chaos\.toml: .*{why}"):
        read(str(path))
