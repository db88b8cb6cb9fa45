"""What of a front end's nodes reaches its back end, and the other way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noxs.handshake import FRONT, back_key, differences, front_value, in_order


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("vif", "state", "4"),
        ("vif", "tx-ring-ref", "768"),
        ("vif", "rx-ring-ref", "4294967295"),
        ("vif", "event-channel", "17"),
        ("vif", "event-channel-tx", "131071"),
        ("vif", "request-rx-copy", "1"),
        ("vif", "feature-gso-tcpv4", "0"),
        ("vif", "multi-queue-num-queues", "4"),
        ("vif", "queue-0/tx-ring-ref", "9"),
        ("vif", "queue-3/event-channel-rx", "9"),
        ("vif", "xdp-headroom", "256"),
        ("vbd", "ring-ref", "8"),
        ("vbd", "ring-ref15", "8"),
        ("vbd", "ring-page-order", "4"),
        ("vbd", "protocol", "x86_64-abi"),
        ("vbd", "feature-persistent", "1"),
        ("vbd", "queue-1/ring-ref3", "8"),
    ],
)
def test_what_is_passed_on(kind: str, key: str, value: str) -> None:
    assert front_value(kind.encode(), key.encode(), value.encode())


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("vif", "backend", "/local/domain/0/backend/vif/6/0"),
        ("vif", "backend-id", "0"),
        ("vif", "script", "/bin/sh"),
        ("vif", "hotplug-status", "connected"),
        ("vif", "mac", "00:16:3e:00:00:01"),
        ("vif", "handle", "0"),
        ("vif", "state", "0"),
        ("vif", "state", "7"),
        ("vif", "state", "44"),
        ("vif", "state", "4\n"),
        ("vif", "state", ""),
        ("vif", "tx-ring-ref", "4294967296"),
        ("vif", "tx-ring-ref", "-1"),
        ("vif", "tx-ring-ref", "1" * 2000),
        ("vif", "tx-ring-ref", "0x10"),
        ("vif", "event-channel", "0"),
        ("vif", "event-channel", "131072"),
        ("vif", "request-rx-copy", "2"),
        ("vif", "queue-64/tx-ring-ref", "9"),
        ("vif", "queue-00/tx-ring-ref", "9"),
        ("vif", "queue-0/state", "4"),
        ("vif", "queue-0/../state", "4"),
        ("vif", "queue-0", ""),
        ("vif", "ring-ref", "8"),
        ("vbd", "ring-ref16", "8"),
        ("vbd", "protocol", "arm-abi"),
        ("vbd", "params", "/etc/shadow"),
        ("vbd", "physical-device", "8:0"),
        ("vbd", "virtual-device", "51712"),
    ],
)
def test_what_is_not(kind: str, key: str, value: str) -> None:
    assert not front_value(kind.encode(), key.encode(), value.encode())


@given(st.sampled_from([b"vif", b"vbd"]), st.binary(max_size=40), st.binary(max_size=40))
def test_whatever_is_passed_on_is_short_and_plain(kind: bytes, key: bytes, value: bytes) -> None:
    for name in (key, *FRONT[kind][0]):
        if front_value(kind, name, value):
            assert len(value) <= 10
            assert value.isdigit() or value.endswith(b"-abi")


def test_what_a_guest_is_shown_of_its_back_end() -> None:
    for key in (
        "state", "feature-sg", "max-ring-page-order", "multi-queue-max-queues", "sectors",
        "sector-size", "info", "hotplug-status", "frontend-id", "discard-granularity",
    ):  # fmt: skip
        assert back_key(key.encode())
    for key in (
        "script", "params", "physical-device-path", "bridge", "domain", "vifname", "type", "rate",
        "hotplug-error", "feature-/x", "feature-", "states",
    ):  # fmt: skip
        assert not back_key(key.encode())


def test_the_state_comes_last() -> None:
    assert in_order([b"state", b"a", b"tx"]) == [b"a", b"tx", b"state"]
    then = {b"state": b"1", b"gone": b"x", b"same": b"s"}
    now = {b"state": b"4", b"tx": b"1", b"same": b"s"}
    assert list(differences(now, then).items()) == [
        (b"gone", None), (b"tx", b"1"), (b"state", b"4"),
    ]  # fmt: skip
