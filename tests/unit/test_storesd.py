"""The daemon's command line and start, as far as they go without Xen."""

import subprocess
import sys
from pathlib import Path

import pytest

from noxs import storesd

ROOT = Path(__file__).parents[2]


def test_the_parser_has_the_defaults_of_the_options() -> None:
    defaults = vars(storesd.parser().parse_args([]))
    given = storesd.parse([])
    assert defaults == {name: getattr(given, name) for name in defaults}
    assert storesd.parse(["--bus", "/x"]).bus == "/x"


@pytest.mark.skipif(Path("/proc/xen/privcmd").exists(), reason="this is a Xen host")
def test_without_xen_it_says_so(tmp_path: Path) -> None:
    run = subprocess.run(
        [
            sys.executable, "-m", "noxs.storesd", "--socket", str(tmp_path / "s"),
            "--state", str(tmp_path / "state"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 1
    assert run.stderr.startswith("storesd: ")
    assert run.stderr.count("\n") == 1
    assert not (tmp_path / "s").exists()
