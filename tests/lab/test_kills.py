"""Each daemon killed at every step boundary of a create and of a destroy, on the real hypervisor.

One chaosd serves many kills: a plan on disk says who is killed before which step, and the
patched steps obey it once. A guest that is not concerned answers ping throughout.
"""

from __future__ import annotations

import contextlib
import os
import select
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from chaosd import DAYTIME, GUESTS, HELLO, NONE, Chaosd, create, filled, running
from daemons import PATIENCE, noxsd_pid, serves, start, xendevd_pid
from guest import pinging
from pings import ping
from test_vif import Traces, vif
from waiting import wait_for

from chaos.client import Chaos
from chaos.create import IMAGE_STEPS, SHELL_STEPS
from chaos.daemon.shell import DELIVERY_STEPS
from chaos.host import Host
from chaos.registry import Registry
from noxs import hotplug
from noxs.bus import Bus
from xenctypes.errors import ChaosError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    Picker = Callable[[Sequence[str]], Sequence[str]]

ONE = f"""
[[flavour]]
name = "daytime"
memory = 4
vif = ["bridge=xenbr0"]
kernel = "{GUESTS}/daytime.elf"
size = 1
"""
PLAN = Path("/run/kill-plan")
# What a destroy consists of, in its order: module, owner, function.
DESTROY = (
    ("chaos.xenstored", "withdraw"),
    ("xenctypes.ctrl.Xenctrl", "domain_pause"),
    ("chaos.vif", "disconnect_all"),
    ("xenctypes.ctrl.Xenctrl", "domain_destroy"),
    ("chaos.registry.Registry", "forget"),
)
# The calls around a change of a domain's UUID.
REKEY = (
    ("chaos.registry.Registry", "move_shell"),
    ("chaos.registry.Registry", "begin_rekey"),
    ("xenctypes.ctrl.Xenctrl", "domain_sethandle"),
    ("chaos.registry.Registry", "finish_rekey"),
)
OBEY = f"""
import os, signal
def obey(step):
    try:
        with open({str(PLAN)!r}) as plan:
            wanted, victim = plan.read().split("=")
        if wanted != step:
            return
        os.unlink({str(PLAN)!r})
    except FileNotFoundError:
        return
    os.kill(int(victim) or os.getpid(), signal.SIGKILL)

def obeying(steps):
    def work(step):
        return lambda context: (obey(step.name), step.do(context), obey("after " + step.name))
    return tuple(step._replace(do=work(step)) for step in steps)

def obeying_call(owner, name):
    before = getattr(owner, name)
    def call(*args, **kwargs):
        obey(name)
        result = before(*args, **kwargs)
        obey("after " + name)
        return result
    setattr(owner, name, call)
"""
DAEMON = f"""
{OBEY}
import chaos.daemon.core as core, chaos.daemon.maker as maker
import chaos.registry, chaos.vif, chaos.xenstored, xenctypes.ctrl
core.DELIVERY_STEPS = obeying(core.DELIVERY_STEPS)
maker.SHELL_STEPS = obeying(maker.SHELL_STEPS)
maker.IMAGE_STEPS = obeying(maker.IMAGE_STEPS)
""" + "\n".join(f"obeying_call({owner}, {name!r})" for owner, name in DESTROY + REKEY)

pytestmark = pytest.mark.usefixtures("network")


@pytest.fixture
def traces() -> Iterator[Traces]:
    """Nothing may be left at the end."""
    Registry().prepare()
    PLAN.unlink(missing_ok=True)
    with Host() as host, Bus.connect() as bus:
        found = Traces(host, bus)
        yield found
        found.gone()


def plan(step: str, victim: int = 0) -> None:
    """Have ``victim``, or the process that comes by, killed once."""
    new = PLAN.with_suffix(".new")
    new.write_text(f"{step}={victim}")
    new.rename(PLAN)


@contextlib.contextmanager
def killing(step: str, pid: int) -> Iterator[None]:
    """Have a process killed at a step that the block makes happen, and wait for its end."""
    process = os.pidfd_open(pid)
    try:
        plan(step, pid)
        yield
        assert select.select([process], [], [], PATIENCE)[0], f"process {pid} was not killed"
    finally:
        os.close(process)


def named(chaos: Chaos) -> set[str]:
    """The guests; a shell that was given up may still be dying."""
    living = [domain for domain in chaos.call("list") if "d" not in domain["state"]]
    return {domain["name"] for domain in living} - {"Domain-0"}


def boundaries(names: Iterable[str]) -> list[str]:
    """Before each step, and after the last."""
    found = list(names)
    return [*found, f"after {found[-1]}"]


MAKING = boundaries(step.name for step in SHELL_STEPS + IMAGE_STEPS)
DELIVERY = boundaries(step.name for step in DELIVERY_STEPS)
IDENTIFYING = ["after move_shell", "after domain_sethandle"]
SETTING_ASIDE = [
    "begin_rekey", "after begin_rekey", "after domain_sethandle", "after finish_rekey"
]  # fmt: skip
DESTROYING = boundaries(name for _, name in DESTROY)


def test_chaosd_killed(traces: Traces, some: Picker) -> None:
    """What was not finished is gone when it serves again, and what was being destroyed too."""
    with running(ONE, DAEMON) as daemon:
        with Chaos() as chaos:
            create(chaos, "stays", DAYTIME, vif(60), wait_ready=30)
        with pinging("10.77.0.60"):
            for step in [*some(DELIVERY), *some(IDENTIFYING)]:
                with Chaos() as chaos:
                    filled(chaos)
                    plan(step)
                    with pytest.raises(ChaosError):
                        create(chaos, "victim", DAYTIME, vif(61), f'uuid="{uuid4()}"')
                again(daemon)
                with Chaos() as chaos:
                    finished = {"victim"} if step == "after unpause" else set()
                    assert named(chaos) == {"stays"} | finished, step
                    if finished:
                        assert ping("10.77.0.61", 3) == 3
                        chaos.call("destroy", domains=["victim"])
            for step in some(DESTROYING):
                with Chaos() as chaos:
                    create(chaos, "victim", DAYTIME, vif(61), wait_ready=30)
                    plan(step)
                    with pytest.raises(ChaosError):
                        chaos.call("destroy", domains=["victim"])
                again(daemon)
                with Chaos() as chaos:
                    assert named(chaos) == {"stays"}, step
        assert ping("10.77.0.60", 3) == 3


def again(daemon: Chaosd) -> None:
    daemon.process.wait(PATIENCE)
    assert not PLAN.exists()
    daemon.start()


def test_makers_killed(traces: Traces, some: Picker) -> None:
    """A half-built shell goes with its maker, another takes its place, and the daemon serves on."""
    with running(ONE, DAEMON) as daemon, Chaos() as chaos:
        filled(chaos)
        create(chaos, "stays", DAYTIME, vif(60), wait_ready=30)
        with pinging("10.77.0.60"):
            for step in some(MAKING):
                filled(chaos)
                (maker,) = daemon.makers()
                with killing(step, maker):
                    chaos.call("pool.drain", name="daytime")
            filled(chaos)
            create(chaos, "net", DAYTIME, vif(61), wait_ready=30)
            assert ping("10.77.0.61", 3) == 3


@pytest.mark.parametrize("victim", ["noxsd", "xendevd"])
def test_a_daemon_of_the_host_killed(victim: str, traces: Traces, some: Picker) -> None:
    """Creates and destroys that were under way end well once it is back."""
    pid_of, restart = {"noxsd": (noxsd_pid, start_noxsd), "xendevd": (xendevd_pid, start_xendevd)}[
        victim
    ]

    def killed_at(step: str, chaos: Chaos, method: str, **params: Any) -> Any:
        with killing(step, pid_of()):
            request = chaos.submit(method, **params)
        restart()
        return request.result()

    with running(ONE, DAEMON), Chaos() as chaos:
        filled(chaos)
        create(chaos, "stays", DAYTIME, vif(60), wait_ready=30)
        with pinging("10.77.0.60"):
            for step in some(MAKING):
                filled(chaos)
                killed_at(step, chaos, "pool.drain", name="daytime")
            guest = [f'kernel="{GUESTS}/daytime.elf"', vif(61), 'name="victim"']
            steps = zip_longest(some(DELIVERY), some(DESTROYING), fillvalue=DELIVERY[0])
            for creating, destroying in steps:
                filled(chaos)
                killed_at(creating, chaos, "create", path=DAYTIME, overrides=guest, wait_ready=30)
                assert ping("10.77.0.61", 2) == 2, creating
                if destroying in DESTROYING:
                    killed_at(destroying, chaos, "destroy", domains=["victim"])
                else:
                    chaos.call("destroy", domains=["victim"])
                assert named(chaos) == {"stays"}, (creating, destroying)


def start_noxsd() -> None:
    start("noxsd")
    wait_for(serves, "noxsd does not start again")


def start_xendevd() -> None:
    start("xendevd")
    wait_for(hotplug.running, "xendevd does not start again")


def test_a_restart_outlives_the_daemon(traces: Traces) -> None:
    with running(NONE) as daemon:
        with Chaos() as chaos:
            made = create(chaos, "again", HELLO, 'on_crash="restart"', wait_ready=30)
            crash(traces.host, chaos, until="ready")
            crash(traces.host, chaos, until="restart waits")  # two seconds
            daemon.kill()
        assert [info.domid for info in traces.host.ctrl.domain_list()] == [0]
        daemon.start()
        with Chaos() as chaos:
            await_event(chaos.submit("events", token=""), "ready")
            uuid = next(d["uuid"] for d in chaos.call("list") if d["name"] == "again")
            assert uuid == made["uuid"]
            assert os.listdir("/run/chaos/restarts") == []
            # A restart that waits is called off by who destroys the guest.
            crash(traces.host, chaos, until="restart waits")
            events = chaos.submit("events", token="")
            chaos.call("destroy", domains=["again"])
            await_event(events, "restart called off")
            assert named(chaos) == set()
            with pytest.raises(ChaosError, match='no domain "again"'):
                chaos.call("destroy", domains=["again"])


def test_a_kill_while_the_dead_is_set_aside(traces: Traces, some: Picker) -> None:
    """Both are there in the end: the dead domain under its new name, and its successor."""
    with running(NONE, DAEMON) as daemon:
        for step in some(SETTING_ASIDE):
            with Chaos() as chaos:
                made = create(chaos, "again", HELLO, 'on_crash="rename-restart"', wait_ready=30)
                plan(step)
                traces.host.ctrl.domain_shutdown(made["domid"], 3)
                again(daemon)
            with Chaos() as chaos:
                await_event(chaos.submit("events", token=""), "ready", close=True)
                found = {domain["name"]: domain for domain in chaos.call("list")}
                assert set(found) == {"Domain-0", "again", "again-1"}, step
                assert found["again"]["uuid"] == made["uuid"] != found["again-1"]["uuid"]
                assert found["again-1"]["domid"] == made["domid"]
                chaos.call("destroy", domains=["again", "again-1"])


def crash(host: Host, chaos: Chaos, *, until: str) -> None:
    """Have the guest crash, and wait for an event of what comes of it."""
    events = chaos.submit("events", token="")
    domid = next(d["domid"] for d in chaos.call("list") if d["name"] == "again")
    host.ctrl.domain_shutdown(domid, 3)
    await_event(events, "died", domid)
    await_event(events, until, None, close=True)


def await_event(events: Any, kind: str, domid: int | None = None, *, close: bool = False) -> None:
    for event in events.progress:
        if event["event"] == kind and (domid is None or event.get("domid") == domid):
            break
    else:
        raise AssertionError(f"no event {kind}")
    if close:
        events.cancel()
