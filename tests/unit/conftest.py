"""What all unit tests share: how hypothesis runs.

Examples have no deadline, for a busy machine is no bug. On CI they are the same in every run, so
that a red run is the change's doing; elsewhere they are new each time, and find more.
"""

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "project",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("project")
