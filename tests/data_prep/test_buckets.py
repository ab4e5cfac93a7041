"""One pass over a corpus writes a dataset for each bucket of a score, as a plain loop over its records splits it."""

import shutil
from pathlib import Path

import pytest
from conftest import content_of, make_scored_rows, read_documents, run_here, write_rows
from processes import Killed, stop_at_every_rename

from data_prep.__main__ import main
from data_prep.documents import DocumentMap
from data_prep.encode import text_hash
from data_prep.ledger import find_imbalances
from data_prep.manifest import load_manifest
from data_prep.paths import dataset_folder

LOW_HIGH = ("--buckets", "low=score < 3", "high=score >= 3 and score <= 5")  # above 5: in no bucket
RENAMES_OF_ONE_UNIT = 6  # four runs, the table, the counts


def bucket_of(score: float | None) -> str:
    """What LOW_HIGH says, once more by hand."""
    if score is None:
        return "no score"
    if score < 3:
        return "low"
    return "high" if score <= 5 else "in no bucket"


def arguments(source: Path, tokenizer: object, out: Path, *more: object) -> list[str]:
    fixed = ("--tokenizer", tokenizer, "--block-size", 1, "--val-fraction", 0.2, "--num-proc", 1, "--out", out)
    return [str(each) for each in ("prep", source, *LOW_HIGH, *fixed, *more)]


@pytest.fixture
def folder_of_files(tmp_path) -> Path:
    """Two files of records, so two units."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = make_scored_rows(120)
    write_rows(folder / "0.jsonl", rows[:60])
    write_rows(folder / "1.jsonl", rows[60:])
    return folder


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_buckets_are_what_a_loop_over_the_records_gives(tmp_path, small_tokenizer, name):
    rows = make_scored_rows()
    if name == "x.jsonl":  # what a line of JSON can hold beside a number
        del rows[20]["score"]
        rows[21]["score"], rows[22]["score"], rows[23]["score"] = float("nan"), "4", True
    score_of = [row.get("score") if isinstance(row.get("score"), int | float) else None for row in rows]
    score_of = [None if score != score or score is True else score for score in score_of]
    out = tmp_path / "out"
    run_here(*arguments(write_rows(tmp_path / name, rows), small_tokenizer, out))
    manifests = {bucket: load_manifest(out / bucket) for bucket in ("low", "high")}
    threshold = manifests["low"].validation["threshold"]
    places = [bucket_of(score) if row["text"] else "empty" for row, score in zip(rows, score_of, strict=True)]
    for bucket, manifest in manifests.items():
        run_here("check", out / bucket)
        assert manifest.dataset == f"out/{bucket}" and manifest.validation["threshold"] == threshold
        other = "high" if bucket == "low" else "low"
        documents = manifest.ledger["x"]["documents"]
        assert documents["read"] == len(rows) and documents["empty"] == 1 and documents["bad"] == 0
        assert documents["filtered"] == {
            f"in {other}": places.count(other),
            "in no bucket": places.count("in no bucket"),
            "no score": places.count("no score"),
        }
        assert documents["train"] + documents["validation"] == places.count(bucket) > 50
        assert find_imbalances(manifest.ledger, manifest.splits, 1) == []
        for split in ("train", "validation"):
            is_validation = split == "validation"
            expected = [
                (number, row)
                for number, (row, place) in enumerate(zip(rows, places, strict=True))
                if place == bucket and (text_hash(row["text"].encode()) < threshold) == is_validation
            ]
            assert read_documents(out / bucket, split) == [row["text"] for _, row in expected] != []
            documents = DocumentMap(out / bucket, split)
            found = [documents.document(number) for number in range(len(documents))]
            assert [document.record for document in found] == [number for number, _ in expected]
            assert [document.columns["score"] for document in found] == [row["score"] for _, row in expected]
            assert [document.columns["url"] for document in found] == [row["url"] for _, row in expected]


def test_no_text_lies_on_both_sides_of_validation_whatever_its_bucket(tmp_path, small_tokenizer):
    out = tmp_path / "out"
    rows = make_scored_rows()
    run_here(*arguments(write_rows(tmp_path / "x.jsonl", rows), small_tokenizer, out))
    texts = {
        split: [set(read_documents(out / bucket, split)) for bucket in ("low", "high")]
        for split in ("train", "validation")
    }
    assert texts["validation"][0] & texts["validation"][1], "the same text with two scores was held out twice"
    assert not set.union(*texts["train"]) & set.union(*texts["validation"])


def test_a_tokenizer_is_trained_once_on_all_the_text(tmp_path, capsys):
    source = write_rows(tmp_path / "x.jsonl", make_scored_rows())
    run_here(*arguments(source, "train:280", tmp_path / "out"))
    assert capsys.readouterr().err.count("training a tokenizer") == 1
    plain = [each for each in arguments(source, "train:280", tmp_path / "plain") if each not in LOW_HIGH]
    run_here(*plain)
    folders = [tmp_path / "out" / "low", tmp_path / "out" / "high", tmp_path / "plain"]
    assert len({load_manifest(folder).tokenizer.sha256 for folder in folders}) == 1
    assert len({(folder / "tokenizer" / "tokenizer.json").read_bytes() for folder in folders}) == 1


def test_one_and_three_workers_give_the_same_bytes(tmp_path, folder_of_files, small_tokenizer):
    for number in range(2, 6):
        write_rows(folder_of_files / f"{number}.jsonl", make_scored_rows(50 + number))
    for num_proc in (1, 3):
        out = tmp_path / str(num_proc) / "out"
        run_here(*arguments(folder_of_files, small_tokenizer, out, "--num-proc", num_proc))
    assert content_of(tmp_path / "1") == content_of(tmp_path / "3")


def test_a_stop_at_every_rename_continues_to_the_same_bytes(tmp_path, folder_of_files, small_tokenizer, monkeypatch):
    run_here(*arguments(folder_of_files, small_tokenizer, tmp_path / "reference" / "out"))
    expected = content_of(tmp_path / "reference" / "out")

    def command(out: Path) -> list[str]:
        return arguments(folder_of_files, small_tokenizer, out)

    manifests = ("low/manifest.json", "high/manifest.json")
    num_tries = stop_at_every_rename(command, tmp_path, expected, monkeypatch, manifests)
    assert num_tries >= 2 * RENAMES_OF_ONE_UNIT + 2 * 6


def test_a_second_run_does_nothing_and_another_split_is_refused(
    tmp_path, folder_of_files, small_tokenizer, capsys, fails
):
    out = tmp_path / "out"
    run_here(*arguments(folder_of_files, small_tokenizer, out))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    command = arguments(folder_of_files, small_tokenizer, out)
    run_here(*command, "--buckets", "high=score>=3 and score<=5", "low=score<3")  # other spelling and order
    shown = capsys.readouterr().out
    assert f"{out / 'low'}: complete, nothing to do" in shown and f"{out / 'high'}: complete" in shown
    message = fails(*command, "--buckets", "low=score < 2", "high=score > 4")
    assert "was made with buckets {'high': 'score >= 3" in message and "PREP_ARGS='--buckets " in message
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert "is no dataset but holds datasets. Name one of them" in fails("check", out)
    shutil.rmtree(out / "low")
    message = fails(*command)
    assert "of its buckets only high is complete" in message and f"rm -r {out / 'high'}" in message


def test_caps_count_the_documents_of_all_buckets_together(tmp_path, small_tokenizer):
    rows = make_scored_rows()
    source = write_rows(tmp_path / "x.jsonl", rows)
    run_here(*arguments(source, small_tokenizer, tmp_path / "out", "--max-docs", 60))
    counts = [load_manifest(tmp_path / "out" / bucket).ledger["x"]["documents"] for bucket in ("low", "high")]
    assert sum(each["train"] + each["validation"] for each in counts) == 60
    kept = [i for i, row in enumerate(rows) if row["text"] and bucket_of(row["score"]) in ("low", "high")]
    assert [each["read"] for each in counts] == [kept[59] + 1] * 2
    assert [each["beyond_cap"] for each in counts] == [len(rows) - kept[59] - 1] * 2


@pytest.fixture
def scored(tmp_path, small_tokenizer, monkeypatch) -> str:
    """The name of a listed dataset with buckets; the working folder and the data folder are this test's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data_prep.catalog.FOLDER", tmp_path)
    name = f"scored-{tmp_path.name}"  # entries are remembered by name
    write_rows(tmp_path / "x.jsonl", make_scored_rows(200))
    (tmp_path / f"{name}.yaml").write_text(
        "description: sentences\npath: x.jsonl\nlicence: CC0-1.0\nsource_of_numbers: none\nval_fraction: 0.2\n"
        f"keep_columns: {{url: string}}\nbuckets: {{low: score < 3, high: score >= 3}}\n"
        f"default_tokenizer: {small_tokenizer}\ndefault_block_size: 1\n"
    )
    return name


def test_a_listed_dataset_is_prepared_whole_or_by_buckets(scored, tmp_path, capsys, fails):
    data = tmp_path / "data" / scored
    assert f"make prep DATASET={scored}/high" in fails("check", f"{scored}/high")
    run_here("prep", f"{scored}/high")
    assert sorted(path.name for path in data.iterdir()) == ["high", "low"]
    run_here("prep", f"{scored}/low")
    assert capsys.readouterr().out.count("nothing to do") == 2
    run_here("prep", scored)
    assert (data / "manifest.json").exists() and not list(data.glob(".*"))
    for command in (["check"], ["stat"], ["inspect", "--documents", "1"]):
        for dataset in (f"{scored}/high", f"data/{scored}/low", scored):
            run_here(command[0], dataset, *command[1:])
    num = [load_manifest(folder).splits["train"].num_documents for folder in (data, data / "low", data / "high")]
    ledger = load_manifest(data / "low").ledger[scored]["documents"]["filtered"]
    assert num[0] > num[1] + num[2] and ledger["no score"] > 0 and ledger["in no bucket"] == 0
    columns = DocumentMap(data / "low", "train").document(0).columns
    assert columns["score"] < 3 and columns["url"].startswith("u")  # what the buckets are by is kept too
    assert "score" not in DocumentMap(data, "train").document(0).columns
    assert "has no bucket hihg. Did you mean high?" in fails("prep", f"{scored}/hihg")
    run_here("datasets")
    assert "sentences; /low: score < 3; /high: score >= 3" in capsys.readouterr().out


def test_an_interrupted_preparation_of_buckets_is_told_as_such(scored, tmp_path, fails, monkeypatch):
    def stop(*arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.prep.write_dataset", stop)
        with pytest.raises(Killed):
            main(["prep", f"{scored}/low"])
    message = fails("check", f"{scored}/low")
    assert "was interrupted" in message and f"make prep DATASET={scored}/low" in message
    message = fails("prep", scored, "--buckets", "few=score > 8", "--block-size", 1, "--out", f"data/{scored}")
    assert "holds an interrupted preparation with buckets {'high'" in message and ".work-buckets" in message
    run_here("prep", f"{scored}/low")
    run_here("check", f"{scored}/high")


def test_a_bucket_lies_under_the_data_folder_unless_there_is_such_a_path(scored, tmp_path):
    assert dataset_folder(f"{scored}/low") == Path("data") / scored / "low"
    assert dataset_folder(f"{scored}/other") == Path(scored) / "other"
    assert dataset_folder("mine/low") == Path("mine/low")
    (tmp_path / "data" / "mine" / "low").mkdir(parents=True)
    assert dataset_folder("mine/low") == Path("data/mine/low")
    assert dataset_folder(Path("mine/low")) == Path("mine/low")
    assert dataset_folder("./mine/low") == Path("mine/low")
    (tmp_path / "mine" / "low").mkdir(parents=True)
    assert dataset_folder("mine/low") == Path("mine/low")


def test_a_recipe_with_two_buckets_prepares_them_with_one_command(tmp_path):
    from clm.prepare import prep_commands
    from clm.recipe import load_recipe

    text = (Path(__file__).parents[2] / "recipes" / "llama_170m.yaml").read_text()
    mixture = "".join(f"\n    - {{dataset: fineweb-edu-10bt/{bucket}}}" for bucket in ("low", "high"))
    path = tmp_path / "quality.yaml"
    path.write_text(text.replace("\n    - {dataset: fineweb, weight: 1.0}", mixture))
    [command, *others] = prep_commands(load_recipe(path))
    assert command[:2] == ["prep", "fineweb-edu-10bt/low"] and command[-2:] == ["--out", "data/fineweb-edu-10bt"]
    assert all(each[1] == "fineweb" for each in others)  # the recipe's validation set
