"""Stock guests, which have a store of their own and connect their devices themselves."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import command
import pytest
from chaosd import DAYTIME, GUESTS, NONE, create, filled, network_state, running
from command import chaos
from daemons import (
    end,
    ensure_bus,
    ensure_storesd,
    ensure_xendevd,
    start,
    stop_storesd,
    storesd_pid,
    storesd_serves,
)
from pings import ping
from stock import BLOCK, EXT4, NET, initramfs
from test_create import Footprint
from waiting import wait_for

from chaos import config as configuration
from chaos import store
from chaos.builder import Builder
from chaos.client import Chaos
from chaos.create import CREATE_STEPS, Creation
from chaos.domains import find, list_domains
from chaos.host import Host
from chaos.registry import Registry
from noxs.bus import Bus
from noxs.gueststores import GuestStores
from noxs.storesd import GNTTAB_RESERVED_XENSTORE, STATE
from xenctypes.errors import ChaosError, StateError, StepError
from xenctypes.gnttab import Gnttab

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HELLO = "/src/examples/hello.cfg"
PHYS32_ENTRY = 18  # XEN_ELFNOTE_PHYS32_ENTRY, public/elfnote.h
BRIDGE = "xenbr0"
ADDRESS = "10.77.0.61"
MAC = "00:16:3e:99:07:02"
LATE_MAC, LATE_ADDRESS, LATE_GATEWAY = "00:16:3e:99:07:03", "10.78.0.61", "10.78.0.1"
"""Of the vif that it gets while it runs, which alone answers for its address."""
BOOT_SECONDS = 240.0
"""For a stock kernel whose page tables and processor are both emulated."""
INIT = f"""#!/bin/busybox sh
export PATH=/bin
for tool in mount umount mkdir insmod ip ping sleep nproc sh getty login; do
    busybox ln -s busybox /bin/$tool
done
mount -t proc proc /proc; echo 1 > /proc/sys/kernel/sysrq
mount -t sysfs sysfs /sys; mount -t devtmpfs devtmpfs /dev
for pass in 1 2 3; do for module in /*.ko; do insmod $module 2>/dev/null; done; done
until [ -e /sys/class/net/eth0 ]; do sleep 0.1; done
ip addr add {ADDRESS}/24 dev eth0
ip link set eth0 up
echo network-up
if [ -e /xen-blkfront.ko ]; then
    until [ -b /dev/xvda ]; do sleep 0.1; done
    mkdir /mnt
    mount -t ext4 /dev/xvda /mnt
    echo from the guest > /mnt/greeting
    umount /mnt
    echo disk-done
fi
echo 1 > /proc/sys/net/ipv4/conf/all/arp_ignore
mkdir /etc
echo root::0:0:root:/:/bin/sh > /etc/passwd
echo root:x:0: > /etc/group
getty -L 0 hvc0 vt100 &
while :; do
    if [ -e /sys/class/net/eth1 ]; then
        ip addr add {LATE_ADDRESS}/24 dev eth1
        ip link set eth1 up
    fi 2> /dev/null
    if [ -b /dev/xvdb ] && [ ! -e /late ]; then
        mount -t ext4 /dev/xvdb /mnt
        echo from the guest, later > /mnt/greeting
        umount /mnt
        echo late-disk-done
        echo > /late
    fi
    # Linux makes a vCPU that it is given present; udev's rules bring it online.
    for cpu in /sys/devices/system/cpu/cpu*/online; do echo 1 > $cpu; done 2> /dev/null
    set -- /sys/class/net/eth*
    cards=$#
    set -- /sys/block/xvd*
    echo "$(nproc) processors, $cards cards, $# disks"
    sleep 1
done
"""
STEPS = ("load image", "open store", "attach devices", "introduce", "record", "announce")
"""The steps that a stock guest's create takes otherwise, or after which it has a store."""


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    ensure_bus()
    ensure_xendevd()
    subprocess.run(["modprobe", "-a", "xen-netback", "xen-blkback", "loop"], check=True)
    Registry().prepare()
    with Host() as opened:
        if not store.service(opened):
            ensure_storesd()
        yield opened


@pytest.fixture
def nothing_left(host: Host) -> Iterator[None]:
    """What the host holds must be the same after the test, and nobody may know of the guests."""
    _ = host.evtchn, host.memory, host.bus
    if store.service(host) == store.PRIVATE:
        _ = host.stores
    measured = Footprint(host)
    # Tables of Dom0's own, of event channels and of grants that it maps, grow and never shrink.
    measured.before["free pages"] -= 16
    before = traces(host)
    yield
    measured.settled()
    left = {what: names - before[what] for what, names in traces(host).items()}
    assert not any(left.values()), left


@pytest.fixture
def plain(tmp_path: Path) -> list[str]:
    """Overrides of hello's configuration for an image that is a stock guest's, with a vif."""
    kernel = tmp_path / "plain.elf"
    elf = Path(f"{GUESTS}/hello.elf").read_bytes()
    assert elf.count(b"noxs\0") == 1
    kernel.write_bytes(elf.replace(b"noxs\0", b"none\0"))
    return [f'kernel="{kernel}"', f'vif=["bridge={BRIDGE}"]', 'name="plain"']


def traces(host: Host) -> dict[str, set[str]]:
    """What guests leave where others look; tests of the bus leave nodes of no guest at all."""
    backend, bus = "/local/domain/0/backend", host.bus
    return {
        "domains": set(bus.directory("/local/domain")),
        "journals": set(os.listdir(STATE)) if os.path.isdir(STATE) else set(),
        "interfaces": {name for name in os.listdir("/sys/class/net") if name.startswith("vif")},
        "loop devices": set(map(str, Path("/sys/block").glob("loop*/loop/backing_file"))),
    } | {
        kind: set(bus.directory(f"{backend}/{kind}")) if bus.exists(f"{backend}/{kind}") else set()
        for kind in ("vif", "vbd")
    }


def config_file(directory: Path, kind: str, linux: Path, ramdisk: Path, *more: str) -> str:
    cfg = directory / "stock.cfg"
    lines = (
        'name = "stock"', f'type = "{kind}"', "memory = 192", "maxmem = 224",
        "vcpus = 1", "maxvcpus = 2",
        f'kernel = "{linux}"', f'ramdisk = "{ramdisk}"', 'extra = "console=hvc0"',
        f'vif = ["bridge={BRIDGE}, mac={MAC}"]', *more,
    )  # fmt: skip
    cfg.write_text("\n".join(lines) + "\n")
    return str(cfg)


def answers(address: str = ADDRESS) -> bool:
    ping = ["ping", "-c", "1", "-W", "1", address]
    return subprocess.run(ping, check=False, capture_output=True).returncode == 0


def greeting(image: Path) -> str:
    """What a guest wrote to the file system in an image."""
    done = subprocess.run(
        ["debugfs", "-R", "cat /greeting", str(image)], capture_output=True, text=True, check=True
    )
    return done.stdout


@contextmanager
def console(name: str, log: Path) -> Iterator[Callable[[bytes], int]]:
    """What the guest says, in a file, and on a failure in the test's report; a keyboard."""
    silent, keyboard = os.pipe()
    try:
        with log.open("ab") as out:
            attached = command.start("console", name, stdin=silent, stdout=out)
        try:
            yield partial(os.write, keyboard)
        finally:
            attached.terminate()
            attached.wait(60)
            sys.stdout.write(log.read_text(errors="replace"))
    finally:
        os.close(silent)
        os.close(keyboard)


def log_in(typed: Callable[[bytes], int], said: Callable[[], bytes]) -> None:
    """On the guest's console."""
    for prompt, line in ((b"login:", b"root\n"), (b" # ", b"echo $((6*7)) is it\n")):
        wait_for(lambda prompt=prompt: prompt in said(), f"no {prompt!r}", BOOT_SECONDS)
        typed(line)
    wait_for(lambda: b"42 is it" in said(), "nobody is logged in")


def served(*argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """The installed command, which has the daemon run the verb."""
    done = subprocess.run(["chaos", *argv], capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done


@contextmanager
def late_network() -> Iterator[None]:
    """Dom0 is in the network that the guest's late vif is for."""
    address = ["ip", "addr", "replace", f"{LATE_GATEWAY}/24", "dev", BRIDGE]
    subprocess.run(address, check=True)
    try:
        yield
    finally:
        subprocess.run([*address[:2], "del", *address[3:]], check=True)


def change_devices(
    run: Callable[..., subprocess.CompletedProcess[str]],
    host: Host,
    domid: int,
    said: Callable[[], bytes],
    plain: list[str],
) -> None:
    """A vif and a disk come and go while the guest runs."""
    image, mapped = Path(plain[0].split('"')[1]).with_name("late"), traces(host)

    def listed(kind: str, *keys: str) -> list[tuple[Any, ...]]:
        rows = json.loads(run(f"{kind}-list", "--json", "stock").stdout)
        return [tuple(row[key] for key in keys) for row in rows]

    subprocess.run(["mkfs.ext4", "-q", str(image), "8M"], check=True)
    run("create", "-q", "-p", HELLO, *plain, f'disk=["{image},raw,xvda,rw"]')
    refused = run("block-attach", "stock", f"{image},raw,xvdb,r", check=False)
    assert 'is a disk of "plain" already' in refused.stderr
    run("destroy", "plain")
    with late_network():
        run("network-attach", "stock", f"bridge={BRIDGE}", f"mac={LATE_MAC}")
        run("block-attach", "stock", str(image), "raw", "xvdb", "w")
        refused = run("block-attach", "stock", f"{image},raw,xvdc,r", check=False)
        assert "is a disk of this domain already" in refused.stderr
        refused = run("network-attach", "stock", f"mac={LATE_MAC}", "bridge=nowhere", check=False)
        assert "two vifs have the MAC" in refused.stderr
        wait_for(lambda: answers(LATE_ADDRESS), "the late vif does not answer", BOOT_SECONDS)
        neighbour = ["ip", "neigh", "show", LATE_ADDRESS, "dev", BRIDGE]
        known = subprocess.run(neighbour, check=True, capture_output=True, text=True).stdout
        assert LATE_MAC in known
        wait_for(lambda: b"late-disk-done" in said(), "the late disk is not written", BOOT_SECONDS)
        assert listed("network", "mac", "state") == [(MAC, 4), (LATE_MAC, 4)]
        assert listed("block", "dev", "state") == [("xvda", 4), ("xvdb", 4)]
        begin = len(said())
        run("network-detach", "stock", LATE_MAC)
        run("block-detach", "stock", "xvdb")
        assert traces(host) == mapped
        assert not Path(f"/sys/devices/vbd-{domid}-51728").exists()
        wait_for(lambda: b" 1 cards, 1 disks" in said()[begin:], "it keeps a late device")
    assert listed("network", "mac", "state") == [(MAC, 4)]
    assert listed("block", "dev", "state") == [("xvda", 4)]
    assert greeting(image) == "from the guest, later\n"


@pytest.mark.every_release
def test_linux_gets_its_devices_and_is_shut_down(
    host: Host, nothing_left: None, plain: list[str], tmp_path: Path, linux: Path
) -> None:
    """The classic handshake of netfront and blkfront; storesd is killed in between."""
    image = tmp_path / "disk"
    subprocess.run(["mkfs.ext4", "-q", str(image), "8M"], check=True)
    ramdisk = initramfs(tmp_path, INIT, NET, BLOCK, *EXT4)
    more = 'on_poweroff = "preserve"', f'disk = ["{image},raw,xvda,rw"]'
    cfg = config_file(tmp_path, "pv", linux, ramdisk, *more)
    log = tmp_path / "console"
    with GuestStores.connect() as stores, Bus.connect() as bus:
        domid = json.loads(chaos("create", "-p", "--json", cfg).stdout)["domid"]
        front = f"/local/domain/{domid}/device"
        try:
            assert stores.read(f"/local/domain/{domid}/cpu/1/availability") == "offline"
            assert stores.read(f"/local/domain/{domid}/memory/target") == str(192 << 10)
            with console("stock", log) as typed:
                chaos("unpause", "stock")
                for device in ("vif/0", "vbd/51712"):
                    wait_for(
                        lambda device=device: bus.get(f"{front}/{device}/state") == "4",
                        f"{device} is not connected",
                        BOOT_SECONDS,
                    )
                end(storesd_pid(), signal.SIGKILL)
                start("storesd")
                wait_for(storesd_serves, "storesd does not start again")
                wait_for(answers, "it does not answer", BOOT_SECONDS)
                wait_for(
                    lambda: b"disk-done" in log.read_bytes(),
                    "the disk is not written",
                    BOOT_SECONDS,
                )
                log_in(typed, log.read_bytes)
                assert not stores.exists(f"/local/domain/{domid}/device/vif/0/script")
                assert stores.read(f"/local/domain/0/backend/vbd/{domid}/51712/sectors") == "16384"
                assert not stores.exists(f"/local/domain/0/backend/vbd/{domid}/51712/params")
                for vcpus in ("2", "1"):
                    log.write_bytes(b"")
                    chaos("vcpu-set", "stock", vcpus)
                    wait_for(lambda said=f"{vcpus} processors": said in log.read_text(), vcpus)
                chaos("mem-set", "stock", "160")
                info = host.ctrl.domain_info
                wait_for(lambda: info(domid).tot_pages <= 176 << 8, "it gives no memory back")
                chaos("sysrq", "stock", "h")
                wait_for(lambda: "sysrq: HELP" in log.read_text(), "it has not heard the key")
                change_devices(chaos, host, domid, log.read_bytes, plain)
                chaos("rename", "stock", "renamed")
                assert stores.read(f"/local/domain/{domid}/name") == "renamed"
                chaos("shutdown", "-w", "renamed", timeout=BOOT_SECONDS)
            assert (
                json.loads(chaos("list", "-l", "renamed").stdout)[0]["shutdown_reason"]
                == "poweroff"
            )
        finally:
            chaos("destroy", str(domid))
    assert greeting(image) == "from the guest\n"


@pytest.mark.anyhost
@pytest.mark.parametrize("private", ["pvh", pytest.param("pv", marks=pytest.mark.thorough)])
def test_the_daemon_makes_one_and_finds_it_again(
    host: Host, nothing_left: None, plain: list[str], tmp_path: Path, linux: Path, private: str
) -> None:
    """Of type ``private`` with storesd; of the other on xenstored, where it panics in the end."""
    info = host.ctrl.domain_info
    shared = store.service(host) == store.SHARED
    image = tmp_path / "disk"
    subprocess.run(["mkfs.ext4", "-q", str(image), "8M"], check=True)
    ramdisk = initramfs(tmp_path, INIT, NET, BLOCK, *EXT4)
    kind = {"pv": "pvh", "pvh": "pv"}[private] if shared else private
    cfg = config_file(tmp_path, kind, linux, ramdisk, f'disk = ["{image},raw,xvda,rw"]')
    with running("[pool]\nadaptive = false\n") as daemon, Chaos() as client:
        made = client.call("create", path=cfg)
        assert host.bus.read(f"/local/domain/{made['domid']}/device/vif/0/mac") == MAC
        if shared:
            listed = subprocess.run(["xl", "list"], capture_output=True, text=True, check=True)
            assert "stock" in listed.stdout.split()
        wait_for(answers, "it does not answer", BOOT_SECONDS)
        # It may have been restarted: see lab/machine.py on guests that the emulator loses.
        domid = find(host, Registry(), "stock").domid
        daemon.kill()
        daemon.start()
        wait_for(answers, "it does not answer any more")
        with Chaos() as again:
            assert b"network-up" in again.call("logs", domain="stock")
            wait_for(
                lambda: b"disk-done" in again.call("logs", domain="stock"), "no disk", BOOT_SECONDS
            )
            change_devices(served, host, domid, lambda: again.call("logs", domain="stock"), plain)
            begin = len(again.call("logs", domain="stock"))
            served("vcpu-set", "stock", "2")
            wait_for(
                lambda: b"2 processors" in again.call("logs", domain="stock")[begin:], "one vCPU"
            )
            # With all the memory that it was given: it grows to maxmem when it is told to.
            assert info(domid).tot_pages >= 188 << 8
            if shared:
                served("mem-set", "stock", "160")
                wait_for(lambda: info(domid).tot_pages <= 176 << 8, "it gives no memory back")
        if shared:
            chaos("reboot", "stock")  # and it gets its store and its devices once more
            wait_for(lambda: info(domid) is None, "it does not reboot", BOOT_SECONDS)
            wait_for(answers, "it does not answer after a reboot", BOOT_SECONDS)
            chaos("sysrq", "stock", "c")  # it panics
        else:
            chaos("shutdown", "-w", "stock", timeout=BOOT_SECONDS)
        wait_for(lambda: len(host.ctrl.domain_list()) == 1, "it is not destroyed")
    assert greeting(image) == "from the guest\n"


MANY_INIT = """#!/bin/busybox sh
export PATH=/bin
for tool in mount insmod ip sleep sed; do busybox ln -s busybox /bin/$tool; done
mount -t proc proc /proc
mount -t sysfs sysfs /sys
for pass in 1 2; do for module in /*.ko; do insmod $module 2>/dev/null; done; done
until [ -e /sys/class/net/eth0 ]; do sleep 0.1; done
ip addr add $(sed 's/.*address=//' /proc/cmdline)/24 dev eth0
ip link set eth0 up
while :; do sleep 1000; done
"""


LEAST = 84
"""MiB with which Debian's kernel boots: it is laid out from 16 MiB to 74, and keeps 46 of them."""


@pytest.mark.thorough
@pytest.mark.anyhost
def test_fifty_with_the_least_memory(
    host: Host, nothing_left: None, tmp_path: Path, linux: Path
) -> None:
    ramdisk = initramfs(tmp_path, MANY_INIT, NET)
    guests = {f"10.77.0.{last}": f"linux-{last}" for last in range(150, 200)}
    with running(NONE), Chaos() as client:
        for address, name in guests.items():
            text = f"""
name = "{name}"
memory = {LEAST}
kernel = "{linux}"
ramdisk = "{ramdisk}"
extra = "console=hvc0 address={address}"
vif = ["bridge={BRIDGE}"]
"""
            client.call("create", config=text)
        silent = dict(guests)

        def all_answer() -> bool:
            for address in [*silent]:
                if answers(address):
                    del silent[address]
            return not silent

        try:
            wait_for(all_answer, "not all answer", 2 * BOOT_SECONDS)
        finally:
            if silent:
                sys.stdout.write(f"{silent=}\n{network_state()}")
        assert len(host.ctrl.domain_list()) == 1 + len(guests)
        client.call("shutdown", all=True, wait=True, timeout=int(BOOT_SECONDS))


# Guests that need not run: hello, without the note that says that it speaks noxs.


@pytest.mark.anyhost
def test_a_failure_at_any_step_leaves_nothing(
    host: Host, plain: list[str], nothing_left: None
) -> None:
    def fail(do: Callable[[Creation], None], *, late: bool) -> Callable[[Creation], None]:
        def step(creation: Creation) -> None:
            if late:
                do(creation)
            raise StateError("made to fail")

        return step

    config = configuration.load(HELLO, plain)[0]
    with Builder() as builder:
        for victim in STEPS:
            for late in (False, True):
                steps = [
                    step._replace(do=fail(step.do, late=late)) if step.name == victim else step
                    for step in CREATE_STEPS
                ]
                with pytest.raises(StepError, match="made to fail") as caught:
                    Creation(config, host, builder, Registry()).run(steps)
                assert caught.value.step == victim
                assert not getattr(caught.value, "__notes__", None)


@pytest.mark.anyhost
def test_a_create_that_is_killed_is_reaped(
    host: Host, plain: list[str], nothing_left: None
) -> None:
    """With a store and a vif; and a guest that another toolstack destroys lets go of both."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)

        def hang(_: Creation) -> None:
            os.write(write, b"x")
            signal.pause()

        steps = [s._replace(do=hang) if s.name == "record" else s for s in CREATE_STEPS]
        with Host() as own, Builder() as process:
            Creation(configuration.load(HELLO, plain)[0], own, process, Registry()).run(steps)
        os._exit(1)
    os.close(write)
    assert os.read(read, 1) == b"x"
    os.close(read)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert [d.name for d in list_domains(host, Registry())] == ["Domain-0"]

    chaos("create", "-q", "-p", HELLO, *plain)
    host.ctrl.domain_destroy(find(host, Registry(), "plain").domid)
    wait_for(lambda: len(list_domains(host, Registry())) == 1, "it stays")


def pvh_image(code: bytes) -> bytes:
    """An ELF file for PVH that runs 32-bit code where neither page tables nor an IDT are."""
    entry = 1 << 20
    note = struct.pack("<III4sI", 4, 4, PHYS32_ENTRY, b"Xen", entry)
    at = 64 + 2 * 56
    header = struct.pack(
        "<4s5B7xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 0, 0, 2, 62, 1, entry, 64, 0, 0, 64, 56, 2, 64,
        0, 0,
    )  # fmt: skip
    load = struct.pack("<IIQQQQQQ", 1, 5, at + len(note), entry, entry, len(code), len(code), 4096)
    notes = struct.pack("<IIQQQQQQ", 4, 4, at, 0, 0, len(note), len(note), 4)
    return header + load + notes + note + code


@pytest.mark.anyhost
def test_guests_that_end_badly_leave_nothing(
    host: Host, plain: list[str], nothing_left: None, tmp_path: Path
) -> None:
    """Those that never connect their vif; one that triple-faults; one whose grant somebody has."""
    faulty = tmp_path / "faulty.elf"
    faulty.write_bytes(pvh_image(b"\x0f\x0b"))  # ud2
    pvh = [f'kernel="{faulty}"', 'type="pvh"', *plain[1:]]
    preserve = [f'on_{how}="preserve"' for how in ("crash", "poweroff", "reboot")]
    with running(NONE), Chaos() as client:
        for overrides, reason in (([*plain, 'extra="poweroff"'], "poweroff"), (pvh, "reboot")):
            client.call("create", path=HELLO, overrides=[*overrides, *preserve])
            ended = wait_for(
                lambda: client.call("list", domains=["plain"])[0]["shutdown_reason"], reason
            )
            assert ended == reason
            client.call("destroy", domains=["plain"])
        domid = client.call("create", path=HELLO, overrides=plain, paused=True)["domid"]
        with Gnttab() as gnttab, gnttab.map_grant_refs(domid, [GNTTAB_RESERVED_XENSTORE]):
            client.call("destroy", domains=["plain"])
            assert any(info.domid == domid and info.dying for info in host.ctrl.domain_list())
            again = client.call("create", path=HELLO, overrides=plain, paused=True)["domid"]
            assert again != domid
            client.call("destroy", domains=["plain"])
        wait_for(lambda: len(host.ctrl.domain_list()) == 1, "it is not gone")


def test_without_storesd(host: Host, plain: list[str], nothing_left: None) -> None:
    stop_storesd()
    try:
        refused = chaos("create", HELLO, *plain, check=False)
        assert refused.returncode == 1
        assert "storesd is not running" in refused.stderr
        assert refused.stderr.count("\n") == 1
        for overrides, why in ((plain, "storesd is not running"), ([], "guests that speak noxs")):
            refused = chaos("create", HELLO, *overrides, "vif=[]", "maxvcpus=2", check=False)
            assert f"maxvcpus is above vcpus: {why}" in refused.stderr
        # Without devices it needs no store.
        chaos("create", "-q", "-p", HELLO, *plain, "vif=[]")
        refused = chaos("shutdown", "plain", check=False)
        assert "has no store: it cannot be asked to shut down" in refused.stderr
        chaos("destroy", "plain")
        start("storesd")
        wait_for(storesd_serves, "storesd does not start")
        chaos("create", "-q", "-p", HELLO, *plain)
        # One that ends while storesd is away: it is not served again.
        end(storesd_pid(), signal.SIGKILL)
        chaos("destroy", "plain")
    finally:
        ensure_storesd()


def test_the_daemon_has_shells_for_them_and_takes_back_what_fails(
    host: Host, plain: list[str], nothing_left: None, tmp_path: Path
) -> None:
    kernel: Any = plain[0].partition("=")[2]
    settings = f"""
[pool]
adaptive = false
[[flavour]]
name = "warm"
type = "pv"
memory = 4
kernel = {kernel}
vif = ["bridge={BRIDGE}"]
size = 1
[[flavour]]
name = "generic"
type = "pv"
memory = 4
size = 1
"""
    with running(settings), Chaos() as client:
        filled(client)
        made = client.call("create", path=HELLO, overrides=plain, paused=True)
        domid = made["domid"]
        assert host.bus.get(f"/local/domain/0/backend/vif/{domid}/0/domain") == "plain"
        assert host.stores.is_introduced(domid)
        steps = [s["name"] for s in made["profile"]["steps"] if s["phase"] == "execute"]
        assert "readdress" in steps
        assert "attach devices" not in steps  # it was plugged before anybody asked for it
        front = f"/local/domain/{domid}/device/vif/0"
        assert host.stores.read(f"{front}/mac") == host.bus.read(f"{front}/mac")
        filled(client, "warm")
        mac, uuid = "00:16:3e:00:00:99", str(uuid4())
        vifs = f'vif=["bridge={BRIDGE},mac={mac}"]'
        other = [*plain, vifs, f'uuid="{uuid}"', 'name="other"']
        made = client.call("create", path=HELLO, overrides=other, paused=True)
        base = f"/local/domain/{made['domid']}"
        assert host.stores.read(f"{base}/vm") == f"/vm/{uuid}"
        assert host.stores.read(f"{base}/device/vif/0/mac") == mac
        assert host.bus.read(f"{base}/device/vif/0/mac") == mac
        filled(client, "warm")
        image = tmp_path / "image"
        disk = [*plain, f'disk=["{image},raw,xvda,rw"]', 'name="disk"']
        with pytest.raises(ChaosError, match="No such file"):
            client.call("create", path=HELLO, overrides=disk, paused=True)
        image.write_bytes(bytes(1 << 20))
        made = client.call("create", path=HELLO, overrides=disk, paused=True)
        steps = [s["name"] for s in made["profile"]["steps"] if s["phase"] == "execute"]
        assert "attach disks" in steps
        assert "load image" not in steps
        back = host.stores.read(f"/local/domain/{made['domid']}/device/vbd/51712/backend")
        assert host.bus.read(f"{back}/physical-device")
        with pytest.raises(ChaosError, match='is a disk of "disk" already'):
            client.call("create", path=HELLO, overrides=[*disk, 'name="second"'])
        bare = [plain[0], 'name="bare"']
        made = client.call("create", path=HELLO, overrides=bare, paused=True)
        assert host.stores.read(f"/local/domain/{made['domid']}/name") == "bare"
        served = {flavour["name"]: flavour["served"] for flavour in client.call("pool.list")}
        assert served["warm"] >= 4  # also the one that a missing disk put back
        assert served["generic"] == 1
        filled(client)
        stop_storesd()
        try:
            with pytest.raises(ChaosError, match="storesd"):
                client.call("create", path=HELLO, overrides=[*plain, 'name="late"'])
        finally:
            ensure_storesd()
        assert "late" not in {d.name for d in list_domains(host, Registry())}
        client.call("destroy", all=True)


# A guest that talks to its store as the words on its command line say: guests/store.


@contextmanager
def talkers(neighbour: str) -> Iterator[tuple[Callable[..., Any], Callable[..., Any]]]:
    """Functions that make one, and wait for what it says; a noxs guest whose network is tried."""
    with running(NONE), Chaos() as client:

        def make(name: str, words: str, *more: str) -> int:
            kernel = f'kernel="{GUESTS}/store.elf"'
            overrides = [kernel, f'name="{name}"', f'extra="{words}"', *more]
            return int(client.call("create", path=HELLO, overrides=overrides)["domid"])

        def said(name: str, what: bytes) -> re.Match[bytes]:
            def look() -> re.Match[bytes] | None:
                return re.search(what, client.call("logs", domain=name))

            found = wait_for(look, f"{name} does not say {what!r}")
            assert isinstance(found, re.Match)
            return found

        vif = f'vif=["bridge={BRIDGE},ip={neighbour}/24"]'
        create(client, "neighbour", DAYTIME, vif, wait_ready=60)
        yield make, said
        assert ping(neighbour, 5) == 5


@pytest.mark.thorough
def test_a_flood_leaves_others_their_share(host: Host, nothing_left: None) -> None:
    """Of storesd, and of Dom0's bus; nor does a ring that makes no sense do harm."""

    def seconds(name: str) -> tuple[float, float]:
        make(name, "ask=100")
        found = said(name, rb"asked 100 times in (\d+) us, the longest (\d+) us")
        return int(found[1]) / 1e6, int(found[2]) / 1e6

    def read_bus() -> float:
        start = time.monotonic()
        for _ in range(50):
            host.bus.directory("/local/domain")
        return time.monotonic() - start

    with talkers("10.77.0.62") as (make, said):
        make("senseless", "nonsense")
        said("senseless", b"its ring is nonsense")
        alone, bus_alone = seconds("alone"), read_bus()
        make("flood", "flood")
        said("flood", b"flooded with 1024")
        beside, bus_beside = seconds("beside"), read_bus()
        sys.stdout.write(f"{alone=} {beside=} {bus_alone=} {bus_beside=}\n")
        assert beside[0] < 5 * alone[0]
        assert beside[1] < 1
        assert bus_beside < 5 * bus_alone


def test_lies_about_rings_and_back_ends_hurt_the_liar(host: Host, nothing_left: None) -> None:
    """With the real netback, and Dom0's bus as it was."""
    bus, back = host.bus, "/local/domain/0/backend/vif"
    with talkers("10.77.0.63") as (make, said):
        victim = next(d.domid for d in list_domains(host, Registry()) if d.name == "neighbour")
        theirs = f"{back}/{victim}/0"
        # The daemon writes the name once its reply is out.
        wait_for(lambda: bus.get(f"{theirs}/domain") == "neighbour", "it has no name")
        before = {key: bus.get(f"{theirs}/{key}") for key in bus.directory(theirs)}
        domid = make("liar", f"lie theirs={theirs}", f'vif=["bridge={BRIDGE}"]')
        mine, front = f"{back}/{domid}/0", f"/local/domain/{domid}/device/vif/0"
        for whose in (b"my", b"their"):
            refused = said("liar", whose + rb" back end's state is written: (\w+)")
            assert refused[1] in {b"EACCES", b"ENOENT"}
        said("liar", b"lies about its store's ring")
        states = re.findall(rb"back end is in state (.)", said("liar", b"(?s).*")[0])
        # netback says 4 also after an error, for a moment (set_backend_state() in its xenbus.c).
        assert set(states) <= {b"4", b"5", b"6"}, states
        assert b"4" in states  # rings that netback took, and which then were noise
        assert {key: bus.get(f"{theirs}/{key}") for key in bus.directory(theirs)} == before
        assert bus.read(f"{mine}/frontend") == front
        assert bus.read(f"{front}/backend") == mine
