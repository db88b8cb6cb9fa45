"""What of a domain is fixed when its shell is made, and what may come later.  Pure.

A shell serves a request when their shapes are equal; the name, the addresses, the metadata, the
UUID and what to do at its end are set late, on any shell::

    fixed   type, memory, vcpus, affinity, TSC mode, grant and event-channel limits, and of each vif
            everything but its addresses; in a warm shell also the image and its command line
    late    name, uuid, mac, ip, gateway, metadata (up to the shell's room), on_poweroff, ...
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Hashable

    from chaos.domconfig import DomainConfig
    from chaos.image import Identity
    from chaos.vifspec import VifConfig


class Shape(NamedTuple):
    """The fixed part of a configuration, without the image; ``vifs`` as ``_fixed`` has them."""

    type: str
    memory: int
    maxmem: int
    vcpus: int
    maxvcpus: int
    affinity: tuple[Hashable, ...]
    tsc_mode: str
    limits: tuple[int, ...]
    vifs: tuple[tuple[Any, ...], ...]
    disks: tuple[Hashable, ...]

    @property
    def poolable(self) -> bool:
        """Whether two domains of this shape can exist at once: not with a vif of fixed name."""
        return not self.disks and not any(vif[_VIFNAME] for vif in self.vifs)


class ImageKey(NamedTuple):
    """Which image a warm shell has in it."""

    kernel: Identity
    ramdisk: Identity | None
    cmdline: str


_VIFNAME = 5


def _fixed(vif: VifConfig) -> tuple[Any, ...]:
    return (
        vif.devid, vif.bridge, vif.mtu, vif.rate, vif.vlan, vif.vifname, vif.script,
        vif.gatewaydev, vif.backend, vif.type, vif.model, vif.trusted,
    )  # fmt: skip


def shape_of(config: DomainConfig) -> Shape:
    """The shape that a configuration asks for."""
    return Shape(
        config.type,
        config.memory,
        config.maxmem,
        config.vcpus,
        config.maxvcpus,
        config.affinity,
        config.tsc_mode,
        (config.max_grant_frames, config.max_maptrack_frames, config.max_event_channels),
        tuple(map(_fixed, config.vifs)),
        config.disks,
    )


def blank(config: DomainConfig, name: str) -> DomainConfig:
    """The configuration of a shell of the same shape: without what comes late."""
    vifs = tuple(
        replace(vif, mac=None, ipv4=None, ipv6=None, gateway4=None, gateway6=None)
        for vif in config.vifs
    )
    return replace(
        config, name=name, uuid=None, vifs=vifs, metadata=b"", metadata_file="", places={}
    )
