"""A real noxsd on a socket of its own, without Xen."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Noxsd:
    """``start`` returns once it serves: it says so as to systemd."""

    def __init__(self, directory: Path) -> None:
        self.socket = str(directory / "socket")
        self.state = str(directory / "journal")
        self.log = directory / "log"
        self.notify = str(directory / "notify")
        self.process: subprocess.Popen[bytes] | None = None

    def command(self, *arguments: str) -> list[str]:
        return [
            sys.executable, "-m", "noxs.noxsd", "--socket-only", "--socket", self.socket,
            "--state", self.state, "--user", "", *arguments,
        ]  # fmt: skip

    def start(self, *arguments: str) -> "Noxsd":
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            Path(self.notify).unlink(missing_ok=True)
            manager.bind(self.notify)
            manager.settimeout(20)
            environment = {**os.environ, "NOTIFY_SOCKET": self.notify}
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    self.command(*arguments), cwd=ROOT, stderr=log, env=environment
                )
            assert manager.recv(100) == b"READY=1", self.said()
        return self

    def kill(self, number: int = signal.SIGKILL) -> int | None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait(10)
        return self.process.returncode if self.process else None

    def said(self) -> str:
        return self.log.read_text()
