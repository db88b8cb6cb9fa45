"""Who is at the other end of a socket."""

from __future__ import annotations

import json
import os
import socket
from typing import TYPE_CHECKING

import pytest

from chaos.daemon.rights import GROUPS_USUAL, ROOT, Peer, peer_for, peer_of

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.skipif(os.geteuid() != 0, reason="only root chooses its groups")
@pytest.mark.parametrize("count", [0, 1, GROUPS_USUAL, GROUPS_USUAL + 1, 1000])
def test_all_groups_of_a_peer_are_known(tmp_path: Path, count: int) -> None:
    groups = tuple(range(1000, 1000 + count))
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        child = os.fork()
        if not child:
            try:
                os.setgroups(groups)
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.connect(path)
                    sock.recv(1)
            finally:
                os._exit(0)
        accepted, _ = listener.accept()
        with accepted:
            peer = peer_of(accepted)
    os.waitpid(child, 0)
    assert (peer.pid, peer.uid, peer.gid, peer.groups) == (child, 0, os.getegid(), groups)


@pytest.mark.parametrize("peer", [Peer(7, 0, 0, (1,)), Peer(7, 1000, 1001, (4, 1002))])
def test_a_record_s_owner_has_the_rights_of_the_peer(peer: Peer) -> None:
    owner = json.loads(json.dumps(peer.owner))
    again = peer_for(owner)
    assert (owner is None) == (peer.uid == 0)
    assert again == (ROOT if owner is None else peer._replace(pid=0))
