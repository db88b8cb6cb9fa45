"""The emulated machine: its size, its QEMU process, its record on the host.

A lab is one QEMU process. It holds a host-wide lock (an inherited descriptor), so that
the lock lasts exactly as long as the machine, whoever started it and however that ended.
There is one lab on a host, but for those that $CHAOS_LAB gives a name of their own.
"""

import fcntl
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from lab import cache, debian, initramfs
from lab.errors import LabError, UsageError
from lab.frames import TOKEN_SIZE
from lab.image import DOM0, Image

CHANNELS = 9
"""Command channels; the first is kept for `down` and `status`."""

MIN_DOM0 = 384 << 20
XEN_RESERVE = 256 << 20
"""Memory that Xen itself takes, its heap and the guests' page tables apart."""

# Without each of the flags after "max" something breaks under emulation: Dom0 does not start
# (smap, smep, pku), vector registers leak between vCPUs (xsave and all that depends on
# it: wrong checksums), PVH guests die (rdtscp).
#
# What no flag mends: a PVH guest goes astray about once in 600,000 of its exits to Xen. One that
# has interrupts off and only reads an I/O port, `1: inb $0x42, %al; dec %ecx; jnz 1b`, gets to
# some other address, or Xen is told of a triple fault and finds its own state in the guest's
# place. It does so with xl as well. Linux reads that port 100,000 times as it starts
# (quick_pit_calibrate), so that of some thirty starts of it one to three fail, and are made again.
# Once, of 170 starts, one neither ended nor said a word: the test that met it shows its registers
# if it comes again.
CPU = "max,-smap,-smep,-pku,-xsave,-avx,-avx2,-f16c,-fma,-vaes,-vpclmulqdq,-rdtscp"

DOM0_MODULES = (
    "xenfs xen-evtchn xen-gntdev xen-gntalloc xen-privcmd xen-netback xen-blkback"
    " bridge tun loop 9pnet_virtio 9p virtio_console"
)

_UNITS = {"": 1 << 20, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse_size(text: str) -> int:
    """Return bytes for "512M", "17G", "2048K" or a bare number of MB, as xl takes them."""
    match = re.fullmatch(r"(\d+)([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match or not int(match[1]):
        raise UsageError(f"{text!r} is not a memory size", hint="like 512M or 4G")
    return int(match[1]) * _UNITS[match[2].upper()]


@dataclass(frozen=True)
class Options:
    """How a lab is booted. Sizes are in bytes; ``dom0_cpus`` 0 stands for all of them."""

    debian: str = "12"
    memory: int = 4 << 30
    dom0_memory: int = 1 << 30
    cpus: int = 2
    dom0_cpus: int = 0
    xenstored: bool = False
    init: str = "lab"

    def check(self) -> None:
        """Raise UsageError if the machine that we run on cannot hold this one."""
        if self.dom0_memory < MIN_DOM0:
            raise UsageError(
                f"Dom0 does not start in {_mb(self.dom0_memory)}",
                hint=f"--dom0-memory of at least {_mb(MIN_DOM0)}",
            )
        if self.dom0_memory + XEN_RESERVE > self.memory:
            raise UsageError(
                f"a Dom0 of {_mb(self.dom0_memory)} does not fit a lab of {_mb(self.memory)}",
                hint=f"--memory of at least {_mb(self.dom0_memory + XEN_RESERVE)}",
            )
        free = available()
        if self.memory > free:
            raise UsageError(
                f"a lab of {_mb(self.memory)} does not fit this machine:"
                f" {_mb(free)} of memory are available",
                hint="see --memory",
            )
        if not 1 <= self.cpus <= (os.cpu_count() or 1):
            raise UsageError(f"--cpus {self.cpus}: this machine has {os.cpu_count()}")
        if not 0 <= self.dom0_cpus <= self.cpus:
            raise UsageError(f"--dom0-cpus {self.dom0_cpus}: the lab has {self.cpus}")


def _mb(size: int) -> str:
    return f"{size >> 20} MB"


def available() -> int:
    """Memory of this machine that is free for labs, in bytes."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


@dataclass
class Machine:
    """A running (or dead) lab, as its record describes it.

    ``started`` is the process's start time in clock ticks since the host booted, which tells a
    reused pid from the one we started.
    """

    verb: str
    options: Options
    folder: Path
    token: str
    tree: str
    since: float
    pid: int = 0
    started: int = 0
    image: str = ""
    wheel: str = ""
    process: "subprocess.Popen[bytes] | None" = field(default=None, repr=False)

    @property
    def serial(self) -> Path:
        """The serial log: Xen's and Dom0's console."""
        return self.folder / "serial.log"

    @property
    def serial_socket(self) -> Path:
        """The serial line itself: three times Ctrl-A switches what is typed there to Xen."""
        return self.folder / "serial"

    def socket(self, channel: int) -> Path:
        """The Unix socket of a command channel."""
        return self.folder / f"channel.{channel}"

    def alive(self) -> bool:
        """Whether its QEMU process exists."""
        if self.process:
            return self.process.poll() is None
        return self.pid > 0 and _start_time(self.pid) == self.started

    def wait(self, seconds: float) -> bool:
        """Wait for QEMU's end; False if it still runs after ``seconds``."""
        if self.process:
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                return False
            return True
        if not self.alive():
            return True
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        try:
            import select

            return bool(select.select([fd], [], [], seconds)[0]) or not self.alive()
        finally:
            os.close(fd)

    def kill(self) -> None:
        """End QEMU at once and forget the record."""
        if self.alive():
            os.kill(self.pid, signal.SIGKILL)
            self.wait(10)
        self.forget()

    def forget(self) -> None:
        """Remove what the machine left on the host."""
        shutil.rmtree(self.folder, ignore_errors=True)
        record = _record()
        if (now := _load()) is None or now.folder == self.folder:
            record.unlink(missing_ok=True)

    def save(self) -> None:
        """Write the record, atomically."""
        data = vars(self) | {"folder": str(self.folder), "options": asdict(self.options)}
        del data["process"]
        record = _record()
        part = record.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(data))
        part.replace(record)


def name() -> str:
    """Which of this host's labs is meant: $CHAOS_LAB, or "" for the one without a name."""
    chosen = os.environ.get("CHAOS_LAB", "")
    if chosen and not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,30}", chosen):
        raise UsageError(f"CHAOS_LAB={chosen}: a name has small letters, digits and hyphens")
    return chosen


def _file(suffix: str) -> Path:
    return cache.directory() / f"lab{'-' * bool(name())}{name()}.{suffix}"


def _record() -> Path:
    return _file("json")


def others() -> dict[str, Machine]:
    """The labs that run under other names."""
    found = {}
    for path in cache.directory().glob("lab*.json"):
        machine = _load(path)
        if machine and path != _record() and machine.alive():
            found[path.stem.removeprefix("lab").removeprefix("-")] = machine
    return found


def _load(record: Path | None = None) -> Machine | None:
    try:
        data = json.loads((record or _record()).read_text())
        options = Options(**data.pop("options"))
        return Machine(**data | {"options": options, "folder": Path(data["folder"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _start_time(pid: int) -> int:
    """Field 22 of /proc/pid/stat (proc(5)), or 0 if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    fields = text.rpartition(")")[2].split()
    return 0 if fields[0] == "Z" else int(fields[19])


def current() -> Machine | None:
    """Return the running lab, or None; what a dead one left behind is removed."""
    machine = _load()
    if machine and not machine.alive():
        machine.forget()
        return None
    return machine


def start(verb: str, image: Image, wheels: Path, options: Options, *, keep: bool) -> Machine:
    """Start QEMU; with ``keep`` it outlives this process, else it dies with it.

    Raises LabError when another lab of this name runs on this host.
    """
    options.check()
    debian.ensure(["qemu-system-x86_64", "setpriv"])
    lock = _file("lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _occupied() from None
        if stale := _load():
            stale.forget()
        folder = Path(tempfile.mkdtemp(prefix="chaos-lab."))
        machine = Machine(
            verb=verb,
            options=options,
            folder=folder,
            token=secrets.token_hex(TOKEN_SIZE),
            tree=str(cache.TREE),
            since=time.time(),
            image=image.path.name,
        )
        try:
            _launch(machine, image, wheels, lock, keep=keep)
        except BaseException:
            machine.kill()
            raise
    return machine


def _occupied() -> LabError:
    machine = _load()
    if not machine:
        return LabError("another lab is starting on this host", hint="try again")
    clock = time.strftime("%H:%M", time.localtime(machine.since))
    return LabError(
        f"a lab runs on this host already: `lab {machine.verb}` of {machine.tree}, Debian"
        f" {machine.options.debian}, since {clock}, QEMU's pid {machine.pid}",
        hint="scripts/lab down ends it" if machine.verb == "up" else "wait for its end",
    )


def _launch(machine: Machine, image: Image, wheels: Path, lock: IO[str], *, keep: bool) -> None:
    folder, options = machine.folder, machine.options
    out = cache.TREE / "lab-out"
    out.mkdir(exist_ok=True)
    (folder / "initrd").write_bytes(image.initramfs.read_bytes() + _overlay(machine, image))
    dom0 = f"{options.dom0_memory >> 20}M"
    kernel_line = (
        "console=hvc0 root=/dev/vda rw quiet loglevel=4 oops=panic panic=0"
        " net.ifnames=0 mitigations=off"
    )
    xen_line = (
        f"console=com1 com1=115200,8n1 dom0_mem={dom0},max:{dom0}"
        f" dom0_max_vcpus={options.dom0_cpus or options.cpus}"
        " ucode=no no-bootscrub spec-ctrl=no xpti=no noreboot loglvl=warning guest_loglvl=warning"
    )
    serial = f"socket,id=serial,path={machine.serial_socket},server=on,wait=off"
    command = [
        "qemu-system-x86_64",
        *("-name", "chaos-lab"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-machine", "pc", "-accel", "tcg,thread=multi,tb-size=1024", "-cpu", CPU),
        # Level-triggered interrupts: under Xen in TCG a message-signalled one gets lost now and
        # then, and whoever waits for that disk, share or channel waits for ever.
        *("-global", "virtio-blk-pci.vectors=0"),
        *("-global", "virtio-9p-pci.vectors=0"),
        *("-global", "virtio-serial-pci.vectors=0"),
        *("-smp", str(options.cpus), "-m", f"{options.memory >> 20}M"),
        *("-chardev", f"{serial},logfile={machine.serial}", "-serial", "chardev:serial"),
        *("-kernel", str(image.xen), "-append", xen_line),
        *("-initrd", f"{image.kernel} {kernel_line},{folder / 'initrd'}"),
        *("-drive", f"file={image.rootfs},format=raw,if=none,id=root,snapshot=on"),
        *("-device", "virtio-blk-pci,drive=root"),
        *("-device", f"virtio-serial-pci,max_ports={CHANNELS + 1}"),
    ]
    for tag, path, mode in (
        ("src", cache.TREE, ",readonly=on"),
        ("out", out, ""),
        ("wheels", wheels, ",readonly=on"),
    ):
        share = f"local,path={path},mount_tag={tag},security_model=none,multidevs=remap"
        command += ["-virtfs", share + mode]
    for channel in range(CHANNELS):
        where = f"socket,id=c{channel},path={machine.socket(channel)},server=on,wait=off"
        command += ["-chardev", where]
        command += ["-device", f"virtserialport,chardev=c{channel},name=lab.{channel}"]
    if not keep:
        command = ["setpriv", "--pdeathsig", "KILL", "--", *command]
    with (folder / "qemu.log").open("wb") as log:
        machine.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[lock.fileno()],
            # Ctrl-C is for the command in Dom0, not for QEMU.
            start_new_session=True,
            env={**os.environ, "PATH": debian.PATH},
        )
    machine.pid = machine.process.pid
    machine.started = _start_time(machine.pid)
    machine.save()


def _overlay(machine: Machine, image: Image) -> bytes:
    """The part of the initramfs that belongs to this boot: the lab's own files."""
    options = machine.options
    shell = (
        f"XEN={image.release.xen}\nXENSTORED={int(options.xenstored)}\nINIT={options.init}\n"
        f'MODULES="{DOM0_MODULES}"\n'
    )
    config = {"channels": CHANNELS, "token": machine.token}
    fstab = (DOM0 / "fstab").read_text()
    ours = [line for line in fstab.splitlines(keepends=True) if " 9p " in line or "xenfs" in line]
    entries = {
        "lab": initramfs.folder(),
        "lab/lab": initramfs.folder(),
        "lab/lab/dom0": initramfs.folder(),
        "lab/config.sh": initramfs.file(shell.encode()),
        "lab/config.json": initramfs.file(json.dumps(config).encode(), 0o600),
        "lab/fstab": initramfs.file(fstab.encode()),
        "lab/fstab.systemd": initramfs.file("".join(ours).encode()),
    }
    for name in ("init", "host-setup"):
        entries[f"lab/{name}"] = initramfs.file((DOM0 / name).read_bytes(), 0o755)
    for name in ("lab-host.service", "lab-agent.service"):
        entries[f"lab/{name}"] = initramfs.file((DOM0 / name).read_bytes())
    for name in (
        "__init__.py",
        "frames.py",
        "dom0/__init__.py",
        "dom0/agent.py",
        "dom0/install.py",
    ):
        entries[f"lab/lab/{name}"] = initramfs.file((DOM0.parent / name).read_bytes())
    return initramfs.archive(entries)


def connect(machine: Machine, channel: int) -> socket.socket:
    """Connect to a channel's socket."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(machine.socket(channel)))
    except OSError:
        connection.close()
        raise
    return connection


def busy(machine: Machine) -> int:
    """How many commands run in a lab: the channels whose locks are held."""
    count = 0
    for path in machine.folder.glob("channel.*.lock"):
        with path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                count += 1
    return count
