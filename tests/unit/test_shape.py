"""What a shell fixes, and what comes late."""

from dataclasses import replace
from ipaddress import IPv4Interface

import pytest

from chaos.domconfig import DomainConfig
from chaos.shape import blank, shape_of
from chaos.vifspec import VifConfig

BASE = DomainConfig(name="a", memory=8, kernel="/k", vifs=(VifConfig(),))


@pytest.mark.parametrize(
    "late",
    [
        {"name": "b"},
        {"uuid": b"0123456789abcdef"},
        {"on_crash": "restart"},
        {"metadata": b"x"},
        {"vifs": (VifConfig(mac=b"\x00\x16\x3e\x00\x00\x01"),)},
        {"vifs": (VifConfig(ipv4=IPv4Interface("10.0.0.1/8")),)},
    ],
)
def test_late_settings_leave_the_shape_alone(late: dict[str, object]) -> None:
    assert shape_of(replace(BASE, **late)) == shape_of(BASE)


@pytest.mark.parametrize(
    "fixed",
    [
        {"memory": 9, "maxmem": 9},
        {"maxmem": 9},
        {"vcpus": 2, "maxvcpus": 2},
        {"maxvcpus": 2},
        {"type": "pvh"},
        {"max_grant_frames": 8},
        {"tsc_mode": "default"},
        {"max_event_channels": 99},
        {"vifs": ()},
        {"vifs": (VifConfig(), VifConfig(devid=1))},
        {"vifs": (VifConfig(bridge="other"),)},
        {"vifs": (VifConfig(mtu=9000),)},
        {"vifs": (VifConfig(vifname="mine"),)},
    ],
)
def test_fixed_settings_make_another_shape(fixed: dict[str, object]) -> None:
    assert shape_of(replace(BASE, **fixed)) != shape_of(BASE)


def test_a_blank_has_the_shape_and_nothing_of_the_guest() -> None:
    mac = b"\x00\x16\x3e\x00\x00\x01"
    guest = replace(BASE, uuid=b"0123456789abcdef", metadata=b"x", vifs=(VifConfig(mac=mac),))
    shell = blank(guest, "shell")
    assert shape_of(shell) == shape_of(guest)
    assert (shell.name, shell.uuid, shell.metadata, shell.vifs[0].mac) == ("shell", None, b"", None)


def test_a_fixed_interface_name_is_for_one_guest_only() -> None:
    assert shape_of(BASE).poolable
    assert not shape_of(replace(BASE, vifs=(VifConfig(vifname="mine"),))).poolable
