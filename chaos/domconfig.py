"""A domain to create: one tree of frozen values that have been checked.  Pure.

However a DomainConfig was made, its values are sound: construction raises ConfigError, whose
``key`` is the setting at fault.  chaos.config reads one from a file, chaos.configjson from JSON.
"""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from chaos.xldoc import Place, quote
from noxs.abi import MAX_METADATA as METADATA_MAX
from noxs.abi import MAX_NAME as NAME_MAX
from xenctypes.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from chaos.cpuspec import CpuSet
    from chaos.diskspec import DiskConfig
    from chaos.vifspec import VifConfig

TYPES = ("pv", "pvh")
ACTIONS = (  # tools/xl/xl_parse.c, action_on_shutdown_names
    "destroy",
    "restart",
    "rename-restart",
    "preserve",
    "coredump-destroy",
    "coredump-restart",
    "soft-reset",
)
PATH_MAX = 4095  # bytes; linux/limits.h, less the final NUL
CMDLINE_MAX = 1023  # bytes; MAX_GUEST_CMDLINE of xen/include/public/xen.h, less the final NUL
MEMORY_MAX = (16 << 20) - 1  # MiB: Xen supports guests of less than 16 TiB (SUPPORT.md)
MEMORY_DEFAULT = 32  # MiB; libxl_create.c, libxl__domain_build_info_setdefault
VCPUS_MAX = {"pv": 8192, "pvh": 128}  # MAX_VIRT_CPUS of x86, HVM_MAX_VCPUS
VIFS_MAX = 16
LIMITS = {  # default, least, most; xl_parse.c and libxl_create.c have the defaults
    "max_grant_frames": (64, 1, 1 << 16),
    "max_maptrack_frames": (1024, 0, 1 << 16),
    "max_event_channels": (1023, 16, (1 << 17) - 1),  # EVTCHN_2L_NR_CHANNELS .. FIFO's
}
DISKS_MAX = 32
TSC_MODES = ("default", "always_emulate", "native")  # by number, as XEN_CPUID_TSC_MODE_*


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainConfig:
    """A domain to create; construction checks the values and raises ConfigError.

    ``name``       unique on the host, see ``check_name``
    ``uuid``       16 bytes, the hypervisor's domain handle; None to have one made up
    ``type``       "pv" or "pvh"
    ``kernel`` ``ramdisk``  paths, "" for none; absolute when they come from ``load``
    ``cmdline``    what the kernel is told, at most CMDLINE_MAX bytes
    ``memory``     MiB at the start; 0 for ``maxmem``, or MEMORY_DEFAULT
    ``maxmem``     MiB that the guest may grow to; 0 for ``memory``
    ``vcpus``      how many are online at the start
    ``maxvcpus``   how many the guest has; 0 for ``vcpus``
    ``affinity``   for vCPU 0, 1, ... the CPUs it may run on; those beyond the end are free
    ``on_poweroff`` ``on_reboot`` ``on_watchdog`` ``on_crash`` ``on_soft_reset``
                   one of ACTIONS: what to do when the guest stops for that reason
    ``tsc_mode``   one of TSC_MODES: whether the guest's rdtsc goes to the processor
    ``max_grant_frames`` ``max_maptrack_frames``  pages of the grant tables, 512 grants each
    ``max_event_channels``  the highest event channel port that the guest may have
    ``vifs``       network interfaces, at most VIFS_MAX
    ``disks``      disks, at most DISKS_MAX
    ``metadata``   bytes for the guest's own use, at most METADATA_MAX
    ``metadata_file``  where ``load`` reads the metadata from, or ""
    ``places``     where each setting stands, for later errors; not part of the value
    """

    name: str
    uuid: bytes | None = None
    type: str = "pv"
    kernel: str = ""
    ramdisk: str = ""
    cmdline: str = ""
    memory: int = 0
    maxmem: int = 0
    vcpus: int = 1
    maxvcpus: int = 0
    affinity: tuple[CpuSet, ...] = ()
    on_poweroff: str = "destroy"
    on_reboot: str = "restart"
    on_watchdog: str = "destroy"
    on_crash: str = "destroy"
    on_soft_reset: str = "soft-reset"
    tsc_mode: str = "native"
    max_grant_frames: int = LIMITS["max_grant_frames"][0]
    max_maptrack_frames: int = LIMITS["max_maptrack_frames"][0]
    max_event_channels: int = LIMITS["max_event_channels"][0]
    vifs: tuple[VifConfig, ...] = ()
    disks: tuple[DiskConfig, ...] = ()
    metadata: bytes = field(default=b"", repr=False)
    metadata_file: str = ""
    places: Mapping[str, Place] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name, value in (
            ("memory", self.memory or self.maxmem or MEMORY_DEFAULT),
            ("maxmem", self.maxmem or self.memory or MEMORY_DEFAULT),
            ("maxvcpus", self.maxvcpus or self.vcpus),
        ):
            object.__setattr__(self, name, value)
        check_name(self.name)
        self._check_identity()
        self._check_image()
        self._check_size()
        self._check_devices()

    def _check_identity(self) -> None:
        if self.uuid is not None and (len(self.uuid) != 16 or not any(self.uuid)):
            raise ConfigError("a uuid has 16 bytes, not all zero", key="uuid")
        if self.type not in TYPES:
            raise ConfigError(f"unknown type {quote(self.type)}", hint="pv or pvh", key="type")
        if self.tsc_mode not in TSC_MODES:
            cause = f"unknown tsc_mode {quote(self.tsc_mode)}"
            raise ConfigError(cause, hint="known are " + ", ".join(TSC_MODES), key="tsc_mode")
        for key in ("on_poweroff", "on_reboot", "on_watchdog", "on_crash", "on_soft_reset"):
            value = getattr(self, key)
            if value not in ACTIONS:
                hint = "known are " + ", ".join(ACTIONS)
                raise ConfigError(f"unknown {key} action {quote(value)}", hint=hint, key=key)

    def _check_image(self) -> None:
        for key in ("kernel", "ramdisk", "metadata_file"):
            _check_text(key, getattr(self, key), PATH_MAX)
        _check_text("cmdline", self.cmdline, CMDLINE_MAX)
        if len(self.metadata) > METADATA_MAX:
            cause = f"the metadata has {len(self.metadata)} bytes, more than {METADATA_MAX}"
            raise ConfigError(cause, key="noxs_metadata")

    def _check_size(self) -> None:
        _check_range("memory", self.memory, 1, MEMORY_MAX, " MiB")
        _check_range("maxmem", self.maxmem, 1, MEMORY_MAX, " MiB")
        if self.maxmem < self.memory:
            cause = f"maxmem {self.maxmem} is less than memory {self.memory}"
            raise ConfigError(cause, key="maxmem")
        limit = VCPUS_MAX[self.type]
        _check_range("vcpus", self.vcpus, 1, limit)
        _check_range("maxvcpus", self.maxvcpus, 1, limit)
        if self.maxvcpus < self.vcpus:
            cause = f"maxvcpus {self.maxvcpus} is less than vcpus {self.vcpus}"
            raise ConfigError(cause, key="maxvcpus")
        for key, (_, low, high) in LIMITS.items():
            _check_range(key, getattr(self, key), low, high)
        if len(self.affinity) > self.maxvcpus:
            cause = f"CPUs for {len(self.affinity)} vCPUs, but there are {self.maxvcpus}"
            raise ConfigError(cause, key="cpus")

    def _check_devices(self) -> None:
        _check_range("the number of vifs", len(self.vifs), 0, VIFS_MAX, key="vif")
        _check_range("the number of disks", len(self.disks), 0, DISKS_MAX, key="disk")
        _check_unique("vif", "devid", (vif.devid for vif in self.vifs))
        _check_unique("vif", "vifname", (vif.vifname for vif in self.vifs if vif.vifname))
        _check_unique("vif", "MAC", (vif.mac_text for vif in self.vifs if vif.mac))
        _check_unique("disk", "vdev", (disk.devid for disk in self.disks))
        if any(vif.type == "ioemu" for vif in self.vifs):
            cause = f"a {self.type} domain has no emulated network card"
            raise ConfigError(cause, hint="leave type=ioemu out", key="vif")

    def named(self, name: str) -> DomainConfig:
        """The same under another name; nothing else is checked again. ConfigError."""
        check_name(name)
        config = object.__new__(DomainConfig)
        for copy in _FIELDS:
            object.__setattr__(config, copy, getattr(self, copy))
        object.__setattr__(config, "name", name)
        return config

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON, under the names of the settings; chaos.configjson reads it back.

        Everything is there, defaults filled in, but for ``places``.  Bytes are text: the uuid as
        usual, the metadata in base64.
        """
        uuid = None if self.uuid is None else self.uuid.hex()
        if uuid is not None:
            uuid = "-".join((uuid[:8], uuid[8:12], uuid[12:16], uuid[16:20], uuid[20:]))
        return {
            "name": self.name,
            "uuid": uuid,
            "type": self.type,
            "kernel": self.kernel,
            "ramdisk": self.ramdisk,
            "cmdline": self.cmdline,
            "memory": self.memory,
            "maxmem": self.maxmem,
            "vcpus": self.vcpus,
            "maxvcpus": self.maxvcpus,
            "cpus": _texts(self.affinity),
            "on_poweroff": self.on_poweroff,
            "on_reboot": self.on_reboot,
            "on_watchdog": self.on_watchdog,
            "on_crash": self.on_crash,
            "on_soft_reset": self.on_soft_reset,
            "tsc_mode": self.tsc_mode,
            **{key: getattr(self, key) for key in LIMITS},
            "vif": [vif.as_dict() for vif in self.vifs],
            "disk": [disk.as_dict() for disk in self.disks],
            "noxs_metadata": b64encode(self.metadata).decode(),
            "noxs_metadata_file": self.metadata_file,
        }

    def error(self, cause: str, key: str, *, hint: str = "") -> ConfigError:
        """An error about a setting, at its place when that is known; for the caller to raise."""
        place = self.places.get(key)
        return ConfigError(cause, hint=hint, key=key, **(place._asdict() if place else {}))


def _texts(sets: Sequence[CpuSet]) -> list[str]:
    """Each as text, which is made once for all that are the same."""
    texts = {each: str(each) for each in set(sets)}
    return [texts[each] for each in sets]


def check_name(name: str) -> None:
    """Raise ConfigError unless a domain may have this name.

    It serves wherever a name or a number is taken, in file names and in one line of a table: up
    to NAME_MAX bytes that print, no "/", no blank or "-" in front, no blank at the end, not
    digits alone, and neither "." nor ".." nor "Domain-0".
    """
    size = len(name.encode("utf-8", "replace"))
    if not 0 < size <= NAME_MAX:
        raise ConfigError(f"a name has 1 to {NAME_MAX} bytes, not {size}", key="name")
    bad = ""
    if not name.isprintable() or "/" in name:
        bad = "/ or characters that do not print"
    elif name[0] in " -" or name[-1] == " ":
        bad = "a blank or - in front or a blank at the end"
    elif name.isdecimal():
        bad = "digits alone, which would be a domain's number"
    elif name in {".", "..", "Domain-0"}:
        bad = "a meaning of its own"
    if bad:
        raise ConfigError(f"name {quote(name)} has {bad}", key="name")


def _check_text(key: str, text: str, limit: int) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ConfigError(f"{key} is not UTF-8", key=key) from None
    if size > limit:
        raise ConfigError(f"{key} has {size} bytes, more than {limit}", key=key)
    if "\0" in text:
        raise ConfigError(f"{key} has a NUL in it", key=key)


def _check_range(what: str, value: int, low: int, high: int, unit: str = "", key: str = "") -> None:
    if not low <= value <= high:
        raise ConfigError(f"{what} {value} is not within {low} to {high}{unit}", key=key or what)


def _check_unique(key: str, what: str, values: Iterable[object]) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise ConfigError(f"two {key}s have the {what} {value}", key=key)
        seen.add(value)


_FIELDS = tuple(each.name for each in fields(DomainConfig))
