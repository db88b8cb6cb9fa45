"""Flavours: the kinds of shells that the pool holds ready, and where their images come from."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chaos import image
from chaos.opening import open_for_others
from chaos.shape import ImageKey
from xenctypes.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chaos.daemon.shell import Shell
    from chaos.domconfig import DomainConfig
    from chaos.image import OpenImage
    from chaos.shape import Shape


class Source:
    """Where an image comes from: paths, or descriptors that a client's rights opened.

    A source with descriptors stays with the files that were opened, whatever the paths name later.
    Once it is closed nothing is opened any more: the paths are a client's, the rights the daemon's.
    """

    def __init__(self, kernel: str, ramdisk: str, cmdline: str) -> None:
        self.kernel = kernel
        self.ramdisk = ramdisk
        self.cmdline = cmdline
        self.held: list[OpenImage] = []
        self.closed = False

    def open(self) -> list[OpenImage]:
        """The images; the caller closes them. ImageError; OSError for descriptors."""
        if self.closed:
            raise ImageError(f"kernel {self.kernel!r} is of a flavour that was removed")
        if self.held:
            return _duplicates(self.held)
        opened = [image.open_image(self.kernel, open_for_others)]
        try:
            if self.ramdisk:
                opened.append(image.open_ramdisk(self.ramdisk, open_for_others))
        except BaseException:
            opened[0].close()
            raise
        return opened

    def key_of(self, opened: Sequence[OpenImage]) -> ImageKey:
        """The key of images that are open."""
        ramdisk = opened[1].identity if len(opened) > 1 else None
        return ImageKey(opened[0].identity, ramdisk, self.cmdline)

    def key(self) -> ImageKey | None:
        """The key of what the paths name now, None if that is nothing."""
        try:
            kernel = image.identity(os.stat(self.kernel))
            ramdisk = image.identity(os.stat(self.ramdisk)) if self.ramdisk else None
        except OSError:
            return None
        return ImageKey(kernel, ramdisk, self.cmdline)

    def holding(self, opened: Sequence[OpenImage]) -> Source:
        """The same with descriptors of its own of what is open. ImageError; OSError."""
        source = Source(self.kernel, self.ramdisk, self.cmdline)
        source.held = _duplicates(opened)
        return source

    def changed(self) -> bool:
        """Whether one of its descriptors is not of what its path names now."""
        return any(held.changed() for held in self.held)

    def close(self) -> None:
        """Close the descriptors. Idempotent."""
        for held in self.held:
            held.close()
        self.held = []
        self.closed = True


def _duplicates(opened: Sequence[OpenImage]) -> list[OpenImage]:
    """The same images with descriptors of their own, all or none. ImageError; OSError."""
    duplicates: list[OpenImage] = []
    try:
        for each in opened:
            fd = os.dup(each.fd)
            duplicates.append(image.adopt_image(fd, each.path, ramdisk=bool(duplicates)))
    except BaseException:
        for duplicate in duplicates:
            duplicate.close()
        raise
    return duplicates


@dataclass(eq=False)
class Flavour:
    """A kind of shell that the pool holds ready.

    ``digest`` is that of its images' contents, ``digested`` the versions of which that is sure;
    ``asked`` is when it last served, ``verify_at`` when to read the images again, loop time.
    ``problem`` is why its last shell was not made, ``lack`` why there is no room for another one.
    """

    name: str
    config: DomainConfig
    size: int
    low: int
    room: int
    shape: Shape
    source: Source | None
    adaptive: bool = False
    shells: set[Shell] = field(default_factory=set)
    making: int = 0
    served: int = 0
    made: int = 0
    failures: int = 0
    problem: str = ""
    lack: str = ""
    not_before: float = 0.0
    asked: float = 0.0
    digest: bytes = b""
    digested: ImageKey | None = None
    verify_at: float = 0.0

    @property
    def missing(self) -> int:
        """How many shells it wants more; negative if it has too many."""
        return self.size - len(self.shells) - self.making

    @property
    def urgent(self) -> bool:
        """Whether it is below its low-water mark."""
        return len(self.shells) + self.making < (self.low or max(1, self.size // 4))

    @property
    def ready(self) -> int:
        """How many of the wanted shells there are."""
        return min(len(self.shells), self.size)

    def describe(self) -> dict[str, Any]:
        """For ``chaos pool list``."""
        source = self.source
        return {
            "name": self.name,
            "type": self.config.type,
            "memory_mib": self.config.memory,
            "vcpus": self.config.vcpus,
            "bridges": [vif.bridge for vif in self.config.vifs],
            "kernel": source.kernel if source else None,
            "cmdline": source.cmdline if source else None,
            "size": self.size,
            "low": self.low or max(1, self.size // 4),
            "ready": len(self.shells),
            "making": self.making,
            "served": self.served,
            "made": self.made,
            "adaptive": self.adaptive,
            "problem": self.problem or self.lack or None,
        }
