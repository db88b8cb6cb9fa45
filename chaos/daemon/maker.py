"""Shell makers: processes that make domains ahead of need, for the daemon that owns them.

A maker makes one shell at a time, with all of its devices connected, and perhaps an image in it.
It parses other people's images with libxenguest: a crash costs one shell, which the daemon reaps
by its UUID. The shells that have no image yet stay with their maker, since libxenguest keeps what
it knows of them in this process; they end with it.

::

    daemon                                  maker
      | make {uuid, config, macs, ...}  --->  the prepare steps; with an image also load
      | <--- domid, frames, ports, page, timings
      | load {uuid, config} + fds       --->  image into a shell of this maker's
      | drop {uuid}                     --->  all undone
      | end of file                     --->  exit

A maker begins by saying its pid, then that it is ready. Requests and replies are one msgpack value
in one SOCK_SEQPACKET message, descriptors beside it (SCM_RIGHTS). A reply is {"ok": values} or
{"error": [class, message, hint]}; {"done": step} may come before it, if the request says "tell".
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

import msgpack

from chaos import builder, registry
from chaos.configjson import from_dict
from chaos.create import IMAGE_STEPS, SHELL_STEPS, Creation
from chaos.host import Host
from chaos.image import adopt_image, check_abi, check_type, inspect
from chaos.registry import Registry
from chaos.steps import Timing, perform, roll_back
from noxs.page import encode
from xenctypes.errors import CallFailed, ChaosError, ImageError, StepError

if TYPE_CHECKING:
    from collections.abc import Callable

    from chaos.domconfig import DomainConfig
    from chaos.image import Identity, ImageInfo, OpenImage
    from xenctypes.guest import DomBuilder

MESSAGE_MAX = 1 << 18
NICE = 10
REMEMBERED_MAX = 64
"""Versions of image files, and configurations, that a maker remembers something of."""
NAME = b"chaosd-maker"
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15
PR_SET_NO_NEW_PRIVS = 38

Key = TypeVar("Key")
Kept = TypeVar("Kept")


class LocalBuilder:
    """What chaos.builder.Builder does in another process, done in this one."""

    alive = True

    def __init__(self, host: Host) -> None:
        self._host = host
        self._builds: dict[int, DomBuilder] = {}

    def populate(self, domid: int, *, kind: str, mib: int, reserved: int = 0) -> list[int]:
        """As Builder.populate."""
        build = self._builds[domid] = builder.populate(self._host.ctrl, domid, kind, mib)
        return builder.last_frames(build, reserved)

    def load(self, domid: int, *, kernel: int, ramdisk: int | None, **rest: Any) -> builder.Loaded:
        """As Builder.load."""
        build = self._builds.pop(domid)
        fds = [kernel] if ramdisk is None else [kernel, ramdisk]
        try:
            return builder.load(build, {"ramdisk": ramdisk is not None, **rest}, fds)
        except CallFailed as error:
            if error.function in builder.IMAGE_CALLS:
                cause, hint = builder.explain(error)
                raise ImageError(cause, hint=hint) from error
            raise
        finally:
            build.release()

    def drop(self, domid: int) -> None:
        """As Builder.drop."""
        build = self._builds.pop(domid, None)
        if build is not None:
            build.release()


class Maker:
    """Serves one daemon."""

    def __init__(self, channel: socket.socket, names: Registry) -> None:
        self.channel = channel
        self.names = names
        self.host = Host()
        self.builder = LocalBuilder(self.host)
        self.shells: dict[str, Creation] = {}
        self.infos: dict[Identity, ImageInfo] = {}
        self.configs: dict[bytes, DomainConfig] = {}

    def serve(self) -> None:
        """Answer until the daemon closes its end."""
        while True:
            message, fds, _, _ = socket.recv_fds(self.channel, MESSAGE_MAX, 2)
            if not message:
                return
            try:
                request = msgpack.unpackb(message)
                reply = {"ok": getattr(self, f"_{request['do']}")(request, fds)}
            except ChaosError as error:
                reply = {"error": [_class(error), error.message, error.hint]}
            except Exception as error:  # noqa: BLE001 - the daemon must hear of it
                reply = {"error": ["ChaosError", f"{type(error).__name__}: {error}", ""]}
            finally:
                for fd in fds:
                    with contextlib.suppress(OSError):  # adopted, and closed with its image
                        os.close(fd)
            self.channel.send(msgpack.packb(reply))

    def _told(self, request: dict[str, Any]) -> Callable[[str], None] | None:
        """What tells the daemon of each step that is done, if it wants to hear."""

        def told(step: str) -> None:
            self.channel.send(msgpack.packb({"done": step}))

        return told if request.get("tell") else None

    def _make(self, request: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        """A shell, warm if there are descriptors."""
        creation = self._creation(request)
        warm = bool(fds)
        if warm:
            self._open(creation, fds)
        timings: list[Timing] = []
        steps = SHELL_STEPS + IMAGE_STEPS if warm else SHELL_STEPS
        try:
            told = self._told(request)
            perform(steps, creation, timings, subject="cannot make a shell", told=told)
        except StepError as error:
            # The step's own error, without the words that are the daemon's to choose.
            raise _cause(error) from error
        finally:
            if warm:
                _close(creation)
        if not warm:
            self.shells[request["uuid"]] = creation
        return self._describe(creation, timings)

    def _load(self, request: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        """An image into a shell that is here; a failure ends the shell."""
        creation = self.shells.pop(request["uuid"])
        creation.config = self._config(request)
        timings: list[Timing] = []
        try:
            self._open(creation, fds)
            told = self._told(request)
            perform(IMAGE_STEPS, creation, timings, subject="cannot load the image", told=told)
        except BaseException as error:
            roll_back(SHELL_STEPS, creation)
            if isinstance(error, StepError):
                raise _cause(error) from error
            raise
        finally:
            _close(creation)
        return self._describe(creation, timings)

    def _drop(self, request: dict[str, Any], _fds: list[int]) -> list[str]:
        """The end of a shell that has no image."""
        creation = self.shells.pop(request["uuid"], None)
        return [] if creation is None else roll_back(SHELL_STEPS, creation)

    def _creation(self, request: dict[str, Any]) -> Creation:
        creation = Creation(
            self._config(request),
            self.host,
            self.builder,  # type: ignore[arg-type]  # has the methods that the steps use
            self.names,
            UUID(request["uuid"]),
        )
        macs = request["macs"]
        creation.macs = macs
        creation.metadata_room = request["metadata_room"]
        creation.record = registry.Record(
            uuid=request["uuid"],
            name=creation.config.name,
            state=registry.SHELL,
            macs=[mac.hex(":") for mac in macs],
        )
        creation.entry = self.names.entry(request["uuid"])
        return creation

    def _config(self, request: dict[str, Any]) -> DomainConfig:
        """What to make, under a name of the shell's; one that was asked for before, from memory."""
        packed = request["config"]
        config = self.configs.get(packed)
        if config is None:
            config = from_dict(msgpack.unpackb(packed))
            _remember(self.configs, packed, config)
        return config.named(f"shell-{request['uuid'][:8]}")

    def _open(self, creation: Creation, fds: list[int]) -> None:
        path = creation.config.kernel
        creation.kernel = _adopt(fds, 0, path)
        creation.info = self._inspect(creation.kernel)
        check_type(creation.info, creation.config.type, path=path)
        check_abi(creation.info)
        if len(fds) > 1:
            creation.ramdisk = _adopt(fds, 1, creation.config.ramdisk)

    def _inspect(self, image: OpenImage) -> ImageInfo:
        """What an image is; of a version of a file that was looked at before, from memory."""
        found = self.infos.get(image.identity)
        if found is None or found.path != image.path:
            found = inspect(image, payload=False)
            _remember(self.infos, image.identity, found)
        return found

    def _describe(self, creation: Creation, timings: list[Timing]) -> dict[str, Any]:
        loaded = creation.loaded
        page = bytes(encode(creation.describe())) if creation.noxs else b""
        return {
            "domid": creation.domid,
            "noxs": creation.noxs,
            "console_port": creation.console_port,
            "store_port": creation.store_port,
            "store": creation.served,
            "console_frame": loaded.console_frame if loaded else -1,
            "page_frames": creation.page_frames if creation.noxs else [],
            "store_frame": loaded.store_frame if loaded else -1,
            "page": page,
            "disks": creation.record.disks if creation.record else [],
            "timings": [[*timing] for timing in timings],
        }


def _remember(memory: dict[Key, Kept], key: Key, value: Kept) -> None:
    if len(memory) >= REMEMBERED_MAX:
        memory.clear()
    memory[key] = value


def _adopt(fds: list[int], index: int, path: str) -> OpenImage:
    return adopt_image(os.dup(fds[index]), path, ramdisk=bool(index))


def _close(creation: Creation) -> None:
    for image in (creation.kernel, creation.ramdisk):
        if image is not None:
            image.close()
    creation.kernel = creation.ramdisk = None


def _cause(error: StepError) -> ChaosError:
    cause = error.__cause__
    if isinstance(cause, ChaosError):
        return type(cause)(cause.message, hint=cause.hint) if _plain(cause) else error
    return error


def _plain(error: ChaosError) -> bool:
    return not isinstance(error, (CallFailed, StepError))


def _class(error: ChaosError) -> str:
    return type(error).__name__ if _plain(error) else "XenError"


def main(fd: int, parent: int, run_dir: str) -> int:
    """Run a maker in this process: its channel's descriptor, the daemon's pid, the registry."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(PR_SET_NAME, NAME, 0, 0, 0)
    if os.getppid() != parent:
        return 1
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the daemon's to handle: it closes the channel
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as f:
        f.write("1000")
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, fileno=fd)
    channel.send(msgpack.packb({"ok": os.getpid()}))
    maker = Maker(channel, Registry(run_dir))
    maker.host.ctrl.physinfo()  # libraries and handles, before anybody waits
    channel.send(msgpack.packb({"ok": "ready"}))
    maker.serve()
    return 0
