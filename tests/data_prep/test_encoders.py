"""The fast encoder gives the reference's ids, or the reference encodes: by tokenizer, at the start, and on the way."""

from __future__ import annotations

import json
import random
import textwrap
from pathlib import Path

import numpy as np
import pytest
from conftest import run_here, write_jsonl
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from data_prep.encoder import ReferenceEncoder
from data_prep.fast_encoder import PATTERNS, FastEncoder, fast_name, hostile_texts, structure_problem
from data_prep.manifest import load_manifest
from data_prep.proof import first_difference

pytestmark = pytest.mark.skipif(fast_name() is None, reason="gigatoken is not installed")

CONTROL = ["<s>", "</s>", "<pad>", "<unk>"]
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_level(use_regex: bool = True, **options):
    return pre_tokenizers.ByteLevel(add_prefix_space=options.get("add_prefix_space", False), use_regex=use_regex)


def split_by(pattern: str):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level(False)])


KINDS = {  # name -> (normalizer, pre-tokenizer, model options, why the reference encodes; "" for the fast one)
    "GPT-2": (None, byte_level(), {}, ""),
    "GPT-2 with a space in front": (None, byte_level(add_prefix_space=True), {}, ""),
    "Llama 3": (None, split_by(PATTERNS["Llama 3"]), {"ignore_merges": True}, ""),
    "Qwen 2 without NFC": (None, split_by(PATTERNS["Qwen 2"]), {}, ""),
    "Qwen 2": (normalizers.NFC(), split_by(PATTERNS["Qwen 2"]), {}, "it has a normalizer of type NFC"),
    "Llama 2": (
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        None,
        {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"},
        "",
    ),
    "GPT-2's pattern as a Split": (None, split_by(GPT2), {}, "its pre-tokenizer splits by a pattern that was not"),
    "Metaspace": (None, pre_tokenizers.Metaspace(), {}, "its pre-tokenizer is Metaspace"),
    "digits apart": (
        None,
        pre_tokenizers.Sequence([pre_tokenizers.Digits(), byte_level()]),
        {},
        "its pre-tokenizer is Digits + ByteLevel",
    ),
    "lowercase": (normalizers.Lowercase(), byte_level(), {}, "it has a normalizer of type Lowercase"),
    "dropout": (None, byte_level(), {"dropout": 0.1}, "it has BPE dropout of 0.1"),
}


def make_tokenizer(folder: Path, kind: str, texts: list[str], added: str | None = None) -> Path:
    """A trained tokenizer of a kind, as a Hugging Face folder."""
    normalizer, pre, options, _ = KINDS[kind]
    is_bytes = "byte_fallback" in options
    tokenizer = Tokenizer(models.BPE(**{k: v for k, v in options.items() if k != "dropout"}))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    bytes_tokens = [f"<0x{i:02X}>" for i in range(256)] if is_bytes else []
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=[*CONTROL, *bytes_tokens],
        initial_alphabet=[] if is_bytes else sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        max_token_length=16,
    )
    tokenizer.train_from_iterator(texts, trainer)
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] not in bytes_tokens]
    raw["model"] |= {name: options[name] for name in ("dropout",) if name in options}
    if added is not None:
        token = dict(raw["added_tokens"][0], id=len(raw["model"]["vocab"]), content=added, special=False)
        raw["added_tokens"].append(token)
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    names = dict(zip(("bos_token", "eos_token", "pad_token", "unk_token"), CONTROL, strict=True))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = random.Random(3)
    words = ["the", "river", "letters,", "naïve", "東京", "1,024", "don't", "I'VE", "🙂", "map;", "x\n", "\t"]
    return [" ".join(rng.choices(words, k=rng.randint(3, 60))) for _ in range(400)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, texts) -> Path:
    path = tmp_path_factory.mktemp("encoders") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_tokenizer_is_proven_or_left_to_the_reference(kind, tmp_path, corpus, texts, capsys):
    tokenizer = make_tokenizer(tmp_path / "tokenizer", kind, texts)
    for encoder in ("auto", "hf"):
        words = ("--tokenizer", tokenizer, "--block-size", 64, "--encoder", encoder)
        if KINDS[kind][2].get("dropout"):
            break
        run_here("prep", corpus, *words, "--out", tmp_path / encoder)
    said = capsys.readouterr().out
    why = KINDS[kind][3]
    if kind != "dropout":
        ours, reference = (load_manifest(tmp_path / encoder) for encoder in ("auto", "hf"))
        assert ours.fingerprint == reference.fingerprint
        assert ours.encoder["name"].startswith("tokenizers" if why else "gigatoken")
        assert (why in ours.encoder["why"] and why in said) if why else ours.encoder["num_ids_compared"] > 1000
        assert reference.encoder["why"] == "--encoder is hf"
    raw = json.loads((tokenizer / "tokenizer.json").read_text())
    assert (structure_problem(raw) or "").startswith(why) and bool(structure_problem(raw)) == bool(why)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not KINDS[kind][3]])
def test_hostile_texts_have_the_ids_of_the_reference(kind, tmp_path, texts):
    raw = json.loads((make_tokenizer(tmp_path / "tokenizer", kind, texts) / "tokenizer.json").read_text())
    hostile = hostile_texts(CONTROL)
    assert len(hostile) == 5000 and hostile == hostile_texts(CONTROL)
    assert first_difference(hostile, FastEncoder(raw), ReferenceEncoder(raw)) is None


def test_an_added_token_that_is_text_is_left_to_the_reference(tmp_path, texts):
    folder = make_tokenizer(tmp_path / "tokenizer", "GPT-2", texts, added="river carries")
    assert "'river carries'" in structure_problem(json.loads((folder / "tokenizer.json").read_text()))


# A package of this name in front of the real one, which it uses and falsifies.
SABOTAGED = """
import sys
from pathlib import Path

here, me = str(Path(__file__).parent.parent), sys.modules.pop("gigatoken")
sys.path.remove(here)
import gigatoken as real
sys.path.insert(0, here)
sys.modules["gigatoken"] = me
import numpy as np

class Layout:
    class Part:
        def __init__(self, data):
            self.data = data
    def __init__(self, ids, offsets):
        self.content, self.offsets = Layout.Part(ids), Layout.Part(offsets)

class Batch:
    def __init__(self, layout):
        self.layout = layout

class Tokenizer:
    seen = 0
    def __init__(self, inner):
        self.inner = inner
    @classmethod
    def from_json(cls, text):
        return cls(real.Tokenizer.from_json(text))
    def encode_batch(self, texts, parallel=None):
        layout = self.inner.encode_batch(texts, parallel=False).layout
        ids, offsets = np.array(layout.content.data), np.array(layout.offsets.data)
        FALSIFY
        return Batch(Layout(ids, offsets))
"""


@pytest.fixture
def sabotage(tmp_path, run_cli):
    """`sabotage(code, *words)`: prep with a gigatoken that runs `code` on `ids`, `offsets` and `texts`."""

    def run(code: str, *words: object):
        package = tmp_path / "sabotage" / "gigatoken"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(SABOTAGED.replace("FALSIFY", textwrap.indent(code, " " * 8).strip()))
        root = Path(__file__).resolve().parents[2]
        env = {"PYTHONPATH": f"{package.parent}:{root}", "DATA_DIR": str(tmp_path / "data")}
        return run_cli(["-m", "data_prep", "prep", *words], env=env)

    return run


def test_one_wrong_id_in_100_000_is_found_at_the_start(sabotage, tmp_path, small_tokenizer):
    rng = random.Random(5)
    corpus = tmp_path / "long.txt"
    corpus.write_text("".join(f"{rng.randrange(10**9)} river {rng.random()}\n" for _ in range(60_000)))
    words = (corpus, "--split-lines", "--tokenizer", small_tokenizer, "--block-size", "256", "--num-proc", "1")
    code = "before = Tokenizer.seen\nTokenizer.seen += len(ids)\nids[(90_000 - before) % 100_000::100_000] ^= 1"
    result = sabotage(code, *words, "--out", tmp_path / "auto")
    assert result.code == 0, result.stderr
    assert "other ids" in result.stdout and "tokenizers" in result.stdout
    run_here("prep", *words, "--encoder", "hf", "--out", tmp_path / "hf")
    assert load_manifest(tmp_path / "auto").fingerprint == load_manifest(tmp_path / "hf").fingerprint
    assert load_manifest(tmp_path / "auto").encoder["name"].startswith("tokenizers")


@pytest.mark.slow
@pytest.mark.parametrize("num_proc", ["1", "2"])
def test_an_encoder_that_is_wrong_in_a_rare_kind_of_document_is_found_on_the_way(
    sabotage, tmp_path, small_tokenizer, num_proc
):
    rng = random.Random(6)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(3):  # the start looks at the beginnings of units: what is rare comes later
        lines = [f"{rng.randrange(10**9)} the river carries letters {rng.random()} " * 12 for _ in range(9000)]
        lines += [f"{rng.randrange(10**9)} ☃ a rare one" for _ in range(6000)] if number == 2 else []
        (corpus / f"{number}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    words = (corpus, "--tokenizer", small_tokenizer, "--block-size", "256", "--num-proc", num_proc)
    code = "for i, text in enumerate(texts):\n    if '☃' in text and len(text) > 20:\n        ids[offsets[i]] ^= 1"
    result = sabotage(code, *words, "--out", tmp_path / "auto")
    assert result.code == 0, result.stderr
    assert "Everything is done again with tokenizers" in result.stdout
    evidence = json.loads((tmp_path / "auto" / "encoder_mismatch.json").read_text())
    assert "☃" in evidence["text"] and evidence["ids"] != evidence["reference_ids"]
    run_here("prep", *words, "--encoder", "hf", "--out", tmp_path / "hf")
    ours, reference = (load_manifest(tmp_path / name) for name in ("auto", "hf"))
    assert ours.fingerprint == reference.fingerprint and "gave other ids" in ours.encoder["why"]


def test_without_the_package_the_reference_encodes_and_it_is_said(tmp_path, run_cli, small_tokenizer, corpus):
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import importlib.metadata as m\n"
        "real = m.version\n"
        "def version(name):\n"
        "    if name == 'gigatoken':\n"
        "        raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
    )
    root = Path(__file__).resolve().parents[2]
    words = ["prep", corpus, "--tokenizer", small_tokenizer, "--block-size", "64", "--out", tmp_path / "out"]
    result = run_cli(["-m", "data_prep", *words], env={"PYTHONPATH": f"{site}:{root}"})
    assert result.code == 0, result.stderr
    assert "because gigatoken is not installed" in result.stdout


@pytest.mark.parametrize("kind", ["GPT-2", "Llama 3", "Qwen 2 without NFC"])
def test_characters_of_a_newer_unicode_are_left_to_the_reference(kind, tmp_path, texts):
    """U+16EBB is a letter to gigatoken and nothing yet to tokenizers: the quote in front of it is another piece."""
    signs = [chr(first + number) for number in range(40) for first in (0x10100, 0x1D100, 0x1EEF0, 0x1F300)]
    tokenizer = make_tokenizer(tmp_path / "tokenizer", kind, [*texts, *(f' "{sign}' for sign in signs * 5)])
    merges = json.loads((tokenizer / "tokenizer.json").read_text())["model"]["merges"]
    assert ['Ġ"', "ð"] in merges, "over the border between the quote and a character's first byte"
    some = [f'{text} "\U00016ebb" and "\U00016ebc' if number % 7 == 0 else text for number, text in enumerate(texts)]
    source = write_jsonl(tmp_path / "new.jsonl", some)
    for encoder in ("auto", "hf"):
        words = ("--tokenizer", tokenizer, "--block-size", 64, "--encoder", encoder)
        run_here("prep", source, *words, "--out", tmp_path / encoder)
    ours, reference = (load_manifest(tmp_path / encoder) for encoder in ("auto", "hf"))
    assert ours.fingerprint == reference.fingerprint
    assert ours.encoder["name"].startswith("gigatoken")
    assert any(first <= 0x16EBB <= last for first, last in ours.encoder["disputed_characters"])
    raw = json.loads((tokenizer / "tokenizer.json").read_text())
    ids, exact = (each.encode(some)[0] for each in (FastEncoder(raw), ReferenceEncoder(raw)))
    assert not np.array_equal(ids, exact), "alone gigatoken gives other ids"
