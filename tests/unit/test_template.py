"""The template of shell makers: a process plays the daemon, and its makers make nothing."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys

PATIENCE = 60.0
MAKER = """
import json, os, sys
from chaos.daemon import maker

class Maker:
    def __init__(self, channel, names):
        self.channel, self.host = channel, self
        self.ctrl = self
    def physinfo(self):
        pass
    def serve(self):
        fds = os.listdir("/proc/self/fd")
        links = {int(fd): os.readlink(f"/proc/self/fd/{fd}") for fd in fds if fd != fds[-1]}
        self.channel.send(json.dumps({
            "pid": os.getpid(), "parent": os.getppid(), "name": open("/proc/self/comm").read(),
            "links": list(links.values()), "nice": os.getpriority(os.PRIO_PROCESS, 0),
            "xen": sorted(name for name in sys.modules if name.startswith("xenctypes.guest")),
        }).encode())
        self.channel.recv(1)
        os._exit(7)

maker.Maker = Maker
"""
DAEMON = """
import os, select, signal, socket, sys
import msgpack
from chaos.daemon import template
made = []

def make():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        forks.make(theirs)
    pid = msgpack.unpackb(ours.recv(1000))["ok"]
    assert msgpack.unpackb(ours.recv(1000)) == {"ok": "ready"}
    told = json.loads(ours.recv(10000))
    assert told["pid"] == pid
    made.append((ours, pid))
    return told

def end(number):
    channel, pid = made[number]
    channel.send(b"x")
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def kill_template():
    os.kill(forks.pid, signal.SIGKILL)
    os.waitid(os.P_PID, forks.pid, os.WEXITED | os.WNOWAIT)

template.COMMAND = (sys.executable, "-P", "-c", SOURCE + '''
from chaos.daemon import template
template._run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
''')
forks = template.Template("/nowhere")
left_open = os.dup(os.open("/etc/passwd", os.O_RDONLY))
os.set_inheritable(left_open, True)
MINE = {"daemon": os.getpid(), "base": os.getpriority(os.PRIO_PROCESS, 0)}
"""


def daemon(story: str) -> subprocess.Popen[str]:
    """A process that is a daemon as far as makers go, and then does as the story says."""
    source = f"{MAKER}\nSOURCE = {MAKER!r}\n{DAEMON}\n{story}"
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-P", "-c", source], stdin=pipe, stdout=pipe, text=True
    )


def told(story: str) -> list[dict[str, object]]:
    """What the daemon of a story prints, one JSON value for each line."""
    with daemon(story) as process:
        said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    return [json.loads(line) for line in said.splitlines()]


def test_makers_are_the_daemon_s_and_have_nothing_of_it() -> None:
    first, second, executed = told("""
forks.fork()
print(json.dumps(make() | MINE))
print(json.dumps(make() | MINE))
before = forks.pid
kill_template()
assert end(0) == end(1) == 7  # they were alive, and their status is known
print(json.dumps(make() | MINE))
assert forks.pid != before
forks.close()
forks.close()
assert end(2) == 7
try:
    os.waitpid(-1, 0)
except ChildProcessError:
    pass
""")
    for each in (first, second, executed):
        assert each["parent"] == each["daemon"]
        assert each["name"] == "chaosd-maker\n"
        assert each["nice"] == min(19, int(str(each["base"])) + 10)
        assert each["xen"] == ["xenctypes.guest"]  # imported ahead
        links = list(each["links"])  # type: ignore[call-overload]
        assert links[:2] == ["/dev/null", "/dev/null"]
        assert [link.partition(":")[0] for link in links[3:]] == ["socket"], links
    assert first["pid"] != second["pid"]


def test_all_end_with_the_daemon() -> None:
    with daemon("""
forks.fork()
print(make()["pid"], forks.pid, flush=True)
kill_template()
print(make()["pid"], forks.pid, flush=True)
sys.stdin.read()
""") as process:
        assert process.stdout is not None
        pids = [int(pid) for _ in range(2) for pid in process.stdout.readline().split()]
        fds = [os.pidfd_open(pid) for pid in pids if os.path.exists(f"/proc/{pid}")]
        assert len(fds) >= 3
        process.send_signal(signal.SIGKILL)
        for fd in fds:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            assert poll.poll(PATIENCE * 1000), pids
            os.close(fd)


def test_one_that_does_not_read_is_replaced() -> None:
    stopped, now = told("""
forks.fork()
print(forks.pid)
os.kill(forks.pid, signal.SIGSTOP)
channels = []
before = forks.pid
while forks.pid == before:
    channels.append(socket.socketpair())
    forks.make(channels[-1][1])
print(forks.pid)
now = forks.pid
forks.give_up(before)  # by those who waited for that one
assert forks.pid == now
forks.give_up(now)
assert not forks.pid
""")
    assert stopped != now
