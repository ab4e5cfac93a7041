"""Before anything is sent between processes: are all of them there, and is each about to do the same?

In: what this process has (host, device, code, versions, recipe, data). Out: nothing, or a UserError that names the
processes that are missing or differ. It goes over the store of the rendezvous (torchrun's, or process 0's own), which
works before there is a process group, so a missing machine is named instead of waited for without a word.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.errors import UserError

if TYPE_CHECKING:
    from clm.plan import Plan

WAIT_S = 300  # for all processes to come; less where training.ddp_timeout is less
SAY_AFTER_S = 10
REPORT_S = 20  # for the store, when this process has failed and the others may be behind
_ROOT = Path(__file__).resolve().parent.parent
_TREES = ("clm", "data_prep")
_PACKAGES = ("torch", "transformers", "accelerate")


class RollCall:
    """The roll call of one launch of several processes. With one process there is nothing to do."""

    def __init__(self) -> None:
        self.rank, self.num_processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self._store: Any = None
        if self.num_processes > 1:
            _say(f"process {self.rank} of {self.num_processes}: {describe_process()}")

    def report_failure(self, error: Exception) -> None:
        """This process ends before the call: the others need not wait for it."""
        if self.num_processes > 1 and "MASTER_ADDR" in os.environ:
            with contextlib.suppress(UserError):  # this error is the one to tell
                self._write({"error": str(error), "host": socket.gethostname()}, REPORT_S)
            time.sleep(1)  # where this is the process that holds the store, the others have to read it

    def compare(self, plan: Plan) -> None:
        """Wait for all processes and compare what they have with what process 0 has. Called by every process.

        Raises:
            UserError: names the processes that did not come, have ended, or have something else, and what.
        """
        if self.num_processes == 1:
            return
        self._write({"host": socket.gethostname(), **collect_facts(plan)})
        wait_s = min(WAIT_S, plan.training.get("ddp_timeout", WAIT_S))
        answers = self._read_all(wait_s)
        problem = find_difference(answers)
        self._store.set(self._key(f"done-{self.rank}"), "1")
        if self.rank == 0:  # its store may be what the others read from
            self._wait([self._key(f"done-{rank}") for rank in range(self.num_processes)], 10)
        if problem:
            raise UserError(problem)

    def _write(self, facts: dict[str, Any], wait_s: float = WAIT_S) -> None:
        from torch.distributed import TCPStore

        host, port = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0"))
        # torchrun holds the store itself; else process 0 does, and torch shares it with us
        is_holder = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        wait = timedelta(seconds=wait_s)
        try:
            if self._store is None:
                self._store = TCPStore(
                    host, port, is_master=is_holder, timeout=wait, wait_for_workers=False, multi_tenant=True
                )
        except Exception as error:
            raise UserError(
                f"process {self.rank} on {socket.gethostname()} cannot reach the rendezvous at {host}:{port} "
                f"({type(error).__name__}). Is the first machine up, and is the port open?"
            ) from error
        self._store.set(self._key(str(self.rank)), json.dumps(facts))

    def _key(self, name: str) -> str:
        launch = (os.environ.get("TORCHELASTIC_RUN_ID", ""), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        return f"clm/{'/'.join(launch)}/{name}"

    def _wait(self, keys: list[str], seconds: float) -> bool:
        from torch.distributed import DistError

        try:
            self._store.wait(keys, timedelta(seconds=seconds))
        except (DistError, RuntimeError):
            return False
        return True

    def _read_all(self, wait_s: float) -> list[dict[str, Any]]:
        started_at, has_said = time.monotonic(), False
        missing = list(range(self.num_processes))
        while missing:
            missing = [rank for rank in missing if not self._store.check([self._key(str(rank))])]
            waited_s = time.monotonic() - started_at
            if missing and waited_s > wait_s:
                raise UserError(
                    f"{_name(missing)} of {self.num_processes} did not come within {wait_s:g} s. Nothing was trained. "
                    "Look at that machine's own output: was the command started there, with the same number of "
                    "processes, and can it reach the first machine?"
                )
            if missing and waited_s > SAY_AFTER_S and not has_said and self.rank == 0:
                has_said = True
                _say(f"waiting for {_name(missing)}")
            if missing:
                time.sleep(0.1)
        return [json.loads(self._store.get(self._key(str(rank)))) for rank in range(self.num_processes)]


def describe_process() -> str:
    """Host, device and process number of this process."""
    import torch

    local = os.environ.get("LOCAL_RANK", "0")
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{local} ({torch.cuda.get_device_name(int(local) % torch.cuda.device_count())})"
    return f"host {socket.gethostname()}, device {device}, pid {os.getpid()}"


def collect_facts(plan: Plan) -> dict[str, Any]:
    """What must be the same everywhere."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {
        "code": hash_code(),
        "versions": {"python": platform.python_version(), **versions},
        "recipe": json.loads(json.dumps(plan.recipe.to_dict(), default=str)),
        "data": plan.fingerprints,
        "num_processes": plan.num_processes,
        "tp_size": plan.tp_size,
        "precision": f"{plan.precision}, attention {plan.attention}",
    }


def hash_code(root: Path = _ROOT) -> str:
    """SHA-256 of the code that trains."""
    digest = hashlib.sha256()
    for path in sorted([root / "run_clm.py", *(p for tree in _TREES for p in (root / tree).rglob("*.py"))]):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def find_difference(answers: list[dict[str, Any]]) -> str | None:
    """What is wrong among the processes, in words, or None; process 0 counts as right."""
    for rank, answer in enumerate(answers):
        if "error" in answer:
            return f"process {rank} on {answer['host']} has ended: {answer['error']}"
    lines, host = [], answers[0].get("host")
    for rank, answer in enumerate(answers):
        for what, first in answers[0].items():
            if what == "host" or answer[what] == first:
                continue
            for key, mine, theirs in _list_differences(what, first, answer[what]):
                lines.append(f"process {rank} on {answer['host']} has {key} {theirs}, process 0 on {host} has {mine}")
    if not lines:
        return None
    more = f"\nand {len(lines) - 10} more differences" if len(lines) > 10 else ""
    return (
        "\n".join(lines[:10]) + more + "\nAll processes must train the same. Bring the code, the environment, the "
        "recipe and the data of that machine up to those of process 0, then type the same command."
    )


def _list_differences(key: str, first: Any, other: Any) -> list[tuple[str, Any, Any]]:
    if not (isinstance(first, dict) and isinstance(other, dict)):
        return [] if first == other else [(key, first, other)]
    found = []
    for name in [*first, *(n for n in other if n not in first)]:
        inner = name if key == "recipe" else f"{key}.{name}"
        found += _list_differences(inner, first.get(name, "nothing"), other.get(name, "nothing"))
    return found


def _name(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"process {shown}" if len(ranks) == 1 else f"processes {shown}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
