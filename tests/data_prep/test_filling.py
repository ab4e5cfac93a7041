"""Shards that are filled while their runs are deleted: little more disk than the result, and no token is ever lost."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import content_of, run_here
from processes import ROOT, Killed, wait_for, write_word_files

from data_prep import align, filling
from data_prep.__main__ import main
from data_prep.align import write_shard
from data_prep.cluster_tasks import EncodeTask, FinishTask, GatherTask, ShardTask, list_jobs
from data_prep.jobs import make_job
from data_prep.plan import Options, make_plan
from data_prep.settled import ALIGN_STATE

CALLS = ("fsync", "replace", "unlink", "truncate")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Six files of records, so six units; a shard below holds two of them and a part of a third."""
    return write_word_files(tmp_path / "corpus", 6, num_files=6)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(align, "SHARD_TOKENS", 4096)
    monkeypatch.setattr(align, "NUM_WRITERS", 1)  # so that calls have an order; two at a time are in the test of kills
    monkeypatch.setattr(filling, "SYNC_BYTES", 2048)


def arguments(corpus: Path, tokenizer: Path, out: Path) -> list[str]:
    fixed = ("--tokenizer", tokenizer, "--block-size", 16, "--val-fraction", 0.1, "--num-proc", 1, "--encoder", "hf")
    return [str(each) for each in ("prep", corpus, *fixed, "--out", out)]


def stop_when_a_run_is_deleted(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    unlink = os.unlink

    def delete_one(path: object, *args: object, **kwargs: object) -> None:
        unlink(path, *args, **kwargs)
        if str(path).endswith(".train.bin"):
            raise Killed

    monkeypatch.setattr(os, "unlink", delete_one)
    with pytest.raises(Killed):
        main(command)
    monkeypatch.setattr(os, "unlink", unlink)


def make_options(corpus: Path, tokenizer: Path, out: Path) -> Options:
    """What `arguments` asks for."""
    return Options(
        (str(corpus),), tokenizer=str(tokenizer), block_size=16, val_fraction=0.1, encoder="hf", out=str(out)
    )


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 4), (1, 1), (3, 5), (40, 2048)])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_the_file_around_the_tokens_is_what_pyarrow_writes(tmp_path, num_blocks, block_size, dtype):
    tokens = np.arange(num_blocks * block_size).astype(dtype)
    write_shard(tmp_path / "x.arrow", tokens, block_size)
    head, tail = filling.frame(num_blocks, block_size, tokens.dtype)
    assert (tmp_path / "x.arrow").read_bytes() == head + tokens.tobytes() + tail


@pytest.mark.slow
def test_a_stop_at_every_write_to_the_disk_of_the_merge_goes_on_to_the_same_bytes(
    tmp_path, corpus, small_tokenizer, monkeypatch
):
    def command(out: Path) -> list[str]:
        return arguments(corpus, small_tokenizer, out)

    run_here(*command(tmp_path / "whole" / "out"))
    expected = content_of(tmp_path / "whole" / "out")
    assert sum(name.startswith("train/data-") for name in expected) >= 3
    real = {name: getattr(os, name) for name in CALLS}
    encoded, numbers = tmp_path / "encoded" / "out", itertools.count()

    def stop_at(number: int) -> None:
        def stopped(name: str):
            def call(*args: object, **kwargs: object) -> object:
                if next(numbers) == number:
                    raise Killed
                return real[name](*args, **kwargs)

            return call

        for name in CALLS:
            monkeypatch.setattr(os, name, stopped(name))

    def let_go() -> None:
        for name in CALLS:
            monkeypatch.setattr(os, name, real[name])

    def replace(source: object, target: object) -> None:
        real["replace"](source, target)
        if Path(target).name == ALIGN_STATE:
            raise Killed

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(Killed):
        main(command(encoded))
    let_go()
    sizes = [path.stat().st_size for path in (encoded / ".work").glob("*.train.bin")]
    whole_bytes, largest_run = sum(sizes) + 4 * 400, max(sizes)  # with what is around the tokens of four shards
    num_half_done = 0  # stops that left a shard begun whose runs are partly gone
    for number in itertools.count():
        out = tmp_path / str(number) / "out"
        shutil.copytree(encoded, out)
        numbers = itertools.count()
        stop_at(number)
        with suppress(Killed):
            main(command(out))
        let_go()
        if (out / "manifest.json").exists():
            break
        runs, shards = list((out / ".work").glob("*.train.bin")), list((out / "train").glob("data-*"))
        # all tokens once; twice those of the run that is read, of one over a border, and what was not waited for yet
        assert sum(path.stat().st_size for path in (*runs, *shards)) < whole_bytes + 2 * largest_run + 2 * 2048
        num_left = len(runs)
        num_half_done += num_left < 6 and any((out / "train").glob("*.tmp"))
        run_here(*command(out))
        assert content_of(out) == expected, f"stopped at call {number}"
        shutil.rmtree(out)
    assert number > 40 and num_half_done > 5, (number, num_half_done)


def test_when_a_half_filled_shard_is_removed_the_loss_is_said(tmp_path, corpus, small_tokenizer, monkeypatch, fails):
    command = arguments(corpus, small_tokenizer, tmp_path / "out")
    stop_when_a_run_is_deleted(command, monkeypatch)
    (tmp_path / "out" / "train" / "data-00000.tmp").unlink()
    message = fails(*command)
    assert "data-00000.tmp: is gone, and the tokens that it held are nowhere else" in message
    assert message.endswith(f"Begin this dataset anew: rm -rf {tmp_path / 'out'}\n")


def test_tasks_on_many_machines_delete_runs_when_all_shards_of_them_are_written(tmp_path, corpus, small_tokenizer):
    run_here(*arguments(corpus, small_tokenizer, tmp_path / "one" / "out"))
    out = tmp_path / "many" / "out"
    options = make_options(corpus, small_tokenizer, out)
    plan = make_plan(options)

    def make_jobs(settled, encoder):
        units = (unit for unit in settled.stream.units() if unit)
        threshold = settled.validation["threshold"]
        return [make_job(plan, settled.stream, unit, settled.tokenizer, encoder, threshold) for unit in units]

    def runs_left() -> list[int]:
        return [index for index, job in enumerate(jobs) if (plan.work / f"{job.key}.train.bin").exists()]

    jobs = list_jobs(plan, options, make_jobs)
    EncodeTask(plan.work)(None, 0, 1)
    GatherTask(options)(None, 0, 1)
    assert runs_left() == [0, 1, 2, 3, 4, 5]
    ShardTask(options)(None, 1, 2)  # every second shard: no run lies in it alone but perhaps one in its middle
    before = runs_left()
    assert len(before) >= 4
    EncodeTask(plan.work)(None, 0, 1)  # a task that comes late makes nothing again
    assert runs_left() == before
    ShardTask(options)(None, 0, 2)
    assert runs_left() == []
    FinishTask(options)(None, 0, 1)
    assert content_of(out) == content_of(tmp_path / "one" / "out")


def test_tasks_go_on_with_a_shard_that_one_process_began(tmp_path, corpus, small_tokenizer, monkeypatch):
    run_here(*arguments(corpus, small_tokenizer, tmp_path / "one" / "out"))
    out = tmp_path / "many" / "out"
    stop_when_a_run_is_deleted(arguments(corpus, small_tokenizer, out), monkeypatch)
    options = make_options(corpus, small_tokenizer, out)
    for rank in (1, 0):
        ShardTask(options)(None, rank, 2)
    FinishTask(options)(None, 0, 1)
    assert content_of(out) == content_of(tmp_path / "one" / "out")


@pytest.mark.slow
def test_sigkill_in_the_merge_goes_on_to_the_same_bytes(tmp_path, small_tokenizer):
    corpus = write_word_files(tmp_path / "long", 60)
    align.SHARD_TOKENS = 2**16  # the fixture puts it back
    run_here(*arguments(corpus, small_tokenizer, tmp_path / "whole" / "out"))
    out = tmp_path / "out"
    code = (
        "import sys; from data_prep import align, filling; from data_prep.__main__ import main;"
        "align.SHARD_TOKENS, filling.SYNC_BYTES = 2**16, 64; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *arguments(corpus, small_tokenizer, out)]
    num_left = 12

    def is_merging(process: subprocess.Popen, num_before: int) -> bool:
        num_now = len(list((out / ".work").glob("*.train.bin")))
        return (out / ".work" / ALIGN_STATE).exists() and num_now < num_before or process.poll() is not None

    for _ in range(3):
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)
        wait_for(partial(is_merging, process, num_left))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        num_left = len(list((out / ".work").glob("*.train.bin")))
    assert 0 < num_left < 10
    run_here(*arguments(corpus, small_tokenizer, out))
    assert content_of(out / "train") == content_of(tmp_path / "whole" / "out" / "train")
    run_here("check", out)
