"""Creates on the real hypervisor: what they make, and that they leave nothing behind."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from command import chaos, start
from sampling import sample, sampled
from stock import initramfs
from waiting import POLL

from chaos import config as configuration
from chaos.builder import Builder
from chaos.create import CREATE_STEPS, SLACK_KIB, UNPAUSED_STEPS, Creation, wait_ready
from chaos.domains import find, list_domains
from chaos.host import Host
from chaos.registry import Registry
from xenctypes.errors import BusError, ChaosError, StateError, StepError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from chaos.config import DomainConfig

HELLO = "examples/hello.cfg"
GZIP_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"  # RFC 1952: deflate, no name, no time


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as opened:
        yield opened


@pytest.fixture
def builder() -> Iterator[Builder]:
    with Builder() as process:
        yield process


def hello(*overrides: str) -> DomainConfig:
    return configuration.load(HELLO, list(overrides))[0]


def guest_memory(line: str) -> bool:
    """Whether a line of /proc/PID/maps is memory of a guest (libxencall caches its own buffers)."""
    return "xen/privcmd" in line or "xen/gntdev" in line


SLACK_PAGES = 4
"""What Xen's allocator and Dom0's maptrack table may take meanwhile; many creates show a leak."""


class Footprint:
    """What the host holds: a create and destroy must give all of it back."""

    def __init__(self, host: Host) -> None:
        self.host = host
        deadline = time.monotonic() + 20
        while any(info.dying for info in host.ctrl.domain_list()):  # of the test before
            assert time.monotonic() < deadline, host.ctrl.domain_list()
            time.sleep(POLL)
        self.before = self.measure()

    def measure(self) -> dict[str, int]:
        ctrl = self.host.ctrl
        return {
            "domains": len(ctrl.domain_list()),
            "free pages": ctrl.physinfo().free_pages,
            "event channels of Dom0": ctrl.count_evtchns(0),
            "descriptors": len(os.listdir("/proc/self/fd")),
            "maps": sum(map(guest_memory, open("/proc/self/maps"))),
            "records": len(os.listdir("/run/chaos/domains")),
            "names": len(os.listdir("/run/chaos/names")),
        }

    def settled(self) -> None:
        """The hypervisor frees a domain's last pages after a grace period: wait for that.

        More free pages than before, and less of all else, is what the test before gave back late.
        """
        deadline = time.monotonic() + 20
        while left := {
            key: (self.before[key], value)
            for key, value in self.measure().items()
            if (
                value < self.before[key] - SLACK_PAGES
                if key == "free pages"
                else value > self.before[key]
            )
        }:
            assert time.monotonic() < deadline, left
            time.sleep(POLL)


@pytest.fixture(scope="module")
def warm() -> None:
    """What the first create in a process loads and keeps is no leak."""
    Registry().prepare()
    with Host() as host, Builder() as builder:
        Creation(hello(), host, builder, Registry()).run().undo()


@pytest.fixture
def footprint(host: Host, warm: None) -> Iterator[Footprint]:
    _ = host.evtchn, host.memory  # opened when first used, and kept as long as the host
    with contextlib.suppress(BusError):
        _ = host.bus  # beside xenstored every domain has a node there, its name for xl
    measured = Footprint(host)
    yield measured
    measured.settled()


def installed_chaos(*argv: str) -> str:
    """What the installed command prints, in a process of its own."""
    done = subprocess.run(
        ["chaos", *argv],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.every_release
@pytest.mark.anyhost
def test_hello_says_hello_and_becomes_ready(host: Host, footprint: Footprint) -> None:
    made = json.loads(installed_chaos("create", HELLO, "--json"))
    try:
        assert made["name"] == "hello"
        assert made["noxs"]
        assert made["profile"]["ready_ms"] > 0
        assert [step["name"] for step in made["profile"]["steps"]] == [s.name for s in CREATE_STEPS]
        chaos("wait", "hello")
        said = installed_chaos("console", "hello")
        assert "Hello" in said
        # Attaching again shows what was shown before.
        again = chaos("console", "hello", stdin=subprocess.DEVNULL).stdout
        assert again.replace("\r\n", "\n") == said
        listed = {d["name"]: d for d in json.loads(installed_chaos("list", "--json"))}
        assert listed["hello"]["uuid"] == made["uuid"]
        assert listed["hello"]["state"] == "-b----"
        assert chaos("domid", "hello").stdout == f"{made['domid']}\n"
        assert chaos("domname", str(made["domid"])).stdout == "hello\n"
    finally:
        installed_chaos("destroy", "hello")
    assert "hello" not in chaos("list").stdout


@pytest.mark.parametrize("victim", sampled([step.name for step in CREATE_STEPS]))
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_a_failure_at_any_step_leaves_nothing(
    host: Host, builder: Builder, footprint: Footprint, victim: str, late: bool
) -> None:
    def fail(do: Callable[[Creation], None]) -> Callable[[Creation], None]:
        def step(creation: Creation) -> None:
            if late:
                do(creation)
            raise StateError("made to fail")

        return step

    steps = [
        step._replace(do=fail(step.do)) if step.name == victim else step for step in CREATE_STEPS
    ]
    creation = Creation(hello(), host, builder, Registry())
    with pytest.raises(StepError, match="made to fail") as caught:
        creation.run(steps)
    assert caught.value.step == victim
    assert not getattr(caught.value, "__notes__", None)
    footprint.settled()


@pytest.mark.every_release
@pytest.mark.anyhost
def test_a_hundred_creates_leak_nothing(host: Host, builder: Builder, footprint: Footprint) -> None:
    for _ in range(100):
        creation = Creation(hello(), host, builder, Registry()).run()
        assert wait_ready(creation, 10.0) is not None
        assert creation.undo() == []
    footprint.settled()


def test_a_name_is_taken_once(host: Host, footprint: Footprint) -> None:
    chaos("create", "-q", HELLO)
    try:
        second = chaos("create", HELLO, check=False)
        assert second.returncode == 1
        assert 'a domain named "hello" exists already' in second.stderr
        assert second.stderr.count("\n") == 1
        assert len(list_domains(host, Registry())) == 2
    finally:
        chaos("destroy", "hello")


def test_of_two_racing_creates_one_wins(footprint: Footprint) -> None:
    for _ in range(2):
        racers = [
            subprocess.Popen(["chaos", "create", "-q", HELLO], stderr=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        said = [racer.communicate(timeout=60)[1] for racer in racers]
        codes = sorted(racer.returncode for racer in racers)
        chaos("destroy", "hello")
        assert codes == [0, 1], said
        assert any("exists already" in text for text in said)


def test_a_killed_create_is_reaped(host: Host, footprint: Footprint) -> None:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        steps = list(CREATE_STEPS)

        def hang(_: Creation) -> None:
            os.write(write, b"x")
            signal.pause()

        steps[6] = steps[6]._replace(do=hang)
        with Host() as own, Builder() as process:
            Creation(hello(), own, process, Registry()).run(steps)
        os._exit(1)
    os.close(write)
    assert os.read(read, 1) == b"x"
    os.close(read)
    names = [d.name for d in list_domains(host, Registry())]
    assert names == ["Domain-0", "hello"]  # alive: nobody reaps it
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert [d.name for d in list_domains(host, Registry())] == ["Domain-0"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_create_undoes(footprint: Footprint, number: int, code: int) -> None:
    process = subprocess.Popen(
        ["chaos", "create", HELLO, "--count", "50"], stderr=subprocess.PIPE, text=True
    )
    with Host() as host:
        while len(host.ctrl.domain_list()) < 5:
            assert process.poll() is None
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    with Host() as host:
        assert len(host.ctrl.domain_list()) == 1


def test_count_names_and_all_or_nothing(host: Host, footprint: Footprint) -> None:
    chaos("create", "-q", HELLO, "--count", "3", 'name="fw-{n}"')
    try:
        names = {d.name for d in list_domains(host, Registry())}
        assert names == {"Domain-0", "fw-1", "fw-2", "fw-3"}
        chaos("destroy", "fw-1")
        clash = chaos("create", HELLO, "--count", "3", 'name="fw-{n}"', check=False)
        assert clash.returncode == 1
        assert {d.name for d in list_domains(host, Registry())} == {"Domain-0", "fw-2", "fw-3"}
    finally:
        chaos("destroy", "--all")


def test_paused_then_unpaused(host: Host, footprint: Footprint) -> None:
    chaos("create", "-p", "-q", HELLO)
    try:
        assert find(host, Registry(), "hello").info.paused
        waited = chaos("wait", "hello", "--timeout", "0.5", check=False)
        assert waited.returncode == 124
        chaos("unpause", "hello")
        chaos("wait", "hello", "--timeout", "30")
        for _ in range(2):
            chaos("pause", "hello")
            assert find(host, Registry(), "hello").info.paused
        chaos("unpause", "hello")
        assert not find(host, Registry(), "hello").info.paused
    finally:
        chaos("destroy", "hello")


def test_rename(host: Host, footprint: Footprint) -> None:
    chaos("create", "-q", HELLO)
    try:
        chaos("rename", "hello", "ciao")
        assert find(host, Registry(), "ciao").name == "ciao"
        with pytest.raises(StateError, match='no domain "hello"'):
            find(host, Registry(), "hello")
        assert chaos("rename", "ciao", "a/b", check=False).returncode == 2
    finally:
        chaos("destroy", "ciao")


def test_foreground_obeys_the_actions(host: Host, footprint: Footprint) -> None:
    def extra(words: str) -> str:
        return f'extra="{words}"'

    done = chaos("create", "-F", HELLO, extra("poweroff"))
    assert "poweroff, destroy" in done.stdout
    done = chaos("create", "-F", HELLO, extra("crash"), 'on_crash="coredump-destroy"')
    assert "crash, destroy" in done.stdout
    assert "no core is written" in done.stderr
    done = chaos("create", "-F", HELLO, extra("crash"), 'on_crash="preserve"')
    assert "crash, preserve" in done.stdout
    try:
        dead = json.loads(chaos("list", "--json", "hello").stdout)[0]
        assert dead["shutdown_reason"] == "crash"
        assert dead["state"][3:5] == "sc"
        assert chaos("wait", "hello", check=False).returncode in {0, 3}
        assert chaos("wait", "--dead", "hello").returncode == 0
    finally:
        chaos("destroy", "hello")


def test_foreground_restarts_until_interrupted(host: Host, footprint: Footprint) -> None:
    process = start(
        "create",
        "-F",
        HELLO,
        'extra="reboot"',
        'on_reboot="restart"',
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for _ in range(2):
        assert select.select([process.stdout], [], [], 60)[0]
        assert "reboot, restart" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "empty"),
        (b"#!/bin/sh\necho hello\n", "script"),
        (b"\x7fELF" + b"\0" * 100, "not a bootable image"),
        (os.urandom(5000), "not a bootable image"),
    ],
    ids=["empty", "script", "bad elf", "noise"],
)
def test_a_bad_image_is_named(
    footprint: Footprint, tmp_path: Path, content: bytes, why: str
) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(content)
    failed = chaos("create", HELLO, f'kernel="{path}"', check=False)
    assert failed.returncode == 1
    assert why in failed.stderr
    assert failed.stderr.count("\n") == 1


def test_mangled_images_never_harm_the_host(
    host: Host, footprint: Footprint, tmp_path: Path, thorough: bool
) -> None:
    """Each create of a mangled ELF ends in a domain or in one error; the next good one works."""
    good = Path("guests/build/hello.elf").read_bytes()
    path = tmp_path / "kernel"
    for seed in range(25) if thorough else sample(range(25), 3):
        mangled = bytearray(good)
        for n in range(4):
            at = (seed * 2654435761 + n * 40503) % min(len(mangled), 1024)
            mangled[at] ^= 1 << (seed + n) % 8
        path.write_bytes(mangled)
        with Builder() as builder:
            creation = Creation(hello(f'kernel="{path}"'), host, builder, Registry())
            try:
                creation.run(CREATE_STEPS[:-1])
            except ChaosError:
                continue
            assert creation.undo() == []
    footprint.settled()
    chaos("create", "-q", HELLO)
    chaos("destroy", "hello")


def test_a_builder_that_dies_fails_one_create(host: Host, footprint: Footprint) -> None:
    with Builder() as builder:

        def kill(_: Creation) -> None:
            os.kill(builder.pid, signal.SIGSEGV)

        steps = list(CREATE_STEPS)
        at = [step.name for step in steps].index("load image")
        steps.insert(at, steps[at]._replace(name="kill", do=kill, undo=None))
        with pytest.raises(StepError, match="SIGSEGV"):
            Creation(hello(), host, builder, Registry()).run(steps)
        assert not builder.alive
    footprint.settled()


def test_too_much_memory_is_refused_clearly(host: Host, footprint: Footprint) -> None:
    free = host.ctrl.physinfo().free_pages >> 8
    failed = chaos("create", HELLO, f"memory={free + 100}", check=False)
    assert failed.returncode == 1
    assert "not enough memory" in failed.stderr
    assert failed.stderr.count("\n") == 1


def test_a_compressed_elf_boots(footprint: Footprint, tmp_path: Path) -> None:
    path = tmp_path / "hello.gz"
    path.write_bytes(gzip.compress(Path("guests/build/hello.elf").read_bytes()))
    made = json.loads(chaos("create", HELLO, f'kernel="{path}"', "--json").stdout)
    try:
        assert made["noxs"]
        assert made["profile"]["ready_ms"] > 0
    finally:
        chaos("destroy", "hello")


def test_a_kernel_that_unpacks_without_end_is_refused(
    host: Host, builder: Builder, footprint: Footprint, tmp_path: Path
) -> None:
    """320 MiB of it, for a guest of 4 MiB."""
    path = tmp_path / "kernel"
    deflate = zlib.compressobj(1, wbits=-15)
    good = Path("guests/build/hello.elf").read_bytes()
    head = deflate.compress(good) + deflate.flush(zlib.Z_FULL_FLUSH)
    # What follows a full flush refers to nothing before it: one block serves as many.
    block = deflate.compress(bytes(8 << 20)) + deflate.flush(zlib.Z_FULL_FLUSH)
    size = len(good) + (40 * 8 << 20)
    trailer = struct.pack("<II", 0, size)  # the size is believed before the sum is seen
    path.write_bytes(GZIP_HEADER + head + block * 40 + deflate.flush() + trailer)
    refused = chaos("create", HELLO, f'kernel="{path}"', check=False)
    assert refused.returncode == 1
    assert "not a bootable image" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_what_was_asked_reaches_the_hypervisor(host: Host, warm: None) -> None:
    """vCPUs, where they may run, and how far the guest may grow."""
    chaos("create", "-q", "-p", HELLO, "vcpus=2", 'cpus=["0", "0-1"]', "memory=4", "maxmem=9")
    try:
        found = find(host, Registry(), "hello")
        ctrl = host.ctrl
        assert found.info.max_vcpu_id == 1
        assert ctrl.vcpu_getaffinity(found.domid, 0) == {0}
        assert ctrl.vcpu_getaffinity(found.domid, 1) >= set(range(min(2, host.nr_cpus)))
        assert found.info.max_pages == (9 << 8) + SLACK_KIB // 4
        assert found.info.tot_pages >= 4 << 8
        for option in ("-l", "--json"):
            listed = json.loads(chaos("list", option, "hello").stdout)[0]
            asked = listed["config"]
            assert (asked["vcpus"], asked["maxvcpus"], asked["maxmem"]) == (2, 2, 9)
            assert asked["cpus"] == ["0", "0-1"]
            assert listed["memory_mib"] == 4
    finally:
        chaos("destroy", "hello")


def test_json_of_every_verb_that_prints(footprint: Footprint) -> None:
    """One document each, with the keys that scripts may rely on."""
    dry = json.loads(chaos("create", "-n", HELLO).stdout)
    assert dry["name"] == "hello"
    two = json.loads(chaos("create", HELLO, "--count", "2", "--json", "-p").stdout)
    assert [made["name"] for made in two] == ["hello-1", "hello-2"]
    keys = {"name", "domid", "uuid", "type", "memory_mib", "vcpus", "noxs", "paused", "profile"}
    assert all(set(made) == keys and made["paused"] for made in two)
    assert set(two[0]["profile"]) == {"steps", "prepare_ms", "execute_ms", "create_ms", "ready_ms"}
    identity = {key: two[0][key] for key in ("name", "domid", "uuid")}
    assert json.loads(chaos("domid", "hello-1", "--json").stdout) == identity
    assert json.loads(chaos("domname", str(two[0]["domid"]), "--json").stdout) == identity
    (listed,) = json.loads(chaos("list", "--json", "hello-1").stdout)
    assert identity.items() <= listed.items()
    late = chaos("wait", "hello-1", "--timeout", "0.2", "--json", check=False)
    assert late.returncode == 124
    waited = json.loads(late.stdout)
    assert set(waited) == {*("name", "domid", "outcome", "shutdown_reason", "exit_code", "message")}
    assert waited["outcome"] == "timeout"
    gone = json.loads(chaos("destroy", "--all", "--json").stdout)
    assert identity in gone
    assert len(gone) == 2


def test_debians_kernel_fits_into_a_builder_for_gigabytes(
    host: Host, builder: Builder, footprint: Footprint, tmp_path: Path
) -> None:
    """Its limit is for what the image costs Dom0; the guest's own pages do not count."""
    ramdisk = tmp_path / "ramdisk"
    ramdisk.write_bytes(os.urandom(64 << 20))
    mib = min(2048, (host.ctrl.physinfo().free_pages >> 8) - 64)
    assert mib >= 1024
    config = hello(
        'name="large"',
        f"memory={mib}",
        f'kernel="/boot/vmlinuz-{os.uname().release}"',
        f'ramdisk="{ramdisk}"',
    )
    creation = Creation(config, host, builder, Registry()).run(UNPAUSED_STEPS)
    assert creation.undo() == []


@pytest.mark.every_release
def test_a_linux_kernel_boots_to_userland(host: Host, footprint: Footprint, tmp_path: Path) -> None:
    """Debian's own kernel with a busybox initramfs, console only."""
    ramdisk = initramfs(
        tmp_path, "#!/bin/busybox sh\necho userland-reached\n/bin/busybox poweroff -f\n"
    )
    cfg = tmp_path / "linux.cfg"
    cfg.write_text(
        'name = "linux"\ntype = "pv"\nmemory = 256\n'
        f'kernel = "/boot/vmlinuz-{os.uname().release}"\nramdisk = "{ramdisk}"\n'
        'extra = "console=hvc0"\non_poweroff = "preserve"\n'
    )
    silent, keyboard = os.pipe()  # a terminal on which nobody types
    try:
        console = chaos("create", "-c", str(cfg), stdin=silent)
        assert "userland-reached" in console.stdout
        chaos("wait", "--dead", "linux", "--timeout", "60")
    finally:
        os.close(silent)
        os.close(keyboard)
        chaos("destroy", "linux")


def test_verbs_name_what_is_unknown() -> None:
    for verb in ("destroy", "pause", "unpause", "console", "wait", "domid", "domname"):
        failed = chaos(verb, "nobody", check=False)
        assert failed.returncode == 1
        assert 'no domain "nobody"' in failed.stderr
    assert chaos("destroy", "0", check=False).returncode == 1
    assert "did you mean create?" in chaos("creat", check=False).stderr


def test_info_agrees_with_the_kernel() -> None:
    facts = json.loads(chaos("info", "--json").stdout)
    with open("/sys/hypervisor/version/minor") as file:
        assert facts["xen_minor"] == int(file.read())
    assert 0 < facts["free_memory"] < facts["total_memory"]


@pytest.mark.xenstored
def test_list_reads_as_xl_s(tmp_path: Path) -> None:
    """The same columns, and each toolstack's domains in both."""
    cfg = tmp_path / "theirs.cfg"
    cfg.write_text(
        'name = "theirs"\ntype = "pv"\nkernel = "/src/guests/build/hello.elf"\nmemory = 4\n'
    )
    subprocess.run(["xl", "create", "-q", cfg], check=True)
    chaos("create", "-q", HELLO)
    try:
        ours = chaos("list").stdout.splitlines()
        theirs = subprocess.run(["xl", "list"], capture_output=True, text=True, check=True)
        header, *rows = theirs.stdout.splitlines()
        assert ours[0] == header
        columns = [row.split()[1:4] for row in rows]  # names and times may differ
        assert [row.split()[1:4] for row in ours[1:]] == columns
        assert [len(row) for row in ours[1:]] == [len(row) for row in rows]
        assert {row.split()[0] for row in ours[1:]} == {"Domain-0", "theirs", "hello"}
        refused = chaos("destroy", "theirs", check=False)
        assert refused.returncode == 1
        assert "was not made by chaos" in refused.stderr
    finally:
        chaos("destroy", "hello")
        subprocess.run(["xl", "destroy", "theirs"], check=True)


def test_a_terminal_on_the_console(footprint: Footprint) -> None:
    """What is typed arrives, Ctrl-] leaves, and the terminal is as it was."""
    chaos("create", "-q", HELLO, 'extra="echo"')
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    try:
        attached = start("console", "hello", stdin=theirs, stdout=theirs, stderr=theirs)
        read_until(ours, b"Hello")
        os.write(ours, b"marco polo\r")
        read_until(ours, b"marco polo")
        second = chaos("console", "hello", check=False, stdin=subprocess.DEVNULL)
        assert "attached elsewhere" in second.stderr
        os.write(ours, b"\x1d")
        assert attached.wait(timeout=60) == 0
        assert termios.tcgetattr(theirs) == before
    finally:
        os.close(ours)
        os.close(theirs)
        chaos("destroy", "hello")


def read_until(fd: int, wanted: bytes) -> bytes:
    seen = b""
    while wanted not in seen:
        assert select.select([fd], [], [], 60)[0], seen
        seen += os.read(fd, 4096)
    return seen


def test_a_domain_destroyed_under_a_console_ends_it(footprint: Footprint) -> None:
    silent, keyboard = os.pipe()
    chaos("create", "-q", HELLO)
    attached = start("console", "hello", stdin=silent, stdout=subprocess.PIPE, text=True)
    assert attached.stdout is not None
    assert "Hello" in attached.stdout.readline()
    chaos("destroy", "hello")
    attached.communicate(timeout=60)
    assert attached.returncode == 0
    os.close(silent)
    os.close(keyboard)


def test_rename_restart_sets_the_dead_one_aside(host: Host, footprint: Footprint) -> None:
    process = start(
        "create",
        "-F",
        HELLO,
        'extra="crash"',
        'on_crash="rename-restart"',
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for _ in range(2):
        assert select.select([process.stdout], [], [], 60)[0]
        assert "crash, rename-restart" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    names = {domain.name for domain in list_domains(host, Registry())}
    assert "hello-1" in names
    chaos("destroy", "--all")


def test_a_domain_destroyed_under_its_create_ends_it(footprint: Footprint) -> None:
    silent, keyboard = os.pipe()
    for option in ("-c", "-F"):
        staying = start("create", option, HELLO, stdin=silent, stdout=subprocess.PIPE, text=True)
        with Host() as own:
            while not [d for d in list_domains(own, Registry()) if d.name == "hello"]:
                assert staying.poll() is None
        chaos("wait", "hello", "--timeout", "60", check=False)
        while chaos("destroy", "hello", check=False).returncode:  # it is still being created
            assert staying.poll() is None
        staying.communicate(timeout=60)
        assert staying.returncode == 0
    os.close(silent)
    os.close(keyboard)


def test_a_flooding_guest_does_not_hold_the_terminal(footprint: Footprint) -> None:
    chaos("create", "-q", HELLO, 'extra="flood"')
    ours, theirs = pty.openpty()
    try:
        attached = start("console", "hello", stdin=theirs, stdout=subprocess.DEVNULL, stderr=theirs)
        while not flooded():
            assert attached.poll() is None
        os.write(ours, b"\x1d")
        assert attached.wait(timeout=60) == 0
    finally:
        os.close(ours)
        os.close(theirs)
        chaos("destroy", "hello")


def flooded() -> bool:
    """Whether a console has taken more than a ring holds."""
    logs = Path("/run/chaos/domains").glob("*/console.log")
    return any(log.stat().st_size > 4096 for log in logs)
