"""Dom0 images: built by mmdebstrap from Debian packages, kept in the cache.

An image is a folder named by release and recipe hash. It appears by a rename when it is
complete, so that an interrupted build leaves nothing that looks like an image.
"""

import gzip
import os
import shutil
import subprocess
import tempfile
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from lab import cache, debian, initramfs, progress
from lab.errors import LabError
from lab.release import (
    DISK_BYTES,
    FILES,
    INITRAMFS_MODULES,
    MODULE_EXCLUDES,
    PATH_EXCLUDES,
    Release,
)

DOM0 = Path(__file__).parent / "dom0"


@dataclass(frozen=True)
class Image:
    """A complete image: what QEMU boots."""

    release: Release
    path: Path

    @property
    def rootfs(self) -> Path:
        """The root file system, ext4, sparse."""
        return self.path / "rootfs.ext4"

    @property
    def xen(self) -> Path:
        """The hypervisor, not compressed."""
        return self.path / "xen"

    @property
    def kernel(self) -> Path:
        """Dom0's kernel."""
        return self.path / "vmlinuz"

    @property
    def initramfs(self) -> Path:
        """The part of the initramfs that does not change between boots."""
        return self.path / "initramfs"


def find(release: Release) -> Image | None:
    """Return the image of ``release`` if it is in the cache."""
    path = _path(release)
    return Image(release, path) if path.is_dir() else None


def ensure(release: Release) -> Image:
    """Return the image of ``release``, building it first if it is not in the cache."""
    if image := find(release):
        return image
    debian.ensure(["mmdebstrap", "mke2fs", *([] if os.geteuid() == 0 else ["newuidmap"])])
    with cache.locked(f"{release.number}.build"):
        # Whoever held the lock before may have built it.
        if image := find(release):
            return image
        path = _path(release)
        for stale in path.parent.glob(f".{release.number}-*"):
            shutil.rmtree(stale)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            _build(release, work)
            work.chmod(0o755)
            work.rename(path)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        for old in path.parent.glob(f"{release.number}-*"):
            if old != path:
                shutil.rmtree(old)
    return Image(release, path)


def _path(release: Release) -> Path:
    assembly = MAKE_ROOTFS + (DOM0 / "initramfs-init").read_text()
    return cache.directory() / f"{release.number}-{release.digest(assembly)}"


STAGES = {
    "running apt-get update": "package lists",
    "downloading packages with apt": "essential packages",
    "installing remaining packages": "Xen, the kernel and the tools",
    "running --customize-hook": "root file system",
}
"""What mmdebstrap says when it enters a stage, and what we call it."""


HOST_FILES = ("apt/apt.conf.d/99mmdebstrap", "apt/sources.list", "dpkg/dpkg.cfg.d/99mmdebstrap")
"""Below /etc: the host's mirrors and options, of no use in a machine without a network."""

MAKE_ROOTFS = """
set -e
mkdir "$1.tree"
mount --bind "$1" "$1.tree"
size=$(du -sm "$1.tree" | cut -f1)
mke2fs -q -t ext4 -O ^has_journal -L dom0 -d "$1.tree" "$1.ext4" "$((size + size / 5 + 64))M"
umount "$1.tree"
rmdir "$1.tree"
mv "$1.ext4" "$1/rootfs.ext4"
"""
"""Run by mmdebstrap as root of its namespace; $1 is the root folder.

The bind mount shows the folder without the /proc, /sys and /dev that are mounted in it. The
file system is made beside the folder, then moved into it, where mmdebstrap's own
``download`` hook can fetch it for a user who is not root.
"""


def _build(release: Release, work: Path) -> None:
    with progress.steps(f"Debian {release.number} image", len(STAGES) + 1) as steps:
        parts = work / "parts"
        parts.mkdir()
        _bootstrap(release, work, parts, steps)
        steps.step("room on the disk and initramfs")
        os.truncate(work / "rootfs.ext4", DISK_BYTES)
        _call(["e2fsck", "-f", "-p", str(work / "rootfs.ext4")], fine=(0, 1))
        _call(["resize2fs", str(work / "rootfs.ext4")])
        boot = parts / "boot"
        modules = next((parts / "modules").iterdir())
        shutil.move(boot / f"vmlinuz-{modules.name}", work / "vmlinuz")
        with gzip.open(boot / f"xen-{release.xen}-amd64.gz") as packed:
            (work / "xen").write_bytes(packed.read())
        busybox = (parts / "busybox").read_bytes()
        (work / "initramfs").write_bytes(_initramfs(busybox, modules))
        shutil.rmtree(parts)
        shutil.rmtree(work / "files")


def _bootstrap(release: Release, work: Path, parts: Path, steps: progress.Steps) -> None:
    """Run mmdebstrap and have it make the file system inside its own namespaces."""
    files = work / "files"
    for name, text in FILES.items():
        target = files / name.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    command = [
        "mmdebstrap",
        "--variant=apt",
        "--format=null",
        *(f"--dpkgopt=path-exclude={glob}" for glob in PATH_EXCLUDES),
        *(
            f"--dpkgopt=path-exclude={prefix}/lib/modules/*/kernel/{folder}/*"
            for folder in MODULE_EXCLUDES
            for prefix in ("", "/usr")
        ),
        *(f"--aptopt={line}" for line in debian.apt_options()),
        f"--include={','.join(release.packages)}",
        f"--customize-hook=copy-in {' '.join(str(p) for p in files.iterdir())} /",
        *(f"--customize-hook=rm -f $1/etc/{name}" for name in HOST_FILES),
        "--customize-hook=chroot $1 passwd -d root",
        f"--customize-hook=copy-out /boot /usr/lib/modules {parts}",
        f"--customize-hook=download /bin/busybox {parts}/busybox",
        f"--customize-hook={MAKE_ROOTFS}",
        f"--customize-hook=download /rootfs.ext4 {work}/rootfs.ext4",
        release.suite,
        "-",
        *debian.sources(release),
    ]
    tail: deque[str] = deque(maxlen=30)
    with subprocess.Popen(
        command,
        env={
            **os.environ,
            "INITRD": "No",
            "DEBIAN_FRONTEND": "noninteractive",
            "PATH": debian.PATH,
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        entered = set()
        for raw in process.stdout:
            line = raw.strip()
            tail.append(line)
            for said, name in STAGES.items():
                if said in line and said not in entered:
                    entered.add(said)
                    steps.step(name)
            steps.note(line.removeprefix("I: "))
    if process.returncode:
        raise LabError(
            f"mmdebstrap failed with status {process.returncode}:\n  " + "\n  ".join(tail)
        )


def _call(command: list[str], fine: tuple[int, ...] = (0,)) -> None:
    done = subprocess.run(
        command,
        env={**os.environ, "PATH": debian.PATH},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode not in fine:
        raise LabError(f"{command[0]} failed: {done.stdout.strip()[-500:]}")


def _initramfs(busybox: bytes, modules: Path) -> bytes:
    order = initramfs.module_order((modules / "modules.dep").read_text(), INITRAMFS_MODULES)
    entries = {
        "bin": initramfs.folder(),
        "dev": initramfs.folder(),
        "dev/console": initramfs.device(5, 1),
        "modules": initramfs.folder(),
        "root": initramfs.folder(),
        "run": initramfs.folder(),
        "bin/busybox": initramfs.file(busybox, 0o755),
        "init": initramfs.file((DOM0 / "initramfs-init").read_bytes(), 0o755),
    }
    names = []
    for path in order:
        name = Path(path).name.partition(".")[0] + ".ko"
        entries[f"modules/{name}"] = initramfs.file(initramfs.module(modules / path))
        names.append(name)
    entries["modules/order"] = initramfs.file("".join(f"{n}\n" for n in names).encode())
    return initramfs.archive(entries)
