"""Exact duplicates leave, documents and lines, as a plain loop over the corpus removes them."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from conftest import content_of, read_documents, run_here, write_rows
from hub_server import serve
from processes import stop_at_every_rename
from test_hub_source import parquet

from data_prep.duplicates import Seen
from data_prep.encode import text_hash
from data_prep.ledger import find_imbalances
from data_prep.manifest import load_manifest
from data_prep.removed import iter_removed, read_samples

FILTERS = "exact_duplicates: true\nduplicate_lines: {min_characters: 8}\n"
MIN_CHARACTERS = 8
WORDS = ("river", "map", "town", "bread", "walk", "old")


@pytest.fixture
def filters(tmp_path) -> Path:
    path = tmp_path / "filters.yaml"
    path.write_text(FILTERS)
    return path


def make_texts(num: int, seed: int = 5) -> list[str]:
    """Texts of lines from a small stock: many lines and some documents stand there twice."""
    rng = random.Random(seed)
    stock = [" ".join(rng.choices(WORDS, k=rng.randint(1, 4))) for _ in range(num)]
    texts = ["\n".join(rng.choices(stock, k=rng.randint(1, 4))) for _ in range(num)]
    return [rng.choice(texts[: i + 1]) if rng.random() < 0.3 else text for i, text in enumerate(texts)]


def write_files(folder: Path, texts: list[str], per_file: int) -> Path:
    """JSON lines files, so as many units."""
    folder.mkdir()
    for number, start in enumerate(range(0, len(texts), per_file)):
        rows = [{"text": text, "score": i % 3} for i, text in enumerate(texts[start : start + per_file], start)]
        write_rows(folder / f"{number:02}.jsonl", rows)
    return folder


class Loop:
    """What the filters say, once more by hand."""

    def __init__(self) -> None:
        self.texts: set[str] = set()
        self.lines: set[str] = set()

    def read(self, text: str) -> tuple[str, str]:
        """What becomes of the next document: its text, and the rule that leaves it out, or ""."""
        if text in self.texts:
            return text, "exact_duplicates"
        self.texts.add(text)
        kept = []
        for line in text.split("\n"):
            if len(line.strip()) >= MIN_CHARACTERS and line.strip() in self.lines:
                continue
            if len(line.strip()) >= MIN_CHARACTERS:
                self.lines.add(line.strip())
            kept.append(line)
        after = "\n".join(kept)
        return after, "" if after.strip() or after == text else "duplicate_lines: nothing left"


def arguments(source: object, tokenizer: object, out: Path, filters: Path, *more: object) -> list[str]:
    sources = source if isinstance(source, list) else [source]
    fixed = ("--tokenizer", tokenizer, "--block-size", 1, "--val-fraction", 0.2, "--num-proc", 1, "--out", out)
    return [str(each) for each in ("prep", *sources, "--filters", filters, *fixed, *more)]


def check_against(out: Path, outcomes: list[tuple[str, str]]) -> dict:
    """The dataset holds what the loop kept, in its order and on the side that its hash says; the whole ledger."""
    manifest = load_manifest(out)
    threshold = manifest.validation["threshold"]
    kept = [text for text, rule in outcomes if not rule]
    for split in ("train", "validation"):
        expected = [text for text in kept if (text_hash(text.encode()) < threshold) == (split == "validation")]
        assert read_documents(out, split) == expected != []
    assert find_imbalances(manifest.ledger, manifest.splits, 1) == []
    return manifest.ledger


def test_what_is_left_and_what_is_counted_is_what_a_loop_over_the_documents_says(tmp_path, small_tokenizer, filters):
    texts = make_texts(300)
    loop = Loop()
    outcomes = [loop.read(text) for text in texts]
    out = tmp_path / "out"
    run_here(*arguments(write_files(tmp_path / "x", texts, 100), small_tokenizer, out, filters))
    run_here("check", out)
    entry = check_against(out, outcomes)["x"]
    rules = [rule for _, rule in outcomes if rule]
    assert entry["documents"]["filtered"] == {rule: rules.count(rule) for rule in set(rules)}
    assert len(set(rules)) == 2
    flow = entry["filters"]["exact_duplicates"]
    assert flow["documents_before"] == 300 and flow["bytes_before"] == sum(map(len, texts))
    assert flow["documents_after"] == 300 - rules.count("exact_duplicates")
    flow = entry["filters"]["duplicate_lines"]
    assert flow["bytes_after"] == sum(len(text) for text, rule in outcomes if not rule)
    is_changed = [a != b and not rule for a, (b, rule) in zip(texts, outcomes, strict=True)]
    assert flow["documents_changed"] == sum(is_changed) > 20


def test_lines_of_code_stay_unless_asked(tmp_path, small_tokenizer, filters):
    folder = tmp_path / "x"
    folder.mkdir()
    for name in ("a.py", "b.py", "c.txt", "d.txt"):
        (folder / name).write_text(f"import the_same_module\n{name}\n")
    for code, num_changed in (("false", 1), ("true", 3)):
        filters.write_text(f"duplicate_lines: {{min_characters: 8, code: {code}}}")
        run_here(*arguments(folder, small_tokenizer, tmp_path / code, filters))
        flow = load_manifest(tmp_path / code).ledger["x"]["filters"]["duplicate_lines"]
        assert flow["documents_changed"] == num_changed


def test_seen_says_what_a_set_says():
    rng = random.Random(3)
    seen, known = Seen(), set()
    for _ in range(60):
        hashes = [rng.randrange(400) for _ in range(rng.randrange(30))]
        expected = []
        for each in hashes:
            expected.append(each in known)
            known.add(each)
        assert seen.add(np.array(hashes, dtype=np.uint64)).tolist() == expected
    assert len(seen.runs) < 12 and sum(map(len, seen.runs)) == len(known)


def test_workers_and_the_number_of_units_at_once_change_no_byte(tmp_path, small_tokenizer, filters, monkeypatch):
    folder = write_files(tmp_path / "x", make_texts(300), 30)
    run_here(*arguments(folder, small_tokenizer, tmp_path / "1" / "out", filters))
    run_here(*arguments(folder, small_tokenizer, tmp_path / "3" / "out", filters, "--num-proc", 3))
    monkeypatch.setattr("data_prep.jobs.UNITS_AT_ONCE", 3)
    run_here(*arguments(folder, small_tokenizer, tmp_path / "few" / "out", filters, "--num-proc", 2))
    assert content_of(tmp_path / "1") == content_of(tmp_path / "3") == content_of(tmp_path / "few")


def test_a_stop_at_every_rename_continues_to_the_same_bytes(tmp_path, small_tokenizer, filters, monkeypatch):
    folder = write_files(tmp_path / "x", make_texts(60), 30)
    run_here(*arguments(folder, small_tokenizer, tmp_path / "reference" / "out", filters))
    expected = content_of(tmp_path / "reference" / "out")

    def command(out: Path) -> list[str]:
        return arguments(folder, small_tokenizer, out, filters)

    num_tries = stop_at_every_rename(command, tmp_path, expected, monkeypatch)
    assert num_tries >= 2 * (2 + 5) + 8  # of two units: screened in two renames, encoded in five


def test_a_document_beyond_the_cap_of_its_source_is_no_duplicate_of_another(tmp_path, small_tokenizer, filters):
    first, second = make_texts(200, seed=6), make_texts(200, seed=7)
    second[5:150:10] = first[50:195:10]  # most of them beyond the cap
    folders = [write_files(tmp_path / "a", first, 20), write_files(tmp_path / "b", second, 20)]
    loop, outcomes = Loop(), []
    for text in first:
        if sum(not rule for _, rule in outcomes) == 30:
            break
        outcomes.append(loop.read(text))
    num_read = len(outcomes)
    assert num_read < 100, "the cap is inside the corpus"
    outcomes += [loop.read(text) for text in second]
    for num_proc in (1, 3):
        out = tmp_path / str(num_proc) / "out"
        specs = [f"{folders[0]}:30", str(folders[1])]
        run_here(*arguments(specs, small_tokenizer, out, filters, "--num-proc", num_proc))
        ledger = check_against(out, outcomes)
        assert ledger["a"]["documents"]["read"] == num_read
    assert content_of(tmp_path / "1") == content_of(tmp_path / "3")


@pytest.mark.parametrize("cap", [("--max-docs", 50), ("--max-tokens", 1000)])
def test_a_cap_on_everything_takes_the_first_documents_that_are_left(tmp_path, small_tokenizer, filters, cap):
    folder = write_files(tmp_path / "x", make_texts(200), 20)
    run_here(*arguments(folder, small_tokenizer, tmp_path / "all" / "out", filters))
    run_here(*arguments(folder, small_tokenizer, tmp_path / "some" / "out", filters, *cap))
    run_here("check", tmp_path / "some" / "out")
    for split in ("train", "validation"):
        some = read_documents(tmp_path / "some" / "out", split)
        assert some == read_documents(tmp_path / "all" / "out", split)[: len(some)] != []
    ledger = load_manifest(tmp_path / "some" / "out").ledger["x"]
    if cap[0] == "--max-docs":
        assert ledger["documents"]["train"] + ledger["documents"]["validation"] == 50
    else:
        assert 1000 <= ledger["train"]["num_tokens"] + ledger["validation"]["num_tokens"] < 1100


def test_the_ledger_of_each_bucket_balances(tmp_path, small_tokenizer, filters):
    texts = make_texts(200)
    folder = write_files(tmp_path / "x", texts, 50)
    out = tmp_path / "out"
    run_here(*arguments(folder, small_tokenizer, out, filters, "--buckets", "low=score < 1", "high=score == 1"))
    loop = Loop()
    in_bucket = [i for i in range(200) if i % 3 < 2]  # what is in no bucket is no duplicate of anything
    outcomes = {i: loop.read(texts[i]) for i in in_bucket}
    for bucket, score in (("low", 0), ("high", 1)):
        run_here("check", out / bucket)
        entry = load_manifest(out / bucket).ledger["x"]
        here = [outcomes[i] for i in in_bucket if i % 3 == score]
        assert entry["filters"]["exact_duplicates"]["documents_before"] == len(here)
        rules = [rule for _, rule in here if rule]
        other = {"low": "in high", "high": "in low"}[bucket]
        assert entry["documents"]["filtered"] == {
            other: sum(i % 3 == 1 - score for i in range(200)),
            "in no bucket": sum(i % 3 == 2 for i in range(200)),
            "no score": 0,
            **{rule: rules.count(rule) for rule in set(rules)},
        }
        check_against(out / bucket, here)


def test_an_official_validation_split_stays_whole_and_what_equals_it_leaves_train(
    tmp_path, small_tokenizer, filters, run_cli
):
    def articles(texts: list[str]) -> list[str]:
        return [f" = Article {number} = \n{text}\n" for number, text in enumerate(texts)]

    def parts(documents: list[str]) -> list[str]:
        return [part for document in documents for part in document.split("\n", 1)]

    def as_file(documents: list[str]) -> bytes:  # a heading begins a document; its lines follow
        return parquet([f"{part}\n" if part.startswith(" = ") else part for part in parts(documents)])

    train, held_out = articles(make_texts(60)), articles(make_texts(40, seed=8))
    train[10:20], held_out[30:] = held_out[:10], held_out[:10]
    card = "---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n"
    card += "".join(f"  - split: {split}\n    path: {split}.parquet\n" for split in ("train", "validation"))
    files = {"README.md": f"{card}---\n".encode(), "train.parquet": as_file(train)}
    with serve({"Salesforce/wikitext": {**files, "validation.parquet": as_file(held_out)}}) as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
        options = ("--tokenizer", small_tokenizer, "--block-size", 1, "--filters", filters, "--out", "out")
        result = run_cli(["-m", "data_prep", "prep", "wikitext2", *options], cwd=tmp_path, env=env)
    assert result.code == 0, result.stderr
    loop = Loop()
    for text in held_out:
        loop.read(text)
    outcomes = [loop.read(text) for text in train]
    assert read_documents(tmp_path / "out", "validation") == held_out
    assert read_documents(tmp_path / "out", "train") == [text for text, rule in outcomes if not rule]
    assert all(rule for _, rule in outcomes[10:20])
    run_here("check", tmp_path / "out")


@pytest.mark.slow
def test_files_elsewhere_are_there_for_both_readings_and_no_more_are_fetched_than_a_cap_needs(
    tmp_path, small_tokenizer, filters, run_cli
):
    texts = make_texts(60)
    files = {f"data/train-{n:05}-of-00003.parquet": parquet(texts[n * 20 : n * 20 + 20]) for n in range(3)}
    loop = Loop()
    outcomes = [loop.read(text) for text in texts]
    with serve({"owner/plain": files}) as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        options = ("--tokenizer", small_tokenizer, "--block-size", 1, "--filters", filters, "--val-fraction", 0)
        for spec, out, num_files in (("owner/plain:5", "some", 1), ("owner/plain", "all", 3)):
            result = run_cli(["-m", "data_prep", "prep", spec, *options, "--out", out], cwd=tmp_path, env=env)
            assert result.code == 0 and len(hub.downloads) == num_files, result.stderr
    kept = [text for text, rule in outcomes if not rule]
    assert read_documents(tmp_path / "some", "train") == kept[:5]
    assert read_documents(tmp_path / "all", "train") == kept
    assert not list(tmp_path.glob("*/.work"))


def test_what_was_removed_is_shown_and_damage_to_it_is_noticed(tmp_path, small_tokenizer, filters, capsys, fails):
    folder = write_files(tmp_path / "x", make_texts(100), 50)
    out = tmp_path / "out"
    run_here(*arguments(folder, small_tokenizer, out, filters))
    shown = capsys.readouterr().out
    num = load_manifest(out).ledger["x"]["documents"]["filtered"]["exact_duplicates"]
    row = next(line.split() for line in shown.splitlines() if line.startswith("exact_duplicates"))
    assert row[:5] == ["exact_duplicates", "100", str(num), "0", str(100 - num)]
    run_here("inspect", out, "--removed")
    shown = capsys.readouterr().out
    assert shown.count("=== exact_duplicates") == 1 and "=== duplicate_lines" in shown and "--- x/0" in shown
    assert len([line for line in iter_removed(out) if line.startswith("--- ")]) <= 3 * 8
    run_here("stat", out)
    page = (out / "stat.html").read_text(encoding="utf-8")
    samples = page[page.index("Samples of what filters left out or changed") :]
    assert "<h3>exact_duplicates</h3>" in samples and "<h3>duplicate_lines</h3>" in samples and "x/0" in samples
    assert read_samples(out, 1)["duplicate_lines"][0][1].count("\n-") >= 1
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["ledger"]["x"]["documents"]["filtered"]["exact_duplicates"] -= 1
    (out / "manifest.json").write_text(json.dumps(manifest))
    message = fails("check", out)
    assert f"has {num} of x by 'exact_duplicates' but the ledger says {num - 1}" in message
    assert "exact_duplicates read 100 documents" in message
    (out / "documents" / "samples.jsonl").write_text("")
    assert "samples.jsonl: its content changed" in fails("check", out)


def test_what_does_not_go_with_filters_is_refused(tmp_path, small_tokenizer, filters, fails, capsys):
    source = write_files(tmp_path / "x", make_texts(30), 30)
    command = arguments(source, small_tokenizer, tmp_path / "out", filters)
    run_here(*command, "--estimate")
    assert "without what the filters leave out" in capsys.readouterr().out
    message = fails(*command, "--tokenized", "documents")
    assert "x is tokenized already: filters are for text" in message
    pytest.importorskip("datatrove")
    message = fails(*command, "--executor", "local")
    assert "exact_duplicates, duplicate_lines decide in the order of all documents" in message


def test_the_same_filters_again_do_nothing_and_others_are_refused(tmp_path, small_tokenizer, filters, capsys, fails):
    source = write_files(tmp_path / "x", make_texts(100), 100)
    out = tmp_path / "out"
    run_here(*arguments(source, small_tokenizer, out, filters))
    filters.write_text(f"filters:\n  near_duplicates: false\n  {FILTERS.replace(chr(10), chr(10) + '  ')}")
    run_here(*arguments(source, small_tokenizer, out, filters))
    assert "complete, nothing to do" in capsys.readouterr().out
    filters.write_text(FILTERS.replace("8", "9"))
    message = fails(*arguments(source, small_tokenizer, out, filters))
    assert (
        "was made with filters.duplicate_lines {'min_characters': 8, 'code': False} but {'min_characters': 9,"
        in message
    )
    assert f"PREP_ARGS='--filters {filters}'" in message
    message = fails(*arguments(source, small_tokenizer, out, filters, "--filters", "none"))
    assert "was made with filters.exact_duplicates {} but 'off' is asked for" in message
    plain = tmp_path / "plain"
    run_here(*arguments(source, small_tokenizer, plain, filters, "--filters", "none"))
    assert load_manifest(plain).removed is None
    assert "was prepared without filters" in fails("inspect", plain, "--removed")
