"""chaosd on the real hypervisor: its pool, its guests, and what a kill leaves behind."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import select
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest
from chaosd import GUESTS, LOG, filled, running, until
from test_vif import Traces, ask, ping, vif

from chaos import frames
from chaos.client import Chaos
from chaos.daemon.shell import DELIVERY_STEPS
from chaos.host import Host
from chaos.registry import Registry
from noxs.bus import Bus
from noxs.pageview import decode
from xenctypes.errors import ChaosError

if TYPE_CHECKING:
    from collections.abc import Iterator

HELLO, DAYTIME = "/src/examples/hello.cfg", "/src/examples/daytime.cfg"
SOCKET = "/run/chaos/chaosd.sock"

WARM = f"""
[[flavour]]
name = "hello"
memory = 4
kernel = "{GUESTS}/hello.elf"
size = 4

[[flavour]]
name = "daytime"
memory = 4
vif = ["bridge=xenbr0"]
kernel = "{GUESTS}/daytime.elf"
size = 2
"""
ONE = f"""
[[flavour]]
name = "daytime"
memory = 4
vif = ["bridge=xenbr0"]
kernel = "{GUESTS}/daytime.elf"
size = 1
"""
NONE = "[pool]\nadaptive = false\n"

pytestmark = pytest.mark.usefixtures("network")


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as opened:
        yield opened


@pytest.fixture
def nothing_left(host: Host) -> Iterator[None]:
    Registry().prepare()
    with Bus.connect() as bus:
        traces = Traces(host, bus)
        yield
        traces.gone()


def create(chaos: Chaos, name: str, path: str = HELLO, *overrides: str, **more: Any) -> Any:
    kernel = f'kernel="{GUESTS}/{Path(path).stem}.elf"'
    return chaos.call("create", path=path, overrides=[kernel, *overrides, f'name="{name}"'], **more)


def served(chaos: Chaos, flavour: str) -> int:
    return int(next(f["served"] for f in chaos.call("pool.list") if f["name"] == flavour))


def page_of(host: Host, uuid: str) -> Any:
    """The device page as the guest sees it, its first page."""
    record = Registry().read(uuid)
    assert record is not None
    with host.memory.map(record.domid, [record.store_frame]) as mapping:
        return decode(bytes(mapping.view))


@pytest.mark.every_release
@pytest.mark.anyhost
def test_guests_from_the_pool(host: Host, nothing_left: None) -> None:
    with running(WARM), Chaos() as chaos:
        filled(chaos)
        made = create(chaos, "first", wait_ready=30)
        assert made["ready_ms"] > 0
        assert served(chaos, "hello") == 1
        assert [s["name"] for s in made["profile"]["steps"] if s["phase"] == "execute"] == [
            step.name for step in DELIVERY_STEPS
        ]
        mac = "00:16:3e:11:22:33"
        uuid = str(uuid4())
        metadata = 'noxs_metadata="configured"'
        made = create(
            chaos, "net", DAYTIME, vif(77, f"mac={mac}"), f'uuid="{uuid}"', metadata, wait_ready=30
        )
        assert made["uuid"] == uuid
        assert served(chaos, "daytime") == 1
        assert " 20 received, 0% packet loss" in ping("10.77.0.77", 20)
        assert b"-UTC" in ask("10.77.0.77")
        page = page_of(host, uuid)
        assert (page.name, page.uuid, page.metadata) == ("net", UUID(uuid).bytes, b"configured")
        assert page.devices[0].mac.hex(":") == mac
        info = host.ctrl.domain_info(made["domid"])
        assert info is not None
        assert info.uuid == UUID(uuid).bytes
        names = {domain["name"] for domain in chaos.call("list")}
        assert names == {"Domain-0", "first", "net"}
        with pytest.raises(ChaosError, match='a domain named "net" exists already'):
            create(chaos, "net")
        filled(chaos)
        assert chaos.call("destroy", domains=["net", "first"])


def test_every_combination_gets_what_it_asks_for(host: Host, nothing_left: None) -> None:
    """Only some of them match a shell; whatever serves them, nothing is ignored."""
    shapes = itertools.product((4, 5), (1, 2), (0, 1, 2))
    # Addresses and UUIDs in turn, with every shape that a shell has and some that none has.
    late = itertools.cycle(itertools.product((False, True), (False, True)))
    combinations = [(*shape, *given) for shape in shapes for given in (next(late), next(late))]
    with running(WARM + "[pool]\nadaptive = false\n"), Chaos() as chaos:
        filled(chaos)
        for memory, vcpus, vifs, with_mac, with_uuid in combinations:
            macs = [f"00:16:3e:00:01:0{n}" for n in range(vifs)]
            texts = [f"'bridge=xenbr0{f',mac={mac}' if with_mac else ''}'" for mac in macs]
            wanted = [f"memory={memory}", f"vcpus={vcpus}", f"vif=[{','.join(texts)}]"]
            uuid = str(uuid4()) if with_uuid else ""
            if uuid:
                wanted.append(f'uuid="{uuid}"')
            made = create(chaos, "one", DAYTIME, *wanted)
            info = host.ctrl.domain_info(made["domid"])
            assert info is not None
            assert info.tot_pages >> 8 == memory
            assert info.max_vcpu_id + 1 == vcpus
            assert not uuid or made["uuid"] == uuid
            assert str(UUID(bytes=info.uuid)) == made["uuid"]
            devices = page_of(host, made["uuid"]).devices
            assert len(devices) == vifs
            got = [device.mac.hex(":") for device in devices]
            assert len(set(got)) == vifs
            assert not with_mac or got == macs
            for devid in range(vifs):
                assert Path(f"/sys/class/net/vif{made['domid']}.{devid}/brport").exists()
            chaos.call("destroy", domains=["one"])


def test_an_image_that_changes_is_never_the_wrong_one(tmp_path: Path, nothing_left: None) -> None:
    original = Path(f"{GUESTS}/hello.elf").read_bytes()
    assert original.count(b"Hello, world") == 1
    one, two = tmp_path / "one.elf", tmp_path / "two.elf"
    one.write_bytes(original)
    two.write_bytes(original.replace(b"Hello, world", b"Hallo, Welt!"))
    with running("[pool]\nadaptive_size = 3\n"), Chaos() as chaos:
        for number in range(100):
            if number == 50:  # they change places, in the very same file
                contents = one.read_bytes(), two.read_bytes()
                two.write_bytes(contents[0])
                one.write_bytes(contents[1])
            path = (one, two)[number % 2]
            wanted = b"Hello, world" if b"Hello, world" in path.read_bytes() else b"Hallo, Welt!"
            name = f"n{number}"
            chaos.call(
                "create",
                path=HELLO,
                overrides=[f'kernel="{path}"', f'name="{name}"'],
                wait_ready=30,
            )
            assert wanted in said(chaos, name)
            chaos.call("destroy", domains=[name])
        assert sum(flavour["served"] for flavour in chaos.call("pool.list")) > 20


def said(chaos: Chaos, name: str) -> bytes:
    return bytes(until(lambda: chaos.call("logs", domain=name), f"{name} says nothing"))


def test_a_generic_shell_takes_any_image(nothing_left: None) -> None:
    flavour = '[[flavour]]\nname = "any"\nmemory = 4\nvif = ["bridge=xenbr0"]\nsize = 2\n'
    with running(NONE + flavour), Chaos() as chaos:
        filled(chaos)
        create(chaos, "net", DAYTIME, vif(78), wait_ready=30)
        assert served(chaos, "any") == 1
        assert " 3 received, 0% packet loss" in ping("10.77.0.78", 3)
        create(chaos, "deaf", HELLO, vif(79), wait_ready=30)
        assert served(chaos, "any") == 2
        with pytest.raises(ChaosError, match="not a bootable image"):
            chaos.call("create", path=HELLO, overrides=['kernel="/bin/true"', vif(80)])


@pytest.mark.every_release
@pytest.mark.anyhost
def test_a_killed_daemon_loses_no_guest(host: Host, nothing_left: None) -> None:
    with running(WARM) as daemon:
        with Chaos() as chaos:
            filled(chaos)
            for last in (81, 82):
                create(chaos, f"g{last}", DAYTIME, vif(last), wait_ready=30)
            create(chaos, "paused", paused=True)
        pinging = subprocess.Popen(
            ["ping", "-q", "-c", "200", "-i", "0.05", "10.77.0.81"],
            stdout=subprocess.PIPE,
            text=True,
        )
        daemon.kill()
        daemon.start()
        with Chaos() as chaos:
            listed = {d["name"]: d["state"] for d in chaos.call("list")}
            assert listed.keys() == {"Domain-0", "g81", "g82", "paused"}
            assert listed["paused"] == "--p---"
            filled(chaos)
            assert pinging.communicate()[0].count("200 received, 0% packet loss") == 1
            assert chaos.call("wait", domain="g81", timeout=5)["outcome"] == "ready"
            assert b"daytime" in chaos.call("logs", domain="g82")
        daemon.stop()  # and a restart in peace
        daemon.start()
        assert " 5 received, 0% packet loss" in ping("10.77.0.82", 5)
        with Chaos() as chaos:
            chaos.call("destroy", domains=["g81"])
            assert "g82" in {domain["name"] for domain in chaos.call("list")}


def recent(chaos: Chaos) -> list[dict[str, Any]]:
    """The events so far, oldest first."""
    found: list[dict[str, Any]] = []
    handle = chaos.submit("events", token="")
    create(chaos, "marker")
    for event in handle.progress:
        found.append(event)
        if event["event"] == "created" and event["name"] == "marker":
            break
    handle.cancel()
    chaos.call("destroy", domains=["marker"])
    return found


def test_what_becomes_of_the_dead(host: Host, nothing_left: None) -> None:
    with running(WARM), Chaos() as chaos:
        filled(chaos)
        events = chaos.submit("events", token="")
        seen: list[dict[str, Any]] = []

        def await_event(kind: str, name: str) -> dict[str, Any]:
            for event in events.progress:
                seen.append(event)
                if event["event"] == kind and event.get("name") == name:
                    return event
            raise AssertionError(seen)

        made = create(chaos, "again", HELLO, 'on_reboot="restart"', wait_ready=30)
        await_event("ready", "again")
        host.ctrl.domain_shutdown(made["domid"], 1)
        assert await_event("died", "again")["action"] == "restart"
        await_event("ready", "again")
        again = next(d for d in chaos.call("list") if d["name"] == "again")
        assert again["uuid"] == made["uuid"]
        assert again["domid"] != made["domid"]
        # Dying young again and again is answered later and later.
        host.ctrl.domain_shutdown(again["domid"], 1)
        assert await_event("restart waits", "again")["seconds"] >= 1
        await_event("ready", "again")

        create(chaos, "gone", HELLO, 'on_crash="destroy"', wait_ready=30)
        host.ctrl.domain_shutdown(guest_domid(chaos, "gone"), 3)
        await_event("destroyed", "gone")
        create(chaos, "kept", HELLO, 'on_poweroff="preserve"', wait_ready=30)
        host.ctrl.domain_shutdown(guest_domid(chaos, "kept"), 0)
        await_event("died", "kept")
        assert chaos.call("wait", domain="kept", dead=True, timeout=5)["outcome"] == "dead"
        create(chaos, "twice", DAYTIME, vif(85), 'on_crash="rename-restart"', wait_ready=30)
        host.ctrl.domain_shutdown(guest_domid(chaos, "twice"), 3)
        await_event("died", "twice")
        await_event("ready", "twice")
        names = {domain["name"] for domain in chaos.call("list")}
        assert {"again", "kept", "twice", "twice-1"} <= names
        assert "gone" not in names
        assert " 3 received, 0% packet loss" in ping("10.77.0.85", 3)
        events.cancel()


def guest_domid(chaos: Chaos, name: str) -> int:
    return int(next(d["domid"] for d in chaos.call("list") if d["name"] == name))


def test_events_go_on_after_a_gap(nothing_left: None) -> None:
    with running(NONE) as daemon, Chaos() as chaos:
        first = recent(chaos)
        token = first[-1]["token"]
        create(chaos, "missed")
        handle = chaos.submit("events", token=token)
        kinds = []
        for event in handle.progress:
            kinds.append((event["event"], event.get("name")))
            if kinds[-1] == ("created", "missed"):
                break
        assert ("created", "marker") not in kinds
        handle.cancel()
        daemon.kill()
        daemon.start()
        with Chaos() as other:
            handle = other.submit("events", token=token)
            assert next(iter(handle.progress))["event"] == "gap"
            handle.cancel()


def test_memory_is_given_back_before_a_create_fails(host: Host, nothing_left: None) -> None:
    free = host.ctrl.physinfo().free_pages >> 8
    big = free // 4
    settings = (
        f"[pool]\nmax_memory = 100000\nmemory_floor = 32\nadaptive = false\n"
        f'[[flavour]]\nname = "big"\nmemory = {big}\nsize = 8\n'
    )
    with running(settings), Chaos() as chaos:

        def stuck() -> bool:
            flavour = chaos.call("pool.list")[0]
            return flavour["ready"] >= 3 and not flavour["making"]

        until(stuck, "the pool does not grow to its floor")
        made = create(chaos, "needs", HELLO, f"memory={free // 2}")
        assert host.ctrl.domain_info(made["domid"])
        assert chaos.call("pool.list")[0]["ready"] < 3


class Raw:
    """A socket, for what no client of ours would say."""

    def __init__(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(SOCKET)
        self.sock.settimeout(30)
        self.splitter = frames.Splitter()

    def ask(self, data: bytes) -> list[frames.Reply]:
        """Say something; the replies up to the end of the connection."""
        replies = []
        with contextlib.suppress(OSError):
            self.sock.sendall(data)
            self.sock.shutdown(socket.SHUT_WR)
        while True:
            try:
                got = self.sock.recv(65536)
            except ConnectionResetError:
                got = b""
            if not got:
                self.sock.close()
                return replies
            replies += [frames.read_reply(body) for body in self.splitter.feed(got)]


def flood(sock: socket.socket, deadline: float) -> None:
    """Ask for ever and never read."""
    for ident in range(1, frames.ID_MAX):
        data = memoryview(frames.pack_request(ident, "nothing", {}))
        while data:
            assert time.monotonic() < deadline
            select.select([], [sock], [], 1)
            with contextlib.suppress(BlockingIOError):
                data = data[sock.send(data) :]


def test_whoever_talks_nonsense_is_told_and_closed(nothing_left: None) -> None:
    with running(NONE) as daemon, Chaos() as chaos:
        assert Raw().ask(b"\xff\xff\xff\x7f")[0].value["class"] == "ProtocolError"
        assert "not msgpack" in Raw().ask(frames.LENGTH.pack(1) + b"\xc1")[0].value["message"]
        assert "version" in Raw().ask(frames.pack([7, 1, "list", {}]))[0].value["message"]
        unknown = Raw().ask(frames.pack_request(1, "nothing", {}))
        assert "no method" in unknown[0].value["message"]
        fds = len(os.listdir(f"/proc/{daemon.pid}/fd"))
        for _ in range(20):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(SOCKET)
                socket.send_fds(sock, [b"\x10"], [0, 1, 2, 0])
                with contextlib.suppress(OSError):
                    socket.send_fds(sock, [b"\x00"], [0, 1, 2, 0])
        chaos.call("version")
        until(lambda: len(os.listdir(f"/proc/{daemon.pid}/fd")) == fds, "descriptors stay behind")
        # One that asks and never reads is cut off; others do not notice.
        deaf = socket.socket(socket.AF_UNIX)
        deaf.connect(SOCKET)
        deaf.setblocking(False)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            flood(deaf, time.monotonic() + 60)
        assert "does not read: cut off" in LOG.read_text()
        assert chaos.call("version")["protocol"] == 1


def test_a_warm_create_asks_next_to_nothing_of_the_system(nothing_left: None) -> None:
    """At most three hypercalls; no file opened, no process, no request to the bus."""
    with running(WARM) as daemon, Chaos() as chaos:
        filled(chaos)
        create(chaos, "before")  # the configuration is read once
        create(chaos, "net-before", DAYTIME, vif(86))
        filled(chaos)
        trace = Path("/run/chaosd.strace")
        strace = subprocess.Popen(
            ["strace", "-f", "-y", "-tt", "-o", str(trace), "-p", str(daemon.pid)],
            stderr=subprocess.PIPE,
        )
        assert strace.stderr is not None
        assert b"attached" in strace.stderr.readline()
        create(chaos, "net", DAYTIME, vif(87))
        strace.send_signal(signal.SIGINT)
        strace.wait()
        lines = trace.read_text().splitlines()
        first = next(i for i, line in enumerate(lines) if re.search(r"recvmsg\(.*create", line))
        last = next(
            i
            for i, line in enumerate(lines)
            if i > first and re.search(r"(sendto|sendmsg)\(\d+<(UNIX|socket)", line)
        )
        thread = lines[first].split()[0]
        calls = [line for line in lines[first : last + 1] if line.split()[0] == thread]
        hypercalls = [line for line in calls if "ioctl(" in line and "xen" in line]
        assert len(hypercalls) <= 3, hypercalls
        opened = [line for line in calls if re.search(r"\b(open|openat|creat)\(", line)]
        assert opened == []
        forked = [
            line for line in calls if re.search(r"\b(clone|clone3|fork|vfork|execve)\(", line)
        ]
        assert forked == []
        assert not [line for line in calls if "/run/noxs/socket" in line]


def test_commands_through_the_daemon(nothing_left: None) -> None:
    """The thin client: the same output and exit codes as without a daemon."""

    def command(*argv: str, **more: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["chaos", *argv], capture_output=True, text=True, check=False, cwd="/src",
            stdin=subprocess.DEVNULL, **more,
        )  # fmt: skip

    with running(WARM), Chaos() as chaos:
        filled(chaos)
        run = command("create", "examples/hello.cfg")
        assert re.fullmatch(r"created hello, domain \d+\n", run.stdout), run.stderr
        run = command("create", "examples/hello.cfg")
        assert run.returncode == 1
        assert 'a domain named "hello" exists already' in run.stderr
        run = command("create", "no-such.cfg")
        assert run.returncode == 2
        assert "no-such.cfg: cannot read the configuration" in run.stderr
        for argv in (
            ("list",),
            ("list", "--json"),
            ("domid", "hello"),
            ("nonsense",),
            ("list", "-x"),
        ):
            through, without = command(*argv), command("--no-daemon", *argv)
            assert through.returncode == without.returncode
            assert through.stderr == without.stderr
            if "--json" not in argv and argv != ("list",):
                assert through.stdout == without.stdout
        run = command("create", "examples/hello.cfg", "--count", "20", "--name", "fw-{n}", "--json")
        made = json.loads(run.stdout)
        assert [one["name"] for one in made] == [f"fw-{n}" for n in range(1, 21)]
        assert all(one["profile"]["ready_ms"] > 0 for one in made)
        assert command("wait", "fw-7").returncode == 0
        events = chaos.submit("events")
        assert command("pause", "fw-7").returncode == 0
        assert command("pause", "fw-7").returncode == 0
        assert command("unpause", "fw-7").returncode == 0
        told = [next(events.progress) for _ in range(2)]
        assert [(e["event"], e["name"]) for e in told] == [("paused", "fw-7"), ("unpaused", "fw-7")]
        events.cancel()
        assert re.search(r"user 0, process \d+: chaos pause \['fw-7'\]", LOG.read_text())
        run = command("create", "examples/hello.cfg", "--count", "3", "--name", "fw-1{n}")
        assert run.returncode == 1  # fw-11 exists: all or nothing
        run = command("create", "examples/hello.cfg", "--count=3", "--name=fw-2{n}", "--keep-going")
        assert run.returncode == 0
        run = command("pool", "resize", "hello", "--size", "5", "--wait", "--json")
        assert [(f["ready"], f["size"]) for f in json.loads(run.stdout)] == [(5, 5)]
        # Ctrl-C while it waits: the client ends with the verb's status.
        waiting = subprocess.Popen(["chaos", "wait", "--dead", "fw-1"], cwd="/src")
        until(lambda: fds_of(waiting.pid), "the client does not connect")
        waiting.send_signal(signal.SIGINT)
        assert waiting.wait(30) == 130
        assert command("destroy", "--all").returncode == 0
        assert [d["name"] for d in chaos.call("list")] == ["Domain-0"]


def test_a_batch_under_way_is_taken_back_when_the_daemon_ends(nothing_left: None) -> None:
    with running(NONE) as daemon:
        with Chaos() as chaos:
            events = chaos.submit("events")
            batch = subprocess.Popen(
                ["chaos", "create", "-q", "examples/hello.cfg", "--count=20", "--name=b-{n}"],
                cwd="/src", stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            assert "created" in (event["event"] for event in events.progress)
            daemon.stop()
        assert batch.wait(60) != 0
        assert "did not end" not in LOG.read_text()
        daemon.start()
        with Chaos() as chaos:
            assert [domain["name"] for domain in chaos.call("list")] == ["Domain-0"]


def fds_of(pid: int) -> bool:
    """Whether a client has connected."""
    links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    return any(link.startswith("socket:") for link in links)


def test_members_of_the_group_have_their_own_rights_on_files(
    tmp_path: Path, nothing_left: None
) -> None:
    subprocess.run(["groupadd", "-f", "chaos"], check=True)
    secret = tmp_path / "secret.cfg"
    secret.write_text('name="secret"\nkernel="/root/k"\n')
    secret.chmod(0o600)
    member = ["setpriv", "--reuid=65534", "--regid=65534", "--groups=65534,{gid}"]
    gid = int(Path("/etc/group").read_text().split("\nchaos:x:")[1].split(":")[0])
    member[-1] = member[-1].format(gid=gid)
    with running(WARM):
        run = subprocess.run(
            [*member, "chaos", "create", str(secret)],
            capture_output=True, text=True, check=False, cwd="/",
        )  # fmt: skip
        assert run.returncode == 2
        assert "Permission denied" in run.stderr
        hello = ["create", HELLO, f'kernel="{GUESTS}/hello.elf"', 'name="mine"']
        run = subprocess.run(
            [*member, "chaos", *hello], capture_output=True, text=True, check=False, cwd="/"
        )
        assert run.returncode == 0, run.stderr
        outsider = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        run = subprocess.run(
            [*outsider, "python3", "-c",
             f"import socket; socket.socket(socket.AF_UNIX).connect({SOCKET!r})"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert "PermissionError" in run.stderr


def test_only_one_chaosd(nothing_left: None) -> None:
    with running(NONE):
        run = subprocess.run(["chaosd"], capture_output=True, text=True, check=False)
        assert run.returncode == 1
        assert "another chaosd runs on this host" in run.stderr


def test_noxsd_and_xendevd_killed_under_the_daemon(restart_noxsd: Any, nothing_left: None) -> None:
    with running(WARM), Chaos() as chaos:
        filled(chaos)
        create(chaos, "g", DAYTIME, vif(88), wait_ready=30)
        restart_noxsd()
        assert " 3 received, 0% packet loss" in ping("10.77.0.88", 3)
        for last in range(90, 94):
            create(chaos, f"g{last}", DAYTIME, vif(last), wait_ready=30)
        assert " 3 received, 0% packet loss" in ping("10.77.0.93", 3)
        filled(chaos)


def test_an_address_that_dom0_gave_up_is_free_at_once(nothing_left: None) -> None:
    mac = "00:16:3e:55:00:01"
    subprocess.run(["ip", "link", "add", "taken", "address", mac, "type", "bridge"], check=True)
    try:
        with running(WARM), Chaos() as chaos:
            filled(chaos)
            with pytest.raises(ChaosError, match="the MAC address 00:16:3e:55:00:01 is in use"):
                create(chaos, "net", DAYTIME, vif(95, f"mac={mac}"))
            subprocess.run(["ip", "link", "del", "taken"], check=True)
            create(chaos, "net", DAYTIME, vif(95, f"mac={mac}"))
    finally:
        subprocess.run(["ip", "link", "del", "taken"], check=False, capture_output=True)


@pytest.mark.xenstored
def test_xl_knows_guests_from_the_pool(nothing_left: None) -> None:
    def listed() -> str:
        return subprocess.run(["xl", "list"], capture_output=True, text=True, check=True).stdout

    with running(WARM), Chaos() as chaos:
        filled(chaos)
        create(chaos, "plain", wait_ready=30)
        create(chaos, "net", DAYTIME, vif(77), wait_ready=30)
        until(lambda: {"plain", "net"} <= set(listed().split()), "xl does not know the names")
        chaos.call("destroy", domains=["plain"])
        assert "plain" not in listed()
