"""What plugging a vif costs: netlink by hand, by pyroute2, by the ip command; xl with and without.

The first part runs anywhere as root, in a network namespace of its own::

    python3 bench/plug.py --count 200

With ``--burst N``, in Dom0 with xendevd running, N vifs appear while xendevd is stopped: the first
time is the kernel's and the store's. Then it goes on: the second time is its own, to the last
verdict in the store::

    scripts/lab run -- sh -c 'noxsd & sleep 2; xendevd & python3 bench/plug.py --burst 1000'

With ``--xl``, in Dom0 of a host with xenstored, `xl create` of one guest is timed without a vif,
with one plugged by vif-bridge, and with one plugged by xendevd, in turn::

    scripts/lab run --xenstored -- sh -c 'xendevd & python3 bench/plug.py --xl'

Prints JSON: milliseconds (median, p99, min) and ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

from dom0 import cpu_seconds, process
from figures import clock, spawn, summary

from noxs import hotplug
from noxs.bus import Bus
from xendevd import bridge
from xendevd.netlink import Rtnetlink
from xendevd.plan import VifPlan

if TYPE_CHECKING:
    from collections.abc import Iterator

CLONE_NEWNET = 0x40000000
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 2, 0x1000
XL_CONF = Path("/etc/xen/xl.conf")
GUEST = """\
name = "bench-plug"
kernel = "/src/guests/build/hello.elf"
memory = 16
"""
VIF = 'vif = ["bridge=xenbr0,script={script}"]\n'


def ways(count: int) -> dict[str, Any]:
    """Enslave, resize and bring up taps, each way in turn."""
    from pyroute2 import IPRoute

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:
        raise SystemExit(f"no network namespace: {os.strerror(ctypes.get_errno())}")
    subprocess.run(["ip", "link", "add", "br0", "type", "bridge"], check=True)
    subprocess.run(["ip", "link", "set", "br0", "mtu", "1400", "up"], check=True)
    rows: dict[str, list[float]] = {"raw": [], "pyroute2": [], "ip": []}
    route, library = Rtnetlink(), IPRoute()
    br0 = route.link("br0")
    assert br0 is not None

    def by_hand(name: str) -> None:
        bridge.plug(route, VifPlan("", name, name, "br0"), br0)

    def by_pyroute2(name: str) -> None:
        index = library.link_lookup(ifname=name)[0]
        library.link("set", index=index, mtu=br0.mtu, master=br0.ifindex)
        library.link("set", index=index, state="up")

    def by_command(name: str) -> None:
        mtu = str(br0.mtu)
        spawn("ip", "link", "set", name, "mtu", mtu, "master", "br0", "up")

    actions = {"raw": by_hand, "pyroute2": by_pyroute2, "ip": by_command}
    for number in range(count):
        for way, action in actions.items():
            name = f"{way}{number}"
            fd = os.open("/dev/net/tun", os.O_RDWR)
            request = struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI)
            fcntl.ioctl(fd, TUNSETIFF, request)
            rows[way].append(clock(lambda action=action, name=name: action(name)))  # type: ignore[misc]
            link = route.link(name)
            assert link is not None
            assert (link.master, link.mtu, link.up) == (br0.ifindex, br0.mtu, True)
            os.close(fd)
    library.close()
    result: dict[str, Any] = {way: summary(samples) for way, samples in rows.items()}
    for way in ("pyroute2", "ip"):
        result[f"{way}_over_raw"] = result[way]["median_ms"] / result["raw"]["median_ms"]
    return result


def burst(count: int) -> dict[str, Any]:
    """Many vifs at once, without guests."""
    if not hotplug.running():
        raise SystemExit("xendevd is not running")
    xendevd = process("xendevd")
    with Bus.connect() as bus, quiet_udevd():
        domids = range(20000, 20000 + count)
        back = "/local/domain/0/backend/vif/{}/0".format
        front = "/local/domain/{}/device/vif/0".format
        os.kill(xendevd, signal.SIGSTOP)
        start = monotonic()
        for domid in domids:
            with bus.transaction() as nodes:
                nodes.write_many(_nodes(domid, back(domid), front(domid)))
        devices = [Path(f"/sys/devices/vif-{domid}-0/net") for domid in domids]
        while not all(map(Path.exists, devices)):
            sleep(0.1)
        probed, before = monotonic(), cpu_seconds(xendevd)
        os.kill(xendevd, signal.SIGCONT)
        waiting = set(domids)
        while waiting:
            some = max(waiting)
            bus.wait_for(f"{back(some)}/{hotplug.STATUS}", bool, 600.0)
            states = bus.read_many(f"{back(domid)}/{hotplug.STATUS}" for domid in waiting)
            waiting = {domid for domid, state in zip(waiting, states, strict=True) if not state}
        plugged, after = monotonic(), cpu_seconds(xendevd)
        bus.rm_many([front(domid) for domid in domids])
        bus.rm_many([back(domid) for domid in domids])
        while any(map(Path.exists, devices)):
            sleep(0.1)
    return {
        "vifs": count,
        "until_probed_s": probed - start,
        "until_plugged_s": plugged - probed,
        "per_vif_ms": (plugged - probed) * 1000 / count,
        "xendevd_cpu_per_vif_ms": (after - before) * 1000 / count,
        "removed_s": monotonic() - plugged,
    }


@contextlib.contextmanager
def quiet_udevd() -> Iterator[None]:
    """Keep udevd, which is not measured here, from forking workers for every event."""
    subprocess.run(["udevadm", "control", "--stop-exec-queue"], check=False)
    try:
        yield
    finally:
        subprocess.run(["udevadm", "control", "--start-exec-queue"], check=False)


def _nodes(domid: int, back: str, front: str) -> list[tuple[str, str]]:
    mac = f"00:16:3e:77:{domid >> 8 & 255:02x}:{domid & 255:02x}"
    frontend = {"backend": back, "backend-id": "0", "state": "1", "handle": "0", "mac": mac}
    backend = {
        "frontend": front,
        "frontend-id": str(domid),
        "online": "1",
        "state": "1",
        "handle": "0",
        "mac": mac,
        "bridge": "xenbr0",
        "script": "vif-xendevd",
        hotplug.STATUS: hotplug.PENDING,
    }
    return [
        *((f"{front}/{key}", value) for key, value in frontend.items()),
        *((f"{back}/{key}", value) for key, value in backend.items()),
    ]


def xl(count: int) -> dict[str, Any]:
    """`xl create` of a paused guest, and what its vif adds."""
    if not hotplug.running():
        raise SystemExit("xendevd is not running")
    scripts = {
        "no_vif": "",
        "vif_bridge": VIF.format(script="vif-bridge"),
        "vif_xendevd": VIF.format(script="/usr/local/bin/vif-xendevd"),
        "bin_true": VIF.format(script="/bin/true"),
    }
    rows: dict[str, list[float]] = {name: [] for name in scripts}
    gone: dict[str, list[float]] = {name: [] for name in scripts}
    with tempfile.TemporaryDirectory() as folder:
        for name, vif in scripts.items():
            Path(folder, name).write_text(GUEST + vif)
        for _ in range(count):
            for name in scripts:
                create = ["xl", "create", "-q", "-p", f"{folder}/{name}"]
                rows[name].append(clock(lambda create=create: spawn(*create)))  # type: ignore[misc]
                gone[name].append(clock(lambda: spawn("xl", "destroy", "bench-plug")))
    result: dict[str, Any] = {name: summary(samples) for name, samples in rows.items()}
    result["destroy"] = {name: summary(samples) for name, samples in gone.items()}
    base = result["no_vif"]["median_ms"]
    script = result["vif_bridge"]["median_ms"]
    for name in ("vif_xendevd", "bin_true"):
        result[f"{name}_speedup"] = script / result[name]["median_ms"]
        result[f"{name}_vif_cost_ratio"] = (result[name]["median_ms"] - base) / (script - base)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="samples of each row")
    parser.add_argument("--burst", type=int, metavar="N", help="N vifs at once, in Dom0")
    parser.add_argument("--xl", action="store_true", help="time xl create, in Dom0")
    args = parser.parse_args()
    if args.burst:
        result = burst(args.burst)
    elif args.xl:
        result = xl(args.count)
    else:
        result = ways(args.count)
    json.dump(result, sys.stdout, indent=2)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
