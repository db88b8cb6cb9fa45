"""One chaosd on the real hypervisor, for tests that do it no harm: what it serves, and to whom."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest
from chaosd import (
    DAYTIME,
    GUESTS,
    HELLO,
    LOG,
    NONE,
    create,
    filled,
    page_of,
    running,
    served,
)
from daemons import ensure_bus, ensure_xendevd
from pings import ping
from sampling import DAY, sample
from test_vif import vif
from waiting import wait_for

from chaos import frames
from chaos.client import Chaos
from xenctypes.errors import ChaosError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from chaosd import Chaosd

    from chaos.host import Host

SOCKET = "/run/chaos/chaosd.sock"
FLAVOURS: tuple[dict[str, Any], ...] = (
    {"name": "hello", "memory": 4, "kernel": f"{GUESTS}/hello.elf", "size": 4},
    {
        "name": "daytime",
        "memory": 4,
        "vif": ["bridge=xenbr0"],
        "kernel": f"{GUESTS}/daytime.elf",
        "size": 2,
    },
)


@pytest.fixture(name="daemon", scope="module")
def one_for_all() -> Iterator[Chaosd]:
    ensure_bus()
    ensure_xendevd()
    subprocess.run(["groupadd", "-f", "chaos"], check=True)  # whose the socket is
    with running(NONE, installed=True) as daemon:
        yield daemon


@pytest.fixture
def chaos(daemon: Chaosd, nothing_left: None) -> Iterator[Chaos]:
    """A client; its guests and flavours go with the test."""
    if daemon.process.poll() is not None:
        daemon.start()  # or a test that ended it failed them all
    with Chaos() as client:
        yield client
        client.destroy_all()
        for flavour in client.pool_list():
            client.pool_remove(flavour["name"])


@pytest.fixture
def warm(chaos: Chaos) -> None:
    """Shells with images in them."""
    for flavour in FLAVOURS:
        chaos.pool_add(**flavour)
    filled(chaos)


FACTORS: dict[str, tuple[Any, ...]] = {
    "shell": ("warm", "generic", "other"),
    "bridges": ((), ("xenbr0",), ("other0",), ("xenbr0", "other0")),
    "memory": (4, 5),
    "vcpus": (1, 2),
    "mac": (False, True),
    "ip": (False, True),
    "uuid": (False, True),
    "metadata": (b"", b"late"),
    "lines": (1, 2),
}
# What a shell must not differ in, and what those beside an "other" request do differ in.
FIXED: tuple[dict[str, Any], ...] = (
    {"memory": 8},
    {"vcpus": 3},
    {"vif": ["bridge=xenbr0"] * 3},
    {"vif": ["bridge=other0", "bridge=other0"]},
    {"cmdline": "show=page lines=3"},
    {"kernel": f"{GUESTS}/daytime.elf"},
)


def pairwise(factors: dict[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Rows in which any two values of different factors meet: few do for all of them."""
    names = list(factors)

    def met(row: dict[str, Any]) -> set[tuple[Any, ...]]:
        return {(a, row[a], b, row[b]) for a, b in itertools.combinations(names, 2)}

    rows = [dict(zip(names, row, strict=True)) for row in itertools.product(*factors.values())]
    pairs = [met(row) for row in rows]
    left = set().union(*pairs)
    while left:
        best = max(range(len(rows)), key=lambda n: len(pairs[n] & left))
        left -= pairs[best]
        yield rows[best]


@pytest.fixture
def other_bridge() -> Iterator[None]:
    subprocess.run(["ip", "link", "add", "other0", "up", "type", "bridge"], check=True)
    yield
    subprocess.run(["ip", "link", "del", "other0"], check=True)


def test_every_combination_gets_what_it_asks_for(
    host: Host, other_bridge: None, chaos: Chaos, thorough: bool
) -> None:
    """From a warm shell, a generic one, and beside one that differs in what cannot change."""
    near = itertools.cycle([*FIXED[DAY % len(FIXED) :], *FIXED[: DAY % len(FIXED)]])
    rows = list(enumerate(pairwise(FACTORS)))
    for number, row in rows if thorough else sample(rows, 2):
        flavour = {
            "memory": row["memory"],
            "vcpus": row["vcpus"],
            "vif": [f"bridge={bridge}" for bridge in row["bridges"]],
            "size": 1,
        }
        if row["shell"] != "generic":
            words = f"show=page lines={row['lines']}"
            flavour |= {"kernel": f"{GUESTS}/hello.elf", "cmdline": words}
        other = row["shell"] == "other"
        flavours = [flavour | next(near), flavour | next(near)] if other else [flavour]
        names = [f"f{number}-{n}" for n in range(len(flavours))]
        for name, each in zip(names, flavours, strict=True):
            chaos.pool_add(name=name, **each)
        filled(chaos)
        check_combination(host, chaos, number, row)
        assert [served(chaos, name) for name in names] == ([0, 0] if other else [1]), row
        for name in names:
            chaos.pool_remove(name)
        chaos.destroy(f"n{number}")


def check_combination(host: Host, chaos: Chaos, number: int, row: dict[str, Any]) -> None:
    """Create a guest; the hypervisor, Dom0 and the guest itself say what it was given."""
    uuid = str(uuid4()) if row["uuid"] else ""
    macs = [f"00:16:3e:00:{number:02x}:0{n}" for n in range(len(row["bridges"]))]
    ips = [f"10.78.{n}.{2 + number}" for n in range(len(row["bridges"]))]
    vifs = []
    for bridge, mac, ip in zip(row["bridges"], macs, ips, strict=True):
        words = [f"bridge={bridge}"]
        words += [f"mac={mac}"] if row["mac"] else []
        words += [f"ip={ip}/24", f"gateway={ip.rpartition('.')[0]}.1"] if row["ip"] else []
        vifs.append(",".join(words))
    overrides = [f"{key}={row[key]}" for key in ("memory", "vcpus")]
    overrides += [f"vif={vifs}", f'cmdline="show=page lines={row["lines"]}"']
    overrides += [f'uuid="{uuid}"'] if uuid else []
    overrides += [f'noxs_metadata="{row["metadata"].decode()}"'] if row["metadata"] else []
    made = create(chaos, f"n{number}", HELLO, *overrides)
    assert made["uuid"] == uuid or not uuid

    info = host.ctrl.domain_info(made["domid"])
    assert info is not None
    got = (info.tot_pages >> 8, info.max_vcpu_id + 1, str(UUID(bytes=info.uuid)))
    assert got == (row["memory"], row["vcpus"], made["uuid"]), row
    for devid, bridge in enumerate(row["bridges"]):
        master = os.readlink(f"/sys/class/net/vif{made['domid']}.{devid}/master")
        assert os.path.basename(master) == bridge, row
    page = page_of(host, made["uuid"])
    assert page.metadata == row["metadata"], row
    given = [device.mac.hex(":") for device in page.devices]
    assert len(set(given)) == len(macs)
    assert not row["mac"] or given == macs, row

    last = f"line {row['lines']}\r\n"
    wait_for(lambda: chaos.logs(f"n{number}").endswith(last.encode()), f"{row}: it does not boot")
    text = chaos.logs(f"n{number}").decode()
    assert f"line {row['lines'] + 1}" not in text, text
    seen = re.search(r"name=(\S+) domid=(\d+) uuid=(\S+) .* metadata=(\d+) memory=(\d+)", text)
    assert seen is not None, text
    length, pages = str(len(row["metadata"])), str(row["memory"] << 8)
    assert seen.groups() == (f"n{number}", str(made["domid"]), made["uuid"], length, pages)
    wanted = [
        f"mac={mac}" + (f" ipv4={ip}/24 gateway={ip.rpartition('.')[0]}.1" if row["ip"] else "")
        for mac, ip in zip(given, ips, strict=True)
    ]
    assert re.findall(r"^vif: .*?(mac=.*?)\r?$", text, re.MULTILINE) == wanted, text


def test_a_generic_shell_takes_any_image(chaos: Chaos) -> None:
    chaos.pool_add(name="any", memory=4, vif=["bridge=xenbr0"], size=2)
    filled(chaos)
    create(chaos, "net", DAYTIME, vif(78), wait_ready=30)
    assert served(chaos, "any") == 1
    assert ping("10.77.0.78", 3) == 3
    create(chaos, "deaf", HELLO, vif(79), wait_ready=30)
    assert served(chaos, "any") == 2
    with pytest.raises(ChaosError, match="not a bootable image"):
        chaos.call("create", path=HELLO, overrides=['kernel="/bin/true"', vif(80)])


@pytest.mark.anyhost
def test_what_becomes_of_the_dead(host: Host, chaos: Chaos, warm: None) -> None:
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
    assert ping("10.77.0.85", 3) == 3
    events.cancel()


def guest_domid(chaos: Chaos, name: str) -> int:
    return int(next(d["domid"] for d in chaos.call("list") if d["name"] == name))


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


def test_whoever_talks_nonsense_is_told_and_closed(daemon: Chaosd, chaos: Chaos) -> None:
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
    wait_for(lambda: len(os.listdir(f"/proc/{daemon.pid}/fd")) == fds, "descriptors stay behind")
    # One that asks and never reads is cut off; others do not notice.
    deaf = socket.socket(socket.AF_UNIX)
    deaf.connect(SOCKET)
    deaf.setblocking(False)
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        flood(deaf, time.monotonic() + 60)
    assert "does not read: cut off" in LOG.read_text()
    assert chaos.call("version")["protocol"] == 1


def asked_of_the_system(daemon: Chaosd, action: Callable[[], object], request: str) -> list[str]:
    """The daemon's system calls for an action, from a request on its socket to the reply."""
    # A file for each thread: in a common one, calls of others tear a line in two.
    trace = Path("/run/chaosd.strace")
    command = ["strace", "-ff", "-y", "-tt", "-s", "64", "-o", str(trace), "-p", str(daemon.pid)]
    strace = subprocess.Popen(command, stderr=subprocess.PIPE)
    assert strace.stderr is not None
    assert b"attached" in strace.stderr.readline()
    action()
    strace.send_signal(signal.SIGINT)
    strace.wait()
    told = Path(f"{trace}.{daemon.pid}").read_text()
    found = re.search(
        rf"^[^\n]* recvmsg\([^\n]*{request}.*? (sendto|sendmsg)\(\d+<(UNIX|socket)[^\n]*", told,
        re.DOTALL | re.MULTILINE,
    )  # fmt: skip
    assert found, told[-4000:]
    return found[0].splitlines()


@pytest.mark.parametrize("by", ["socket", "command"])
def test_a_warm_create_asks_next_to_nothing_of_the_system(
    by: str, daemon: Chaosd, chaos: Chaos, warm: None
) -> None:
    """At most three hypercalls; no file opened, no process, no request to the bus."""

    def make(name: str, last: int) -> None:
        if by == "socket":
            create(chaos, name, DAYTIME, vif(last))
            return
        words = [DAYTIME, f'kernel="{GUESTS}/daytime.elf"', vif(last), f'name="{name}"']
        subprocess.run(["chaos", "create", *words], check=True, stdout=subprocess.DEVNULL)

    filled(chaos)
    make("before", 86)  # the configuration is read once
    filled(chaos)
    served_before = served(chaos, "daytime")
    request = "create" if by == "socket" else "run.*argv"
    calls = asked_of_the_system(daemon, lambda: make("net", 87), request)
    assert served(chaos, "daytime") == served_before + 1
    assert ping("10.77.0.87", 3) == 3
    hypercalls = [line for line in calls if re.search(r"\b(ioctl|write)\(\d+</dev/xen/", line)]
    assert 1 <= len(hypercalls) <= 3, calls
    opened = [line for line in calls if re.search(r"\b(open|openat|openat2|creat)\(", line)]
    assert opened == [], calls
    forked = [line for line in calls if re.search(r"\b(clone|clone3|fork|vfork|execve)\(", line)]
    assert forked == []
    assert not [line for line in calls if "/run/noxs/socket" in line]


def test_commands_through_the_daemon(chaos: Chaos, warm: None) -> None:
    """The thin client: the same output and exit codes as without a daemon."""

    def command(*argv: str, **more: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["chaos", *argv], capture_output=True, text=True, check=False, cwd="/src",
            stdin=subprocess.DEVNULL, **more,
        )  # fmt: skip

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
    # Xen's clock may stand still between two processors of an emulated machine.
    assert all(one["profile"]["ready_ms"] >= 0 for one in made)
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
    wait_for(lambda: fds_of(waiting.pid), "the client does not connect")
    waiting.send_signal(signal.SIGINT)
    assert waiting.wait(30) == 130
    assert command("destroy", "--all").returncode == 0
    assert [d["name"] for d in chaos.call("list")] == ["Domain-0"]


def fds_of(pid: int) -> bool:
    """Whether a client has connected."""
    links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    return any(link.startswith("socket:") for link in links)


MEMBER = 65534


def as_member(*argv: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a member of the group."""
    gid = int(Path("/etc/group").read_text().split("\nchaos:x:")[1].split(":")[0])
    rights = [f"--reuid={MEMBER}", f"--regid={MEMBER}", f"--groups={MEMBER},{gid}"]
    return subprocess.run(
        ["setpriv", *rights, "chaos", *argv], capture_output=True, text=True, check=False, cwd="/"
    )


def test_a_restart_has_the_rights_of_who_had_it_made(host: Host, chaos: Chaos) -> None:
    """Its owner puts a link to a file in the image's place that he may not read."""
    with TemporaryDirectory() as folder:
        secret, kernel = Path(folder, "secret"), Path(folder, "mine", "k")
        kernel.parent.mkdir()
        Path(folder).chmod(0o711)
        os.chown(kernel.parent, MEMBER, MEMBER)
        for path in (secret, kernel):
            shutil.copy(f"{GUESTS}/hello.elf", path)
        secret.chmod(0o600)
        wanted = [f'kernel="{kernel}"', 'name="mine"', 'on_reboot="restart"']
        run = as_member("create", "--json", HELLO, *wanted)
        assert run.returncode == 0, run.stderr
        events = chaos.submit("events")
        host.ctrl.domain_shutdown(guest_domid(chaos, "mine"), 1)
        again = next(e for e in events.progress if e["event"] == "created")
        assert again["by"] == {"uid": MEMBER, "pid": 0}
        assert chaos.call("wait", domain="mine", timeout=30)["outcome"] == "ready"
        kernel.unlink()
        kernel.symlink_to(secret)
        host.ctrl.domain_shutdown(guest_domid(chaos, "mine"), 1)
        problem = next(e for e in events.progress if e["event"] in {"problem", "created"})
        events.cancel()
        assert "k' cannot be opened: Permission denied" in problem["what"]
        assert chaos.call("destroy", domains=["mine"])[0]["domid"] is None  # it has none by now


def test_members_of_the_group_have_their_own_rights_on_files(tmp_path: Path, warm: None) -> None:
    secret = tmp_path / "secret.cfg"
    secret.write_text('name="secret"\nkernel="/root/k"\n')
    secret.chmod(0o600)
    run = as_member("create", str(secret))
    assert run.returncode == 2
    assert "Permission denied" in run.stderr
    run = as_member("create", HELLO, f'kernel="{GUESTS}/hello.elf"', 'name="mine"')
    assert run.returncode == 0, run.stderr
    outsider = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    run = subprocess.run(
        [*outsider, "python3", "-c",
         f"import socket; socket.socket(socket.AF_UNIX).connect({SOCKET!r})"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "PermissionError" in run.stderr


def test_only_one_chaosd(daemon: Chaosd) -> None:
    run = subprocess.run(["chaosd"], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "another chaosd is running" in run.stderr


def test_noxsd_and_xendevd_killed_under_the_daemon(
    restart_noxsd: Any, chaos: Chaos, warm: None
) -> None:
    filled(chaos)
    create(chaos, "g", DAYTIME, vif(88), wait_ready=30)
    restart_noxsd()
    assert ping("10.77.0.88", 3) == 3
    for last in range(90, 94):
        create(chaos, f"g{last}", DAYTIME, vif(last), wait_ready=30)
    assert ping("10.77.0.93", 3) == 3
    filled(chaos)


@pytest.mark.xenstored
def test_xl_knows_guests_from_the_pool(chaos: Chaos, warm: None) -> None:
    def listed() -> str:
        return subprocess.run(["xl", "list"], capture_output=True, text=True, check=True).stdout

    filled(chaos)
    create(chaos, "plain", wait_ready=30)
    create(chaos, "net", DAYTIME, vif(77), wait_ready=30)
    wait_for(lambda: {"plain", "net"} <= set(listed().split()), "xl does not know the names")
    chaos.call("destroy", domains=["plain"])
    assert "plain" not in listed()
