"""The creates of `chaos profile`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

import pytest

from chaos import client
from chaos.domconfig import DomainConfig
from chaos.sampler import own
from xenctypes.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

OTHER, OURS = "a guest of the same name", "the guest that was made"


class Daemon:
    """What it was asked, and has; ``hurried`` are the methods during which Ctrl-C is hit."""

    def __init__(self, *hurried: str, answers: bool) -> None:
        self.hurried = hurried
        self.answers = answers
        self.guests, self.flavours = {OTHER}, set[str]()

    def ask(self, method: str, params: dict[str, Any]) -> Any:
        if method == "pool.add":
            self.flavours.add(params["flavour"]["name"])
        elif method == "pool.remove":
            self.flavours.remove(params["name"])
        elif method == "pool.wait":
            return [{"served": 0}]
        elif method == "create":
            self.guests.add(OURS)
            return {"uuid": OURS, "noxs": True, "profile": {}}
        elif method == "destroy":
            for guest in params["domains"]:
                self.guests.remove(guest)
        return None


class Connection:
    """A connection that a Ctrl-C leaves without its replies, unless the daemon ``answers``."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.lost = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, method: str, **params: Any) -> SimpleNamespace:
        if self.lost:
            raise ProtocolError("the connection was interrupted")
        value = self.daemon.ask(method, params)
        interrupts = [KeyboardInterrupt()] if method in self.daemon.hurried else []

        def result() -> Any:
            if interrupts:
                self.lost = not self.daemon.answers
                raise interrupts.pop()
            if self.lost:
                raise ProtocolError("the connection was interrupted")
            return value

        return SimpleNamespace(result=result)

    def call(self, method: str, **params: Any) -> Any:
        return self.submit(method, **params).result()


@pytest.fixture
def profiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Daemon], None]:
    """Take a sample of a guest from the pool."""

    def profile(daemon: Daemon) -> None:
        monkeypatch.setattr(client, "Chaos", lambda: Connection(daemon))
        args = SimpleNamespace(kind="warm", overrides=[], ready_timeout=1)
        call: Any = SimpleNamespace(args=args, environ={})
        config = DomainConfig(name="web", memory=4)
        with own(call, config, str(tmp_path / "web.cfg")) as ours:
            ours.sample()

    return profile


@pytest.mark.parametrize("hurried", ["create", "wait", "pool.wait"])
@pytest.mark.parametrize("answers", [True, False], ids=["answered", "lost"])
def test_ctrl_c_leaves_neither_guest_nor_flavour(
    profiled: Callable[[Daemon], None], hurried: str, *, answers: bool
) -> None:
    daemon = Daemon(hurried, answers=answers)
    with pytest.raises(KeyboardInterrupt):
        profiled(daemon)
    # Where the reply is lost nobody knows which guest it was; one that is not done is taken back.
    unknown = {OURS} if hurried == "create" and not answers else set()
    assert daemon.guests == {OTHER} | unknown
    assert daemon.flavours == set()
