"""What the wheel holds beside the packages: see tool.hatch.build in pyproject.toml."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

TAG = "py3-none-linux_x86_64"
# No C library, so nothing that needs one; a single segment, so few page faults.
FLAGS = (
    *("-Os", "-static", "-s", "-nostdlib", "-ffreestanding", "-fno-pie", "-no-pie"),
    *("-fno-stack-protector", "-fcf-protection=none", "-fno-asynchronous-unwind-tables"),
    *("-fno-tree-loop-distribute-patterns", "-Wall", "-Wextra"),
    "-Wl,-z,noseparate-code,-z,norelro,-z,noexecstack,--build-id=none",
)
PYTHON_COMMAND = """\
#!python
import sys

from chaos.cli import main

sys.exit(main())
"""
"""`chaos` where the client cannot be compiled. Who installs it fills in the interpreter."""


class BuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds manual pages, shell completion and `chaos`, made in a directory of their own."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Before the wheel is put together."""
        self._folder = Path(tempfile.mkdtemp(prefix="chaos-wheel."))
        self._add_client(version, build_data)
        build_data["shared_data"].update(self._manual())

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """After it."""
        del version, build_data, artifact_path
        shutil.rmtree(self._folder)

    def _add_client(self, version: str, build_data: dict[str, Any]) -> None:
        """The client as the script `chaos`. Where it is installed it needs no compiler.

        An editable install without gcc gets a `chaos` that is the Python command.
        """
        command = self._folder / "chaos"
        try:
            compile_client(Path(self.root, "client", "chaos.c"), command)
            build_data["tag"] = TAG
        except RuntimeError as error:
            if version != "editable":
                shutil.rmtree(self._folder)
                self.app.abort(str(error))
            self.app.display_warning(f"{error}\nchaos will be the Python command, which is slower")
            command.write_text(PYTHON_COMMAND)
            command.chmod(0o755)
        build_data["shared_scripts"][str(command)] = "chaos"

    def _manual(self) -> dict[str, str]:
        sys.path.insert(0, self.root)
        try:
            from man.__main__ import write

            return write(self._folder / "man")
        finally:
            sys.path.remove(self.root)


def compile_client(source: Path, target: Path) -> None:
    """Compile client/chaos.c. RuntimeError with what the compiler says, or how to get one."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise RuntimeError("the command chaos is built on Linux on x86_64, as Xen's Dom0 is")
    gcc = shutil.which("gcc")
    if gcc is None:
        raise RuntimeError("gcc is needed to build the command chaos: apt install gcc libc6-dev")
    done = subprocess.run(
        [gcc, *FLAGS, "-o", str(target), str(source)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile:\n{done.stderr.rstrip()}")
