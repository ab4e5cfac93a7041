"""Every filter on documents of known kinds: what it leaves out, what it changes, what is counted and shown."""

import json
import random
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import content_of, read_documents, run_here, write_jsonl

from data_prep.documents import DocumentMap
from data_prep.filter_settings import make_filters
from data_prep.ledger import find_imbalances
from data_prep.manifest import load_manifest

if any(find_spec(name) is None for name in ("datatrove", "spacy", "ftfy", "fasttext")):
    pytest.skip("the extra corpus is not installed", allow_module_level=True)

TEXT = "the river carries letters and a map of the old town while people walk to market with bread that they have"
GERMAN = "der die und den von zu das mit sich des auf ist im dem nicht ein eine als"
WORDS = TEXT.split(" ")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven")


def sentence(rng: random.Random, num_words: int = 12) -> str:
    return " ".join(rng.choices(WORDS, k=num_words)).capitalize() + "."


def make_good(num: int, seed: int = 1) -> list[str]:
    """Documents of lines of sentences, which every filter keeps as they are."""
    rng = random.Random(seed)
    return ["\n".join(f"{sentence(rng)} {sentence(rng)}" for _ in range(6)) for _ in range(num)]


LENIENT = {"gopher_repetition": {"top_n_grams": [[2, 0.5]], "dup_n_grams": []}}  # the words of these tests are few


@pytest.fixture
def prep(tmp_path, small_tokenizer):
    """`prep(source, filters, ...)` into `out`; its manifest's entry of the ledger."""

    def run(source: object, filters: dict, *more: object, out: str = "out") -> dict:
        path = tmp_path / "filters.yaml"
        path.write_text(json.dumps(filters))
        fixed = ("--tokenizer", small_tokenizer, "--block-size", 1, "--num-proc", 1, "--val-fraction", 0.2)
        run_here("prep", source, "--filters", path, *fixed, *more, "--out", tmp_path / out)
        run_here("check", tmp_path / out)
        manifest = load_manifest(tmp_path / out)
        assert find_imbalances(manifest.ledger, manifest.splits, 1) == []
        return next(iter(manifest.ledger.values()))

    return run


def all_documents(folder: Path) -> dict[int, str]:
    """The documents of both splits by their record numbers."""
    found = {}
    for split in ("train", "validation"):
        documents = DocumentMap(folder, split)
        records = [documents.document(number).record for number in range(len(documents))]
        found |= dict(zip(records, read_documents(folder, split), strict=True))
    return found


def test_each_rule_leaves_out_the_one_document_that_breaks_it(tmp_path, prep):
    good = make_good(20)
    lines = good[0].split("\n")
    bad = {
        "gopher_repetition: dup_line_frac": "\n".join([lines[0], lines[1]] * 4),
        "gopher_repetition: dup_para_frac": "\n\n".join([lines[0], lines[1]] * 4),
        "gopher_quality: short_doc": "A map of the old town.",
        "gopher_quality: below_alpha_threshold": " ".join(f"{word} 1234" for word in WORDS[:20] * 3),
        "c4: lorem_ipsum": good[1] + "\nLorem ipsum has the words that nobody reads.",
        "c4: curly_bracket": good[2] + "\nThe man wrote { and went away.",
        "c4: too_few_sentences": good[3].replace(".", ""),
        "fineweb: list_ratio": "\n".join(sentence(random.Random(number), 8) for number in range(40)),
    }
    bad["gopher_quality: enough_stop_words"] = "\n".join(
        f"River map town bread walks old people markets {word}." for word in NUMBERS
    )
    texts = [*good[4:12], *bad.values(), *good[12:]]
    filters = {**LENIENT, "gopher_quality": True, "c4": True, "fineweb": {"new_line_ratio": 0.1}}
    entry = prep(write_jsonl(tmp_path / "x.jsonl", texts), filters)
    assert entry["documents"]["filtered"] == dict.fromkeys(bad, 1)
    kept = all_documents(tmp_path / "out")
    assert kept == {number: text for number, text in enumerate(texts) if text in good}


def test_c4_changes_lines_and_the_bytes_are_counted(tmp_path, prep):
    texts = make_good(10)
    texts[3] += "\nno end of a sentence\nThis page needs JavaScript to be read."
    entry = prep(write_jsonl(tmp_path / "x.jsonl", texts), {"c4": True})
    assert all_documents(tmp_path / "out")[3] == make_good(10)[3]
    num_bytes = sum(map(len, texts))
    assert entry["filters"]["c4"] == {
        "documents_before": 10,
        "bytes_before": num_bytes,
        "documents_changed": 1,
        "documents_after": 10,
        "bytes_after": num_bytes - len("\nno end of a sentence\nThis page needs JavaScript to be read."),
    }


def test_normalize_mends_text_and_leaves_code_alone_unless_asked(tmp_path, prep, capsys):
    folder = tmp_path / "x"
    folder.mkdir()
    wrong = "cafÃ© \x07\x1b[31mred\x1b[0m e\u0301"
    right = "café red \u00e9"
    (folder / "a.md").write_text(f"{wrong}\n```python\n{wrong}\n```\n{wrong}\n", encoding="utf-8")
    (folder / "b.py").write_text(f"# {wrong}\n", encoding="utf-8")
    (folder / "c.txt").write_text("nothing wrong here\n", encoding="utf-8")
    (folder / "d.txt").write_text("\x07\x07", encoding="utf-8")
    options = {"normalization": "NFC"}
    entry = prep(folder, {"normalize": options})
    assert entry["documents"]["filtered"] == {"normalize: nothing left": 1}
    assert entry["filters"]["normalize"]["documents_changed"] == 1
    texts = {split: read_documents(tmp_path / "out", split) for split in ("train", "validation")}
    assert sorted(texts["train"] + texts["validation"]) == sorted(
        [f"{right}\n```python\n{wrong}\n```\n{right}\n", f"# {wrong}\n", "nothing wrong here\n"]
    )
    capsys.readouterr()
    run_here("inspect", tmp_path / "out", "--removed")
    shown = capsys.readouterr().out
    assert f"- {wrong}\n- ```python" in shown and f"+ {right}\n+ ```python" in shown
    run_here("inspect", tmp_path / "out")
    assert "normalize changed texts of this dataset: byte ranges count in a text as changed" in capsys.readouterr().out
    entry = prep(folder, {"normalize": {**options, "code": True}}, out="code")
    assert entry["filters"]["normalize"]["documents_changed"] == 2


def test_personal_data_is_masked_the_same_way_in_every_document(tmp_path, prep):
    folder = tmp_path / "x"
    folder.mkdir()
    good = make_good(60)
    for number in range(6):
        texts = good[number * 10 : number * 10 + 10]
        texts[4] += f"\nAsk jane.{number}@mail.example.net or joe@example.net at 8.8.8.{number} or 10.0.0.1."
        write_jsonl(folder / f"{number}.jsonl", texts)
    entry = prep(folder, {"pii": True})
    assert entry["filters"]["pii"]["documents_changed"] == 6
    masked = [text for split in ("train", "validation") for text in read_documents(tmp_path / "out", split)]
    end = "\nAsk email@example.com or firstname.lastname@example.org at 22.214.171.124 or 10.0.0.1."
    assert sum(text.endswith(end) for text in masked) == 6  # every one begins with the first replacement
    samples = (tmp_path / "out" / "documents" / "samples.jsonl").read_text()
    assert "Ask jxxx.x@xxxx.xxxxxxx.xxx or" in samples and "jane" not in samples and "8.8.8" not in samples
    prep(folder, {"pii": {"remove_ips": False, "email_replacement": ["<EMAIL>"]}}, out="other")
    masked = [text for split in ("train", "validation") for text in read_documents(tmp_path / "other", split)]
    assert sum("Ask <EMAIL> or <EMAIL> at 8.8.8." in text for text in masked) == 6


def make_near(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    words[rng.randrange(5, len(words) - 5)] = "changed"
    return " ".join(words)


def test_near_duplicates_leave_as_datatrove_finds_them_and_none_is_on_both_sides(tmp_path, prep):
    from datatrove.data import Document
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets, MinhashDedupSignature
    from datatrove.utils.hashing import HashConfig

    rng = random.Random(4)
    good = make_good(60)
    texts = [text for original in good for text in (original, *(make_near(original, rng) for _ in range(2)))][:150]
    rng.shuffle(texts)
    texts += ["two words", "two words more"]  # too short to be compared
    folder = tmp_path / "x"
    folder.mkdir()
    for number in range(4):
        write_jsonl(folder / f"{number}.jsonl", texts[number * 40 : number * 40 + 40])
    entry = prep(folder, {"near_duplicates": True})

    # The same by datatrove's own steps: what comes second in a pair
    config = MinhashConfig(hash_config=HashConfig(hash_fc="sha1"))
    signatures, pairs = str(tmp_path / "signatures"), tmp_path / "pairs"
    MinhashDedupSignature(signatures, config).run([Document(text=text, id="") for text in texts])
    for bucket in range(config.num_buckets):
        MinhashDedupBuckets(signatures, str(pairs), config=config).run(None, bucket, config.num_buckets)
    second = set()
    for path in pairs.iterdir():
        numbers = memoryview(path.read_bytes()).cast("I")
        second |= set(numbers[3::4])
    assert 70 < len(second) < 110
    assert entry["documents"]["filtered"] == {"near_duplicates": len(second)}
    kept = [text for number, text in enumerate(texts) if number not in second]
    found = {split: read_documents(tmp_path / "out", split) for split in ("train", "validation")}
    assert sorted(found["train"] + found["validation"]) == sorted(kept)

    train, validation = (
        [set(zip(*[text.split(" ")[i:] for i in range(5)], strict=False)) for text in found[split]]
        for split in ("train", "validation")
    )
    shares = [len(a & b) / max(len(a | b), 1) for a in train for b in validation]
    assert len(validation) > 5 and max(shares) < 0.75  # under LSH's 0.72, about


def test_documents_that_share_an_ngram_with_an_evaluation_set_leave_and_its_items_are_marked(tmp_path, prep, capsys):
    from datatrove.data import Document
    from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter
    from datatrove.utils.hashing import HashConfig

    texts = make_good(30)
    rng = random.Random(9)
    items = [{"ctx": sentence(rng, 20), "endings": [sentence(rng), sentence(rng)], "label": 1} for _ in range(5)]
    texts[4] += f"\n{items[1]['ctx'].upper()}"  # other letters and signs do not hide it
    texts[9] += "\n" + " , ".join(f"{items[3]['ctx']} {items[3]['endings'][0]}".split()[10:26])  # across two fields
    texts[12] += "\n" + " ".join(items[2]["ctx"].split()[:12])  # one word too few
    texts[20] += f"\n{items[1]['ctx']}"
    evaluation = tmp_path / "evaluation.jsonl"
    evaluation.write_text("".join(json.dumps(item) + "\n" for item in [*items, {"ctx": "too short"}]))
    source = write_jsonl(tmp_path / "x.jsonl", texts)
    entry = prep(source, {"decontaminate": [str(evaluation)]})
    assert entry["documents"]["filtered"] == {"decontaminate": 3}
    assert "6 items of" in (shown := capsys.readouterr().err) and "1 of fewer than 13 words" in shown
    kept = all_documents(tmp_path / "out")
    assert sorted(set(range(30)) - set(kept)) == [4, 9, 20]

    def marked(out: str) -> list[tuple]:
        path = tmp_path / out / "documents" / "contaminated.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        keys = ("file", "line", "num_documents", "num_documents_left", "source", "record")
        return [tuple(row[key] for key in keys) for row in rows]

    assert marked("out") == [
        (str(evaluation), 2, 2, 0, "x/x.jsonl", 4),
        (str(evaluation), 4, 1, 0, "x/x.jsonl", 9),
    ]
    entry = prep(source, {"decontaminate": {"files": [str(evaluation)], "remove": False}}, out="marked")
    assert entry["documents"]["filtered"] == {} and len(all_documents(tmp_path / "marked")) == 30
    assert marked("marked") == [
        (str(evaluation), 2, 2, 2, "x/x.jsonl", 4),
        (str(evaluation), 4, 1, 1, "x/x.jsonl", 9),
    ]

    # datatrove's own filter over the same index
    from data_prep.decontamination import write_index

    filters = make_filters({"decontaminate": [str(evaluation)]}, "")
    write_index(filters, tmp_path / "index.npy")
    import numpy as np

    theirs = NGramsDecontFilter(str(tmp_path), NGramsDecontConfig(13, hash_config=HashConfig(hash_fc="sha1")))
    theirs._index_hashes = dict.fromkeys(np.load(tmp_path / "index.npy").tolist(), "evaluation")
    assert [i for i, text in enumerate(texts) if theirs.filter(Document(text=text, id="")) is not True] == [4, 9, 20]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> Path:
    """A fastText model of two languages of twenty words each."""
    import fasttext

    folder = tmp_path_factory.mktemp("fasttext")
    rng = random.Random(0)
    words = {"en": WORDS, "de": GERMAN.split(" ")}
    rows = [(language, " ".join(rng.choices(words[language], k=12))) for language in rng.choices(["en", "de"], k=400)]
    (folder / "train.txt").write_text("".join(f"__label__{language} {text}\n" for language, text in rows))
    model = fasttext.train_supervised(
        str(folder / "train.txt"), dim=8, epoch=20, bucket=100, minn=2, maxn=3, verbose=0, thread=1
    )
    model.save_model(str(folder / "tiny.bin"))
    return folder / "tiny.bin"


def test_only_documents_of_the_languages_asked_for_are_kept(tmp_path, prep, language_model):
    german = ["der die und den von zu\ndas mit sich des auf ist", "nicht ein eine als im dem und von"]
    good = make_good(10)
    source = write_jsonl(tmp_path / "x.jsonl", [good[0], german[0], *good[1:], german[1]])
    entry = prep(source, {"language": {"model": str(language_model), "keep": ["en"]}})
    assert entry["documents"]["filtered"] == {"language": 2}
    assert sorted(all_documents(tmp_path / "out").values()) == sorted(good)
    entry = prep(source, {"language": {"model": str(language_model), "keep": ["de", "en"]}}, out="both")
    assert entry["documents"]["filtered"] == {}


@pytest.mark.slow  # workers import spaCy each
def test_all_filters_together_give_the_same_bytes_for_any_number_of_workers(tmp_path, prep, language_model):
    rng = random.Random(2)
    good = make_good(80)
    folder = tmp_path / "x"
    folder.mkdir()
    evaluation = write_jsonl(tmp_path / "evaluation.jsonl", [good[50].split("\n")[2]])
    texts = [
        *good,
        *good[:5],
        *(make_near(text, rng) for text in good[5:10]),
        "The map and the town",
        "der die und den von zu das",
    ]
    texts[60] += "\nAsk jane@example.net about the map of the town.\x07"
    texts[61] += f"\n{good[1].split(chr(10))[0]}"
    for number in range(4):
        write_jsonl(folder / f"{number}.jsonl", texts[number * 25 : number * 25 + 25])
    filters = {
        "normalize": True,
        "language": {"model": str(language_model), "keep": ["en"]},
        **LENIENT,
        "gopher_quality": True,
        "c4": True,
        "fineweb": True,
        "pii": True,
        "decontaminate": [str(evaluation)],
        "exact_duplicates": True,
        "near_duplicates": True,
        "duplicate_lines": True,
    }
    entry = prep(folder, filters)
    assert entry["documents"]["filtered"] == {
        "language": 1,
        "gopher_quality: short_doc": 1,
        "decontaminate": 1,
        "exact_duplicates": 5,
        "near_duplicates": 5,
    }
    changed = {name: flow["documents_changed"] for name, flow in entry["filters"].items() if flow["documents_changed"]}
    assert changed == {"normalize": 1, "pii": 1, "duplicate_lines": 1}
    prep(folder, filters, "--num-proc", 2, out="two/out")
    assert content_of(tmp_path / "out") == content_of(tmp_path / "two" / "out")


def test_a_tokenizer_is_trained_on_the_text_as_the_filters_change_it(tmp_path, prep):
    source = write_jsonl(tmp_path / "x.jsonl", [f"{text}\nAsk zzzzq@zzzzq.net now." for text in make_good(60)])
    prep(source, {"pii": True}, "--tokenizer", "train:340")
    assert "zz" not in "".join(json.loads((tmp_path / "out/tokenizer/tokenizer.json").read_text())["model"]["vocab"])
    prep(source, {"exact_duplicates": True}, "--tokenizer", "train:340", out="plain")
    assert "zz" in "".join(json.loads((tmp_path / "plain/tokenizer/tokenizer.json").read_text())["model"]["vocab"])


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"c4": {"language": "xxx"}}, "filters.c4.language is xxx but datatrove knows no rules for its words"),
        ({"c4": {"language": "tha"}}, "filters.c4.language is tha, which needs another package"),
        ({"decontaminate": ["x.jsonl"]}, "x.jsonl has 1 items but none of 13 words"),
        ({"language": {"model": "x.jsonl", "keep": ["en"]}}, "filters.language.model is x.jsonl but fastText cannot"),
        (
            {"gopher_quality": {"min_doc_words": 9}},
            "The filters left out 1 of 1 documents: gopher_quality: short_doc 1",
        ),
    ],
)
def test_what_cannot_work_is_one_message(tmp_path, monkeypatch, small_tokenizer, fails, filters, message):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "x.jsonl", ["a few words"])
    Path("f.yaml").write_text(json.dumps(filters))
    shown = fails("prep", "x.jsonl", "--filters", "f.yaml", "--tokenizer", small_tokenizer, "--block-size", 1)
    assert message in shown
