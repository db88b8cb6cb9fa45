"""What `chaos create --count` makes of its command line."""

from __future__ import annotations

from argparse import Namespace

from chaos.verbs.create import members


def names(configured: str, *overrides: str, name: str | None = None, count: int = 0) -> list[str]:
    args = Namespace(name=name, count=count or None)
    return [member.name(configured) for member in members(args, list(overrides))]


def test_names_are_numbered() -> None:
    assert names("web") == ["web"]
    assert names("web", count=2) == ["web-1", "web-2"]
    assert names("w{n}b", count=2) == ["w1b", "w2b"]
    assert names("web", name="fw-{n}", count=2) == ["fw-1", "fw-2"]
    assert names("web", name="fw", count=2) == ["fw-1", "fw-2"]
    assert names("web", name="fw-{n}") == ["fw-{n}"]
    # The overrides were numbered before the configuration was read.
    assert names("a1", 'name="a{n}"', count=1) == ["a1"]
    assert names("a1", 'name="a{n}"', name="b", count=1) == ["b-1"]
    assert names("web", 'extra="name={n}"', count=2) == ["web-1", "web-2"]


def test_overrides_are_numbered() -> None:
    text = "vif=['ip=10.0.0.{n}/8']"
    found = list(members(Namespace(name=None, count=3), [text, "memory=8"]))
    assert [member.overrides for member in found] == [
        [f"vif=['ip=10.0.0.{n}/8']", "memory=8"] for n in (1, 2, 3)
    ]
    (alone,) = members(Namespace(name=None, count=None), [text])
    assert alone.overrides == [text]
