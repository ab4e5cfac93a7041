"""cluster/slurm.sh: what it does with Slurm's warning. srun and scontrol are stand-ins; a real Slurm ran it by hand."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "cluster" / "slurm.sh"
# Writes down how it is called, and ends when the run is asked to stop, as a training does.
SRUN = """#!/bin/bash
echo "$@" > {folder}/srun
{finish}
while [ ! -f {folder}/runs/tiny/STOP ]; do sleep 0.02; done
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && echo n1 || echo "$@" > {folder}/scontrol
"""


@pytest.mark.parametrize(
    "is_finished, restarts, expected", [(False, 0, "requeue 7"), (True, 0, None), (False, 3, None)]
)
def test_the_warning_makes_the_run_save_and_the_job_queue_again_unless_it_is_over(
    tmp_path, is_finished, restarts, expected
):
    programs = tmp_path / "bin"
    programs.mkdir()
    finish = f"mkdir -p {tmp_path}/runs/tiny/final" if is_finished else ""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text.format(folder=tmp_path, finish=finish))
        (programs / name).chmod(0o755)
    env = {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    env |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_RESTART_COUNT": str(restarts)}
    env |= {"RUNS_DIR": str(tmp_path / "runs"), "MAX_REQUEUES": "3"}
    job = subprocess.Popen(["bash", SCRIPT, "recipes/tiny.yaml", "data.tokens=1B"], env=env, stdout=subprocess.PIPE)
    while not (tmp_path / "srun").exists():
        time.sleep(0.01)
    time.sleep(0.1)  # until the shell waits for it
    job.send_signal(signal.SIGUSR1)
    output = job.communicate(timeout=60)[0].decode()
    called = tmp_path / "scontrol"
    assert (called.read_text().strip() if called.exists() else None) == expected
    assert job.returncode == (1 if restarts == 3 else 0), output
    command = (tmp_path / "srun").read_text()
    assert "--nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint n1:20007" in command
    assert "run_clm.py recipes/tiny.yaml training.run_name=tiny run.uneven_batch=true data.tokens=1B" in command
