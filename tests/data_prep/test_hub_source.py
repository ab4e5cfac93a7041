"""Datasets of the Hub, downloaded from a server on this machine through the real libraries."""

import io
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import read_documents
from hub_server import COMMIT, serve

from data_prep.errors import UserError
from data_prep.hub import with_retries
from data_prep.manifest import load_manifest

TOKEN = "hf_thisIsASecretThatMustNotBeSeen"
EDU_SCORES = [2.5, 2.99, 3.0, 4.5] * 5
ARTICLES = ["", " = First = \n", "", " Some words of it .\n", " = = Part = = \n", " = Second = \n", " More words .\n"]


def parquet(texts: list[str], **more: list) -> bytes:
    buffer = io.BytesIO()
    columns = {"text": texts, "url": [f"https://example.org/{text[:8]}" for text in texts], **more}
    pq.write_table(pa.table(columns), buffer, row_group_size=5)
    return buffer.getvalue()


def texts_of(part: str) -> list[str]:
    return [f"{part} document {number}" for number in range(20)]


@pytest.fixture(scope="module")
def hub():
    card = (
        "---\nconfigs:\n- config_name: small\n  data_files:\n  - split: train\n    path: small/train-*\n"
        "  - split: test\n    path: small/test-*\n"
        "- config_name: large\n  data_files:\n  - split: train\n    path: large/*\n---\n"
    )
    wikitext = "---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n" + "".join(
        f"  - split: {split}\n    path: wikitext-2-raw-v1/{split}-*\n" for split in ("train", "validation")
    )
    repositories = {
        "owner/plain": {f"data/train-{n:05d}-of-00003.parquet": parquet(texts_of(f"part {n}")) for n in range(3)},
        "owner/configs": {
            "README.md": card.encode(),
            "small/train-0.parquet": parquet(texts_of("small")),
            "small/test-0.parquet": parquet(texts_of("test")),
            "large/0.parquet": parquet(texts_of("large")),
        },
        "Salesforce/wikitext": {
            "README.md": f"{wikitext}---\n".encode(),
            "wikitext-2-raw-v1/train-0.parquet": parquet(ARTICLES[:5]),
            "wikitext-2-raw-v1/train-1.parquet": parquet(ARTICLES[5:]),
            "wikitext-2-raw-v1/validation-0.parquet": parquet([" = Third = \n", " Held out .\n"]),
        },
        "HuggingFaceFW/fineweb-edu": {
            "README.md": b"---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n"
            b"  - split: train\n    path: sample/10BT/*\n---\n",
            **{f"sample/10BT/00{n}.parquet": parquet(texts_of(f"part {n}"), score=EDU_SCORES) for n in range(2)},
        },
        "owner/gated": {"README.md": b"", "data/train-0.parquet": parquet(["x"])},
        "owner/lines": {"train.jsonl": b'{"text": "a line of JSON"}\n' * 5},
    }
    with serve(repositories) as server:
        server.gated.add("owner/gated")
        yield server


@pytest.fixture
def prep(hub, tmp_path, small_tokenizer, run_cli):
    """`prep("owner/plain", ..., **environment)` in a process of its own, whose Hub is ours."""

    def run(*arguments: object, **environment: str):
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN}
        env |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", **environment}
        options = ("--tokenizer", small_tokenizer, "--block-size", 1)
        result = run_cli(["-m", "data_prep", "prep", *arguments, *options], cwd=tmp_path, env=env)
        assert TOKEN not in result.stdout + result.stderr and "Traceback" not in result.stderr
        hub.failures.clear()
        return result

    return run


def test_a_hub_dataset_is_downloaded_prepared_and_then_known_offline(hub, prep, tmp_path):
    hub.downloads.clear()
    result = prep("owner/plain", "--val-fraction", 0, "--keep-downloads")
    assert result.code == 0, result.stderr
    out = tmp_path / "data" / "plain"
    assert read_documents(out, "train") == [text for n in range(3) for text in texts_of(f"part {n}")]
    assert set(hub.downloads.values()) == {1} and len(hub.downloads) == 3
    assert COMMIT in (out / "documents" / "files.jsonl").read_text()
    assert TOKEN not in (out / "manifest.json").read_text()
    again = prep("owner/plain", "--val-fraction", 0, HF_HUB_OFFLINE="1")
    assert again.code == 0 and "nothing to do" in again.stdout
    other = prep("owner/plain", "--val-fraction", 0, "--out", "data/again", HF_HUB_OFFLINE="1")  # from the cache
    assert other.code == 0, other.stderr
    assert load_manifest(tmp_path / "data" / "again").fingerprint == load_manifest(out).fingerprint
    away = prep(
        "owner/plain", "--val-fraction", 0, "--out", "data/away", HF_ENDPOINT=hub.url, http_proxy="http://127.0.0.1:9"
    )
    assert away.code == 0, away.stderr


def test_only_as_many_files_are_downloaded_as_the_cap_needs(hub, prep, tmp_path):
    hub.downloads.clear()
    result = prep("owner/plain:15", "--val-fraction", 0, "--num-proc", 2)
    assert result.code == 0, result.stderr
    assert dict(hub.downloads) == {"data/train-00000-of-00003.parquet": 1}
    documents = load_manifest(tmp_path / "data" / "plain").ledger["plain"]["documents"]
    assert documents["train"] == 15 and documents["beyond_cap"] == 5 and not documents["is_beyond_cap_exact"]


def test_wikitext_is_joined_into_articles_and_its_validation_split_is_used(prep, tmp_path):
    result = prep("wikitext2")
    assert result.code == 0, result.stderr
    out = tmp_path / "data" / "wikitext2"
    assert read_documents(out, "train") == ["".join(ARTICLES[1:5]), "".join(ARTICLES[5:])]
    assert read_documents(out, "validation") == [" = Third = \n Held out .\n"]
    assert load_manifest(out).validation["official"] == ["wikitext2"]


def test_a_bucket_of_a_listed_dataset_prepares_all_its_buckets_from_one_download(hub, prep, tmp_path):
    hub.downloads.clear()
    result = prep("fineweb-edu-10bt/high", "--val-fraction", 0)
    assert result.code == 0, result.stderr
    assert [hub.downloads[f"sample/10BT/00{n}.parquet"] for n in range(2)] == [1, 1]
    texts = [*texts_of("part 0"), *texts_of("part 1")]
    for bucket, places in (("low", (0, 1)), ("high", (2, 3))):
        folder = tmp_path / "data" / "fineweb-edu-10bt" / bucket
        assert read_documents(folder, "train") == [text for i, text in enumerate(texts) if i % 4 in places]
    again = prep("fineweb-edu-10bt/low", "--val-fraction", 0, HF_HUB_OFFLINE="1")
    assert again.code == 0 and again.stdout.count("nothing to do") == 2


def test_json_lines_on_the_hub_are_read_too(prep, tmp_path):
    result = prep("owner/lines", "--val-fraction", 0)
    assert result.code == 0, result.stderr
    assert read_documents(tmp_path / "data" / "lines", "train") == ["a line of JSON"] * 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("owner/missing", "the Hub has no such dataset, or it is private"),
        ("owner/gated", "the dataset is gated. Accept its terms at"),
        ("owner/configs", "has several configs: small, large"),
    ],
)
def test_what_cannot_be_had_is_one_message(prep, tmp_path, name, message):
    result = prep(name)
    assert result.code == 2 and message in result.stderr, result.stderr
    assert result.stderr.count("error:") == 1 and not (tmp_path / "data" / name.split("/")[1]).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": "smal"}, "owner/configs: has no config smal. Did you mean small"),
        ({"config": "small", "splits": {"train": "trian"}}, "owner/configs: has no split trian. Did you mean train"),
        ({"config": "small", "revision": "v9"}, "the revision does not exist"),
        ({"config": "small"}, None),
    ],
)
def test_a_config_split_or_revision_that_does_not_exist_lists_those_that_do(hub, run_cli, tmp_path, changes, message):
    code = (
        "from data_prep.catalog import DatasetEntry; from data_prep.hub import list_hub_files\n"
        "entry = DatasetEntry(name='x', description='x', licence='x', default_tokenizer='x', default_block_size=1,\n"
        f"    source_of_numbers='x', repository='owner/configs', **{changes!r})\n"
        "try:\n    print(*(file.name for file in list_hub_files(entry)))\n"
        "except ValueError as error:\n    print(error)\n"
    )
    env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
    result = run_cli(["-c", code], cwd=tmp_path, env=env)
    assert (message or "small/train-0.parquet") in result.stdout, result.stderr


def test_no_network_is_one_message(prep, hub):
    result = prep("fineweb", HF_ENDPOINT="http://127.0.0.1:9")
    assert result.code == 2
    assert "error: the file list of HuggingFaceFW/fineweb: http://127.0.0.1:9 cannot be reached" in result.stderr


def test_offline_by_setting_is_one_message(prep):
    result = prep("fineweb", HF_HUB_OFFLINE="1")
    assert result.code == 2 and "HF_HUB_OFFLINE is set" in result.stderr


def test_retries_wait_longer_each_time_and_then_give_up(capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    calls = []

    def always_late():
        calls.append(1)
        raise TimeoutError("late")

    with pytest.raises(UserError, match="cannot be reached"):
        with_retries(always_late, "owner/name", waits_s=(0, 0.001, 0.002))
    assert len(calls) == 4
    waits = [float(wait) for wait in re.findall(r"next try in (\S+) s", capsys.readouterr().err)]
    assert waits[0] == 0 and 0.00075 <= waits[1] <= 0.00125 and 0.0015 <= waits[2] <= 0.0025  # no two clients in step
