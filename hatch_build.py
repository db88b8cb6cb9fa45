"""What the wheel holds beside the packages: see tool.hatch.build in pyproject.toml."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class BuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds manual pages and shell completion, made in a directory of their own."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Before the wheel is put together."""
        del version
        self._folder = Path(tempfile.mkdtemp(prefix="chaos-wheel."))
        build_data["shared_data"].update(self._manual())

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """After it."""
        del version, build_data, artifact_path
        shutil.rmtree(self._folder)

    def _manual(self) -> dict[str, str]:
        sys.path.insert(0, self.root)
        try:
            from man.__main__ import write

            return write(self._folder / "man")
        finally:
            sys.path.remove(self.root)
