"""chaosd's start and end."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import signal
import sys

from chaos import __version__
from chaos.daemon import settings as settings_module
from chaos.daemon.calls import Calls
from chaos.daemon.core import Daemon
from chaos.daemon.server import SOCKET, Server, listen
from chaos.daemon.template import Template
from chaos.registry import Registry
from noxs import privileges
from noxs.daemon import notify_manager
from xenctypes.errors import ChaosError

DESCRIPTORS = 1 << 20
DIRECTORY_MODE = 0o711
SWITCH_INTERVAL = 0.0005
CAPABILITIES = (
    privileges.CAP_CHOWN,  # of the socket
    privileges.CAP_FOWNER,
    privileges.CAP_DAC_READ_SEARCH,  # images and configurations that root names, wherever they are
    privileges.CAP_SETUID,  # to open those of others with their own rights
    privileges.CAP_SETGID,
    privileges.CAP_KILL,  # makers
    privileges.CAP_SYS_NICE,
    privileges.CAP_SYS_RESOURCE,
    privileges.CAP_IPC_LOCK,  # hypercall buffers
)
"""What the daemon keeps; the hypervisor's devices are root's by ownership."""


def main(argv: list[str] | None = None) -> int:
    """Run the daemon; its exit status."""
    options = parser().parse_args(argv)
    try:
        settings = _settings(options.config)
        names = Registry()
        _raise_limits()
        if os.geteuid() == 0:
            privileges.keep_only(*CAPABILITIES)  # before there are threads: each has its own
        os.umask(0o077)
        template = Template(names.path)
        template.fork()
        return asyncio.run(_serve(options.socket, settings, names, template))
    except ChaosError as error:
        sys.stderr.write(f"chaosd: {error}\n")
        return error.exit_code
    except OSError as error:
        sys.stderr.write(f"chaosd: {error.filename or 'start'}: {error.strerror}\n")
        return 1


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="chaosd",
        description="The daemon that keeps domain shells ready. Runs in the foreground.",
    )
    parser.add_argument("--config", metavar="FILE", help=f"settings ({settings_module.PATH})")
    parser.add_argument(
        "--socket",
        metavar="PATH",
        default=os.environ.get("CHAOS_SOCKET") or SOCKET,
        help="where to listen (%(default)s)",
    )
    parser.add_argument("--version", action="version", version=f"chaosd {__version__}")
    return parser


def _settings(path: str | None) -> settings_module.Settings:
    if path is None:
        if not os.path.exists(settings_module.PATH):
            return settings_module.Settings()
        path = settings_module.PATH
    return settings_module.read(path)


async def _serve(
    path: str, settings: settings_module.Settings, names: Registry, template: Template
) -> int:
    daemon = Daemon(settings, names, template)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        await daemon.start()
        os.chmod(names.path, DIRECTORY_MODE)  # for the socket; what is in it stays closed
        server = Server(daemon, Calls(daemon), *listen(path, settings.group))
        # What is there now stays: a collection would walk through it all for nothing.
        gc.collect()
        gc.freeze()
        notify_manager("READY=1")
        # A thread that computes gives way to the loop, which somebody waits for, soon.
        sys.setswitchinterval(SWITCH_INTERVAL)
        daemon.log(f"serving {len(daemon.guests.by_uuid)} guests on {path}")
        await stop.wait()
        notify_manager("STOPPING=1")
        await server.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    finally:
        await daemon.close()
    if daemon.stuck:
        os._exit(0)  # the interpreter would wait for its threads
    return 0


def _raise_limits() -> None:
    """A shell costs three descriptors at most: have room for thousands."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(DESCRIPTORS, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    raise SystemExit(main())
