"""What bad input gets: one message that names file, place and remedy, exit code 2, nothing written, nothing lost."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import content_of, read_documents, run_here, write_jsonl

from data_prep.manifest import load_manifest

GOOD = "a good document " * 20


@pytest.fixture
def refused(fails, tmp_path, small_tokenizer, monkeypatch):
    """`refused(path, ...)`: prep ends with code 2 and leaves the folder as it was; the message."""
    monkeypatch.chdir(tmp_path)

    def run(*sources: object, tokenizer: object = small_tokenizer) -> str:
        before = content_of(tmp_path)
        message = fails("prep", *sources, "--tokenizer", tokenizer, "--block-size", 8, "--out", "data/out")
        assert content_of(tmp_path) == before and not (tmp_path / "data").exists()
        return message

    return run


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.txt", b"", "x.txt: the file is empty. Mend or remove it"),
        ("x.jsonl", b"", "x.jsonl: the file is empty"),
        ("x.txt", b"ab\0cd", "x.txt: the file is binary"),
        ("x.md", b"caf\xe9", "x.md: the file is not utf-8 (byte 3"),
        ("x.jsonl", b'{"text": "a"}\n\n{"text": }\n', "x.jsonl: line 3: the line is not JSON"),
        ("x.jsonl", b'{"text": "a"}\n["b"]\n', "x.jsonl: line 2: the line is a JSON list, not an object"),
        ("x.jsonl", b'{"text": "a"}\n{"text": null}\n', "x.jsonl: line 2: 'text' is null"),
        ("x.jsonl", b'{"text": 12}\n', "x.jsonl: line 1: 'text' is 12, a int, not text"),
        ("x.jsonl", b'{"text": "\\ud800"}\n', "x.jsonl: line 1: 'text' is no valid Unicode"),
        ("x.jsonl", b'{"text": "caf\xe9"}\n', "x.jsonl: line 1: the line is not UTF-8"),
        ("x.jsonl", b'{"body": "a", "id": 1}\n', "line 1: there is no column 'text'; there are: 'body', 'id'"),
        (
            "x.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:60],
            "x.jsonl.gz: line 1: the rest of the file cannot be decompressed",
        ),
        ("x.jsonl.gz", b"no gzip at all", "x.jsonl.gz: line 1: the rest of the file cannot be decompressed"),
        ("x.jsonl.zst", b"no zstd at all", "x.jsonl.zst: line 1: the rest of the file cannot be decompressed"),
        ("x.parquet", b"PAR1 and then nothing", "x.parquet: the Parquet file cannot be read"),
        ("x.pdf", b"%PDF", "x.pdf: the extension says no format that can be read. Readable are .txt"),
    ],
)
def test_a_bad_file_is_named_with_the_place(tmp_path, refused, name, data, message):
    (tmp_path / name).write_bytes(data)
    write_jsonl(tmp_path / "good.jsonl", [GOOD])
    assert message in refused("good.jsonl", name)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pa.array(["a", None]), "record 2: 'text' is null"),
        (pa.array([1, 2]), "record 1: 'text' is 1, a int, not text"),
        (pa.array([b"caf\xe9"]).view(pa.string()), "record 1: 'text' is not UTF-8"),
    ],
)
def test_a_bad_value_in_a_parquet_file_is_named(tmp_path, refused, values, message):
    pq.write_table(pa.table({"text": values}), tmp_path / "x.parquet")
    assert f"x.parquet: {message}" in refused("x.parquet")


def test_a_parquet_file_without_the_column_lists_those_it_has(tmp_path, refused):
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), tmp_path / "x.parquet")
    message = refused("x.parquet")
    assert "--text-column is text but the file has no such column. Its columns: body, id." in message


def test_a_damaged_row_group_is_named(tmp_path, refused):
    pq.write_table(
        pa.table({"text": [GOOD * 50] * 9}), tmp_path / "x.parquet", use_dictionary=False, compression="zstd"
    )
    data = bytearray((tmp_path / "x.parquet").read_bytes())
    data[10:60] = b"\xff" * 50
    (tmp_path / "x.parquet").write_bytes(data)
    assert "x.parquet: record 1: the rest of the file cannot be read as Parquet" in refused("x.parquet")


def test_several_problems_are_told_at_once(tmp_path, refused):
    (tmp_path / "x.jsonl").write_text('{"text": null}\n{"text": 1}\n' * 10)
    message = refused("x.jsonl")
    assert message.count("x.jsonl: line") == 5 and "and more" in message


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.txt", "missing.txt: no such file or folder"),
        ("*.jsonl", "*.jsonl: no file matches"),
        ("finweb", "Did you mean fineweb"),
        ("empty", "empty: no file to read there"),
        ("x.txt:many", "the part after the colon caps the number of documents but 'many' is not a count"),
        ("x.txt:0", "caps the documents at 0"),
    ],
)
def test_a_source_that_is_not_there_is_refused(tmp_path, refused, source, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.txt").write_text(GOOD)
    assert message in refused(source)


def test_a_bare_name_never_goes_to_the_hub(tmp_path, refused):
    message = refused("imdb")
    assert "neither a listed dataset nor a file or folder here" in message and "owner/name" in message


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ("train:many", "--tokenizer is train:many but 'many' is not a count"),
        ("train:100", "a byte-level vocabulary has at least 260 entries"),
        ("train:50000", "the vocabulary size is 50,000 but the text yields only"),
        ("./nowhere", "--tokenizer ./nowhere: not a tokenizer folder (no such folder)"),
        ("empty", "--tokenizer empty: not a tokenizer folder"),
        ("x.txt", "--tokenizer is x.txt but that is a file"),
        ("owner/name", "--tokenizer owner/name: cannot be loaded from the Hub"),
    ],
)
def test_a_tokenizer_that_cannot_be_had_is_refused(tmp_path, refused, tokenizer, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.txt").write_text(GOOD)
    assert message in refused("x.txt", tokenizer=tokenizer)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path, refused, small_tokenizer):
    (tmp_path / "x.txt").write_text(GOOD)
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "tokenizer.json").write_bytes((small_tokenizer / "tokenizer.json").read_bytes())
    (tmp_path / "t" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert "has no eos_token, so the end of a document cannot be written" in refused("x.txt", tokenizer="t")


def test_text_shorter_than_one_block_is_refused_with_a_block_size_that_fits(tmp_path, fails, small_tokenizer):
    (tmp_path / "x.txt").write_text("few words")
    out = tmp_path / "out"
    fixed = ("prep", tmp_path / "x.txt", "--tokenizer", small_tokenizer, "--val-fraction", 0, "--out", out)
    message = fails(*fixed, "--block-size", 512)
    assert "block_size is 512 but the train documents have only" in message and not out.exists()
    run_here(*fixed, "--block-size", message.rsplit("BLOCK_SIZE=")[1].rstrip(".\n"))


def test_bad_records_are_skipped_and_counted_when_asked(tmp_path, small_tokenizer):
    rows = [{"text": GOOD}, {"text": None}, {"text": ""}, {"body": 1}, {"text": "\ud800"}, {"text": GOOD + "!"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "no JSON\n")
    (tmp_path / "broken.jsonl.gz").write_bytes(b"no gzip at all")
    (tmp_path / "broken.parquet").write_bytes(b"no Parquet at all")
    (tmp_path / "empty.txt").write_bytes(b"")
    out = tmp_path / "out"
    fixed = ("--tokenizer", small_tokenizer, "--block-size", 1, "--val-fraction", 0, "--out", out)
    run_here("prep", f"{tmp_path}/*.*", *fixed, "--on-bad-record", "skip")
    assert read_documents(out, "train") == [GOOD, GOOD + "!"]
    ledger = next(iter(json.loads((out / "manifest.json").read_text())["ledger"].values()))["documents"]
    assert (ledger["read"], ledger["empty"], ledger["bad"], ledger["train"]) == (10, 2, 6, 2)


def test_a_document_that_is_too_long_is_a_bad_record_with_its_size(tmp_path, fails, small_tokenizer, monkeypatch):
    monkeypatch.setattr("data_prep.readers.MAX_DOCUMENT_BYTES", 100)  # of 2**30
    folder, short = tmp_path / "notes", "a short one"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [short, "é" * 60, short])
    pq.write_table(pa.table({"text": [short, "x" * 101]}), folder / "b.parquet")
    (folder / "c.txt").write_text(short + "\n" + "y" * 150)
    fixed = ("--tokenizer", small_tokenizer, "--block-size", 1, "--out", tmp_path / "out", "--num-proc", 1)
    message = fails("prep", folder, *fixed)
    says = "bytes but a document may have 100 (1 GiB) at most"
    assert f"a.jsonl: line 2: 'text' has 120 {says}" in message
    assert f"b.parquet: record 2: 'text' has 101 {says}" in message
    assert f"c.txt: the file is one document and has {151 + len(short)} {says}" in message
    assert "cut it into several. Mend or remove it, or leave such records out with --on-bad-record skip" in message
    assert f"c.txt: line 2: the line has 150 {says}" in fails("prep", folder / "c.txt", "--split-lines", *fixed)
    run_here("prep", folder, *fixed, "--on-bad-record", "skip")
    ledger = load_manifest(tmp_path / "out").ledger["notes"]["documents"]
    assert (ledger["read"], ledger["bad"], ledger["train"] + ledger["validation"]) == (6, 3, 3)


def test_skipping_bad_records_after_all_costs_only_the_units_that_have_some(
    tmp_path, fails, small_tokenizer, monkeypatch
):
    from data_prep import encode, workers

    monkeypatch.setattr("data_prep.prep.READ_TWICE_BYTES", 0)  # as a corpus too large to be read twice
    (tmp_path / "notes").mkdir()
    for name in "abcd":
        write_jsonl(tmp_path / "notes" / f"{name}.jsonl", [GOOD + name])
    with open(tmp_path / "notes" / "c.jsonl", "a") as file:
        file.write("no JSON\n")
    encoded = []
    monkeypatch.setattr(
        workers,
        "encode_unit",
        lambda job, report: encoded.append(job.unit.pieces[0].path[-7]) or encode.encode_unit(job, report),
    )
    command = ("prep", tmp_path / "notes", "--tokenizer", small_tokenizer, "--block-size", 8, "--num-proc", 1)
    assert "c.jsonl: line 2" in fails(*command, "--out", tmp_path / "out")
    run_here(*command, "--out", tmp_path / "out", "--on-bad-record", "skip")
    assert encoded == ["a", "b", "c", "c", "d"]
    run_here(*command, "--out", tmp_path / "new", "--on-bad-record", "skip")
    assert content_of(tmp_path / "new" / "train") == content_of(tmp_path / "out" / "train")


def test_a_folder_of_somebody_else_is_not_touched(tmp_path, fails, small_tokenizer):
    source = write_jsonl(tmp_path / "x.jsonl", [GOOD])
    (tmp_path / "model" / "tokenizer").mkdir(parents=True)
    (tmp_path / "model" / "tokenizer" / "tokenizer.json").write_text("mine")
    message = fails("prep", source, "--tokenizer", small_tokenizer, "--block-size", 8, "--out", tmp_path / "model")
    assert "is not empty and was not made by prep" in message
    assert (tmp_path / "model" / "tokenizer" / "tokenizer.json").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, fails, small_tokenizer):
    source = write_jsonl(tmp_path / "x.jsonl", [GOOD])
    (tmp_path / "file").write_text("not a folder")
    message = fails(
        "prep", source, "--tokenizer", small_tokenizer, "--block-size", 8, "--out", tmp_path / "file" / "out"
    )
    assert "cannot be written (Not a directory)" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_folders_without_permission_are_refused(tmp_path, fails, small_tokenizer):
    source = write_jsonl(tmp_path / "corpus.jsonl", [GOOD])
    (tmp_path / "closed").mkdir(mode=0o500)
    fixed = ("--tokenizer", small_tokenizer, "--block-size", 8, "--out")
    assert "cannot be written (Permission denied)" in fails("prep", source, *fixed, tmp_path / "closed" / "out")
    (tmp_path / "unreadable").mkdir(mode=0o000)
    assert "cannot be read" in fails("prep", tmp_path / "unreadable", *fixed, tmp_path / "out")


@pytest.fixture
def complete(tmp_path, small_tokenizer, monkeypatch) -> Path:
    """data/notes, complete, of two files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    write_jsonl(tmp_path / "notes" / "a.jsonl", [GOOD])
    write_jsonl(tmp_path / "notes" / "b.jsonl", [GOOD + "!"])
    run_here("prep", "notes", "--tokenizer", small_tokenizer, "--block-size", 8)
    return tmp_path / "data" / "notes"


def test_another_block_size_or_tokenizer_is_refused_with_the_remedy(tmp_path, complete, fails, small_tokenizer):
    before = content_of(complete)
    message = fails("prep", "notes", "--tokenizer", small_tokenizer, "--block-size", 16)
    assert "with block_size 8 but block_size 16 is asked for" in message
    assert "make prep DATASET=notes OUT=data/notes-16 BLOCK_SIZE=16" in message
    message = fails("prep", "notes", "--tokenizer", "train:300", "--block-size", 8)
    assert "make prep DATASET=notes OUT=data/notes-train-300 TOKENIZER=train:300" in message
    message = fails("prep", "notes", "--tokenizer", small_tokenizer, "--block-size", 8, "--max-docs", 1)
    assert "was made with max_docs None but 1 is asked for" in message
    message = fails("prep", "notes", "--tokenizer", small_tokenizer, "--block-size", 8, "--text-column", "body")
    assert "was made with text_column 'text' but 'body' is asked for" in message
    assert content_of(complete) == before
    run_here("prep", "notes", "--tokenizer", complete / "tokenizer", "--block-size", 8)  # its own tokenizer is the same


def test_changed_input_is_refused_and_says_what_changed(tmp_path, complete, fails, small_tokenizer):
    before = content_of(complete)
    write_jsonl(tmp_path / "notes" / "a.jsonl", [GOOD + "?"])
    write_jsonl(tmp_path / "notes" / "c.jsonl", [GOOD])
    (tmp_path / "notes" / "b.jsonl").unlink()
    message = fails("prep", "notes", "--tokenizer", small_tokenizer, "--block-size", 8)
    assert "1 file changed (a.jsonl), 1 file new (c.jsonl), 1 file gone (b.jsonl)" in message
    assert "OUT=data/notes-new" in message and "rm -r data/notes" in message
    assert content_of(complete) == before


def test_a_bad_record_that_is_mended_costs_only_its_own_unit(tmp_path, fails, small_tokenizer, monkeypatch):
    from data_prep import encode, workers

    monkeypatch.setattr("data_prep.prep.READ_TWICE_BYTES", 0)  # as a corpus too large to be read twice
    (tmp_path / "notes").mkdir()
    for name in "abc":
        write_jsonl(tmp_path / "notes" / f"{name}.jsonl", [GOOD + name])
    good = (tmp_path / "notes" / "b.jsonl").read_bytes()
    (tmp_path / "notes" / "b.jsonl").write_bytes(good + b"no JSON\n")
    command = ("prep", tmp_path / "notes", "--tokenizer", small_tokenizer, "--block-size", 8, "--out", tmp_path / "out")
    assert "b.jsonl: line 2: the line is not JSON" in fails(*command)
    encoded = []
    monkeypatch.setattr(
        workers,
        "encode_unit",
        lambda job, report: encoded.append(job.unit.pieces[0].path) or encode.encode_unit(job, report),
    )
    (tmp_path / "notes" / "b.jsonl").write_bytes(good)
    run_here(*command)
    assert [Path(path).name for path in encoded] == ["b.jsonl", "c.jsonl"]


@pytest.mark.parametrize(
    "arguments", [["--block-size", "0"], ["--block-size", "-4"], ["--num-proc", "0"], ["--max-tokens", "1.5"]]
)
def test_a_number_out_of_range_is_refused(tmp_path, run_cli, arguments):
    result = run_cli(["-m", "data_prep", "prep", "stdlib", *arguments], cwd=tmp_path)
    assert result.code == 2 and "Traceback" not in result.stderr and arguments[0] in result.stderr


def test_a_validation_fraction_out_of_range_is_refused(tmp_path, fails):
    for value in ("1", "-0.1", "nan"):
        assert "must be at least 0 and below 1" in fails(
            "prep", "stdlib", f"--val-fraction={value}", "--out", tmp_path / "out"
        )
