"""`prep --executor`: a preparation on many processes or machines, run by datatrove's executors.

In: the options of `prep`, and how many tasks. Out: with `local` and `ray` the dataset; with `slurm` four jobs, each
waiting for the one before: encode (an array of the tasks), gather (one), shards (the tasks), finish (one). The same
command again runs what is missing. The bytes are those of one process (data_prep/cluster_tasks.py). datatrove is an
optional extra, and imported here only.
"""

import hashlib
import importlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

from data_prep.cluster_tasks import EncodeTask, FinishTask, GatherTask, ShardTask, list_jobs
from data_prep.encode import Job
from data_prep.errors import UserError, did_you_mean
from data_prep.filter_settings import SCREENED
from data_prep.jobs import make_job
from data_prep.plan import Options, Plan, make_plan
from data_prep.prep import Settled, prepare
from data_prep.row_groups import read_far_groups
from data_prep.settled import is_complete
from data_prep.workers import MAX_TRIES

ROOT = Path(__file__).resolve().parents[1]
CLUSTER_FOLDER = ".cluster"  # beside the dataset: datatrove's logs and completions
NUM_FOOTERS_AT_ONCE = 16


def prepare_on(executor: str, options: Options, num_tasks: int, num_at_once: int, slurm: list[tuple[str, str]]) -> None:
    """Prepare with an executor.

    Args:
        executor: local, slurm or ray.
        num_tasks: Parts that the units, and later the shards, are divided into.
        num_at_once: Of these at the same time, for local and ray.
        slurm: words of --slurm: partition and time at least.
    Raises:
        UserError: datatrove is not installed, an option does not go with it, or a task failed.
    """
    _import_executor(executor)
    plan = make_plan(options)
    settings = _parse_slurm(slurm) if executor == "slurm" else {}
    _check_options(plan, executor, settings)
    if slurm and executor != "slurm":
        raise UserError(f"--slurm is for --executor slurm, not {executor}. Leave it out.")
    if is_complete(plan):
        prepare(options)  # says so
        return
    jobs = list_jobs(plan, options, lambda settled, encoder: _make_all_jobs(plan, settled, encoder))
    num_tasks = min(num_tasks, len(jobs))
    keys = hashlib.sha256("".join(job.key for job in jobs).encode()).hexdigest()[:12]
    logs = (plan.folder.parent / CLUSTER_FOLDER / f"{plan.dataset}-{keys}-{num_tasks}").absolute()
    steps = {
        "encode": (EncodeTask(plan.work), num_tasks),
        "gather": (GatherTask(options), 1),
        "shards": (ShardTask(options), num_tasks),
        "finish": (FinishTask(options), 1),
    }
    print(f"{plan.folder}: {len(jobs):,} units in {num_tasks:,} tasks; logs: {logs}", flush=True)
    if executor == "slurm":
        _submit(steps, logs, settings)
        return
    run = _run_locally if executor == "local" else _run_on_ray
    for name in ("encode", "shards"):
        if name == "shards":
            steps["gather"][0](None, 0, 1)
        run(*steps[name], num_at_once, logs / name)
    prepare(replace(options, num_proc=1))
    shutil.rmtree(logs, ignore_errors=True)
    with suppress(OSError):  # of another dataset's
        logs.parent.rmdir()


def _import_executor(executor: str) -> type:
    try:
        if executor == "local":
            from datatrove.executor import LocalPipelineExecutor as Executor
        elif executor == "slurm":
            from datatrove.executor import SlurmPipelineExecutor as Executor
        else:
            importlib.import_module("ray")  # datatrove's executor imports without it
            from datatrove.executor.ray import RayPipelineExecutor as Executor
    except ImportError as error:
        package = f"ray, or its part {error.name}" if executor == "ray" else "datatrove"
        raise UserError(
            f"--executor {executor} needs {package}, which is not installed. Install it: pip install "
            f"-e '.[cluster]'{' ray' if executor == 'ray' else ''}"
        ) from error
    return Executor


def _parse_slurm(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """The words of --slurm as arguments of datatrove's executor.

    Raises:
        UserError: a key that it does not have.
    """
    known = set(signature(_import_executor("slurm").__init__).parameters)
    known -= {"self", "pipeline", "tasks", "depends", "logging_dir", "sbatch_args", "job_name"}
    settings: dict[str, Any] = {"sbatch_args": {}}
    for key, value in pairs:
        if key.startswith("sbatch."):
            settings["sbatch_args"][key.removeprefix("sbatch.")] = value
        elif key in known:
            settings[key] = int(value) if value.lstrip("-").isdigit() else value
        else:
            raise UserError(f"--slurm {key}={value}: datatrove's executor has no {key}. {did_you_mean(key, known)}")
    return settings


def _check_options(plan: Plan, executor: str, slurm: dict[str, Any]) -> None:
    is_capped = plan.max_docs or plan.max_tokens or any(source.max_documents for source in plan.sources)
    if is_capped or plan.is_spread:
        raise UserError(
            f"--executor {executor}: caps and --sample spread take a beginning of the units, which is only known when "
            "all in front are done. Prepare a capped dataset without --executor."
        )
    if plan.filters is not None and plan.filters.is_screened:
        names = [name for name in plan.filters.options if name in SCREENED]
        raise UserError(
            f"--executor {executor}: {', '.join(names)} decide in the order of all documents, on one machine. Prepare "
            "without --executor, or without these filters."
        )
    if plan.skip_failed:
        raise UserError(f"--executor {executor}: --skip-failed is for one machine. Leave one of them out.")
    missing = [key for key in ("partition", "time") if key not in slurm] if executor == "slurm" else []
    if missing:
        raise UserError(
            f"--executor slurm: {' and '.join(missing)} missing. Write --slurm partition=cpu time=24:00:00."
        )


def _make_all_jobs(plan: Plan, settled: Settled, encoder: Any) -> list[Job]:
    """All jobs; of Parquet files elsewhere the ends are read, many at once, and nothing is downloaded."""
    from concurrent.futures import ThreadPoolExecutor

    stream, downloads = settled.stream, settled.stream.downloads
    downloads.is_cut_from_afar = True
    far = [(i, n, f) for i, (n, f) in enumerate(stream.files) if f.format == "parquet" and downloads.is_far(i)]

    def note(item: tuple[int, int, Any]) -> None:
        index, number, file = item
        source = plan.sources[number]
        downloads.remembered_groups(index, lambda: read_far_groups(source, index, file, downloads))

    with ThreadPoolExecutor(NUM_FOOTERS_AT_ONCE) as pool:
        list(pool.map(note, far))
    threshold = settled.validation["threshold"]
    return [make_job(plan, stream, unit, settled.tokenizer, encoder, threshold) for unit in stream.units() if unit]


def _submit(steps: dict[str, tuple[Callable, int]], logs: Path, slurm: dict[str, Any]) -> None:
    """Four jobs of Slurm, each after the one before; those that are done already are left out."""
    executor_class = _import_executor("slurm")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    python_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {
        "env_command": f'export PATH="{path}" PYTHONPATH="{python_path}"',
        "qos": None,
        **slurm,
        # a job whose predecessor failed would wait for ever
        "sbatch_args": {"kill-on-invalid-dep": "yes", **slurm.get("sbatch_args", {})},
    }
    before = None
    for name, (task, num_tasks) in steps.items():
        before = executor_class(
            pipeline=[task],
            tasks=num_tasks,
            job_name=f"prep-{name}",
            logging_dir=str(logs / name),
            depends=before,
            **settings,
        )
    try:
        before.run()
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"--executor slurm: sbatch failed ({error}). Is this a machine from which jobs can be submitted?"
        ) from error
    print(
        f"submitted: encode, gather, shards, finish, one after the other. The dataset is complete when its "
        f"manifest.json is there; should a job fail ({logs}), the same command submits what is missing."
    )


def _run_on_ray(task: Callable, num_tasks: int, num_at_once: int, logs: Path) -> None:
    executor_class = _import_executor("ray")
    try:
        executor_class(pipeline=[task], tasks=num_tasks, workers=num_at_once, logging_dir=str(logs)).run()
    except Exception as error:  # Ray wraps what a task raised
        raise UserError(f"a task failed on Ray: {' '.join(str(error).split())[-500:]} Its log is in {logs}.") from error
    _check_all_done(num_tasks, logs)


def _check_all_done(num_tasks: int, logs: Path) -> None:
    missing = [rank for rank in range(num_tasks) if not (logs / "completions" / f"{rank:05d}").exists()]
    if missing:
        raise UserError(
            f"{len(missing)} of {num_tasks} tasks failed, the first is {missing[0]}. What is finished is kept; the "
            f"same command continues. Logs: {logs}"
        )


def _run_locally(task: Callable, num_tasks: int, num_at_once: int, logs: Path) -> None:
    """datatrove's local executor in a few processes, each with its share of the tasks.

    Its own pool waits for ever for a process that was killed; these are seen, and begun again.
    """
    logs.mkdir(parents=True, exist_ok=True)
    (logs / "task.pickle").write_bytes(pickle.dumps(task))
    num_at_once = min(num_at_once, num_tasks)
    shares = [(i * num_tasks // num_at_once, (i + 1) * num_tasks // num_at_once) for i in range(num_at_once)]
    tries = {share: 0 for share in shares}
    running: dict[tuple[int, int], subprocess.Popen] = {}
    try:
        waiting = list(shares)
        while waiting or running:
            for share in waiting:
                tries[share] += 1
                running[share] = _start_share(share, num_tasks, logs)
            waiting = []
            for share, process in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[share]
                if code == 0:
                    continue
                with suppress(ProcessLookupError):  # what it had started
                    os.killpg(process.pid, signal.SIGKILL)
                log = _log_of(share, logs).read_text(encoding="utf-8", errors="replace")
                if code == 2:
                    raise UserError(log[log.rindex("error: ") + len("error: ") :].strip())
                how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                what = f"process {process.pid}, which did tasks {share[0]} to {share[1] - 1} of {num_tasks}, {how}"
                if tries[share] == MAX_TRIES:
                    raise UserError(
                        f"{what}, for the second time. What is finished is kept; the same command continues. Its log: "
                        f"{_log_of(share, logs)}"
                    )
                print(f"warning: {what}; what it did not finish is done again.", file=sys.stderr, flush=True)
                waiting.append(share)
            time.sleep(0.05)
    finally:
        for process in running.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)  # with its encoder, and with what datatrove started
        for process in running.values():
            process.wait()
    _check_all_done(num_tasks, logs)


def _start_share(share: tuple[int, int], num_tasks: int, logs: Path) -> subprocess.Popen:
    code = "import sys; from data_prep.cluster import run_share; sys.exit(run_share(*sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with open(_log_of(share, logs), "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", code, str(logs), str(num_tasks), str(share[0]), str(share[1])],
            env=environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the parent, which ends them
        )


def run_share(logs: str, num_tasks: str, first: str, end: str) -> int:
    """In a process of its own: some tasks, one after the other; the exit code."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    task = pickle.loads((Path(logs) / "task.pickle").read_bytes())
    executor = _import_executor("local")(
        pipeline=[task],
        tasks=int(num_tasks),
        workers=1,
        logging_dir=logs,
        local_tasks=int(end) - int(first),
        local_rank_offset=int(first),
    )
    try:
        executor.run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def _end_with(parent: int) -> None:
    """Nobody works on for a preparation that was killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def _log_of(share: tuple[int, int], logs: Path) -> Path:
    return logs / f"tasks-{share[0]:05d}-{share[1] - 1:05d}.log"
