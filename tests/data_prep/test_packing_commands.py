"""Packed datasets from the command line: what packing costs is said, damage is found, another packing is refused."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import main, run_here, write_jsonl

from data_prep.manifest import load_manifest, sha256_of
from data_prep.packing import BEST_FIT, PAD
from data_prep.pieces import SCHEMA, pieces_path


def arguments(source: Path, tokenizer: Path, out: Path) -> list[str]:
    fixed = ("--tokenizer", tokenizer, "--block-size", 32, "--val-fraction", 0.1, "--packing", BEST_FIT)
    return [str(each) for each in ("prep", source, *fixed, "--out", out)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, small_tokenizer):
    folder = tmp_path_factory.mktemp("packed")
    texts = [f"Document {number} says [EOT] and carries letters. " * (number % 5 + 1) for number in range(40)]
    source = write_jsonl(folder / "x.jsonl", texts)
    run_here(*arguments(source, small_tokenizer, folder / "out"))
    return folder / "out"


@pytest.fixture
def copy(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / "copy")


@pytest.mark.parametrize(
    "name", ["train/lengths.npy", "documents/train-pieces.arrow", "documents/validation-pieces.arrow"]
)
def test_a_damaged_or_missing_file_is_named(copy, fails, name):
    data = bytearray((copy / name).read_bytes())
    data[-20] ^= 1
    (copy / name).write_bytes(data)
    assert f"{copy / name}: its content changed" in fails("check", copy)
    (copy / name).unlink()
    assert f"{copy / name}: is missing" in fails("check", copy)
    if "pieces" in name:
        split = name.split("/")[1].split("-")[0]
        assert f"{copy / name} is missing or damaged" in fails("inspect", copy, "--split", split)


@pytest.mark.parametrize("key", ["num_padding_tokens", "num_cut", "num_long", "lengths_sha256"])
def test_a_count_of_the_manifest_that_is_wrong_is_found(copy, fails, key):
    manifest = json.loads((copy / "manifest.json").read_text())
    value = manifest["splits"]["train"][key]
    manifest["splits"]["train"][key] = None if isinstance(value, str) else value + 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert "of its facts do not hold" in fails("check", copy)


def test_pieces_that_were_exchanged_are_found_though_every_checksum_is_right(copy, fails):
    """The piece map says that two documents lie where the other one does; its checksum is brought into line."""
    path = pieces_path(copy, "train")
    with pa.memory_map(str(path)) as file:
        (batch,) = list(pa.ipc.open_stream(file))
    position, token = (batch.column(name).to_pylist() for name in SCHEMA.names)
    i, j = 0, len(token) - 1
    token[i], token[j] = token[j], token[i]
    with open(path, "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        writer.write_batch(
            pa.record_batch([pa.array(position, pa.uint64()), pa.array(token, pa.uint64())], schema=SCHEMA)
        )
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["splits"]["train"]["pieces_sha256"] = sha256_of(path)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert "where the piece map says" in fails("check", copy)


def test_another_packing_is_refused_with_the_command_beside(dataset, small_tokenizer, fails):
    source = dataset.parent / "x.jsonl"
    words = [word for word in arguments(source, small_tokenizer, dataset) if word not in ("--packing", BEST_FIT)]
    message = fails(*words)
    assert "holds a dataset made with packing best_fit but packing concat is asked for" in message
    assert f"OUT={dataset}-concat PACKING=concat" in message


def test_another_packing_is_refused_for_an_interrupted_preparation_too(tmp_path, small_tokenizer, monkeypatch, fails):
    def stop(*_):
        raise KeyboardInterrupt

    words = arguments(write_jsonl(tmp_path / "x.jsonl", ["some text"] * 20), small_tokenizer, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.prep.write_dataset", stop)
        assert main(words) == 130
    message = fails(*(PAD if word == BEST_FIT else word for word in words))
    assert "an interrupted preparation with packing best_fit but packing pad" in message
    run_here(*words)


def test_what_packing_costs_is_printed(tmp_path, small_tokenizer, capsys):
    texts = ["Z" * 3, "Q" * 9, "J" * 4] * 10  # letters it has not learned: with [BOT] and [EOT] 5, 11 and 6 tokens
    source, costs = write_jsonl(tmp_path / "x.jsonl", texts), {}
    for packing in ("concat", BEST_FIT, PAD):
        out = tmp_path / packing
        options = ("--tokenizer", small_tokenizer, "--block-size", 11, "--val-fraction", 0, "--packing", packing)
        run_here("prep", source, *options, "--out", out)
        printed = capsys.readouterr().out
        run_here("stat", out)
        stat, train = capsys.readouterr().out, load_manifest(out).splits["train"]
        costs[packing] = train.num_cut, train.num_padding_tokens
        cut_line = f"cut by a block's border: {train.num_cut} of 30 documents"
        assert cut_line in printed and cut_line in stat and f"({packing})" in stat
        share = f"padding: {costs[packing][1]} positions, {100 * costs[packing][1] / train.num_blocks / 11:.3f} %"
        assert (share in printed) == (share in stat) == (packing != "concat")
    # best_fit: ten blocks of 11, and ten of 5 + 6; pad: thirty blocks, of which twenty have 6 or 5 tokens of padding
    assert costs == {"concat": (10, 0), BEST_FIT: (0, 0), PAD: (0, 110)}


def test_a_datasets_yaml_names_its_packing(tmp_path, monkeypatch, small_tokenizer, fails):
    monkeypatch.setattr("data_prep.catalog.FOLDER", tmp_path)
    source = write_jsonl(tmp_path / "x.jsonl", ["some text"] * 9)
    entry = f"""description: x\nlicence: cc0-1.0\nsource_of_numbers: counted\npath: {source}
default_tokenizer: {small_tokenizer}\ndefault_block_size: 32\npacking: """
    (tmp_path / "packed.yaml").write_text(entry + "pad\n")
    run_here("prep", "packed", "--out", tmp_path / "out", "--val-fraction", 0)
    assert load_manifest(tmp_path / "out").packing == PAD
    assert load_manifest(tmp_path / "out").splits["train"].num_blocks == 9
    (tmp_path / "wrong.yaml").write_text(entry + "tight\n")
    message = fails("prep", "wrong", "--out", tmp_path / "other")
    assert "packing is 'tight' but must be one of concat, best_fit, pad" in message
