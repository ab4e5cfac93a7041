"""The same bytes for any number of workers, after a kill at any moment, and for a second run."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import content_of, run_here
from processes import Killed, stop_at_every_rename, write_word_files

from data_prep.__main__ import main
from data_prep.errors import UserError
from data_prep.lock import folder_lock
from data_prep.manifest import load_manifest


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Twelve files of records, so twelve units."""
    return write_word_files(tmp_path / "corpus", 60)


def arguments(corpus: Path, tokenizer: Path, out: Path, *more: object) -> list[str]:
    fixed = ("--tokenizer", tokenizer, "--block-size", 16, "--val-fraction", 0.1)
    return [str(each) for each in ("prep", corpus, *fixed, "--out", out, *more)]


def test_one_and_two_workers_give_the_same_bytes(tmp_path, corpus, small_tokenizer, run_cli):
    for num_proc in (1, 2):
        result = run_cli(
            [
                "-m",
                "data_prep",
                *arguments(corpus, small_tokenizer, tmp_path / f"out{num_proc}", "--num-proc", num_proc),
            ]
        )
        assert result.code == 0, result.stderr
        assert "fork" not in result.stderr.lower() and "warning" not in result.stderr.lower()
    one, two = content_of(tmp_path / "out1"), content_of(tmp_path / "out2")
    one.pop("manifest.json"), two.pop("manifest.json")  # they differ by the dataset's name
    assert one == two
    manifests = [load_manifest(tmp_path / name) for name in ("out1", "out2")]
    assert manifests[0].fingerprint == manifests[1].fingerprint
    assert manifests[0].ledger == manifests[1].ledger


@pytest.mark.slow
def test_a_killed_prep_continues_to_the_same_bytes(tmp_path, corpus, small_tokenizer):
    out, reference = tmp_path / "a" / "out", tmp_path / "b" / "out"
    run_here(*arguments(corpus, small_tokenizer, reference, "--num-proc", 1))
    command = [sys.executable, "-m", "data_prep", *arguments(corpus, small_tokenizer, out, "--num-proc", 2)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    rng = random.Random(os.getpid())
    waits = [rng.uniform(0.2, 3.0) for _ in range(3)]
    for wait_s in waits:
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        time.sleep(wait_s)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"waits {waits}: {done.stderr}"
    assert content_of(out) == content_of(reference), f"waits {waits}"


def test_a_stop_at_every_rename_continues_to_the_same_bytes(tmp_path, corpus, small_tokenizer, monkeypatch):
    for path in sorted(corpus.iterdir())[3:]:
        path.unlink()
    monkeypatch.setattr("data_prep.align.SHARD_TOKENS", 4096)
    run_here(*arguments(corpus, small_tokenizer, tmp_path / "reference" / "out", "--num-proc", 1))
    expected = content_of(tmp_path / "reference" / "out")

    def command(out: Path) -> list[str]:
        return arguments(corpus, small_tokenizer, out, "--num-proc", 1)

    assert stop_at_every_rename(command, tmp_path, expected, monkeypatch) >= 20


def test_finished_units_are_not_encoded_again(tmp_path, corpus, small_tokenizer, monkeypatch):
    from data_prep import encode, workers

    out = tmp_path / "out"
    calls = []

    def encode_some(job, report):
        calls.append(job.key)
        if len(calls) == 6:
            raise Killed
        return encode.encode_unit(job, report)

    monkeypatch.setattr(workers, "encode_unit", encode_some)
    with pytest.raises(Killed):
        main(arguments(corpus, small_tokenizer, out, "--num-proc", 1))
    run_here(*arguments(corpus, small_tokenizer, out, "--num-proc", 1))
    assert len(calls) == 12 + 1 and len(set(calls)) == 12


def test_a_second_run_does_nothing_and_takes_a_moment(tmp_path, corpus, small_tokenizer, run_cli):
    command = ["-m", "data_prep", *arguments(corpus, small_tokenizer, tmp_path / "out")]
    assert run_cli(command).code == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    started_s = time.monotonic()
    again = run_cli(command)
    assert time.monotonic() - started_s < 20
    assert again.code == 0 and "nothing to do" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    for path in corpus.iterdir():
        os.utime(path)  # touched, not changed
    (tmp_path / "out" / ".lock").write_text("999999")  # its writer was killed after its last file
    (tmp_path / "out" / ".work").mkdir()
    assert "nothing to do" in run_cli(command).stdout
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_two_preps_into_one_folder_are_refused(tmp_path, corpus, small_tokenizer, fails):
    out = tmp_path / "out"
    with folder_lock(out, "is preparing it", "OUT=..."):
        message = fails(*arguments(corpus, small_tokenizer, out))
        assert f"process {os.getpid()} is preparing it" in message
    assert not out.exists()
    out.mkdir()
    (out / ".lock").write_text("999999")  # left by a process that died: the kernel freed it
    run_here(*arguments(corpus, small_tokenizer, out, "--num-proc", 1))


def test_a_worker_that_dies_is_named_and_its_unit_tried_once_more(tmp_path, corpus, small_tokenizer, capfd):
    from data_prep.workers import _Pool

    pool = _Pool(2)
    jobs = _jobs(corpus, small_tokenizer, tmp_path / "work")
    results = pool.run(iter(jobs), lambda *counts: None)
    next(results)
    victim = next(worker for worker in pool.workers)
    os.kill(victim.process.pid, signal.SIGKILL)
    assert [job.key for job, _ in results] == [job.key for job in jobs[1:]]
    pool.close()
    assert "was killed by signal 9 while it encoded" in capfd.readouterr().err


def test_a_unit_that_kills_two_workers_ends_the_run_with_a_sentence(tmp_path, corpus, small_tokenizer):
    from data_prep.workers import _Pool

    pool = _Pool(2)
    jobs = _jobs(corpus, small_tokenizer, tmp_path / "work")

    def kill_whoever_works():
        for job in jobs:
            for worker in pool.workers:
                with suppress(ProcessLookupError):  # it died of the last one
                    os.kill(worker.process.pid, signal.SIGKILL)
            yield job

    with pytest.raises(UserError, match="for the second time. Most often the machine is out of memory"):
        pool.tries = {index: 1 for index in range(len(jobs))}
        list(pool.run(kill_whoever_works(), lambda *counts: None))
    pool.close()


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_finished_units_stay(tmp_path, corpus, small_tokenizer, run_cli):
    for path in sorted(corpus.iterdir())[1:]:
        path.write_bytes(path.read_bytes() * 8)
    out = tmp_path / "out"
    # A limit on the size of a file is the full disk that a test can have: the first unit fits, the second does not.
    limited = (
        "import resource, runpy, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000));"
        "runpy.run_module('data_prep', run_name='__main__')"
    )
    for num_proc in (1, 2):
        result = run_cli(["-c", limited, *arguments(corpus, small_tokenizer, out, "--num-proc", num_proc)])
        assert result.code == 2, result.stderr
        assert "while writing. What is finished is kept." in result.stderr and "Traceback" not in result.stderr
        assert not (out / "manifest.json").exists()
        assert any((out / ".work").glob("*.train.bin"))
    run_here(*arguments(corpus, small_tokenizer, out, "--num-proc", 1))
    run_here("check", out)


def test_no_room_is_recognised_by_its_number(tmp_path, corpus, small_tokenizer, fails, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device while writing" in fails(
        *arguments(corpus, small_tokenizer, tmp_path / "out", "--num-proc", 1)
    )


def _jobs(corpus: Path, tokenizer: Path, work: Path) -> list:
    from data_prep.encoder import EncoderChoice, reference_name
    from data_prep.jobs import make_jobs, make_stream
    from data_prep.plan import Options, make_plan
    from data_prep.tokenizer_folder import describe_tokenizer

    plan = make_plan(Options((str(corpus),), tokenizer=str(tokenizer), block_size=16, out=str(work.parent)))
    shutil.copytree(tokenizer, work.parent / "tokenizer")
    (work.parent / ".work").mkdir()
    files = [(0, file) for file in plan.local_files[0]]
    choice = EncoderChoice(reference_name(), False)
    return list(make_jobs(plan, make_stream(plan, files), describe_tokenizer(tokenizer, None), choice, 0))
