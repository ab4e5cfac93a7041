"""One fork server per test session, with the fault library in it, and a lab for each test module."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from clm.fork_server import ForkServer

from .lab import Lab


@pytest.fixture(scope="session")
def fault_library(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """fault.c, compiled; None where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    library = tmp_path_factory.mktemp("fault") / "fault.so"
    source = Path(__file__).with_name("fault.c")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl", "-lpthread"], check=True)
    return library


@pytest.fixture(scope="session")
def fork_server(fault_library: Path | None) -> Iterator[ForkServer]:
    """Starts trainings without their imports."""
    env = {"OMP_NUM_THREADS": "1", **({"LD_PRELOAD": str(fault_library)} if fault_library else {})}
    for name in ("TENSORBOARD_LOGGING_DIR", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_DIR", "WANDB_PROJECT"):
        os.environ.pop(name, None)
    with ForkServer(env) as server:
        yield server


@pytest.fixture
def lab(fork_server: ForkServer, tmp_path: Path, prepared) -> Lab:
    """An empty lab."""
    return Lab(fork_server, tmp_path / "lab", prepared.folder)


@pytest.fixture
def faults(fault_library: Path | None) -> None:
    """Needs the fault library."""
    if fault_library is None:
        pytest.skip("no C compiler: file operations cannot be made to fail")
