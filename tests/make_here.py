"""`make` with this interpreter in place of .venv: the recipes of the Makefile run, its installation does not."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def make(*arguments: str, marks: Path, env: dict[str, str], timeout_s: float = 280) -> subprocess.CompletedProcess[str]:
    """Run make in the repository.

    Args:
        marks: an empty folder for the files that say "installed", so that the user's .venv is not looked at.
        env: added to ours; DATA_DIR and RUNS_DIR belong there, so that nothing of the user's is touched.
    """
    for name in ("made", "installed"):
        (marks / name).touch()
    instead = [f"PY={shlex.quote(sys.executable)}", f"PYTHON={sys.executable}", f"MADE={marks / 'made'}"]
    return subprocess.run(
        ["make", *arguments, *instead, f"INSTALLED={marks / 'installed'}"],
        cwd=ROOT,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
