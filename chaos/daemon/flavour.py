"""Flavours: the kinds of shells that the pool holds ready, and where their images come from."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chaos import image
from chaos.shape import ImageKey

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chaos.daemon.shell import Shell
    from chaos.domconfig import DomainConfig
    from chaos.image import OpenImage
    from chaos.shape import Shape


class Source:
    """Where an image comes from: paths, or descriptors that a client's rights opened.

    A source with descriptors stays with the files that were opened, whatever the paths name later.
    """

    def __init__(self, kernel: str, ramdisk: str, cmdline: str) -> None:
        self.kernel = kernel
        self.ramdisk = ramdisk
        self.cmdline = cmdline
        self.held: list[OpenImage] = []

    def open(self) -> list[OpenImage]:
        """The images; the caller closes them. ImageError."""
        if self.held:
            return [
                image.adopt_image(os.dup(held.fd), held.path, ramdisk=bool(index))
                for index, held in enumerate(self.held)
            ]
        opened = [image.open_image(self.kernel)]
        try:
            if self.ramdisk:
                opened.append(image.open_ramdisk(self.ramdisk))
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
        """The same with descriptors of its own of what is open."""
        source = Source(self.kernel, self.ramdisk, self.cmdline)
        source.held = [
            image.adopt_image(os.dup(each.fd), each.path, ramdisk=bool(index))
            for index, each in enumerate(opened)
        ]
        return source

    def close(self) -> None:
        """Close the descriptors. Idempotent."""
        for held in self.held:
            held.close()
        self.held = []


@dataclass(eq=False)
class Flavour:
    """A kind of shell that the pool holds ready.

    ``digest`` is that of its images' contents, ``digested`` the versions of which that is sure;
    ``asked`` is when it last served, ``verify_at`` when to read the images again, loop time.
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
            "problem": self.problem or None,
        }
