"""noxsd against xenstored: the same requests, in the same boot of the same Dom0.

    scripts/lab run --xenstored -- python3 bench/bus.py            both servers' sockets
    scripts/lab run -- python3 bench/bus.py --kernel --netback 1000    noxsd serves the kernel
    scripts/lab run --xenstored -- python3 bench/bus.py --kernel --netback 1000    so does xenstored

Only one store can serve the kernel, so ``--kernel`` (requests through /dev/xen/xenbus) and
``--netback`` (real vifs, made by netback) measure the one that does. A noxsd for the sockets'
figures is started, and stopped, here. Prints JSON; times are in seconds unless a name says ms.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from dom0 import cpu_seconds, rss_kib

from noxs import wire
from noxs.bus import SOCKETS, Bus

XENSTORED = [path for path in SOCKETS if "xenstored" in path]
Figures = dict[str, float]

# What netback reads and writes for one vif, besides its watches
# (drivers/xen/xenbus/xenbus_probe_backend.c, drivers/net/xen-netback/xenbus.c of Linux 6.1).
FEATURES = (
    "feature-sg", "feature-gso-tcpv4", "feature-gso-tcpv6", "feature-ipv6-csum-offload",
    "feature-rx-copy", "feature-xdp-headroom", "feature-rx-flip", "feature-multicast-control",
    "feature-dynamic-multicast-control",
)  # fmt: skip
AFTERWARDS = ("feature-split-event-channels", "multi-queue-max-queues", "feature-ctrl-ring")


def front_and_back(domid: int) -> tuple[str, str]:
    return f"/local/domain/{domid}/device/vif/0", f"/local/domain/0/backend/vif/{domid}/0"


def toolstack_nodes(domid: int) -> list[tuple[str, str | int]]:
    """The nodes that a toolstack writes for a vif; the backend's state comes last."""
    front, back = front_and_back(domid)
    return [
        (f"{front}/backend", back),
        (f"{front}/backend-id", 0),
        (f"{front}/state", 1),
        (f"{front}/handle", 0),
        (f"{front}/mac", "00:16:3e:00:00:01"),
        (f"{back}/frontend", front),
        (f"{back}/frontend-id", domid),
        (f"{back}/online", 1),
        (f"{back}/handle", 0),
        (f"{back}/mac", "00:16:3e:00:00:01"),
        (f"{back}/type", "vif"),
        (f"{back}/bridge", "xenbr0"),
        (f"{back}/script", "/bin/true"),
        (f"{back}/state", 1),
    ]


class Server:
    """A store's socket, and the process behind it."""

    def __init__(self, name: str, path: str) -> None:
        self.name = name
        self.path = path
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            size = 12
            self.pid = int.from_bytes(
                sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)[:4], "little"
            )

    def cpu(self) -> float:
        """Seconds of processor time that the server has used."""
        return cpu_seconds(self.pid)

    def resident(self) -> int:
        """KiB of memory."""
        return rss_kib(self.pid)


def round_trips(server: Server, op: int, payload: bytes, reply: bytes, count: int) -> Figures:
    """One request at a time, as a kernel thread or a tool asks."""
    request = wire.pack(op, 1, 0, payload)
    due = wire.HEADER_SIZE + len(reply)
    times = []
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(server.path)
        cpu = server.cpu()
        for _ in range(count):
            before = time.perf_counter()
            sock.sendall(request)
            got = 0
            while got < due:
                got += len(sock.recv(8192))
            times.append(time.perf_counter() - before)
        cpu = server.cpu() - cpu
    return {**summary(times), "server_cpu_ms_per_1000": round(cpu / count * 1e6, 1)}


def summary(times: list[float]) -> Figures:
    return {
        "per_second": round(len(times) / sum(times)),
        "median_ms": round(statistics.median(times) * 1e3, 4),
        "p99_ms": round(statistics.quantiles(times, n=100)[98] * 1e3, 4),
    }


def pipelined(server: Server, op: int, payload: bytes, reply: bytes, count: int) -> Figures:
    """A hundred requests under way at once."""
    batch = 100
    requests = wire.pack(op, 1, 0, payload) * batch
    due = (wire.HEADER_SIZE + len(reply)) * batch
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(server.path)
        cpu = server.cpu()
        start = time.perf_counter()
        for _ in range(count // batch):
            sock.sendall(requests)
            got = 0
            while got < due:
                got += len(sock.recv(1 << 16))
        elapsed = time.perf_counter() - start
        cpu = server.cpu() - cpu
    return {
        "per_second": round(count / elapsed),
        "server_cpu_ms_per_1000": round(cpu / count * 1e6, 1),
    }


def vifs(server: Server, count: int) -> Figures:
    """The nodes, watches and transactions of vifs, as a toolstack and netback make them."""
    steps = []
    cpu = server.cpu()
    with Bus.connect(server.path) as toolstack, Bus.connect(server.path) as netback:
        netback.watch("backend", "backend")
        requests = 0
        start = time.perf_counter()
        for domid in range(1, count + 1):
            before = time.perf_counter()
            front, back = front_and_back(domid)
            nodes = toolstack_nodes(domid)
            toolstack.write_many(nodes)
            netback.read(f"{back}/state")
            netback.read(f"{back}/frontend-id")
            netback.read(f"{back}/frontend")
            netback.watch(f"{front}/state", f"otherend {domid}")
            with netback.transaction() as tx:
                for name in FEATURES:
                    tx.write(f"{back}/{name}", 1)
            for name in AFTERWARDS:
                netback.write(f"{back}/{name}", 1)
            netback.read(f"{back}/script")
            netback.read(f"{back}/handle")
            with netback.transaction() as tx:
                tx.read(f"{back}/state")
                tx.write(f"{back}/state", 2)
            netback.watch(f"{back}/hotplug-status", f"hotplug {domid}")
            netback.watch(f"{back}/rate", f"rate {domid}")
            while not any(path.endswith("state") for path, _ in netback.events(30)):
                pass
            requests += len(nodes) + len(FEATURES) + len(AFTERWARDS) + 14
            steps.append(time.perf_counter() - before)
            if domid % 100 == 0:
                each = statistics.mean(steps[-100:]) * 1e3
                print(f"{server.name}: {domid} vifs, {each:.0f} ms each", file=sys.stderr)
        made = time.perf_counter()
        for domid in range(1, count + 1):
            toolstack.rm_many(front_and_back(domid))
        toolstack.rm_many(f"/local/domain/{domid}" for domid in range(1, count + 1))
        removed = time.perf_counter()
        netback.events()
    cpu = server.cpu() - cpu
    tenth = max(1, count // 10)
    return {
        "count": count,
        "requests": requests,
        "made": round(made - start, 3),
        "removed": round(removed - made, 3),
        "first_tenth_ms_each": round(statistics.mean(steps[:tenth]) * 1e3, 3),
        "last_tenth_ms_each": round(statistics.mean(steps[-tenth:]) * 1e3, 3),
        "server_cpu": round(cpu, 2),
        "server_resident_kib": server.resident(),
    }


def sockets(server: Server, count: int, vif_count: int) -> dict[str, object]:
    """All figures of one server's socket."""
    with Bus.connect(server.path) as bus:
        bus.write("/bench/node", "value")
    read = (server, wire.READ, b"/bench/node\0", b"value", count)
    write = (server, wire.WRITE, b"/bench/node\0value", b"OK\0", count)
    figures: dict[str, object] = {}
    for name, measurement in (
        ("read", lambda: round_trips(*read)),
        ("write", lambda: round_trips(*write)),
        ("read_pipelined", lambda: pipelined(*read)),
        ("write_pipelined", lambda: pipelined(*write)),
        ("vifs", lambda: vifs(server, vif_count)),
    ):
        figures[name] = measurement()
        print(f"{server.name}: {name}: {figures[name]}", file=sys.stderr)
    with Bus.connect(server.path) as bus:
        bus.rm("/bench")
    return figures


def kernel(count: int) -> Figures:
    """Requests over the kernel's ring, from user space through /dev/xen/xenbus."""
    fd = os.open("/dev/xen/xenbus", os.O_RDWR)
    decoder = wire.Decoder()
    requests = [
        wire.pack(wire.WRITE, 1, 0, b"/bench/node\0value"),
        wire.pack(wire.READ, 1, 0, b"/bench/node\0"),
    ]
    times = []
    for number in range(count):
        before = time.perf_counter()
        os.write(fd, requests[number % 2])
        while not decoder.feed(os.read(fd, 8192)):
            pass
        times.append(time.perf_counter() - before)
    os.close(fd)
    return summary(times)


def netback(count: int) -> Figures:
    """Real vifs: nodes written, netback has made its interface and says state 2; and the end."""
    first = 10_000
    domids = range(first, first + count)
    waiting = {f"{front_and_back(domid)[1]}/state" for domid in domids}
    with Bus.connect() as bus:
        server = Server("", bus.path)
        cpu = server.cpu()
        bus.watch("/local/domain/0/backend/vif", "bench")
        start = time.perf_counter()
        for domid in domids:
            bus.write_many(toolstack_nodes(domid))
        written = time.perf_counter()
        while waiting:
            changed = waiting.intersection(path for path, _ in bus.events(60))
            if time.perf_counter() > written + 600:
                raise SystemExit(f"netback does not answer: {sorted(waiting)}")
            states = bus.read_many(sorted(changed))
            ready = zip(sorted(changed), states, strict=True)
            waiting -= {path for path, state in ready if state == "2"}
        made = time.perf_counter()
        cpu = server.cpu() - cpu
        bus.unwatch("/local/domain/0/backend/vif", "bench")
        for domid in domids:
            front, back = front_and_back(domid)
            bus.write_many([(f"{back}/online", 0), (f"{front}/state", 6), (f"{back}/state", 5)])
            bus.rm_many([front, back, f"/local/domain/{domid}", back.removesuffix("/0")])
        while left := [d for d in domids if Path(f"/sys/class/net/vif{d}.0").exists()]:
            if time.perf_counter() > made + 300:
                raise SystemExit(f"vifs of domains {left} do not go")
            time.sleep(0.01)
        removed = time.perf_counter()
    return {
        "count": count,
        "written": round(written - start, 3),
        "made": round(made - start, 3),
        "made_ms_each": round((made - start) / count * 1e3, 2),
        "removed": round(removed - made, 3),
        "server_cpu": round(cpu, 2),
    }


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    result: dict[str, object] = {"kernel": os.uname().release}
    if arguments.requests:
        with tempfile.TemporaryDirectory(dir="/run") as directory:
            path = f"{directory}/socket"
            command = ["noxsd", "--socket-only", "--socket", path, "--state", f"{directory}/state"]
            with subprocess.Popen([*command, "--user", ""]) as process:
                while not Path(path).exists():
                    time.sleep(0.01)
                servers = [Server("noxsd", path)]
                servers += [Server("xenstored", p) for p in XENSTORED if Path(p).exists()][:1]
                for server in servers:
                    result[server.name] = sockets(server, arguments.requests, arguments.vifs)
                process.terminate()
    if arguments.kernel or arguments.netback:
        with Bus.connect() as bus:
            result["serves_the_kernel"] = bus.path
    if arguments.kernel:
        result["through_the_kernel"] = kernel(arguments.kernel)
    if arguments.netback:
        result["netback"] = netback(arguments.netback)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="noxsd against xenstored")
    parser.add_argument("--requests", type=int, default=2000, help="of each kind (%(default)s)")
    parser.add_argument("--vifs", type=int, default=1000, help="vifs' nodes (%(default)s)")
    parser.add_argument("--kernel", type=int, nargs="?", const=1000, default=0, metavar="N")
    parser.add_argument("--netback", type=int, default=0, metavar="N", help="real vifs")
    json.dump(measure(parser.parse_args()), sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
