"""PVH guests, and stock kernels as PVH and PV, with one vCPU and with several."""

from __future__ import annotations

import json
import os
import subprocess
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from chaosd import GUESTS, filled, running
from command import chaos
from daemons import stop_storesd
from guest import (
    DAYTIME,
    SHUTDOWN_CRASH,
    SHUTDOWN_POWEROFF,
    ask_tcp,
    end_of_image,
    read_console,
    ready,
    vif,
    vifs,
)
from pings import ping
from sampling import sampled
from stock import KERNEL, initramfs
from test_create import Footprint

from chaos.builder import Builder
from chaos.client import Chaos
from chaos.config import load
from chaos.create import CREATE_STEPS, Creation
from chaos.host import Host
from chaos.registry import Registry
from chaos.vif import PAGES
from noxs import abi
from xenctypes.errors import ChaosError, StepError
from xenctypes.public import HVM_PARAM_STORE_EVTCHN, HVM_PARAM_STORE_PFN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from guest import Guest

PVH = 'type="pvh"'
STARTS = 4
HELLO, DAYTIME_CFG = "/src/examples/hello-pvh.cfg", "/src/examples/daytime-pvh.cfg"
INIT = """#!/bin/busybox sh
/bin/busybox echo "userland: $(/bin/busybox nproc) processors"
/bin/busybox poweroff -f
"""


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """A host on which guests were made: what they load and keep, Xen too, is no leak."""
    Registry().prepare()
    with Host() as opened, Builder() as builder:
        for _ in range(4):
            config = load(HELLO, ["vcpus=8"])[0]
            Creation(config, opened, builder, Registry()).run().undo()
        yield opened


@pytest.fixture
def footprint(host: Host, network: None) -> Iterator[Footprint]:
    """What the host holds must be the same after the test."""
    measured = Footprint(host)
    yield measured
    measured.settled()


@pytest.mark.every_release
@pytest.mark.anyhost
@pytest.mark.usefixtures("network")
def test_a_server_with_its_page_and_its_network(make: Callable[..., Guest], tmp_path: Path) -> None:
    """The same image as for PV: device page with continuations, console, vif, time."""
    blob = tmp_path / "blob"
    blob.write_bytes(os.urandom(abi.MAX_METADATA // 2).hex().encode())
    metadata = f'noxs_metadata_file="{blob}"'
    guest = make("hello", "show=metadata", PVH, metadata, "memory=4", "vcpus=2")
    said = read_console(guest.name, blob.read_bytes() + b"\r\n")
    assert b"This is hello, a PVH guest on Xen" in said
    assert guest.info().hvm
    assert guest.info().max_vcpu_id == 1
    server = ready(make("daytime", "", PVH, vifs(vif(61)), "maxmem=80", name="server"))
    assert server.info().max_pages >= 80 << 8
    assert ping("10.77.0.61", 20) == 20, server.said()
    for _ in range(5):
        assert DAYTIME.fullmatch(ask_tcp("10.77.0.61"))
    assert server.ask(abi.REQUEST_POWEROFF).ack_result == abi.ACK_OK
    assert server.died() == SHUTDOWN_POWEROFF


@pytest.mark.usefixtures("network")
def test_the_toolstack_s_pages_lie_above_the_image(
    make: Callable[..., Guest], tmp_path: Path
) -> None:
    """A MiB has room for four vifs, and for a ramdisk that leaves room."""
    addresses = range(62, 66)
    guest = ready(make("daytime", "", PVH, vifs(*map(vif, addresses)), "memory=1"))
    for last in addresses:
        assert ping(f"10.77.0.{last}", 2) == 2, guest.said()
    ramdisk = tmp_path / "ramdisk"
    end = end_of_image(Path(f"{GUESTS}/hello.elf").read_bytes())
    for room, hint in ((PAGES + 2, ""), (PAGES, "raise memory= to 2 or more")):
        ramdisk.write_bytes(os.urandom((1 << 20) - (-(-end // 4096) + room) * 4096))
        more = [PVH, vifs("bridge=xenbr0"), "memory=1", f'ramdisk="{ramdisk}"']
        if not hint:
            ready(make("hello", "", *more, name="enough"))
            continue
        with pytest.raises(StepError, match="need 40 KiB beside the image") as caught:
            make("hello", "", *more, name="short")
        assert caught.value.hint == hint


@pytest.mark.usefixtures("network")
def test_those_that_fault_or_scribble_hurt_themselves(make: Callable[..., Guest]) -> None:
    guest = make("hello", "fault exit=4 message=fault", PVH)
    assert guest.died() == SHUTDOWN_CRASH
    assert (guest.words().state, guest.words().message) == (abi.STATE_FAILED, "fault")
    honest = ready(make("daytime", "", PVH, vifs(vif(78)), name="honest"))
    scribbler = make("noxs-fuzz", "seed=1", PVH, vifs(vif(79)), name="scribbler")
    scribbler.died()
    assert ping("10.77.0.78", 5) == 5, honest.said()


@pytest.mark.every_release
def test_debian_s_kernel_boots_to_userland(
    host: Host, footprint: Footprint, tmp_path: Path, linux: Path
) -> None:
    """With no store to wait for, and eight vCPUs. With one it is in test_create and test_stock."""
    stop_storesd()
    ramdisk = initramfs(tmp_path, INIT)
    vcpus = 8
    try:
        stock("pv", vcpus, linux, ramdisk)
        reason, said = ended("pv")
        assert reason == "poweroff", said
        assert f"userland: {vcpus} processors\r\n" in said
        for _ in range(STARTS):
            made = stock("pvh", vcpus, linux, ramdisk)
            for parameter in (HVM_PARAM_STORE_PFN, HVM_PARAM_STORE_EVTCHN):
                assert host.ctrl.hvm_param_get(made, parameter) == 0
            reason, said = ended("pvh")
            if said or reason not in ("reboot", None):
                break
            # The emulator lost it: see lab/machine.py.
            warnings.warn(f"made again: {reason}\n{where(made, vcpus)}", stacklevel=1)
            chaos("destroy", "pvh")
        assert reason == "poweroff", said
        assert f"userland: {vcpus} processors\r\n" in said
    finally:
        chaos("destroy", "--all")


def ended(name: str) -> tuple[str | None, str]:
    """Why a guest ended, once it has, or None if it does not; and what it said."""
    chaos("wait", "--dead", name, "--timeout", "120", timeout=200, check=False)
    said = chaos("console", name, stdin=subprocess.DEVNULL).stdout
    return json.loads(chaos("list", "-l", name).stdout)[0]["shutdown_reason"], said


def where(domid: int, vcpus: int) -> str:
    """The registers of a guest's vCPUs."""
    (xenctx,) = Path("/usr/lib").glob("xen-*/bin/xenctx")
    shown = (
        subprocess.run([xenctx, str(domid), str(vcpu)], check=False, capture_output=True, text=True)
        for vcpu in range(vcpus)
    )
    return "\n".join(done.stdout + done.stderr for done in shown)


def stock(kind: str, vcpus: int, kernel: Path, ramdisk: Path) -> int:
    """Create a guest with a stock kernel, named after its kind; its domid."""
    overrides = (
        f'name="{kind}"',
        f'type="{kind}"',
        f"vcpus={vcpus}",
        "memory=160",
        f'kernel="{kernel}"',
        f'ramdisk="{ramdisk}"',
        'cmdline="console=hvc0 quiet"',
        'on_poweroff="preserve"',
        'on_reboot="preserve"',
    )
    return int(json.loads(chaos("create", HELLO, *overrides, "--json").stdout)["domid"])


@pytest.mark.every_release
def test_the_pool_has_pvh_shells_generic_and_warm(host: Host, footprint: Footprint) -> None:
    settings = f"""
[pool]
adaptive = false
[[flavour]]
name = "warm"
type = "pvh"
memory = 4
kernel = "{GUESTS}/hello.elf"
size = 1
[[flavour]]
name = "generic"
type = "pvh"
memory = 4
vif = ["bridge=xenbr0"]
size = 1
"""
    with running(settings), Chaos() as daemon:
        filled(daemon)
        hello = f'kernel="{GUESTS}/hello.elf"'
        made = daemon.call("create", path=HELLO, overrides=[hello], wait_ready=30)
        assert made["ready_ms"] > 0
        kernel = f'kernel="{GUESTS}/daytime.elf"'
        overrides = [kernel, vifs(vif(80))]
        made = daemon.call("create", path=DAYTIME_CFG, overrides=overrides, wait_ready=30)
        assert made["ready_ms"] > 0
        assert ping("10.77.0.80", 3) == 3
        served = {flavour["name"]: flavour["served"] for flavour in daemon.call("pool.list")}
        assert served == {"warm": 1, "generic": 1}
        daemon.call("create", path=HELLO, overrides=[hello, 'type="pv"', 'name="pv"'])
        assert daemon.call("pool.list")[0]["served"] == 1  # another type is another shape
        said = daemon.call("logs", domain="hello-pvh")
        assert b"a PVH guest on Xen" in said
        daemon.call("destroy", all=True)


def test_what_cannot_be_is_refused_in_a_line(footprint: Footprint, tmp_path: Path) -> None:
    elf = Path(f"{GUESTS}/hello.elf").read_bytes()
    entry = b"\x04\0\0\0\x04\0\0\0\x12\0\0\0Xen\0"  # the note PHYS32_ENTRY
    loader = b"\x04\0\0\0\x08\0\0\0\x08\0\0\0Xen\0generic\0"
    assert elf.count(entry) == elf.count(loader) == 1
    pv_only, pvh_only = tmp_path / "pv.elf", tmp_path / "pvh.elf"
    pv_only.write_bytes(elf.replace(entry, entry.replace(b"Xen\0", b"Nex\0")))
    pvh_only.write_bytes(elf.replace(loader, loader.replace(b"generic", b"nothing")))
    for overrides, message, hint in (
        ((PVH, f'kernel="{pv_only}"'), "a PV-only kernel", 'type = "pv" boots it'),
        (('type="pv"', f'kernel="{pvh_only}"'), "a PVH-only kernel", 'type = "pvh" boots it'),
        ((f'ramdisk="{KERNEL}"',), "its ramdisk does not fit into its memory", "more than"),
        ((PVH, "memory=1000000"), "not enough memory: 1000000 MiB", "or lower memory="),
    ):
        failed = chaos("create", HELLO, *overrides, check=False)
        assert failed.returncode == 1
        assert message in failed.stderr
        assert hint in failed.stderr
        assert failed.stderr.count("\n") == 1, failed.stderr


def test_a_host_without_hardware_virtualisation_says_so(
    monkeypatch: pytest.MonkeyPatch, host: Host, footprint: Footprint
) -> None:
    monkeypatch.setitem(vars(host), "virt_caps", frozenset({"pv"}))
    config = load(HELLO)[0]
    with Builder() as builder, pytest.raises(StepError, match="runs no PVH guests") as caught:
        Creation(config, host, builder, Registry()).run()
    assert 'type = "pv"' in caught.value.hint


@pytest.mark.parametrize("victim", sampled([step.name for step in CREATE_STEPS]))
def test_a_create_that_fails_leaves_nothing(victim: str, host: Host, footprint: Footprint) -> None:
    def fail(do: Callable[[Creation], None]) -> Callable[[Creation], None]:
        def failing(creation: Creation) -> None:
            do(creation)
            raise ChaosError("made to fail")

        return failing

    steps = tuple(
        step._replace(do=fail(step.do)) if step.name == victim else step for step in CREATE_STEPS
    )
    with Builder() as builder, pytest.raises(StepError, match="made to fail"):
        Creation(load(HELLO)[0], host, builder, Registry()).run(steps)
