"""The command and chaosd in children of the test: as when they are started, but for Python.

To start an interpreter and import what they need takes seconds here, and nothing is learnt from it
the hundredth time: a fork of the test has that behind it. Where the start itself is the matter, the
installed programs are started; other daemons always are (daemons.py).
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import signal
import subprocess
import sys
import threading
import traceback
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chaos import cli

if TYPE_CHECKING:
    from typing import NoReturn

MODULES = {"chaos": "chaos.cli", "chaosd": "chaos.daemon.main"}
"""Where ``main`` is, as in pyproject.toml."""
EX_SOFTWARE = 70  # sysexits.h: nothing that the programs exit with
COMM_LENGTH = 15


def start(
    *argv: str, code: str = "", env: dict[str, str] | None = None, **options: Any
) -> subprocess.Popen[Any]:
    """Popen(ARGV), whose child is a fork of this process that runs the program's ``main``.

    ``code`` is Python that it executes before. Of this process's descriptors it has but the
    standard ones.
    """
    _import()
    # What is called before the program is executed does not return: it never is. The end of the
    # pipe on which Popen waits for that is closed with all else.
    become = partial(_become, argv, code, env)
    return subprocess.Popen(
        argv,
        preexec_fn=become,  # noqa: PLW1509 - no other thread holds a lock for long here
        restore_signals=False,  # an interpreter ignores SIGPIPE
        **options,
    )


@cache
def _import() -> None:
    """Here, once, rather than in each child."""
    for name in MODULES.values():
        import_module(name)
    for verb in cli.VERBS.values():
        import_module(f"chaos.verbs.{verb.module}")


def _become(argv: tuple[str, ...], code: str, env: dict[str, str] | None) -> NoReturn:
    status: Any = EX_SOFTWARE
    try:
        _forget_the_test()
        sys.argv = list(argv)
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
        Path("/proc/self/comm").write_text(argv[0][:COMM_LENGTH])
        if code:
            exec(code, {"__name__": "__main__"})
        status = import_module(MODULES[argv[0]]).main()
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            sys.stderr.write(f"{status}\n")
            status = 1
    except BaseException:  # noqa: BLE001 - it has nowhere to go
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):  # nobody reads it any more
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(int(status or 0))


def _forget_the_test() -> None:
    """Standard streams, signals and hooks as a new interpreter has them, and no descriptors."""
    gc.freeze()  # what is there is not the program's to look through, nor to copy
    faulthandler.disable()  # pytest's writes to a descriptor that goes now
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    for name, fd, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        stream = open(fd, mode, encoding="utf-8", closefd=False)  # noqa: SIM115 - for its life
        setattr(sys, name, stream)
    sys.unraisablehook, sys.excepthook = sys.__unraisablehook__, sys.__excepthook__
    threading.excepthook = threading.__excepthook__
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
