"""chaosd on the real hypervisor: its pool, its guests, and what a kill leaves behind."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from operator import itemgetter
from pathlib import Path
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
    network_state,
    page_of,
    running,
    served,
)
from pings import ping
from test_vif import ask, vif
from waiting import wait_for

from chaos.client import Chaos
from chaos.daemon.shell import DELIVERY_STEPS
from xenctypes.errors import ChaosError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chaos.host import Host

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

pytestmark = pytest.mark.usefixtures("network")


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
        assert ping("10.77.0.77", 20) == 20
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


def test_an_image_that_changes_is_never_the_wrong_one(
    tmp_path: Path, thorough: bool, nothing_left: None
) -> None:
    original = Path(f"{GUESTS}/hello.elf").read_bytes()
    assert original.count(b"Hello, world") == 1
    one, two = tmp_path / "one.elf", tmp_path / "two.elf"
    one.write_bytes(original)
    two.write_bytes(original.replace(b"Hello, world", b"Hallo, Welt!"))
    with running("[pool]\nadaptive_size = 3\n"), Chaos() as chaos:
        rounds = 100 if thorough else 40
        for number in range(rounds):
            if number == rounds // 2:  # they change places, in the very same file
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
        assert sum(flavour["served"] for flavour in chaos.call("pool.list")) > rounds // 5


def said(chaos: Chaos, name: str) -> bytes:
    return bytes(wait_for(lambda: chaos.call("logs", domain=name), f"{name} says nothing"))


@pytest.mark.anyhost
def test_a_restarted_daemon_disturbs_no_guest(
    host: Host, thorough: bool, nothing_left: None
) -> None:
    """Killed, and in peace; all guests answer throughout."""
    count = 100 if thorough else 6
    names = [f"g{last}" for last in range(81, 81 + count)]
    with running(WARM) as daemon:
        with Chaos() as chaos:
            filled(chaos)
            for last, name in enumerate(names, 81):
                create(chaos, name, DAYTIME, vif(last), wait_ready=30)
            create(chaos, "paused", paused=True)
            before = {d["name"]: (d["uuid"], d["domid"]) for d in chaos.call("list")}
            assert before.keys() == {"Domain-0", "paused", *names}
        pings = Pings([f"10.77.0.{last}" for last in range(81, 81 + count)])
        daemon.kill()
        daemon.start()
        with Chaos() as chaos:
            listed = chaos.call("list")
            assert {d["name"]: (d["uuid"], d["domid"]) for d in listed} == before
            assert next(d["state"] for d in listed if d["name"] == "paused") == "--p---"
            filled(chaos)
            assert chaos.call("wait", domain="g81", timeout=5)["outcome"] == "ready"
            assert b"daytime" in chaos.call("logs", domain="g82")
        daemon.stop()
        alone = ["chaos", "create", "-p", "--json", HELLO, 'name="alone"']
        made = subprocess.run(alone, capture_output=True, text=True, check=True)
        before["alone"] = itemgetter("uuid", "domid")(json.loads(made.stdout))
        daemon.start()
        with Chaos() as chaos:
            assert {d["name"]: (d["uuid"], d["domid"]) for d in chaos.call("list")} == before
            assert pings.lost() == {}
            chaos.call("destroy", domains=["alone"])
            del before["alone"]
            chaos.call("destroy", domains=["g81"])
            # Who had the guest's pages mapped (xenstored) holds its remains for a moment more.
            left = before.keys() - {"g81"}
            wait_for(lambda: {d["name"] for d in chaos.call("list")} == left, "g81 stays")


class Pings:
    """Echo requests to many addresses, until somebody asks what was lost."""

    def __init__(self, addresses: Sequence[str]) -> None:
        interval = str(max(0.2, len(addresses) / 50))
        self._pinging = {
            address: subprocess.Popen(
                ["ping", "-n", "-i", interval, address], stdout=subprocess.PIPE, text=True
            )
            for address in addresses
        }
        for pinging in self._pinging.values():
            assert pinging.stdout is not None
            wait_for(lambda p=pinging: "icmp_seq" in p.stdout.readline(), "no answer")  # type: ignore[misc]

    def lost(self) -> dict[str, str]:
        """Whose answers do not come in an unbroken row, the one that is under way aside."""
        lost = {}
        for address, pinging in self._pinging.items():
            pinging.send_signal(signal.SIGINT)
            assert pinging.stdout is not None
            told = pinging.stdout.read()
            pinging.wait()
            numbers = [int(number) for number in re.findall(r"icmp_seq=(\d+)", told)]
            sent = re.search(r"(\d+) packets transmitted", told)
            assert sent is not None
            if numbers not in ([*range(2, int(sent[1]) + more)] for more in (0, 1)):
                lost[address] = told
        if lost:
            sys.stdout.write(network_state())
        return lost


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

        wait_for(stuck, "the pool does not grow to its floor")
        made = create(chaos, "needs", HELLO, f"memory={free // 2}")
        assert host.ctrl.domain_info(made["domid"])
        assert chaos.call("pool.list")[0]["ready"] < 3


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
