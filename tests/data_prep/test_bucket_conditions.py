"""A bucket's condition is obeyed or refused with the reason; no two buckets can hold one document."""

import pytest
from conftest import make_scored_rows, write_rows

from data_prep.buckets import condition_columns, parse_buckets, split_conditions
from data_prep.catalog import read_entry
from data_prep.errors import UserError


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["score < 3"], "--buckets low: is 'score < 3"),
        (["low=score <"], "--buckets low: is 'score <' but must compare a column with a number or a text in quotes"),
        (["low=score < three"], "must compare a column"),
        (["low=3 > score"], "must compare a column"),
        (["low=score < 3 or score > 5"], "must compare a column"),
        (["low=score < 3 and"], "must compare a column"),
        (["low=score =< 3"], "must compare a column"),
        (["low=__import__('os').system('x')"], "must compare a column"),
        (["low=score < 3and score > 1"], "must compare a column"),
        (["a/b=score < 3"], "--buckets a/b: is no name for a bucket"),
        (["train=score < 3"], "--buckets train: is no name for a bucket"),
        (["low"], "--buckets is 'low' but has no name"),
        (["low=score < 3", "low=score > 5"], "names a bucket for the second time"),
        (["low=score < 'three'"], "the column score is read as float64. Compare it with a number"),
        (["low=url < 3"], "the column url is read as string. Compare it with a text in quotes"),
        (
            ["low=score <= 3", "high=score >= 3"],
            "high: is 'score >= 3' but low is 'score <= 3': a document with score 3",
        ),
        (["low=score < 3", "some=language == 'en'"], 'a document with score 2 and language "en" would be in both'),
    ],
)
def test_a_condition_that_cannot_be_obeyed_is_named_before_anything_is_read(
    tmp_path, fails, words, message, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "x.jsonl", make_scored_rows(20))
    words = ["low=score < 3 x"] if words == ["score < 3"] else words
    shown = fails("prep", "x.jsonl", "--tokenizer", "train:300", "--out", "data/x", "--buckets", *words)
    assert message in shown and not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("first", "second", "kept", "is_common"),
    [
        ("a < 3", "a >= 3", {}, False),
        ("a < 3", "a > 2.9", {}, True),
        ("a < 4", "a > 3", {}, True),
        ("a < 4", "a > 3", {"a": "int64"}, False),  # between 3 and 4 lies no whole number
        ("a < 4.5", "a > 3.5", {"a": "int64"}, True),
        ("a == 3", "a != 3", {}, False),
        ("a != 3", "a != 4", {}, True),
        ("a > 1e300", "a > 2e300", {}, True),
        ("a > 1 and b == 'x'", "a > 1 and b == 'y'", {}, False),
        ("a > 1 and b == 'x'", "a > 2", {}, True),
        ("a < 'k'", "a >= 'k'", {}, False),
        ("a > 'k'", "a > 'l'", {}, True),
        ("a < 3 and a > 5", "a < 10", {}, False),  # the first is empty
    ],
)
def test_buckets_that_a_document_could_be_in_together_are_refused(first, second, kept, is_common):
    buckets = parse_buckets({"one": first, "two": second}, "")
    if is_common:
        with pytest.raises(UserError, match="would be in both"):
            condition_columns(buckets, kept, "")
    else:
        assert set(condition_columns(buckets, kept, "")) <= {"a", "b"}


def test_a_condition_has_one_spelling():
    words = ["low=score<3", "mine = score >= -3.50 and language=='e n'and url != \"it's\" "]
    low, mine = parse_buckets({name.strip(): text for name, text in split_conditions(words).items()}, "")
    assert low.condition == "score < 3"
    assert mine.condition == 'score >= -3.5 and language == "e n" and url != "it\'s"'
    assert parse_buckets({"mine": mine.condition}, "") == (mine,)


def test_a_column_that_is_nowhere_is_an_error(tmp_path, small_tokenizer, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--tokenizer", small_tokenizer, "--block-size", 1, "--out", "data/x", "--buckets", "low=scroe < 3")
    write_rows(tmp_path / "x.parquet", make_scored_rows(20))
    message = fails("prep", "x.parquet", *options)
    assert "x.parquet: the buckets are by column scroe but the file has no such column. Did you mean score?" in message
    assert not (tmp_path / "data").exists()
    write_rows(tmp_path / "x.jsonl", make_scored_rows(20))
    message = fails("prep", "x.jsonl", *options)
    assert "the buckets are by scroe (read as float64) but not one of its 19 documents has a value there" in message
    assert not (tmp_path / "data").exists()


def test_a_bucket_without_one_block_is_an_error(tmp_path, small_tokenizer, fails):
    source = write_rows(tmp_path / "x.jsonl", make_scored_rows(20))
    options = ("--tokenizer", small_tokenizer, "--block-size", 1, "--out", tmp_path / "out")
    message = fails("prep", source, *options, "--buckets", "low=score < 3", "high=score > 100")
    assert f"{tmp_path / 'out' / 'high'} (score > 100): block_size is 1" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("buckets: {low: score}", "mine.yaml: buckets.low: is 'score' but must compare"),
        ("buckets: {low: 3}", "mine.yaml: buckets.low: is 3 but must compare"),
        ("buckets: [score < 3]", r"mine.yaml: buckets is \['score < 3'\] but must be names with conditions"),
        ("buckets: {a: score < 3, b: score < 4}", "mine.yaml: buckets.a: is 'score < 3' but b is 'score < 4'"),
    ],
)
def test_wrong_buckets_in_a_catalogue_file_are_named(tmp_path, line, message):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "description: my notes\npath: notes/\nlicence: CC0-1.0\nsource_of_numbers: none\n"
        f"default_tokenizer: gpt2\ndefault_block_size: 512\n{line}\n"
    )
    with pytest.raises(UserError, match=message):
        read_entry(path)
