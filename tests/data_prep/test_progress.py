"""Progress of each stage: bars on a terminal, lines elsewhere; what an earlier attempt did is done, and no speed."""

import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, WORDS, run_here, run_on_terminal, write_jsonl

from data_prep.progress import Progress
from data_prep.sizes import format_bytes, format_count

# A process that kills itself when it says that half of the encoding is done.
KILLED_AT_HALF = """
import os, signal, sys
from data_prep import progress
from data_prep.__main__ import main

class Listener:
    def __getattr__(self, name):
        return getattr(sys.__stderr__, name)
    def write(self, text):
        if text.startswith("encoding: ") and "(50%)" in text:
            os.kill(os.getpid(), signal.SIGKILL)

progress.LINE_EVERY_S = 0
sys.stderr = Listener()
main(sys.argv[1:])
"""


@pytest.fixture(autouse=True)
def _every_line(monkeypatch):
    monkeypatch.setattr("data_prep.progress.LINE_EVERY_S", 0)


@pytest.fixture
def corpus(tmp_path):
    """Ten files, so ten units, of 40 documents."""
    (tmp_path / "corpus").mkdir()
    for number in range(10):
        write_jsonl(tmp_path / "corpus" / f"{number}.jsonl", [f"{number} {i} {WORDS * (i + 1)}" for i in range(40)])
    return tmp_path / "corpus"


def arguments(corpus, tokenizer, out, *more):
    options = ("--tokenizer", tokenizer, "--block-size", 16, "--num-proc", 1, "--out", out)
    return [str(each) for each in ("prep", corpus, *options, *more)]


def lines_of(stage, text):
    return [line for line in text.splitlines() if line.startswith(f"{stage}: ")]


def test_a_terminal_has_a_bar_for_every_stage(tmp_path, corpus, small_tokenizer):
    shown = run_on_terminal(*arguments(corpus, "train:300", tmp_path / "out"))
    assert "learning merges: 100%" in shown and '{"stage"' not in shown
    size = sum(path.stat().st_size for path in corpus.iterdir())
    for stage in ("reading for the tokenizer", "encoding", "writing"):
        *_, last = re.findall(rf"\r({stage}: [^\r]*)", shown)
        assert re.search(r": +100%\|█+", last), last
        if stage == "encoding":
            assert re.search(r"MB/s of text, [0-9.]+ (k|M)? ?tokens/s\]", last), last
            assert f"/{size / 1000:.0f}kB" in last or f"/{size / 1e6:.2f}MB" in last, last


def test_lines_elsewhere_say_how_much_how_fast_and_how_long(tmp_path, corpus, small_tokenizer, capsys):
    run_here(*arguments(corpus, small_tokenizer, tmp_path / "out"))
    printed = capsys.readouterr().err
    lines = lines_of("encoding", printed)
    size = format_bytes(sum(path.stat().st_size for path in corpus.iterdir()))
    assert "\r" not in printed and len(lines) > 10
    done = r"encoding: [\d.]+ k?B of [\d.]+ [kM]B \((\d+)%\), [\d.]+ [kM]B of text, "
    shape = done + r"[\d.]+ MB/s of text, [\d.]+ [kM]? ?tokens/s, \d+:\d\d left"
    shares = [int(match[1]) for match in (re.fullmatch(shape, line) for line in lines) if match]
    assert len(shares) >= 9 and shares == sorted(shares)
    assert lines[-1].startswith(f"encoding: {size} of {size} (100%), ") and lines[-1].endswith(", 0:00 left")
    assert lines_of("writing", printed)[-1].count("MB/s") == 1 and "(100%)" in lines_of("writing", printed)[-1]


def test_downloads_have_lines_of_their_own(tmp_path, corpus, small_tokenizer, capsys):
    run_here(*arguments(f"file://{corpus}/*.jsonl", small_tokenizer, tmp_path / "out"))
    size = format_bytes(sum(path.stat().st_size for path in corpus.iterdir()))
    lines = lines_of("downloading", capsys.readouterr().err)
    shares = [int(re.search(rf" of {size} \((\d+)%\)", line)[1]) for line in lines]
    assert len(lines) > 10 and shares == sorted(shares) and shares[-1] == 100
    assert re.fullmatch(rf"downloading: {size} of {size} \(100%\), [\d.]+ MB/s, 0:00 left", lines[-1])
    run_here(*arguments(f"file://{corpus}/*.jsonl", small_tokenizer, tmp_path / "capped", "--max-docs", 60))
    lines = lines_of("downloading", capsys.readouterr().err)  # how much that will be nobody knows
    assert lines and not any("%" in line or "left" in line for line in lines)


def test_after_a_kill_what_was_done_is_done_and_no_speed(tmp_path, corpus, small_tokenizer, capsys):
    command = [sys.executable, "-c", KILLED_AT_HALF, *arguments(corpus, small_tokenizer, tmp_path / "out")]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
    units = [path for path in (tmp_path / "out" / ".work").glob("*.json") if re.fullmatch("[0-9a-f]{32}", path.stem)]
    assert len(units) == 5
    run_here(*arguments(corpus, small_tokenizer, tmp_path / "out"))
    lines = lines_of("encoding", capsys.readouterr().err)
    sizes = [path.stat().st_size for path in sorted(corpus.iterdir())]
    before, size = format_bytes(sum(sizes[: len(units)])), format_bytes(sum(sizes))
    assert f"encoding: {before} of {size} ({sum(sizes[: len(units)]) / sum(sizes):.0%}), {before} of it before" in lines
    assert lines[-1].startswith(f"encoding: {size} of {size} (100%), {before} of it before, ")


@pytest.mark.parametrize(
    ("option", "unit", "total"), [("--max-docs", "documents", 130), ("--max-tokens", "tokens", 90_000)]
)
def test_with_a_cap_progress_counts_what_the_cap_counts(tmp_path, corpus, small_tokenizer, capsys, option, unit, total):
    run_here(*arguments(corpus, small_tokenizer, tmp_path / "out", option, total))
    lines = lines_of("encoding", capsys.readouterr().err)
    assert f" {unit} of {format_count(total)} {unit} (" in lines[0] and "(100%)" in lines[-1]


def test_time_left_follows_from_what_was_done_now():
    progress = Progress("encoding", 1000)
    progress.started_s -= 10  # ten seconds ago
    progress.add_input(600, was_done=True)
    assert progress.seconds_left() is None and progress.describe_speed() == ""
    progress.add_input(100)
    progress.add_text(50_000_000, 20_000_000)
    assert progress.seconds_left() == pytest.approx(30, rel=0.05)  # 300 left at 100 in ten seconds
    assert progress.describe_speed() == "5.0 MB/s of text, 2 M tokens/s"
    progress.add_input(500)  # more than was estimated
    assert (progress.total, progress.seconds_left()) == (1200, 0)
    assert time.monotonic() - progress.started_s < 60
