"""What can go wrong on one machine, done for real: killed processes, a full disk, damaged files, two at once."""

import gzip
import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import content_of, run_here, write_jsonl
from processes import encoders, start, wait_for, write_word_files

from data_prep.manifest import load_manifest

NUM_FILES = 12


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Twelve files, so twelve units, of some tenths of a second each."""
    return write_word_files(tmp_path / "corpus", 600, NUM_FILES)


def arguments(source: Path, tokenizer: Path, out: Path, *more: object) -> list[str]:
    fixed = ("--tokenizer", tokenizer, "--block-size", 16, "--val-fraction", 0.1, "--encoder", "hf")
    return [str(each) for each in ("prep", source, *fixed, "--out", out, *more)]


def finished_units(out: Path) -> list[Path]:
    return sorted((out / ".work").glob("*.train.bin"))


@pytest.mark.slow
def test_a_killed_worker_is_named_and_its_unit_done_again(tmp_path, corpus, small_tokenizer):
    run_here(*arguments(corpus, small_tokenizer, tmp_path / "a" / "out", "--num-proc", 1))
    out = tmp_path / "b" / "out"
    process = start(*arguments(corpus, small_tokenizer, out, "--num-proc", 2))
    wait_for(lambda: finished_units(out))
    victim = encoders(process)[0]
    victim.send_signal(signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f"(process {victim.pid}) was killed by signal 9 while it encoded" in err and "is tried once more" in err
    assert content_of(out) == content_of(tmp_path / "a" / "out")


@pytest.mark.slow
def test_workers_that_keep_dying_end_the_preparation_with_a_sentence_and_it_goes_on(tmp_path, corpus, small_tokenizer):
    out = tmp_path / "out"
    process = start(*arguments(corpus, small_tokenizer, out, "--num-proc", 2))
    wait_for(lambda: finished_units(out))
    while process.poll() is None:
        for worker in encoders(process):
            worker.send_signal(signal.SIGKILL)
        time.sleep(0.02)
    _, err = process.communicate()
    assert process.returncode == 2 and "for the second time. Most often the machine is out of memory" in err, err
    assert "Traceback" not in err and finished_units(out)
    run_here(*arguments(corpus, small_tokenizer, out, "--num-proc", 1))
    run_here("check", out)


@pytest.mark.slow
def test_a_source_that_changed_between_kill_and_resume_is_refused(tmp_path, corpus, small_tokenizer, fails):
    out = tmp_path / "out"
    command = arguments(corpus, small_tokenizer, out, "--num-proc", 1)
    process = start(*command)
    wait_for(lambda: len(finished_units(out)) >= 2)
    process.kill()
    process.communicate()
    finished = content_of(out)
    first, good = corpus / "00.jsonl", (corpus / "00.jsonl").read_bytes()
    first.write_bytes(good.replace(b"river", b"rover"))
    message = fails(*command)
    assert "its input changed since the preparation was interrupted: 1 file changed (00.jsonl)" in message
    first.unlink()
    assert "1 file gone (00.jsonl)" in fails(*command)
    first.write_bytes(good)
    write_jsonl(corpus / "99.jsonl", ["new"])
    message = fails(*command)
    assert "1 file new (99.jsonl)" in message and f"rm -rf {out}/.work {out}/tokenizer" in message
    finished.pop(".lock")  # of the process that was killed
    assert content_of(out) == finished
    (corpus / "99.jsonl").unlink()
    run_here(*command)  # as it was
    run_here("check", out)


@pytest.mark.slow
def test_the_second_of_two_preparations_into_one_folder_is_refused(tmp_path, corpus, small_tokenizer, fails):
    out = tmp_path / "out"
    command = arguments(corpus, small_tokenizer, out, "--num-proc", 1)
    process = start(*command)
    wait_for(lambda: finished_units(out))
    process.send_signal(signal.SIGSTOP)  # so that it cannot be done first
    assert f"process {process.pid} is preparing it" in fails(*command)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    run_here("check", out)


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished_and_leaves_no_process(tmp_path, corpus, small_tokenizer):
    out = tmp_path / "out"
    command = arguments(corpus, small_tokenizer, out, "--num-proc", 2)
    process = start(*command)
    wait_for(lambda: finished_units(out))
    workers = encoders(process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted; what is finished is kept" in err and "Traceback" not in err
    assert not any(worker.is_running() for worker in workers)
    before = {path: path.stat().st_mtime_ns for path in finished_units(out)}
    assert 0 < len(before) < NUM_FILES
    run_here(*command)
    run_here("check", out)


@contextmanager
def mounted(folder: Path, options: str):
    """A small file system of its own in a folder; skips where that is not allowed."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"mount is not allowed here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="only root may mount")
def test_a_disk_that_is_full_is_one_sentence_and_room_is_all_it_takes(tmp_path, corpus, small_tokenizer, run_cli):
    with mounted(tmp_path / "disk", "size=2m") as disk:
        command = ["-m", "data_prep", *arguments(corpus, small_tokenizer, disk / "out", "--num-proc", 1)]
        result = run_cli(command)
        assert result.code == 2 and "No space left on device while writing. What is finished is kept." in result.stderr
        assert "Traceback" not in result.stderr
        finished = finished_units(disk / "out")
        assert 0 < len(finished) < NUM_FILES and not (disk / "out" / "manifest.json").exists()
        stamps = {path.name: path.stat().st_mtime_ns for path in finished}
        subprocess.run(["mount", "-o", "remount,size=60m", disk], check=True)
        assert stamps == {path.name: path.stat().st_mtime_ns for path in finished_units(disk / "out")}
        assert run_cli(command).code == 0
        run_here("check", disk / "out")


@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="only root may mount")
def test_a_read_only_folder_is_refused_before_anything_is_done(tmp_path, corpus, small_tokenizer, fails):
    with mounted(tmp_path / "disk", "ro") as disk:
        message = fails(*arguments(corpus, small_tokenizer, disk / "out"))
        assert f"{disk}/out: cannot be written (Read-only file system). Give another folder" in message


@pytest.mark.parametrize("skip", [False, True])
def test_a_truncated_parquet_file_is_named_or_counted(tmp_path, small_tokenizer, fails, skip):
    texts = [f"document {number} " * 50 for number in range(400)]
    (tmp_path / "corpus").mkdir()
    for name in "ab":
        pq.write_table(pa.table({"text": texts}), tmp_path / "corpus" / f"{name}.parquet", row_group_size=100)
    whole = (tmp_path / "corpus" / "b.parquet").read_bytes()
    (tmp_path / "corpus" / "b.parquet").write_bytes(whole[: len(whole) * 6 // 10])
    command = arguments(tmp_path / "corpus", small_tokenizer, tmp_path / "out")
    if skip:
        run_here(*command, "--on-bad-record", "skip")
        documents = load_manifest(tmp_path / "out").ledger["corpus"]["documents"]
        assert (documents["read"], documents["bad"]) == (401, 1)
    else:
        assert "b.parquet: the Parquet file cannot be read" in fails(*command)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("skip", [False, True])
def test_gzip_that_is_corrupt_in_the_middle_is_named_with_the_line(tmp_path, small_tokenizer, fails, skip):
    rng = random.Random(1)
    lines = "".join(f'{{"text": "document {n} {rng.randbytes(30).hex()}"}}\n' for n in range(20_000)).encode()
    data = bytearray(gzip.compress(lines))
    middle = len(data) // 2
    data[middle : middle + 1000] = b"\xff" * 1000
    (tmp_path / "x.jsonl.gz").write_bytes(data)
    command = arguments(tmp_path / "x.jsonl.gz", small_tokenizer, tmp_path / "out")
    if skip:
        run_here(*command, "--on-bad-record", "skip")
        documents = load_manifest(tmp_path / "out").ledger["x"]["documents"]
        assert documents["bad"] >= 1 and 5_000 < documents["read"] < 15_000
        run_here("check", tmp_path / "out")
    else:
        message = fails(*command)
        assert "x.jsonl.gz: line " in message
        assert "the rest of the file cannot be decompressed" in message or "the line is not JSON" in message
