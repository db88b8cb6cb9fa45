"""Plans of vifs: what the backend's nodes mean."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noxs.hotplug import SCRIPTS, DeviceError, script_for
from xendevd.plan import (
    BUILT_IN,
    ERROR_MAX,
    KEYS,
    OURS,
    VLAN_MAX,
    VifPlan,
    Vlans,
    check_ifname,
    error_text,
    parse,
    parse_vlans,
    served,
)


def plan(**nodes: str) -> VifPlan:
    return parse("backend/vif/1/0", "vif1.0", {"script": "vif-xendevd", "bridge": "br0", **nodes})


def test_a_plain_vif() -> None:
    made = plan(mac="00:16:3e:01:02:03", frontend="/local/domain/1/device/vif/0")
    assert (made.ifname, made.bridge, made.mtu, made.vlans) == ("vif1.0", "br0", None, None)
    assert made.openvswitch is None
    assert (made.ovs_bridge, made.ovs_vlans) == ("br0", None)
    assert (made.mac, made.frontend) == ("00:16:3e:01:02:03", "/local/domain/1/device/vif/0")


def test_everything_given() -> None:
    made = plan(vifname="web0", mtu="9000", vlan="10p/20", script="/etc/xen/scripts/vif-bridge")
    assert (made.ifname, made.mtu) == ("web0", 9000)
    assert made.vlans == Vlans(10, frozenset({10}), frozenset({20}))
    assert made.openvswitch is False


@pytest.mark.parametrize(
    ("bridge", "name", "vlans"),
    [
        ("ovs0", "ovs0", None),
        ("ovs0.100", "ovs0", Vlans(100, frozenset({100}))),
        ("ovs0:1:20:300", "ovs0", Vlans(None, frozenset(), frozenset({1, 20, 300}))),
        ("ovs0.9:20:30", "ovs0", Vlans(9, frozenset({9}), frozenset({20, 30}))),
    ],
)
def test_bridge_names_of_open_vswitch(bridge: str, name: str, vlans: Vlans | None) -> None:
    for script in ("vif-openvswitch", "vif-xendevd-openvswitch"):
        made = plan(bridge=bridge, script=script)
        assert (made.openvswitch, made.ovs_bridge, made.ovs_vlans) == (True, name, vlans)
    assert plan(bridge=bridge).openvswitch is (True if ":" in bridge else None)


def test_a_bridge_with_a_dot() -> None:
    """Linux's or Open vSwitch's, as the host has it; unless it says VLANs twice, or is too long."""
    both = plan(bridge="br0.5", vlan="7")
    assert (both.openvswitch, both.ovs_bridge) == (None, "")
    assert both.vlans == Vlans(7, frozenset({7}))
    long = plan(bridge="a-bridge-of-15-.4000")
    assert (long.openvswitch, long.ovs_bridge) == (True, "a-bridge-of-15-")


@pytest.mark.parametrize(
    ("nodes", "why"),
    [
        ({"bridge": ""}, "no bridge is given"),
        ({"bridge": "a b"}, "no name for a network interface"),
        ({"bridge": "../../x"}, "no name for a network interface"),
        ({"bridge": "averyveryverylongname"}, "no name for a network interface"),
        ({"bridge": "br0:x", "script": "vif-openvswitch"}, "is not of the form"),
        ({"bridge": "br0.5000", "script": "vif-openvswitch"}, "VLANs are within"),
        ({"bridge": "br0.5", "vlan": "7", "script": "vif-openvswitch"}, "both bridge"),
        ({"bridge": "br0:5", "vlan": "7"}, "both bridge"),
        ({"vifname": "eth%d"}, "no name for a network interface"),
        ({"vifname": "a/b"}, "no name for a network interface"),
        ({"vifname": "é"}, "no name for a network interface"),
        ({"mtu": "67"}, "not within"),
        ({"mtu": "70000"}, "not within"),
        ({"mtu": "1500 "}, "not within"),
        ({"mtu": "9" * 5000}, "not within"),
        ({"script": "vif-route"}, "runs no scripts"),
        ({"script": "/root/evil"}, "runs no scripts"),
        ({"vlan": "0"}, "not within 1"),
    ],
)
def test_refusals(nodes: dict[str, str], why: str) -> None:
    with pytest.raises(DeviceError, match=why):
        plan(**nodes)


@pytest.mark.parametrize(
    ("text", "pvid", "untagged", "tagged"),
    [
        ("10", 10, {10}, set()),
        ("10p/20", 10, {10}, {20}),
        ("10p/100+10x4", 10, {10}, {100, 110, 120, 130, 140}),
        ("5p/7-9/20-21u", 5, {5, 20, 21}, {7, 8, 9}),
        ("1-3/2p", 2, {2}, {1, 3}),
    ],
)
def test_vlans(text: str, pvid: int, untagged: set[int], tagged: set[int]) -> None:
    assert parse_vlans(text) == Vlans(pvid, frozenset(untagged), frozenset(tagged))


@pytest.mark.parametrize(
    "text", ["", "x", "1p/2p", "1-2p", "3-1p", "4095p", "1/2", "10p/", "1p/5+0x0x", "5p/9-4095"]
)
def test_vlans_refused(text: str) -> None:
    with pytest.raises(DeviceError, match="vlan"):
        parse_vlans(text)


@given(st.text(max_size=40))
def test_any_vlan_text(text: str) -> None:
    try:
        made = parse_vlans(text)
    except DeviceError:
        return
    assert made.pvid in made.untagged
    assert all(1 <= vlan <= VLAN_MAX for vlan in made.untagged | made.tagged)


@given(st.fixed_dictionaries({}, optional={key: st.text(max_size=24) for key in KEYS}))
def test_any_nodes(nodes: dict[str, str]) -> None:
    try:
        made = parse("p", "vif1.0", nodes)
    except DeviceError as error:
        text = error_text(error)
    else:
        check_ifname("ifname", made.ifname)
        text = ""
    assert len(text) <= ERROR_MAX
    assert text.isprintable()


def test_whose_vifs_these_are() -> None:
    assert served("/usr/local/bin/vif-xendevd", alone=False)
    assert served("/bin/true", alone=False)
    assert not served("/etc/xen/scripts/vif-bridge", alone=False)
    assert served("/etc/xen/scripts/vif-route", alone=True)


def test_scripts_for_xendevd_are_those_that_it_serves() -> None:
    for script in SCRIPTS:
        written = script_for(f"/etc/xen/scripts/{script}" if script else "")
        assert written in OURS
        if script in BUILT_IN:
            assert OURS[written] == BUILT_IN[script]
    with pytest.raises(DeviceError, match="runs no scripts"):
        script_for("vif-nat")


def test_error_text_is_one_bounded_line() -> None:
    assert error_text(ValueError("a\nb\tc\x1b" + "é" * 5000)).startswith("a b c")
    assert len(error_text(ValueError("x" * 5000))) == ERROR_MAX
    assert error_text(ValueError()) == "ValueError"
