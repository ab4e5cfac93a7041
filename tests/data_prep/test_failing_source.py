"""A source that fails stops the preparation with its name; with --skip-failed it ends there, which everything says."""

import json

import pytest
from conftest import read_documents, run_here, write_jsonl

from data_prep.manifest import load_manifest


@pytest.fixture
def command(tmp_path, small_tokenizer, monkeypatch):
    """`command(source, ...)`: two sources around it, all into data/all."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data_prep.units.UNIT_BYTES", 600)
    write_jsonl(tmp_path / "first.jsonl", [f"first {number}" for number in range(20)])
    write_jsonl(tmp_path / "last.jsonl", [f"last {number}" for number in range(20)])
    fixed = (
        "--tokenizer",
        small_tokenizer,
        "--block-size",
        4,
        "--val-fraction",
        0,
        "--out",
        "data/all",
        "--num-proc",
        1,
    )
    return lambda source, *more: ("prep", "first.jsonl:5", source, "last.jsonl:3", *fixed, *more)


@pytest.mark.parametrize("num_proc", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_bad_record_ends_its_source_and_the_others_go_on(tmp_path, command, fails, capsys, num_proc):
    path = write_jsonl(tmp_path / "middle.jsonl", [f"middle {number}" for number in range(60)])
    lines = path.read_text().splitlines(keepends=True)
    lines[30] = "no JSON\n"
    path.write_text("".join(lines))
    assert "middle.jsonl: line 31: the line is not JSON" in fails(*command("middle.jsonl"))
    run_here(*command("middle.jsonl", "--skip-failed", "--num-proc", num_proc))
    out = tmp_path / "data" / "all"
    middle = [f"middle {number}" for number in range(30)]
    assert read_documents(out, "train")[:-1] == [*(f"first {n}" for n in range(5)), *middle, "last 0", "last 1"]
    manifest = load_manifest(out)
    assert "line 31" in manifest.ledger["middle"]["failed"] and manifest.settings["skip_failed"] is True
    assert manifest.ledger["middle"]["documents"]["is_beyond_cap_exact"] is False
    shown = capsys.readouterr()
    assert "warning: source middle failed and is left out from here on" in shown.err
    assert "middle: FAILED after 30 documents: " in shown.out
    run_here("check", out)
    run_here(*command("middle.jsonl", "--skip-failed"))
    assert "nothing to do" in capsys.readouterr().out
    message = fails(*command("middle.jsonl"))
    assert "was made with --skip-failed, and middle failed: it does not hold all of it" in message


def test_a_source_whose_files_cannot_be_listed_is_left_out_whole_when_asked(tmp_path, command, fails, capsys):
    source = f"file://{tmp_path}/nothing-*.parquet"
    message = fails(*command(source))
    assert "error: source nothing" in message or "error: source " in message
    assert "no file there" in message and "--skip-failed" in message
    assert not (tmp_path / "data" / "all").exists()
    run_here(*command(source, "--skip-failed"))
    ledger = load_manifest(tmp_path / "data" / "all").ledger
    failed = [entry for entry in ledger.values() if "failed" in entry]
    assert len(ledger) == 3 and len(failed) == 1 and failed[0]["documents"]["read"] == 0
    run_here("check", tmp_path / "data" / "all")


def test_when_all_sources_fail_there_is_nothing_to_make(tmp_path, fails, small_tokenizer):
    (tmp_path / "empty").mkdir()
    fixed = ("--tokenizer", small_tokenizer, "--block-size", 4, "--out", tmp_path / "out", "--skip-failed")
    assert "no source is left to read" in fails("prep", tmp_path / "empty", *fixed)
    assert not (tmp_path / "out").exists()


def test_spread_is_drawn_over_all_files_keeps_record_numbers_and_grows_with_the_cap(
    tmp_path, small_tokenizer, monkeypatch
):
    monkeypatch.setattr("data_prep.units.UNIT_BYTES", 600)
    (tmp_path / "corpus").mkdir()
    for part in range(5):
        texts = [f"part {part} line {number}" for number in range(60)]
        write_jsonl(tmp_path / "corpus" / f"{part}.jsonl", texts)
    fixed = (
        "--tokenizer",
        small_tokenizer,
        "--block-size",
        1,
        "--val-fraction",
        0,
        "--sample",
        "spread",
        "--num-proc",
        1,
    )
    found = {}
    for cap in (40, 80):
        run_here("prep", f"{tmp_path}/corpus:{cap}", *fixed, "--out", tmp_path / str(cap))
        run_here("check", tmp_path / str(cap))
        found[cap] = read_documents(tmp_path / str(cap), "train")
        assert len(found[cap]) == cap == len(set(found[cap]))
    assert found[80][:40] == found[40]
    assert len({text.split(" line")[0] for text in found[80]}) >= 4
    names = [json.loads(line)["name"] for line in (tmp_path / "80" / "documents" / "files.jsonl").open()]
    from data_prep.documents import DocumentMap

    for document, text in zip(DocumentMap(tmp_path / "80", "train").between(0, 10**9), found[80], strict=True):
        part, line = text.removeprefix("part ").split(" line ")
        assert document.source.endswith(names[int(part)]) and document.record == int(line)
