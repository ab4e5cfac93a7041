"""Starts trainings in a fraction of a second: one process imports what they need, and forks a copy for each.

    with ForkServer() as server:
        training = server.start(["run_clm.py", "recipes/demo.yaml"], log=folder / "log.txt")
        training.kill()
        assert training.wait() == -signal.SIGKILL

Importing torch and Trainer takes longer than a tiny training does. A copy is a process of its own, as if it had been
started with `python run_clm.py recipes/demo.yaml`: own arguments, environment, folder and output. What libraries read
from the environment when they are imported (OMP_NUM_THREADS, HF_HUB_OFFLINE) is that of the server.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# What a training imports. None of them may start threads that compute: a fork copies only the thread that forks.
PRELOADED = (
    "torch",
    "torch.distributed",
    "torch.nn.parallel",
    "torch.utils.data",
    "transformers",
    "transformers.trainer",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "accelerate",
    "safetensors.torch",
    "deepspeed",  # where it is installed accelerate imports it in every run
    "matplotlib.axes",
    "matplotlib.backends.backend_svg",
    "numpy.ctypeslib",
    "clm.trainer",
    "clm.launch",
    "clm.plan",
    "clm.run_record",
    "clm.curve",
    "clm.card",
)
_LET_GO_S = 0.005  # between two looks at whether a training has ended


class ForkServer:
    """A process with everything imported, and the requests to it.

    Args:
        env: added to this process's environment, for the server and all it starts.
        preloaded: modules to import once.
    """

    def __init__(self, env: Mapping[str, str] | None = None, preloaded: Sequence[str] = PRELOADED):
        # a look at the GPUs through the driver's library would make them unusable in the copies; NVML is harmless
        self.env = {**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1", **(env or {})}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "clm.fork_server", *preloaded],
            cwd=ROOT,
            env=self.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.started: list[Training] = []

    def start(
        self,
        argv: Sequence[str | Path],
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Training:
        """Start `python argv...` as a copy of the server.

        Args:
            argv: a script's path and its arguments.
            log: file that its output is appended to.
            env: added to the server's environment.
            cwd: its working folder, ours if not given.
        """
        request = {
            "start": [str(word) for word in argv],
            "log": str(log),
            "env": {**self.env, **(env or {})},
            "cwd": str(cwd or Path.cwd()),
        }
        training = Training(self, self.ask(request), log)
        self.started.append(training)
        return training

    def ask(self, request: dict[str, Any]) -> Any:
        """One request, one answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the fork server ended with code {self.process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        """End the server and every training of it that still lives."""
        for training in self.started:
            if training.poll() is None:
                training.kill()
                training.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Training:
    """A started process; the part of subprocess.Popen that is needed here."""

    def __init__(self, server: ForkServer, pid: int, log: Path):
        self.server, self.pid, self.log = server, pid, log
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code (-N: signal N ended it), None while it runs."""
        if self.returncode is None:
            self.returncode = self.server.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout_s: float = 300) -> int:
        """Its exit code, once it has ended.

        Raises:
            TimeoutError: it runs on; nothing was done to it.
        """
        deadline = time.monotonic() + timeout_s
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {self.pid} still runs after {timeout_s} s; its output: {self.log}")
            time.sleep(_LET_GO_S)
        assert self.returncode is not None
        return self.returncode

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal; nothing happens when it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


# --- the server's side ------------------------------------------------------------------------------------------------


def _serve(modules: list[str]) -> None:
    """Answer requests until stdin ends. In a copy this returns too, after its program has run."""
    answers = os.fdopen(os.dup(1), "w")  # a program's prints must not get among the answers
    errors, nothing = os.dup(2), os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)  # what libraries say when they are imported
    for name in modules:
        with contextlib.suppress(ImportError):  # what is not installed is not needed, or the program itself says so
            importlib.import_module(name)
    os.dup2(errors, 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who asked: it ends us
    gc.freeze()
    living: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 counts OpenBLAS's threads, which can fork
                pid = os.fork()
            if pid == 0:
                answers.close()
                _become(request)
                return
            living.add(pid)
            answer: Any = pid
        else:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            living.discard(pid)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    for pid in living:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _become(request: dict[str, Any]) -> None:
    """Turn this copy into the program that was asked for, and run it; SystemExit passes through."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.close(nothing)
    sys.stdin = os.fdopen(0, closefd=False)  # the old one has buffered the server's next requests
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = request["start"]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    _serve(sys.argv[1:])
