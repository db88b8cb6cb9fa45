"""shutdown and reboot on real guests, which agree, refuse, say nothing, or cannot be asked."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

import command
import pytest
from waiting import wait_for

from chaos.domains import find, shutdown_name
from chaos.host import Host
from chaos.registry import Registry
from xenctypes.evtchn import Evtchn

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

HELLO = "examples/hello.cfg"


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as opened:
        yield opened
    chaos("destroy", "--all", status=None)


def chaos(*argv: str, status: int | None = 0) -> subprocess.CompletedProcess[str]:
    done = command.chaos(*argv, check=False)
    assert status is None or done.returncode == status, (done.stdout, done.stderr)
    return done


def make(name: str, cmdline: str = "", *more: str) -> None:
    chaos("create", "--json", HELLO, f'name="{name}"', f'cmdline="{cmdline}"', *more)


def reason(host: Host, name: str) -> str | None:
    """Why a domain shut down; "gone" when it is destroyed (a daemon may do that)."""
    listed = json.loads(chaos("list", "--json").stdout)
    for domain in listed:
        if domain["name"] == name:
            return str(domain["shutdown_reason"]) if domain["shutdown_reason"] else None
    return "gone"


@pytest.mark.anyhost
def test_a_guest_shuts_down_and_is_waited_for(host: Host) -> None:
    make("asked", "message=bye")
    told = json.loads(chaos("shutdown", "-w", "--json", "asked").stdout)
    assert [(one["name"], one["answered"], one["dead"]) for one in told] == [("asked", True, True)]
    assert reason(host, "asked") in {"poweroff", "gone"}


def test_reboot_and_everybody_else(host: Host) -> None:
    make("again")
    make("stubborn", "refuse")
    make("plain")
    done = chaos("reboot", "again")
    assert not done.stdout
    info = wait_for(lambda: find(host, Registry(), "again").info.shutdown or None, "it does not")
    assert info
    assert shutdown_name(find(host, Registry(), "again").info) == "reboot"
    assert "has shut down already" in chaos("reboot", "again", status=1).stderr
    # One that refuses keeps the others from nothing, and is named.
    done = chaos("shutdown", "-a", "-w", status=1)
    assert 'domain "stubborn" refuses to shut down' in done.stderr
    assert reason(host, "plain") in {"poweroff", "gone"}
    assert reason(host, "stubborn") is None


def test_a_guest_that_does_not_run_answers_later(host: Host) -> None:
    make("asleep")
    chaos("pause", "asleep")
    done = chaos("shutdown", "--timeout", "0.5", "asleep", status=124)
    assert "has not answered; the request stays until it does" in done.stderr
    chaos("unpause", "asleep")
    assert chaos("wait", "--dead", "--timeout", "60", "asleep").returncode == 0


def test_a_channel_that_another_process_holds_is_waited_for(host: Host) -> None:
    make("busy")
    record = find(host, Registry(), "busy").record
    assert record is not None
    holder = Evtchn()
    holder.bind_interdomain(record.domid, record.store_port)
    release = threading.Timer(1.0, holder.close)
    release.start()
    chaos("shutdown", "-w", "busy")
    release.join()
    assert reason(host, "busy") in {"poweroff", "gone"}


def test_who_cannot_be_asked(host: Host) -> None:
    assert "was not made by chaos" in chaos("shutdown", "0", status=1).stderr
    assert 'no domain "nobody"' in chaos("shutdown", "nobody", status=1).stderr
    assert "name domains, or give --all" in chaos("shutdown", status=2).stderr
    registry: Any = Registry()
    make("stock")
    domain = find(host, registry, "stock")
    with registry.entry(domain.uuid) as entry:
        entry.lock(wait=True)
        record = registry.read(domain.uuid)
        record.noxs = False
        entry.write(record)
    done = chaos("shutdown", "stock", status=1)
    assert "does not speak noxs" in done.stderr
    assert "has no store" in done.stderr
