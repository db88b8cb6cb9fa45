"""What a front end may tell its back end through a store, and what it is told.

A guest writes what it likes below /local/domain/N/device/<kind>/<devid>, which it owns. The back
end in Dom0 gets no more of that than the keys listed here, with values of their form: never
``backend``, ``backend-id`` or anything else that the toolstack decides (XSA-175). The other way the
guest is shown what a front end reads, and nothing about the host, such as a script or a file.

The keys are those that Linux and the BSDs use: xen/include/public/io/netif.h and blkif.h.
"""

from __future__ import annotations

import re

VALUE_MAX = 256
"""Bytes that a back end's value may have to be shown to the guest."""
QUEUES_MAX = 64
"""More queues than any front end has; what else is bounded are the values' lengths."""

STATE = b"state"

_U32 = re.compile(rb"(?:0|[1-9][0-9]{0,9})\Z")
_PORT = re.compile(rb"[1-9][0-9]{0,5}\Z")
_FLAG = re.compile(rb"[01]\Z")
_STATE = re.compile(rb"[1-6]\Z")  # XenbusStateInitialising .. Closed; 7 and 8 are PCI's
_SMALL = re.compile(rb"(?:0|[1-9][0-9]?)\Z")
_PROTOCOL = re.compile(rb"x86_(?:32|64)-abi\Z")
_HEADROOM = re.compile(rb"(?:0|[1-9][0-9]{0,3})\Z")

_COMMON = {STATE: _STATE, b"multi-queue-num-queues": _SMALL}
_VIF_QUEUE = {
    b"tx-ring-ref": _U32,
    b"rx-ring-ref": _U32,
    b"event-channel": _PORT,
    b"event-channel-tx": _PORT,
    b"event-channel-rx": _PORT,
}
_VBD_QUEUE = {
    b"ring-ref": _U32,
    b"event-channel": _PORT,
    **{b"ring-ref%d" % number: _U32 for number in range(16)},
}
_FLAGS = (
    b"request-rx-copy", b"feature-rx-notify", b"feature-sg", b"feature-gso-tcpv4",
    b"feature-gso-tcpv4-prefix", b"feature-gso-tcpv6", b"feature-gso-tcpv6-prefix",
    b"feature-no-csum-offload", b"feature-ipv6-csum-offload", b"request-multicast-control",
)  # fmt: skip

FRONT: dict[bytes, tuple[dict[bytes, re.Pattern[bytes]], dict[bytes, re.Pattern[bytes]]]] = {
    b"vif": (
        {
            **_COMMON,
            **_VIF_QUEUE,
            **dict.fromkeys(_FLAGS, _FLAG),
            b"ctrl-ring-ref": _U32,
            b"event-channel-ctrl": _PORT,
            b"xdp-headroom": _HEADROOM,
        },
        _VIF_QUEUE,
    ),
    b"vbd": (
        {
            **_COMMON,
            **_VBD_QUEUE,
            b"ring-page-order": _SMALL,
            b"protocol": _PROTOCOL,
            b"feature-persistent": _FLAG,
        },
        _VBD_QUEUE,
    ),
}
"""For each kind of device the front end's keys, and those of each of its queues."""

_BACK = re.compile(
    rb"(?:state|online|frontend|frontend-id|handle|mac|mtu|hotplug-status|trusted"
    rb"|feature-[a-z0-9-]{1,48}|max-[a-z0-9-]{1,48}|multi-queue-max-queues"
    rb"|discard-(?:granularity|alignment|secure|enable)"
    rb"|sectors|sector-size|physical-sector-size|info|mode|removable|device-type)\Z"
)
_QUEUE = re.compile(rb"queue-(0|[1-9][0-9]?)/([a-z0-9-]{1,24})\Z")


def front_key(kind: bytes, key: bytes) -> re.Pattern[bytes] | None:
    """The form of what a front end may tell its back end under a key, if there is anything.

    ``key`` is relative to the front end's directory.
    """
    keys, queue_keys = FRONT[kind]
    queue = _QUEUE.match(key)
    if queue is None:
        return keys.get(key)
    return queue_keys.get(queue[2]) if int(queue[1]) < QUEUES_MAX else None


def front_value(kind: bytes, key: bytes, value: bytes) -> bool:
    """Whether a front end may tell its back end this: ``key`` is as for ``front_key``."""
    form = front_key(kind, key)
    if form is None or not form.match(value):
        return False
    if form is _U32:
        return int(value) < 1 << 32
    if form is _PORT:
        return int(value) < 1 << 17  # FIFO event channels have no more (event_channel.h)
    return True


def back_key(key: bytes) -> bool:
    """Whether a guest is shown this key of its back end."""
    return _BACK.match(key) is not None


def in_order(keys: list[bytes]) -> list[bytes]:
    """Keys in the order in which they are to be written: whoever sees the state sees the rest."""
    return sorted(keys, key=lambda key: (key == STATE, key))


def differences(now: dict[bytes, bytes], then: dict[bytes, bytes]) -> dict[bytes, bytes | None]:
    """What has to change to come from ``then`` to ``now``, in order: None for what is gone."""
    keys = in_order([key for key in now.keys() | then.keys() if now.get(key) != then.get(key)])
    return {key: now.get(key) for key in keys}
