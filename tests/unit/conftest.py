"""What all unit tests share: how hypothesis runs, and that Ctrl-C counts.

Examples have no deadline, for a busy machine is no bug. On CI they are the same in every run, so
that a red run is the change's doing; elsewhere they are new each time, and find more.

A shell has what it runs in the background ignore SIGINT and SIGQUIT; some tests send them.
"""

import os
import signal

from hypothesis import HealthCheck, settings

settings.register_profile(
    "project",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("project")
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
