"""torchrun over two agents, as on two machines: when one is lost the other goes on alone, at the same global batch."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import losses, quiet_config
from .test_launch import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_a_lost_machine_leaves_a_run_that_goes_on_from_its_checkpoint_with_fewer_processes(train, recipe, tmp_path):
    # enough steps that there is time to lose a machine, and a rate at which roundings do not grow
    short = [quiet_config(recipe), "data.tokens=102400", "training.learning_rate=1e-4", "training.save_steps=20"]
    short += ["data.validation=[]", "training.per_device_train_batch_size=6", "run.uneven_batch=true"]
    one = train(*short, name="one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc_per_node", "1"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "lost"]
    command += ["--max_restarts", "3"]
    training = ["run_clm.py", str(recipe), *short, "training.run_name=two"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = one.with_name("two")
    logs, agents = [tmp_path / "agent-0.txt", tmp_path / "agent-1.txt"], []
    try:
        for log, is_host in zip(logs, (1, 0), strict=True):  # the first one holds the rendezvous
            whole = [*command, "--rdzv_conf", f"last_call_timeout=10,is_host={is_host}", *training]
            with log.open("w") as file:
                agents.append(
                    subprocess.Popen(whole, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True)
                )
        until = time.monotonic() + 120
        while not (run / "checkpoint-40").exists():
            assert all(agent.poll() is None for agent in agents) and time.monotonic() < until, logs[0].read_text()
            time.sleep(0.01)
        kill_tree(agents[1].pid)  # a machine that is gone says nothing
        assert agents[0].wait(200) == 0, logs[0].read_text()
    finally:
        for agent in agents:
            kill_tree(agent.pid)
            agent.wait()
    first, both = logs[0].read_text(), "".join(log.read_text() for log in logs)
    assert "2 processes x 2 accumulation = 768 tokens, of which 512 count: 33.3 % of the work is filling" in both
    assert "error: process " in first and "has given no sign of life for" in first
    assert "continuing from" in first and "1 processes x 3 accumulation = 576 tokens, of which 512 count" in first
    assert losses(run) == pytest.approx(losses(one), rel=1e-5)


def kill_tree(pid: int) -> None:
    """SIGKILL for a process and those that it started."""
    for path in Path(f"/proc/{pid}/task/{pid}").glob("children"):
        for child in path.read_text().split():
            kill_tree(int(child))
    if Path(f"/proc/{pid}").exists():
        os.kill(pid, signal.SIGKILL)
