"""`check` finds every damage; `inspect` and `stat` show what is there."""

import json
import math
import shutil

import numpy as np
import pytest
from conftest import main, run_here, run_on_terminal, write_jsonl

from data_prep.blocks import Blocks
from data_prep.errors import UserError
from data_prep.manifest import load_manifest
from data_prep.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, small_tokenizer):
    folder = tmp_path_factory.mktemp("check")
    texts = [f"Document {number} says [EOT] and carries letters. " * 8 for number in range(60)]
    source = write_jsonl(folder / "x.jsonl", texts, url=[f"u{number}" for number in range(60)])
    options = ("--tokenizer", small_tokenizer, "--block-size", 16, "--val-fraction", 0.2, "--out", folder / "out")
    run_here("prep", source, *options)
    return folder / "out"


@pytest.fixture
def copy(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / "copy")


def test_an_intact_dataset_passes(dataset):
    shown = run_on_terminal("check", dataset)
    assert "checksums: 100%" in shown and "every count and checksum holds" in shown


@pytest.mark.parametrize(
    "name",
    ["train/data-00000.arrow", "validation/data-00000.arrow", "documents/train.arrow", "tokenizer/tokenizer.json"],
)
@pytest.mark.parametrize("position", [0.02, 0.5, 0.97])
def test_a_flipped_byte_anywhere_is_found_and_named(copy, fails, name, position):
    data = bytearray((copy / name).read_bytes())
    data[int(len(data) * position)] ^= 1
    (copy / name).write_bytes(data)
    assert f"{copy / name}: " in fails("check", copy)


@pytest.mark.parametrize(
    "name", ["train/data-00000.arrow", "documents/validation.arrow", "tokenizer/tokenizer.json", "train/state.json"]
)
def test_a_missing_or_truncated_file_is_named(copy, fails, name):
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[:-5])
    assert f"{copy / name}" in fails("check", copy)
    (copy / name).unlink()
    assert f"{copy / name}" in fails("check", copy)


@pytest.mark.parametrize("key", ["num_documents", "num_bytes", "num_tokens", "num_blocks"])
def test_a_count_of_the_manifest_that_is_wrong_is_found(copy, fails, key):
    raw = json.loads((copy / "manifest.json").read_text())
    raw["splits"]["train"][key] += 1
    (copy / "manifest.json").write_text(json.dumps(raw))
    assert "train" in fails("check", copy)


def test_a_reader_names_a_damaged_shard_and_the_command(copy):
    path = copy / "train" / "data-00000.arrow"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{path} is missing or damaged.*make check DATASET="):
        Blocks(copy, "train").read([0])


def test_a_missing_and_an_interrupted_dataset_are_told_apart(tmp_path, fails, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    assert "was never prepared. Prepare it with: make prep DATASET=fineweb\n" in fails("check", "fineweb")
    (tmp_path / "fineweb" / ".work").mkdir(parents=True)
    assert "was interrupted" in fails("check", "fineweb")
    (tmp_path / "fineweb" / "manifest.json").write_text("{")
    assert "manifest.json is damaged" in fails("check", "fineweb")


def test_every_document_ends_with_eos_and_text_never_does(dataset):
    manifest = load_manifest(dataset)
    tokens = Blocks(dataset, "train").shard_tokens(0)
    num_eos = np.count_nonzero(tokens == manifest.tokenizer.eos_token_id)
    assert 0 <= manifest.splits["train"].num_documents - num_eos <= 1  # the last may end in the remainder


def test_inspect_shows_documents_and_opens_blocks_at_the_borders(dataset, capsys):
    assert main(["inspect", str(dataset), "--documents", "2", "--show", "2", "--first-block", "1"]) == 0
    shown = capsys.readouterr().out
    assert "=== document 0: x/x.jsonl, record" in shown and ", url u" in shown
    assert "[BOT]Document" in shown and "letters. [EOT]" in shown and "says [EOT] and" in shown
    assert "=== block 0:" not in shown and "=== block 1: tokens 16 to 32" in shown and "=== block 2:" in shown
    assert "(begun earlier): x/x.jsonl, record" in shown and "--- goes on in the next block" in shown
    assert "\x1b" not in shown


def test_blocks_opened_whole_give_the_split_back(dataset, capsys):
    """All blocks, without the lines that mark borders: the text of the split, up to the last block's end."""
    blocks, vocabulary = Blocks(dataset, "train"), Vocabulary(dataset)
    options = ["--documents", "0", "--show", str(blocks.num_blocks), "--whole"]
    assert main(["inspect", str(dataset), *options]) == 0
    lines = capsys.readouterr().out.split("\n")
    text = [line for line in lines[1:-2] if line and not line.startswith(("===", "---", str(dataset)))]
    assert "".join(text) == "".join(vocabulary.texts(blocks.token_at(range(blocks.num_tokens))))


def test_inspect_colours_a_terminal_and_nothing_else(dataset, capsys):
    shown = run_on_terminal("inspect", dataset, "--documents", 0, "--show", 1)
    assert "\x1b[1m=== block 0: tokens 0 to 16\x1b[0m" in shown
    assert "\x1b[7;2m[BOT]\x1b[0mDocument" in shown and "\x1b[36m--- goes on" in shown
    run_here("inspect", dataset, "--documents", 0, "--show", 1)
    shown = capsys.readouterr().out
    assert "=== block 0: tokens 0 to 16" in shown and "\x1b" not in shown


def test_stat_gives_the_unigram_entropy_of_the_train_blocks(dataset, tmp_path, capsys):
    assert main(["stat", str(dataset), "--html", str(tmp_path / "stat.html")]) == 0
    shown = capsys.readouterr().out
    counts = np.unique(Blocks(dataset, "train").shard_tokens(0), return_counts=True)[1]
    entropy = -sum(count / counts.sum() * math.log(count / counts.sum()) for count in counts)
    assert f"unigram entropy of train: {entropy:.4f} nats per token" in shown
    split = load_manifest(dataset).splits["train"]
    assert f"{split.num_bytes / split.num_tokens:.3f} bytes per token" in shown


def test_datasets_lists_names_sizes_and_licences(capsys):
    assert main(["datasets"]) == 0
    shown = capsys.readouterr().out
    assert "stdlib" in shown and "10 B" in shown and "odc-by" in shown
