"""The rtnetlink codec, and plugging taps into real bridges in a namespace."""

import errno
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from netns import in_namespace, tap

from noxs.hotplug import DeviceError
from xendevd import bridge
from xendevd.bridge import Gone
from xendevd.netlink import IFINFO, Link, Rtnetlink, attribute, attributes, parse_link
from xendevd.plan import VifPlan, Vlans


@given(st.lists(st.tuples(st.integers(0, 0x3FFF), st.binary(max_size=50)), max_size=8))
def test_attributes_come_back(pairs: list[tuple[int, bytes]]) -> None:
    data = b"".join(attribute(kind, value) for kind, value in pairs)
    assert len(data) % 4 == 0
    assert list(attributes(data)) == pairs


@given(st.binary(max_size=200))
def test_any_attributes(data: bytes) -> None:
    assert len(list(attributes(data))) <= len(data) // 4


def test_a_link() -> None:
    data = IFINFO.pack(0, 1, 7, 1, 0) + attribute(3, b"vif1.0\0") + attribute(4, b"\xdc\5\0\0")
    data += attribute(10, b"\2\0\0\0")
    data += attribute(18, attribute(1, b"bridge\0") + attribute(2, attribute(7, b"\1")))
    assert parse_link(data) == Link(7, "vif1.0", 1500, True, 2, "bridge", True)


def ip(*commands: str) -> None:
    done = subprocess.run(
        ["ip", "-batch", "-"],
        input="\n".join(commands),
        text=True,
        capture_output=True,
        check=False,
    )
    if "not supported" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr


def plan(vif: str, ifname: str = "", **more: Any) -> VifPlan:
    return VifPlan("backend/vif/1/0", vif, ifname or vif, "br0", **more)


def with_bridge(body: Callable[[Rtnetlink, Link], None], mtu: int = 1500) -> None:
    def prepared() -> None:
        ip("link add br0 type bridge", "link set br0 up", f"link set br0 mtu {mtu}")
        fds = [tap("vif1.0"), tap("vif2.0")]
        route = Rtnetlink()
        try:
            made = route.link("br0")
            assert made is not None
            body(route, made)
        finally:
            route.close()
            for fd in fds:
                os.close(fd)

    in_namespace(prepared)


def inet6() -> str:
    return Path("/proc/thread-self/net/if_inet6").read_text()


def test_plug_and_plug_again() -> None:
    def body(route: Rtnetlink, br0: Link) -> None:
        assert bridge.plug(route, plan("vif1.0"), br0) == 1400
        link = route.link("vif1.0")
        assert link is not None
        assert (link.up, link.master, link.mtu) == (True, br0.ifindex, 1400)
        assert "vif1.0" not in inet6()  # silent until its guest speaks
        assert bridge.plug(route, plan("vif1.0"), br0) == 1400
        assert route.link("vif1.0") == link

    with_bridge(body, mtu=1400)


def test_rename_and_its_repetition() -> None:
    def body(route: Rtnetlink, br0: Link) -> None:
        bridge.plug(route, plan("vif1.0", "web0", mtu=1300), br0)
        assert route.link("vif1.0") is None
        link = route.link("web0")
        assert link is not None
        assert (link.mtu, link.up) == (1300, True)
        bridge.plug(route, plan("web0", mtu=1300), br0)  # as it is found after a restart
        with pytest.raises(Gone):
            bridge.plug(route, plan("vif1.0", "web0"), br0)
        with pytest.raises(DeviceError, match="vifname 'web0': an interface of that name exists"):
            bridge.plug(route, plan("vif2.0", "web0"), br0)

    with_bridge(body)


def test_refusals_name_their_cause() -> None:
    def body(route: Rtnetlink, br0: Link) -> None:
        with pytest.raises(DeviceError, match=r"mtu 65530.*(maximum|Invalid)"):
            bridge.plug(route, plan("vif1.0", mtu=65530), br0)
        with pytest.raises(DeviceError, match="does not filter VLANs"):
            bridge.plug(route, plan("vif1.0", vlans=Vlans(7, frozenset({7}))), br0)
        with pytest.raises(Gone):
            bridge.plug(route, plan("vif9.0"), br0)
        no_bridge = route.link("vif2.0")
        assert no_bridge is not None
        with pytest.raises(DeviceError, match="joining the bridge"):
            bridge.plug(route, plan("vif1.0"), no_bridge)

    with_bridge(body)


def test_a_full_bridge() -> None:
    class Full:
        def set_link(self, *_: object, **__: object) -> None:
            raise OSError(errno.EXFULL, "Exchange full")

    route: Any = Full()
    link = Link(7, "vif1.0", 1500, up=False, master=0, kind="", vlan_filtering=False)
    with pytest.raises(DeviceError, match="as many ports as Linux allows"):
        bridge.configure(route, link, master=3)


def test_vlans_of_a_port() -> None:
    def body(route: Rtnetlink, br0: Link) -> None:
        ip("link set br0 type bridge vlan_filtering 1")
        again = route.link("br0")
        assert again is not None
        assert again.vlan_filtering
        vlans = Vlans(10, frozenset({10}), frozenset(range(100, 1400)))
        bridge.plug(route, plan("vif1.0", vlans=vlans), again)
        shown = subprocess.run(
            ["bridge", "vlan", "show", "dev", "vif1.0"], capture_output=True, text=True, check=True
        ).stdout
        assert "10 PVID Egress Untagged" in shown
        assert "1 PVID" not in shown.replace("10 PVID", "").replace("101", "")

    with_bridge(body)


def test_errors_carry_errno_and_words() -> None:
    def body(route: Rtnetlink, _: Link) -> None:
        with pytest.raises(OSError, match=r".+") as caught:
            route.set_up(9999)
        assert caught.value.errno == errno.ENODEV

    with_bridge(body)


def test_no_interface_no_link() -> None:
    route = Rtnetlink()
    assert route.link("surely-not-here") is None
    assert {name for _, name in socket.if_nameindex()} >= {"lo"}
    route.close()
