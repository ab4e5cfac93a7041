"""Preparations run by datatrove: the bytes of one process, whatever dies on the way."""

import importlib.util
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from conftest import content_of, run_here
from processes import encoders, start, wait_for, write_word_files

has_datatrove = importlib.util.find_spec("datatrove") is not None
needs_datatrove = pytest.mark.skipif(not has_datatrove, reason="--executor needs datatrove")
has_slurm = shutil.which("sbatch") is not None and subprocess.run(["sinfo"], capture_output=True).returncode == 0
needs_slurm = pytest.mark.skipif(not has_slurm, reason="no Slurm answers here (sbatch, sinfo)")
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="--executor ray needs ray")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_word_files(tmp_path / "corpus", 300)


@pytest.fixture
def expected(tmp_path, corpus, small_tokenizer) -> dict[str, bytes]:
    run_here(*arguments(corpus, small_tokenizer, tmp_path / "one" / "out", "--num-proc", 1))
    return content_of(tmp_path / "one" / "out")


def arguments(corpus: Path, tokenizer: Path, out: Path, *more: object) -> list[str]:
    fixed = ("--tokenizer", tokenizer, "--block-size", 16, "--val-fraction", 0.1, "--encoder", "hf")
    return [str(each) for each in ("prep", corpus, *fixed, "--out", out, *more)]


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_without_datatrove_the_remedy_is_said_and_prep_does_not_import_it(tmp_path, run_cli):
    code = (
        "import sys; sys.modules['datatrove'] = None; from data_prep.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    result = run_cli(["-c", code, "prep", "stdlib", "--executor", "local"], cwd=tmp_path)
    assert result.code == 2 and "pip install -e '.[cluster]'" in result.stderr
    result = run_cli(["-c", code, "prep", "stdlib", "--tasks", "4", "--out", tmp_path / "out"], cwd=tmp_path)
    assert result.code == 2 and "--tasks and --slurm are for --executor" in result.stderr
    assert not (tmp_path / "out").exists()


@needs_datatrove
def test_what_does_not_go_with_an_executor_is_refused(tmp_path, corpus, small_tokenizer, fails):
    def message(*more: object) -> str:
        return fails(*arguments(corpus, small_tokenizer, tmp_path / "out", *more))

    assert "caps and --sample spread" in message("--executor", "local", "--max-docs", 5)
    assert "partition and time missing" in message("--executor", "slurm")
    assert "has no partion. Did you mean partition" in message("--executor", "slurm", "--slurm", "partion=x")
    assert "--slurm is for --executor slurm" in message("--executor", "local", "--slurm", "partition=x")
    assert not (tmp_path / "out").exists()


@needs_datatrove
@pytest.mark.slow
def test_local_tasks_give_the_bytes_of_one_process(tmp_path, corpus, small_tokenizer, expected, run_cli):
    out = tmp_path / "two" / "out"
    command = arguments(corpus, small_tokenizer, out, "--num-proc", 2, "--executor", "local", "--tasks", 5)
    result = run_cli(["-m", "data_prep", *command])
    assert result.code == 0, result.stderr
    assert content_of(out) == expected and sorted(path.name for path in (tmp_path / "two").iterdir()) == ["out"]
    assert "nothing to do" in run_cli(["-m", "data_prep", *command]).stdout


@needs_datatrove
@pytest.mark.slow
@pytest.mark.parametrize("victim", ["task", "encoder"])
def test_a_local_process_that_dies_is_begun_again(tmp_path, corpus, small_tokenizer, expected, victim):
    out = tmp_path / "two" / "out"
    command = arguments(corpus, small_tokenizer, out, "--num-proc", 2, "--executor", "local", "--tasks", 4)
    process = start(*command)
    wait_for(lambda: list((out / ".work").glob("*.train.bin")))

    def find() -> psutil.Process | None:
        if victim == "encoder":
            return next(iter(encoders(process)), None)
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                if "run_share" in " ".join(child.cmdline()):
                    return child
            except psutil.Error:
                continue
        return None

    wait_for(find).send_signal(signal.SIGKILL)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert victim == "encoder" or "was killed by signal 9; what it did not finish is done again" in err
    assert content_of(out) == expected


@needs_datatrove
@pytest.mark.slow
def test_after_ctrl_c_and_a_kill_finished_units_are_not_done_again(tmp_path, corpus, small_tokenizer, expected):
    out = tmp_path / "two" / "out"
    command = arguments(corpus, small_tokenizer, out, "--num-proc", 2, "--executor", "local", "--tasks", 4)
    finished: dict[Path, int] = {}
    for how in (signal.SIGINT, signal.SIGKILL):
        process = start(*command)
        num = len(finished)
        wait_for(lambda num=num: len(list((out / ".work").glob("*.train.bin"))) > num + 1)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(how)
        process.communicate(timeout=60)
        wait_for(lambda children=children: not any(map(is_alive, children)), 20)  # nobody works on for the dead
        now = {path: path.stat().st_mtime_ns for path in (out / ".work").glob("*.train.bin")}
        assert finished.items() <= now.items()
        finished = now
    process = start(*command)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert content_of(out) == expected


@needs_datatrove
@needs_ray
@pytest.mark.slow
def test_ray_gives_the_bytes_of_one_process(tmp_path, corpus, small_tokenizer, expected, run_cli):
    out = tmp_path / "two" / "out"
    command = arguments(corpus, small_tokenizer, out, "--num-proc", 2, "--executor", "ray", "--tasks", 3)
    result = run_cli(["-m", "data_prep", *command])
    assert result.code == 0, result.stderr
    assert content_of(out) == expected


@needs_datatrove
@needs_slurm
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_slurm_gives_the_bytes_of_one_process_also_after_a_killed_task(
    tmp_path, corpus, small_tokenizer, expected, run_cli
):
    out = tmp_path / "two" / "out"
    command = arguments(corpus, small_tokenizer, out, "--executor", "slurm", "--tasks", 4)
    command += ["--slurm", "partition=main", "time=00:10:00", "mem_per_cpu_gb=1", "requeue="]

    def jobs() -> list[str]:
        shown = subprocess.run(["squeue", "-h", "-o", "%i %j %T"], capture_output=True, text=True).stdout
        return [line for line in shown.splitlines() if "prep-" in line]

    result = run_cli(["-m", "data_prep", *command])
    assert result.code == 0 and "submitted: encode, gather, shards, finish" in result.stdout, result.stderr
    running = wait_for(lambda: [line.split()[0] for line in jobs() if "prep-encode RUNNING" in line and "_" in line])
    subprocess.run(["scancel", "--signal=KILL", "--full", running[0]], check=True)
    wait_for(lambda: not jobs(), 250)
    if not (out / "manifest.json").exists():  # it was not over when the signal came
        result = run_cli(["-m", "data_prep", *command])
        assert result.code == 0, result.stderr
        wait_for(lambda: (out / "manifest.json").exists() and not jobs(), 250)
    assert content_of(out) == expected


@pytest.mark.slow
def test_a_wrong_id_that_a_task_found_makes_the_next_start_use_the_reference(
    tmp_path, corpus, small_tokenizer, monkeypatch
):
    from data_prep import encode
    from data_prep.cluster import _make_all_jobs
    from data_prep.cluster_tasks import EncodeTask, list_jobs
    from data_prep.errors import UserError
    from data_prep.fast_encoder import FastEncoder
    from data_prep.manifest import load_manifest
    from data_prep.plan import Options, make_plan
    from data_prep.workers import Workers

    for path in sorted(corpus.iterdir())[2:]:
        path.unlink()
    out = tmp_path / "out"
    options = Options((str(corpus),), tokenizer=str(small_tokenizer), block_size=16, out=str(out))
    plan = make_plan(options)
    list_jobs(plan, options, lambda settled, encoder: _make_all_jobs(plan, settled, encoder))
    right = FastEncoder.encode

    def wrong(self, texts):
        ids, lengths = right(self, texts)
        return (ids + 1) % 300, lengths

    monkeypatch.setattr(FastEncoder, "encode", wrong)
    monkeypatch.setattr("data_prep.cluster_tasks.Workers", lambda *_, **__: Workers(1))  # in this process
    encode._load_encoder.cache_clear()
    with pytest.raises(UserError, match="The same command again does everything with the reference"):
        EncodeTask(plan.work)(None, 0, 1)
    monkeypatch.undo()
    encode._load_encoder.cache_clear()
    run_here("prep", corpus, "--tokenizer", small_tokenizer, "--block-size", 16, "--out", out)
    assert load_manifest(out).encoder["name"].startswith("tokenizers ") and (out / "encoder_mismatch.json").exists()
    run_here("check", out)
