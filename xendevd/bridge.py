"""Vifs as ports of a Linux bridge: what Xen's vif-bridge script does."""

from errno import EEXIST, ENODEV, EXFULL

from noxs.hotplug import DeviceError
from xendevd.netlink import VLAN_INFO_PVID, VLAN_INFO_UNTAGGED, Link, Rtnetlink
from xendevd.plan import VifPlan, Vlans

DEFAULT_VLAN = 1  # the kernel's default_pvid, which every new port gets
VLANS_AT_ONCE = 1000  # an attribute has 65535 bytes, an entry 8


class Gone(Exception):
    """The interface is not there any more: nobody waits for it."""


def find_vif(route: Rtnetlink, plan: VifPlan) -> Link:
    """The vif, under the name that its event gave. Raises Gone.

    One that has been renamed since was plugged since, on an earlier event; what else
    has the wanted name by now is not looked at.
    """
    link = route.link(plan.vif)
    if link is None:
        raise Gone
    return link


def plug(route: Rtnetlink, plan: VifPlan, bridge: Link) -> int:
    """Name the vif, set its MTU and VLANs, make it a port of ``bridge`` and bring it up.

    Done twice it changes nothing. Returns the MTU. Raises DeviceError with the cause,
    Gone if the vif has vanished.
    """
    link = find_vif(route, plan)
    if plan.vlans and not bridge.vlan_filtering:
        raise DeviceError(
            f"bridge {bridge.name!r} does not filter VLANs",
            hint=f"ip link set {bridge.name} type bridge vlan_filtering 1",
        )
    mtu = plan.mtu or bridge.mtu
    name = plan.ifname if link.name != plan.ifname else ""
    master = bridge.ifindex if link.master != bridge.ifindex else 0
    try:
        configure(route, link, name=name, mtu=mtu, master=master)
        if plan.vlans:
            set_vlans(route, link, plan.vlans)
        if not link.up:
            route.set_up(link.ifindex)
    except OSError as error:
        if error.errno == ENODEV:
            raise Gone from error
        raise DeviceError(f"vif {plan.vif!r}: {error.strerror}") from error
    return mtu


def configure(
    route: Rtnetlink, link: Link, *, name: str = "", mtu: int = 0, master: int = 0
) -> None:
    """Change a link that is not up yet; if the kernel refuses, find out what it refuses.

    Raises DeviceError, or OSError where the cause is none of the wishes.
    """
    mtu = mtu if mtu != link.mtu else 0
    if not (name or mtu or master) and link.up:
        return
    try:
        route.set_link(link.ifindex, name=name, mtu=mtu, master=master)
    except OSError as refused:
        if refused.errno == ENODEV:
            raise
        _one_by_one(route, link, name=name, mtu=mtu, master=master)


def _one_by_one(route: Rtnetlink, link: Link, *, name: str, mtu: int, master: int) -> None:
    if mtu:
        try:
            route.set_link(link.ifindex, mtu=mtu)
        except OSError as error:
            raise _refused(error, f"mtu {mtu}") from error
    if name:
        try:
            route.set_link(link.ifindex, name=name)
        except OSError as error:
            if error.errno == EEXIST:
                text = f"vifname {name!r}: an interface of that name exists"
                raise DeviceError(text, hint="choose another vifname") from error
            raise _refused(error, f"vifname {name!r}") from error
    if master:
        try:
            route.set_link(link.ifindex, master=master)
        except OSError as error:
            if error.errno == EXFULL:
                raise DeviceError(
                    "joining the bridge: it has as many ports as Linux allows, 1023",
                    hint="spread the vifs over several bridges",
                ) from error
            raise _refused(error, "joining the bridge") from error


def _refused(error: OSError, what: str) -> Exception:
    if error.errno == ENODEV:
        return error
    return DeviceError(f"{what}: {error.strerror}")


def set_vlans(route: Rtnetlink, link: Link, vlans: Vlans) -> None:
    """Make ``vlans`` those of the port. Raises OSError."""
    wanted = sorted(vlans.tagged | vlans.untagged)
    entries = [
        (
            vlan,
            (VLAN_INFO_UNTAGGED if vlan in vlans.untagged else 0)
            | (VLAN_INFO_PVID if vlan == vlans.pvid else 0),
        )
        for vlan in wanted
    ]
    for at in range(0, len(entries), VLANS_AT_ONCE):
        route.add_vlans(link.ifindex, entries[at : at + VLANS_AT_ONCE])
    if DEFAULT_VLAN not in wanted:
        route.delete_vlans(link.ifindex, [DEFAULT_VLAN])
