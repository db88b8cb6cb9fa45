"""Sets of physical CPUs as in ``cpus=`` of xl.cfg(5): ``"0-3,^1"``, ``"all,^7"``.  Pure.

The reader is that of xl (tools/xl/xl_parse.c: parse_cpurange, update_cpumap_range, parse_range).
How many CPUs the host has is not known here, so "all" stays symbolic until ``resolve``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

from chaos.xldoc import quote
from xenctypes.errors import ConfigError

MAX_TEXT = 4096  # characters of one list
MAX_PCPUS = 16384  # above NR_CPUS of any Xen build (xen/arch/Kconfig allows up to 16383)

_RANGE = re.compile(r"[ \t]*([0-9]{1,9})(?:-[ \t]*([0-9]{1,9}))?")


@dataclass(frozen=True, slots=True)
class CpuSet:
    """The CPUs in ``cpus``; or, when ``complement``, all of the host but those.  Ascending."""

    cpus: tuple[int, ...]
    complement: bool = False
    _hash: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if list(self.cpus) != sorted(set(self.cpus)):
            raise ConfigError("the CPUs of a set are not in ascending order", key="cpus")
        if self.cpus and not 0 <= self.cpus[0] <= self.cpus[-1] < MAX_PCPUS:
            raise ConfigError(f"CPU numbers end at {MAX_PCPUS - 1}", key="cpus")
        if not self.cpus and not self.complement:
            raise ConfigError("no CPU is left to run on", key="cpus")
        object.__setattr__(self, "_hash", hash((self.cpus, self.complement)))

    def __hash__(self) -> int:
        """Once for all: a configuration may have a set for each of thousands of vCPUs."""
        return self._hash

    @property
    def everything(self) -> bool:
        """No restriction at all."""
        return self.complement and not self.cpus

    def resolve(self, count: int) -> frozenset[int]:
        """The CPUs meant on a host with CPUs 0 to count-1; those beyond it do not count."""
        host = frozenset(range(count))
        return host - frozenset(self.cpus) if self.complement else host & frozenset(self.cpus)

    def __str__(self) -> str:
        """The set in xl's notation; ``parse_cpus`` reads it back."""
        ranges: list[tuple[int, int]] = []
        for cpu in self.cpus:
            if ranges and ranges[-1][1] == cpu - 1:
                ranges[-1] = (ranges[-1][0], cpu)
            else:
                ranges.append((cpu, cpu))
        mark = "^" if self.complement else ""
        words = [f"{mark}{a}" if a == b else f"{mark}{a}-{b}" for a, b in ranges]
        return ",".join(["all", *words] if self.complement else words)


@lru_cache(64)
def parse_cpus(text: str) -> CpuSet:
    """Read a CPU list; words count from left to right, so ``"^1,0-3"`` has CPU 1.

    The same text gives the same object. Raise ConfigError for a list that xl refuses, for NUMA
    nodes, and for an empty set.
    """
    if len(text) > MAX_TEXT:
        raise ConfigError(f"a CPU list is longer than {MAX_TEXT} characters", key="cpus")
    mask = 0  # bit n is CPU n, of the set or of what is missing from it
    complement = False
    for word in filter(None, text.split(",")):
        body = word.removeprefix("^")
        if body.startswith(("node:", "nodes:")):
            hint = "name the CPUs of the node"
            raise ConfigError("NUMA nodes are not supported in a CPU list", hint=hint, key="cpus")
        if body == "all":
            if word != body:
                raise ConfigError('"^all" leaves no CPU to run on', key="cpus")
            mask, complement = 0, True
            continue
        match = _RANGE.fullmatch(body)
        first = int(match[1]) if match else -1
        last = int(match[2] or match[1]) if match else -1
        if not 0 <= first <= last < MAX_PCPUS:
            hint = 'for example "0-3,^1"'
            raise ConfigError(f"{quote(word)} is no CPU or range of CPUs", hint=hint, key="cpus")
        bits = (1 << last + 1) - (1 << first)
        mask = mask | bits if (word != body) == complement else mask & ~bits
    cpus = tuple(cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1)
    return CpuSet(cpus, complement)
