"""A Hub that is busy, breaks off, hangs or goes away; and how much of the disk its files take."""

import gzip
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import read_documents, run_on_terminal
from hub_server import serve

from data_prep.manifest import load_manifest
from data_prep.sizes import format_bytes

SHORT_WAITS = "import data_prep.retries; data_prep.retries.RETRY_WAITS_S = (0.1, 0.1, 0.1)"
NUM_FILES = 12
ROWS = 40


def texts_of(part: int) -> list[str]:
    rng = random.Random(part)
    return [f"part {part} row {row} " + "".join(rng.choices("abcdefgh ", k=200)) for row in range(ROWS)]


def parquet(texts: list[str]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), buffer, row_group_size=5)
    return buffer.getvalue()


FILES = {f"data/train-{n:05d}-of-{NUM_FILES:05d}.parquet": parquet(texts_of(n)) for n in range(NUM_FILES)}
ALL = [text for n in range(NUM_FILES) for text in texts_of(n)]


@pytest.fixture
def hub():
    with serve({"owner/parts": FILES}) as server:
        yield server


@pytest.fixture
def start(hub, tmp_path, small_tokenizer):
    """`start("owner/parts", ..., first="...")`: the command's process, with its waits made short.

    `first` is Python that changes other constants.
    """

    def run(*arguments: object, first: str = "", **environment: str) -> subprocess.Popen:
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
        env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1", **environment}
        fixed = ("--tokenizer", small_tokenizer, "--block-size", 1, "--val-fraction", 0)
        code = f"{SHORT_WAITS}; {first}\nimport runpy; runpy.run_module('data_prep', run_name='__main__')"
        command = [sys.executable, "-c", code, "prep", *map(str, (*arguments, *fixed))]
        root = str(Path(__file__).parents[2])
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": root, **env}, **pipes)

    return run


@pytest.fixture
def prep(start):
    """The same, waited for: exit code, output, errors."""

    def run(*arguments: object, **environment: str) -> tuple[int, str, str]:
        process = start(*arguments, **environment)
        out, err = process.communicate(timeout=120)
        assert "Traceback" not in err, err
        return process.returncode, out, err

    return run


@pytest.mark.slow
def test_busy_broken_short_and_hanging_answers_cost_a_wait_and_no_document(hub, prep, tmp_path):
    hub.failures = {
        "train-00001-of-00012.parquet": [503, 500],
        "train-00002-of-00012.parquet": [429],
        "train-00003-of-00012.parquet": ["short"],
        "train-00004-of-00012.parquet": ["hang"],
    }
    code, _, err = prep("owner/parts", "--num-proc", 1)
    assert code == 0, err
    assert read_documents(tmp_path / "data" / "parts", "train") == ALL
    assert not any(hub.failures.values())
    asked = [at for at, path in hub.asked_at if "00002" in path]
    assert asked[1] - asked[0] >= 1  # as the server asked
    asked = [at for at, path in hub.asked_at if "00004" in path]
    assert asked[1] - asked[0] < 5  # the server would have been silent for 6 s


@pytest.mark.slow
def test_downloads_are_seen_on_a_terminal_and_elsewhere(hub, start, tmp_path, small_tokenizer, monkeypatch):
    size = sum(map(len, FILES.values()))
    hub.failures["train-00003-of-00012.parquet"] = ["short"]
    hub.now = lambda: time.sleep(0.1)
    process = start("owner/parts", "--num-proc", 1, first="import data_prep.progress as p; p.LINE_EVERY_S = 0")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    lines = [line for line in err.splitlines() if line.startswith("downloading: ")]
    assert len(lines) >= NUM_FILES and "\r" not in err
    assert f"downloading: {format_bytes(size)} of {format_bytes(size)} (100%), " in lines[-1]
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"), "DATA_DIR": "data"}
    for name, value in (environment | {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}).items():
        monkeypatch.setenv(name, value)
    fixed = ("--tokenizer", small_tokenizer, "--block-size", 1, "--out", tmp_path / "out", "--num-proc", 1)
    shown = run_on_terminal("prep", "owner/parts", *fixed)
    bars = re.findall(r"(\w+)(?:-00012\.parquet)?: +\d+%\|", shown)
    assert set(bars) == {"downloading", "encoding", "writing"}  # and none of huggingface_hub's
    assert re.search(r"downloading: 100%\|█+", shown)


@pytest.mark.slow
def test_a_hub_that_stays_broken_ends_the_preparation_with_the_file_and_what_is_done_is_kept(hub, prep, tmp_path):
    hub.failures["train-00003-of-00012.parquet"] = [500] * 4
    code, _, err = prep("owner/parts", "--num-proc", 1)
    assert code == 2 and "train-00003-of-00012.parquet" in err and err.count("error:") == 1
    before = dict(hub.downloads)
    hub.downloads.clear()
    assert prep("owner/parts", "--num-proc", 1)[0] == 0
    assert read_documents(tmp_path / "data" / "parts", "train") == ALL
    finished = {name for name in before if name < "data/train-00003"}
    assert len(finished) == 3 and not finished & set(hub.downloads)  # resumed by shard


@pytest.mark.slow
def test_downloaded_files_are_never_all_on_disk_and_none_stays(hub, prep, tmp_path):
    folder = tmp_path / "data" / "parts" / ".work" / "downloads"
    most = []
    hub.now = lambda: most.append(len(list(folder.rglob("*.parquet"))))
    code, _, err = prep("owner/parts", "--num-proc", 1)
    assert code == 0, err
    assert len(hub.downloads) == NUM_FILES and 2 <= max(most) <= 6
    assert not list(tmp_path.rglob("*.parquet"))
    assert read_documents(tmp_path / "data" / "parts", "train") == ALL


@pytest.mark.slow
def test_of_files_that_are_not_cut_there_are_twenty_at_most(hub, prep, tmp_path):
    names = [f"data/{part:02d}.jsonl.gz" for part in range(40)]
    lines = [json.dumps({"text": f"the document of {name}"}).encode() + b"\n" for name in names]
    files = {name: gzip.compress(line * 2000) for name, line in zip(names, lines, strict=True)}
    hub.repositories["owner/packed"] = files
    folder = tmp_path / "data" / "packed" / ".work" / "downloads"
    most = []
    hub.now = lambda: most.append(len(list(folder.rglob("*.jsonl.gz"))))
    code, _, err = prep("owner/packed", "--num-proc", 6)
    assert code == 0, err
    assert 6 <= max(most) <= 20
    assert load_manifest(tmp_path / "data" / "packed").ledger["packed"]["documents"]["train"] == 40 * 2000


@pytest.mark.slow
def test_a_kill_in_the_middle_downloads_no_finished_file_again(hub, start, prep, tmp_path):
    work = tmp_path / "data" / "parts" / ".work"
    hub.now = lambda: time.sleep(0.3)  # so that there is a middle
    process = start("owner/parts", "--num-proc", 1)
    deadline = time.monotonic() + 60
    while len(list(work.glob("*.train.bin"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub.now = None
    finished = len(list(work.glob("*.train.bin")))
    assert 3 <= finished < NUM_FILES
    hub.downloads.clear()
    assert prep("owner/parts", "--num-proc", 1)[0] == 0
    assert read_documents(tmp_path / "data" / "parts", "train") == ALL
    again = {int(re.search(r"train-(\d+)", name)[1]) for name in hub.downloads}
    assert not again & set(range(finished - 1))  # the last may have been in the making


@pytest.mark.slow
def test_ctrl_c_ends_at_once_and_the_same_command_goes_on(hub, start, prep, tmp_path):
    hub.now = lambda: time.sleep(0.5)
    process = start("owner/parts", "--num-proc", 2)
    work = tmp_path / "data" / "parts" / ".work"
    deadline = time.monotonic() + 60
    while not list(work.glob("*.train.bin")) and time.monotonic() < deadline:
        time.sleep(0.02)
    sent_s = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - sent_s < 30
    assert process.returncode == 130 and "Traceback" not in err
    assert "interrupted; what is finished is kept" in err
    hub.now = None
    assert prep("owner/parts", "--num-proc", 1)[0] == 0
    assert read_documents(tmp_path / "data" / "parts", "train") == ALL


@pytest.mark.slow
def test_spread_takes_from_all_files_and_reads_little_of_each(hub, prep, tmp_path):
    rng = random.Random(1)
    texts = [[f"part {part} row {row} {rng.randbytes(10_000).hex()}" for row in range(ROWS)] for part in range(12)]
    hub.repositories["owner/large"] = {f"data/{part}.parquet": parquet(rows) for part, rows in enumerate(texts)}
    small = "import data_prep.units; data_prep.units.UNIT_BYTES = 1"  # a unit is a row group
    code, _, err = prep("owner/large:60", "--sample", "spread", "--num-proc", 1, first=small)
    assert code == 0, err
    out = tmp_path / "data" / "large"
    found = read_documents(out, "train")
    assert len(found) == 60 == len(set(found)) and set(found) <= set(sum(texts, []))
    assert len({text.split(" row")[0] for text in found}) >= 6  # of 12 files, by 12 row groups
    size = sum(map(len, hub.repositories["owner/large"].values()))
    assert hub.num_bytes_sent < 0.5 * size  # 12 of 96 row groups, a few ahead, and the ends of 12 files
    rows = [json.loads(line) for line in (out / "documents" / "files.jsonl").read_text().splitlines()]
    assert len(rows) == NUM_FILES
    assert load_manifest(out).settings["sample"] == "spread"


@pytest.mark.slow
def test_a_source_that_fails_stops_prep_with_its_name_and_is_left_out_when_asked(hub, prep, tmp_path):
    (tmp_path / "here.jsonl").write_text('{"text": "a document that lies here"}\n' * 3)
    hub.gated.add("owner/parts")
    command = ("here.jsonl", "owner/parts", "--out", "data/both", "--num-proc", 1)
    code, _, err = prep(*command)
    assert code == 2 and "source parts: " in err and "gated" in err and "--skip-failed" in err
    code, out, err = prep(*command, "--skip-failed")
    assert code == 0, err
    assert "warning: source parts failed" in err and "parts: FAILED after 0 documents" in out
    manifest = load_manifest(tmp_path / "data" / "both")
    assert "gated" in manifest.ledger["parts"]["failed"] and "failed" not in manifest.ledger["here"]
    assert manifest.settings["skip_failed"] is True
    code, _, err = prep(*command)
    assert code == 2 and "was made with --skip-failed, and parts failed" in err
    assert "nothing to do" in prep(*command, "--skip-failed")[1]


@pytest.mark.slow
def test_an_estimate_of_a_hub_dataset_reads_parts_of_it_and_writes_nothing(hub, prep, tmp_path):
    rng = random.Random(1)
    texts = [[f"part {part} row {row} {rng.randbytes(5_000).hex()}" for row in range(ROWS)] for part in range(12)]
    hub.repositories["owner/large"] = {f"data/{part}.parquet": parquet(rows) for part, rows in enumerate(texts)}
    small = (
        "import data_prep.estimate, data_prep.units; data_prep.units.UNIT_BYTES = data_prep.estimate.SAMPLE_BYTES = 1"
    )
    code, out, err = prep("owner/large", "--estimate", first=small)
    assert code == 0, err
    assert re.search(r"large +12 +\S+ MB +(479|480) ", out), out  # 8 row groups of 5 rows, scaled
    assert "of it downloads" in out and "download: " in out
    assert not (tmp_path / "data").exists()
    assert hub.num_bytes_sent < 0.5 * sum(map(len, hub.repositories["owner/large"].values()))
