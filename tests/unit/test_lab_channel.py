"""A session with a lab, whose other end is played here."""

from __future__ import annotations

import os
import socket
import threading
from typing import TYPE_CHECKING

from lab import channel
from lab.channel import Session
from lab.frames import NONCE_SIZE
from lab.machine import Machine, Options

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

TOKEN = os.urandom(16)


def test_a_connection_that_is_overlooked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "RECONNECT_SECONDS", 0.1)
    machine = Machine("up", Options(), tmp_path, TOKEN.hex(), str(tmp_path), 0.0)
    monkeypatch.setattr(Machine, "alive", lambda _: True)
    machine.serial.touch()
    heard = []

    def answer() -> None:
        overlooked, _ = listener.accept()
        heard.append(overlooked.recv(1024))
        noticed, _ = listener.accept()
        with overlooked, noticed:
            heard.append(noticed.recv(1024))
            noticed.sendall(heard[-1])  # the agent sends the token and the nonce back

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(machine.socket(1)))
        listener.listen()
        other_end = threading.Thread(target=answer)
        other_end.start()
        with Session(machine, channel=1):
            pass
        other_end.join()
    assert heard[0] == heard[1]
    assert heard[0][:-NONCE_SIZE] == TOKEN
