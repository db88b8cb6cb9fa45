"""The guests on the real hypervisor: what they read, what they say, and that they obey."""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from command import chaos
from daemons import noxsd_pid
from guest import (
    DAYTIME,
    PATIENCE,
    SHUTDOWN_CRASH,
    SHUTDOWN_POWEROFF,
    SHUTDOWN_REBOOT,
    ask_tcp,
    end_of_image,
    read_console,
    ready,
    vif,
    vifs,
)
from pings import ping
from waiting import wait_for

from chaos.vif import PAGES
from noxs import abi, hotplug
from noxs.page import encode, more_pages, patch_identity, patch_metadata, publish, write_request
from xenctypes.errors import StepError

if TYPE_CHECKING:
    from collections.abc import Callable

    from guest import Guest


def test_hello_reads_its_page(make: Callable[..., Guest]) -> None:
    guest = ready(make("hello", "show=page"))
    uuid = guest.creation.uuid
    said = guest.said()
    assert f"This is hello, a PV guest on Xen {xen_version()}, with a device page." in said
    assert f"page: name=hello domid={guest.creation.domid} uuid={uuid} abi=1.0" in said
    assert guest.words() == (0, 0, abi.STATE_READY, 0, 0b1100110, "", abi.ABI_VERSION)
    wait_for(lambda: guest.info().blocked, "hello does not sleep")


def xen_version() -> str:
    version = Path("/sys/hypervisor/version")
    return ".".join((version / part).read_text().strip() for part in ("major", "minor"))


@pytest.mark.parametrize("size", [0, 1, 2000, 4096, 65536])
def test_metadata_arrives(make: Callable[..., Guest], tmp_path: Path, size: int) -> None:
    blob = random.Random(size).randbytes(size // 2).hex().encode() + b"." * (size % 2)
    path = tmp_path / "blob"
    path.write_bytes(blob)
    guest = make("hello", "show=metadata", f'noxs_metadata_file="{path}"')
    read_console(guest.name, b"metadata: " + blob + b"\r\n")


@pytest.mark.parametrize(
    ("code", "state", "reason"),
    [
        (abi.REQUEST_POWEROFF, abi.STATE_POWEROFF, SHUTDOWN_POWEROFF),
        (abi.REQUEST_REBOOT, abi.STATE_REBOOT, SHUTDOWN_REBOOT),
    ],
    ids=["poweroff", "reboot"],
)
def test_shutdown_requests(make: Callable[..., Guest], code: int, state: int, reason: int) -> None:
    guest = ready(make("hello", "message=enough exit=-7"))
    answer = guest.ask(code)
    assert (answer.ack, answer.ack_result) == (1, abi.ACK_OK)
    assert guest.died() == reason
    final = guest.words()
    assert (final.state, final.exit_code, final.message) == (state, -7, "enough")


def test_a_request_from_before_the_boot_is_obeyed(make: Callable[..., Guest]) -> None:
    guest = make("daytime", paused=True)
    write_request(guest.page, 5, abi.REQUEST_POWEROFF)
    guest.unpause()
    assert guest.died() == SHUTDOWN_POWEROFF
    assert guest.words().ack == 5


def test_other_requests(make: Callable[..., Guest]) -> None:
    guest = ready(make("hello", "refuse"))
    assert guest.ask(abi.REQUEST_POWEROFF).ack_result == abi.ACK_REFUSED
    assert guest.ask(abi.REQUEST_SUSPEND).ack_result == abi.ACK_UNSUPPORTED
    assert guest.ask(99).ack_result == abi.ACK_UNSUPPORTED
    assert guest.ask(abi.REQUEST_SYSRQ, ord("h")).ack_result == abi.ACK_OK
    wait_for(lambda: "sysrq: h" in guest.said(), "no answer to sysrq")
    assert guest.words().state == abi.STATE_READY
    guest.ask(abi.REQUEST_SYSRQ, ord("c"))
    assert guest.died() == SHUTDOWN_CRASH
    assert (guest.words().state, guest.words().message) == (abi.STATE_FAILED, "sysrq c")


def test_a_page_changes_under_a_running_guest(make: Callable[..., Guest]) -> None:
    guest = ready(make("hello", "show=page"))
    template = encode(guest.creation.describe())
    for number in range(20):
        patch_identity(template, name=f"renamed-{number}")
        patch_metadata(template, b"x" * number)
        publish(guest.page, template)
        assert guest.ask(abi.REQUEST_REREAD).ack_result == abi.ACK_OK
    said = wait_for(
        lambda: (text := guest.said()) and "name=renamed-19" in text and text, "not seen"
    )
    assert "generation=42" in said
    assert "metadata=19 " in said


def test_leaving_and_faults(make: Callable[..., Guest]) -> None:
    for way, reason, state in (
        ("poweroff", SHUTDOWN_POWEROFF, abi.STATE_POWEROFF),
        ("reboot", SHUTDOWN_REBOOT, abi.STATE_REBOOT),
        ("crash", SHUTDOWN_CRASH, abi.STATE_FAILED),
        ("fault", SHUTDOWN_CRASH, abi.STATE_FAILED),
    ):
        guest = make("hello", f"{way} exit=4 message={way}", name=f"hello-{way}")
        assert guest.died() == reason
        assert (guest.words().state, guest.words().exit_code) == (state, 4)
        assert guest.words().message == way


def test_echo_and_many_lines(make: Callable[..., Guest]) -> None:
    guest = ready(make("hello", "echo lines=2000"))
    assert read_console(guest.name, b"line 2000\r\n").count(b"line ") == 2000
    read_console(guest.name, b"typed", b"typed")


def test_spin_burns_and_finds_nothing(make: Callable[..., Guest]) -> None:
    guest = ready(make("spin"))
    before = guest.info().cpu_time
    wait_for(lambda: guest.info().cpu_time - before > 2_000_000_000, "spin does not spin")
    wait_for(lambda: guest.info().running or not guest.info().blocked, "spin sleeps")
    said = guest.said()
    assert "rounds in" in said
    assert "CORRUPT" not in said


# ---- With a network


@pytest.mark.every_release
@pytest.mark.anyhost
@pytest.mark.usefixtures("network")
def test_daytime_answers(make: Callable[..., Guest]) -> None:
    guest = ready(make("daytime", "", vifs(vif(20))))
    assert ping("10.77.0.20", 100) == 100, guest.said()
    for _ in range(100):
        assert DAYTIME.fullmatch(ask_tcp("10.77.0.20"))
    with contextlib.ExitStack() as stack:
        connections = [
            stack.enter_context(socket.create_connection(("10.77.0.20", 13), PATIENCE))
            for _ in range(50)
        ]
        for connection in connections:
            connection.settimeout(PATIENCE)
            assert DAYTIME.fullmatch(connection.recv(4096))
            assert connection.recv(4096) == b""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram:
        datagram.settimeout(PATIENCE)
        datagram.connect(("10.77.0.20", 13))
        datagram.send(b"?")
        text = datagram.recv(4096)
        assert DAYTIME.fullmatch(text)
        told = time.strptime(text.decode().strip(), "%A, %B %d, %Y %H:%M:%S-UTC")
        assert abs(time.mktime(told) - time.mktime(time.gmtime())) < 5
        datagram.connect(("10.77.0.20", 14))
        datagram.send(b"?")
        with pytest.raises(ConnectionRefusedError):
            datagram.recv(4096)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("10.77.0.20", 80), PATIENCE)
    assert guest.ask(abi.REQUEST_REBOOT).ack_result == abi.ACK_OK
    assert guest.died() == SHUTDOWN_REBOOT


@pytest.mark.usefixtures("network")
def test_daytime_answers_over_ipv6(make: Callable[..., Guest]) -> None:
    if not Path("/proc/net/if_inet6").exists():
        pytest.skip("this Dom0 has no IPv6")
    address = ["fd77::1/64", "dev", "xenbr0"]
    subprocess.run(["ip", "-6", "addr", "add", *address, "nodad"], check=True)
    try:
        guest = ready(make("daytime", "", vifs("bridge=xenbr0,ip=10.77.0.27/24 fd77::27/64")))
        assert ping("fd77::27", 20) == 20, guest.said()
        for _ in range(20):
            assert DAYTIME.fullmatch(ask_tcp("fd77::27"))
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as datagram:
            datagram.settimeout(PATIENCE)
            datagram.connect(("fd77::27", 13))
            datagram.send(b"?")
            assert DAYTIME.fullmatch(datagram.recv(4096))
    finally:
        subprocess.run(["ip", "-6", "addr", "del", *address], check=True)


@pytest.mark.every_release
@pytest.mark.anyhost
@pytest.mark.usefixtures("network")
def test_what_came_before_the_boot_is_answered_after_it(make: Callable[..., Guest]) -> None:
    mac = "00:16:3e:00:77:21"
    guest = make("daytime", "", vifs(vif(21, f"mac={mac}")), paused=True)
    # The address is known ahead, so that the first packet is the question itself.
    neighbour = ["ip", "neigh", "replace", "10.77.0.21", "lladdr", mac, "dev", "xenbr0"]
    subprocess.run(neighbour, check=True)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram:
            datagram.connect(("10.77.0.21", 13))
            datagram.send(b"?")
            datagram.settimeout(2)
            with pytest.raises(TimeoutError):
                datagram.recv(4096)
            guest.unpause()
            datagram.settimeout(PATIENCE)
            assert DAYTIME.fullmatch(datagram.recv(4096))
    finally:
        subprocess.run(["ip", "neigh", "del", "10.77.0.21", "dev", "xenbr0"], check=True)


@pytest.mark.every_release
@pytest.mark.anyhost
@pytest.mark.usefixtures("network")
def test_guests_ping_each_other(make: Callable[..., Guest]) -> None:
    ready(make("daytime", "", vifs(vif(22)), name="one"))
    other = ready(make("daytime", "ping=10.77.0.22 count=30", vifs(vif(23)), name="two"))
    wait_for(lambda: "ping: 30 sent, 30 received" in other.said(), "they do not reach each other")


@pytest.mark.usefixtures("network")
def test_sixteen_vifs_and_all_metadata_in_four_mebibytes(
    make: Callable[..., Guest], tmp_path: Path
) -> None:
    blob = tmp_path / "blob"
    blob.write_bytes(random.Random(1).randbytes(32768).hex().encode())
    addresses = range(40, 56)
    more = [vifs(*(vif(last) for last in addresses)), f'noxs_metadata_file="{blob}"']
    guest = ready(make("daytime", "", *more, "memory=4", name="sixteen"))
    assert "daytime: 16 interfaces" in guest.said()
    # Dom0 has one address on that link: each vif answers for its own.
    for last in addresses:
        assert ping(f"10.77.0.{last}", 3) == 3, guest.said()


@pytest.mark.usefixtures("network")
def test_too_little_memory_says_how_much_would_do(
    make: Callable[..., Guest], tmp_path: Path
) -> None:
    """Too little for the first mapping of all, and for what is at the top of memory."""
    with pytest.raises(StepError, match="its first mapping needs 4 MiB") as caught:
        make("hello", "", vifs("bridge=xenbr0"), "memory=1", name="tiny")
    assert caught.value.hint == "raise memory= to 4 or more"
    blob, ramdisk = tmp_path / "blob", tmp_path / "ramdisk"
    blob.write_bytes(b"x" * abi.MAX_METADATA)
    # libxenguest rounds the mapping up, with 512 KiB to spare: this is short of that by 60 KiB.
    image = Path("guests/build/hello.elf").read_bytes()
    ramdisk.write_bytes(bytes((3584 - 60 << 10) - end_of_image(image)))
    more = [f'noxs_metadata_file="{blob}"', f'ramdisk="{ramdisk}"']
    more.append(vifs(*["bridge=xenbr0"] * 12))
    kept = 4 * (12 * PAGES + more_pages(12, abi.MAX_METADATA))
    with pytest.raises(StepError, match=f"need {kept} KiB beside the image") as caught:
        make("hello", "", *more, "memory=4", name="short")
    assert "\n" not in str(caught.value)
    assert caught.value.hint == "raise memory= to 5 or more"
    ready(make("hello", "", *more, "memory=5", name="enough"))


@pytest.mark.usefixtures("network")
def test_the_mtu_is_the_bridge_s(make: Callable[..., Guest]) -> None:
    bridge = ["ip", "link", "add", "small0", "mtu", "1400", "type", "bridge"]
    subprocess.run(bridge, check=True)
    try:
        guest = ready(make("hello", "show=page", vifs("bridge=small0")))
        assert " mtu=1400 " in guest.said()
        interface = Path(f"/sys/class/net/vif{guest.creation.domid}.0")
        assert (interface / "mtu").read_text() == "1400\n"
        assert (interface / "master").resolve().name == "small0"
    finally:
        subprocess.run(["ip", "link", "del", "small0"], check=True)


@pytest.mark.usefixtures("network")
def test_pages_beyond_the_bootstrap_mapping(make: Callable[..., Guest]) -> None:
    guest = ready(make("daytime", "", vifs(vif(24)), "memory=64", name="big"))
    assert ping("10.77.0.24", 20) == 20, guest.said()


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize("words", ["", "close end=crash", "spare=page,console end=sleep"])
def test_a_scribbling_guest_hurts_nobody(
    make: Callable[..., Guest], thorough: bool, words: str
) -> None:
    honest = ready(make("daytime", "", vifs(vif(25)), name="honest"))
    bus = noxsd_pid()
    for seed in range(4 if thorough else 2):
        scribbler = make(
            "noxs-fuzz", f"seed={seed} {words}", vifs(vif(26)), name=f"scribbler-{seed}"
        )
        if "sleep" in words:
            wait_for(lambda: scribbler.info().blocked, "it does not end")  # noqa: B023 - at once
        else:
            expected = SHUTDOWN_CRASH if "crash" in words else SHUTDOWN_POWEROFF
            assert scribbler.died() == expected
        assert len(scribbler.words().message) <= abi.MAX_MESSAGE
        chaos("list", "-l")
        scribbler.said()
        assert ping("10.77.0.25", 5) == 5, honest.said()
        assert DAYTIME.fullmatch(ask_tcp("10.77.0.25"))
    assert noxsd_pid() == bus
    assert hotplug.running()


# ---- With xl


def xl(*argv: str, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["xl", *argv], **options)


@pytest.mark.xenstored
@pytest.mark.parametrize("kind", ["pv", "pvh"])
@pytest.mark.parametrize("kernel", ["hello", "daytime", "spin"])
def test_xl_boots_them_without_a_device_page(kernel: str, kind: str, tmp_path: Path) -> None:
    """The same image starts as PV and as PVH."""
    config = tmp_path / "guest.cfg"
    config.write_text(
        f'name="xl-{kernel}"\nkernel="guests/build/{kernel}.elf"\ntype="{kind}"\nmemory=64\n'
    )
    subprocess.run(["xl", "create", "-q", config], check=True, timeout=PATIENCE)
    try:
        state = "r-----" if kernel == "spin" else "-b----"
        wait_for(
            lambda: state in subprocess.check_output(["xl", "list", f"xl-{kernel}"], text=True),
            f"it never is {state}",
        )
        if kernel == "hello":
            greeting = f"This is a guest, a {kind.upper()} guest on Xen {xen_version()}, with no"
            read_console(f"xl-{kernel}", greeting.encode(), toolstack=xl)
    finally:
        subprocess.run(["xl", "destroy", f"xl-{kernel}"], check=True, timeout=PATIENCE)
