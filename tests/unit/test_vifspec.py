from ipaddress import ip_address, ip_interface

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chaos.netspec import RateLimit, VlanConfig
from chaos.vifspec import MAX_TEXT, VifConfig, parse_vif
from xenctypes.errors import ConfigError


def test_defaults() -> None:
    assert parse_vif("") == (VifConfig(), [])
    assert parse_vif(" ,, ", 3) == (VifConfig(devid=3), [])
    vif = VifConfig()
    assert (vif.bridge, vif.mac, vif.mac_text, vif.mtu, vif.trusted) == (
        "xenbr0",
        None,
        "",
        0,
        True,
    )


def test_every_key() -> None:
    vif, warnings = parse_vif(
        "mac=00:16:3E:74:3d:76, bridge=br1,ip=10.77.0.2/24 fd00::2/64,gateway=10.77.0.1 fe80::1,"
        "mtu=9000,rate=1MB/s@20ms,vlan=10p/20,vifname=web0,script=/etc/xen/scripts/vif-route,"
        "gatewaydev=eth0,backend=netdom,type=vif,model=e1000,devid=7,untrusted"
    )
    assert not warnings
    assert vif == VifConfig(
        devid=7,
        mac=bytes.fromhex("00163e743d76"),
        bridge="br1",
        ipv4=ip_interface("10.77.0.2/24"),
        ipv6=ip_interface("fd00::2/64"),
        gateway4=ip_address("10.77.0.1"),
        gateway6=ip_address("fe80::1"),
        mtu=9000,
        rate=RateLimit(20_000, 20_000),
        vlan=VlanConfig(10, (10,), (20,)),
        vifname="web0",
        script="/etc/xen/scripts/vif-route",
        gatewaydev="eth0",
        backend="netdom",
        type="vif",
        model="e1000",
        trusted=False,
    )
    assert vif.mac_text == "00:16:3e:74:3d:76"
    assert vif.ip == "10.77.0.2/24 fd00::2/64"


def test_a_later_key_wins_as_with_xl() -> None:
    assert parse_vif("bridge=a,bridge=b,trusted,untrusted,ip=10.0.0.1,ip=fd00::1")[0] == VifConfig(
        bridge="b",
        trusted=False,
        ipv4=ip_interface("10.0.0.1/32"),
        ipv6=ip_interface("fd00::1/128"),
    )


def test_what_xl_ignores_is_ignored_with_a_warning() -> None:
    vif, warnings = parse_vif("forwarddev=eth1,colo_sock_mirror_id=1,accel=x,netdev=eth0")
    assert vif == VifConfig(gatewaydev="eth0")
    assert [warning.split()[1] for warning in warnings] == [
        "forwarddev",
        "colo_sock_mirror_id",
        "accel",
        "netdev",
    ]


def test_open_vswitch_bridges_carry_tags() -> None:
    vif, _ = parse_vif("script=vif-openvswitch,bridge=ovs0.10:20:30")
    assert vif.openvswitch
    assert vif.bridge == "ovs0.10:20:30"


@pytest.mark.parametrize(
    ("text", "only"),
    [
        ("bridge=ovs0", False),
        ("bridge=ovs0.20", False),
        ("bridge=ovs0:20", True),
        ("bridge=ovs0.20:30:40", True),
        ("bridge=a-bridge-of-15-.4000", True),
        ("bridge=ovs0,script=vif-openvswitch", True),
        ("bridge=ovs0,script=/etc/xen/scripts/vif-openvswitch", True),
        ("bridge=ovs0.20,script=vif-bridge", False),
        ("bridge=ovs0.20,vlan=30", False),
    ],
)
def test_the_bridge_or_the_script_asks_for_open_vswitch(text: str, only: bool) -> None:
    assert parse_vif(text)[0].openvswitch is only


@pytest.mark.parametrize(
    ("text", "cause", "column"),
    [
        ("brigde=x", '"brigde=" is no key of a vif .did you mean bridge=', 1),
        ("mac=00:16:3e:0:0:1, mtu", '"mtu" is no key of a vif .did you mean mtu=', 21),
        ("trusted=1", '"trusted=" is no key', 1),
        ("bridge=x,mac=x", "no MAC address", 10),
        ("mac=01:00:5e:00:00:01", "no address of one interface", 1),
        ("mac=00:00:00:00:00:00", "no address of one interface", 1),
        ("bridge=", "no name of an interface", 1),
        ("bridge=a/b", "no name of an interface", 1),
        ("bridge=sixteen-letters-", "no name of an interface", 1),
        ("bridge=sixteen-letters-.5", "no name of an interface", 1),
        ("script=vif-bridge,bridge=ovs0:20", "no name of an interface", 19),
        ("bridge=ovs0:20:", "no name of an interface", 1),
        ("bridge=ovs0:4096", "a VLAN above 4095", 1),
        ("bridge=ovs0.5:20,vlan=7", "name VLANs", 18),
        ("bridge=x,vifname=a b", "no name of an interface", 10),
        ("vifname=..", "no name of an interface", 1),
        ("mtu=67", "mtu 67 is not within 68 to 65517", 1),
        ("mtu=65518", "not within", 1),
        ("mtu=1500x", "is not a number", 1),
        ("mtu=-1", "is not a number", 1),
        ("devid=256", "not within", 1),
        ("type=e1000", "neither", 1),
        ("rate=1", "no rate", 1),
        ("rate=1b/s", "less than one byte", 1),
        ("ip=10.0.0.0/24", "not a host's address", 1),
        ("ip=10.0.0.255/24", "not a host's address", 1),
        ("ip=224.0.0.1/24", "no address of one interface", 1),
        ("ip=0.0.0.0", "no address of one interface", 1),
        ("ip=127.0.0.1/8", "no address of one interface", 1),
        ("ip=fe80::1%eth0/64", "no address of one interface", 1),
        ("ip=10.0.0.1/33", "no IP address", 1),
        ("ip=host", "no IP address", 1),
        ("ip=10.0.0.1 10.0.0.2", "more than one IPv4 address", 1),
        ("gateway=10.0.0.1", "without an IPv4 address", 1),
        ("ip=10.0.0.2/24,gateway=10.0.1.1", "not in 10.0.0.0/24", 16),
        ("ip=10.0.0.2/24,gateway=10.0.0.2", "own address", 16),
        ("ip=10.0.0.2/24,gateway=10.0.0.1/24", "no prefix here", 16),
        ("ip=fd00::2/64,gateway=fd01::1", "not in fd00::/64", 15),
        ("script=a\tb", "do not print", 1),
        ("x" * (MAX_TEXT + 1), "longer than", 0),
    ],
)
def test_errors(text: str, cause: str, column: int) -> None:
    with pytest.raises(ConfigError, match=cause) as caught:
        parse_vif(text)
    assert caught.value.column == column
    assert str(caught.value).isprintable()


@settings(max_examples=200)
@given(st.text("abcdefgimprtuvwx=,. :/0123456789@KMGsé\x1b\udc80", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    refusal = None
    try:
        parse_vif(text)
    except ConfigError as error:
        refusal = error
    if refusal is not None:
        assert 1 <= refusal.column <= len(text) + 1
        assert str(refusal).isprintable()
