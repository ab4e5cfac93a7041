"""The words a person writes, and the catalogue of datasets."""

import math
from pathlib import Path

import pytest

from data_prep.catalog import FOLDER, entry_names, load_entry, read_entry
from data_prep.errors import UserError, nearest
from data_prep.paths import data_dir, dataset_folder, runs_dir
from data_prep.plan import parse_tokenizer
from data_prep.sizes import format_bytes, format_count, parse_bytes, parse_count


@pytest.mark.parametrize(
    ("text", "count"),
    [("10B", 10**10), ("262_144", 262144), ("1e9", 10**9), (1e9, 10**9), (10_000, 10_000), ("350K", 350_000)]
    + [("2M", 2_000_000), ("1.5m", 1_500_000), ("1,024", 1024), ("0", 0), ("2T", 2 * 10**12)],
)
def test_a_count_may_be_written_as_people_write_it(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize(
    "text", ["", "ten", "-5", -5, True, None, "1.5", 0.5, math.nan, math.inf, "10Q", "2GB", "1e400x", [1]]
)
def test_what_is_no_count_is_refused(text):
    with pytest.raises(ValueError, match="count|negative|whole"):
        parse_count(text)


def test_bytes_are_decimal():
    assert parse_bytes("2GB") == 2 * 10**9
    assert parse_bytes("500MB") == 500 * 10**6
    assert [format_bytes(n) for n in (812, 28_500_000_000)] == ["812 B", "28.5 GB"]
    assert [format_count(n) for n in (999, 33_280, 999_999, 10**10)] == ["999", "33.3 k", "1 M", "10 B"]


def test_a_bare_name_lies_under_the_data_folder_and_a_path_is_a_path(monkeypatch):
    monkeypatch.setenv("DATA_DIR", "/mnt/data")
    monkeypatch.delenv("RUNS_DIR", raising=False)
    assert dataset_folder("fineweb") == Path("/mnt/data/fineweb")
    assert dataset_folder("data/fineweb") == Path("data/fineweb")
    assert (data_dir(), runs_dir()) == (Path("/mnt/data"), Path("runs"))


def test_the_nearest_name_comes_first():
    assert nearest("finweb", entry_names())[0] == "fineweb"
    assert nearest("qqqqqq", entry_names()) == []


def test_every_dataset_of_the_contract_is_listed():
    sizes = [f"fineweb-edu-{size}bt" for size in (10, 100, 350)]
    others = ["fineweb", "openwebtext", "stdlib", "tinystories", "wikipedia-en", "wikitext103", "wikitext2"]
    assert entry_names() == sorted([*sizes, *others])


@pytest.mark.parametrize("name", entry_names())
def test_every_catalogue_file_is_whole(name):
    entry = load_entry(name)
    assert entry.licence and entry.source_of_numbers
    assert parse_tokenizer(entry.default_tokenizer)
    assert entry.default_block_size % 256 == 0  # so that 256, 512 ... are divisors
    assert ("validation" in entry.splits) == (name in ("wikitext2", "wikitext103", "tinystories"))


def test_a_user_adds_a_dataset_with_one_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "description: my notes\npath: notes/\nlicence: CC0-1.0\nsource_of_numbers: none\n"
        "default_tokenizer: gpt2\ndefault_block_size: 512\n"
    )
    entry = read_entry(path)
    assert (entry.name, entry.path, entry.on_bad_record) == ("mine", "notes/", "fail")


def test_a_wrong_catalogue_file_tells_all_its_problems_at_once(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        (FOLDER / "fineweb.yaml").read_text().replace("licence:", "license:").replace("text_column:", "colum:")
    )
    with pytest.raises(UserError) as error:
        read_entry(path)
    assert "unknown key license. Did you mean licence" in str(error.value)
    assert "unknown key colum. Did you mean" in str(error.value)
    assert "key licence is missing" in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("repository: HuggingFaceFW/fineweb", "repository: null", "exactly one of repository"),
        ("splits: {train: train}", "splits: {test: train}", "splits is"),
        ("default_block_size: 2048", "default_block_size: 0", "default_block_size is 0"),
        ("{url: string, language_score: float64}", "{url: text}", "keep_columns is"),
        ("{train: 50000}", "[1]", "default_tokenizer is"),
        ("text_column: text", "split: paragraph", "split is 'paragraph' but must be line"),
    ],
)
def test_a_wrong_value_in_a_catalogue_file_is_named(tmp_path, old, new, message):
    path = tmp_path / "mine.yaml"
    path.write_text((FOLDER / "fineweb.yaml").read_text().replace(old, new))
    with pytest.raises(UserError, match=message):
        read_entry(path)
