"""Which encoder a preparation uses: the fast one where it has proved itself on this tokenizer and this corpus.

In: the stream and the tokenizer of a preparation. Out: an `EncoderChoice`, noted in the working folder, so that a
continued preparation goes on with it. The gates are those of data_prep/fast_encoder.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from contextlib import suppress
from dataclasses import asdict, astuple, replace
from itertools import islice
from pathlib import Path

import numpy as np

from data_prep.disputed import find_disputed
from data_prep.encoder import Encoder, EncoderChoice, Ranges, ReferenceEncoder, load_tokenizer_json, reference_name
from data_prep.fast_encoder import (
    EncoderMismatchError,
    FastEncoder,
    fast_checksum,
    fast_name,
    hostile_texts,
    structure_problem,
)
from data_prep.manifest import TokenizerInfo
from data_prep.output import write_whole
from data_prep.paths import cache_dir
from data_prep.plan import Plan
from data_prep.stream import Stream

CHOICE = "encoder.json"  # in the working folder
MISMATCH = "mismatch.json"  # in the working folder: noted, and not yet acted on
EVIDENCE = "encoder_mismatch.json"  # in the dataset's folder
PROVEN_IDS = 1_000_000
_MOST_UNITS = 10_000  # are counted: with more, each compares the hundred ids that so many would


def choose_encoder(plan: Plan, stream: Stream, tokenizer: TokenizerInfo, option: str) -> EncoderChoice:
    """Settle which encoder this preparation uses, and say so where it is not the fast one.

    Args:
        option: auto, or hf for the reference.
    """
    path = plan.work / CHOICE
    key = [tokenizer.sha256, option, fast_name(), reference_name()]
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["key"] == key:
            ranges = tuple((first, last) for first, last in known["choice"]["disputed"])
            return EncoderChoice(**{**known["choice"], "disputed": ranges})
    choice = _try(plan, stream, tokenizer, option)
    if choice.why and option == "auto" and choice.name != "none":
        print(f"encoder: {choice.name}, because {choice.why}.", flush=True)
    write_whole(path, json.dumps({"key": key, "choice": asdict(choice)}))
    return choice


def note_mismatch(work: Path, mismatch: EncoderMismatchError) -> None:
    """Where units are encoded apart from who decides: leave the evidence for the next start, which gives up."""
    write_whole(work / MISMATCH, json.dumps(mismatch.evidence))


def choose_or_give_up(plan: Plan, stream: Stream, tokenizer: TokenizerInfo, option: str) -> EncoderChoice:
    """`choose_encoder`, unless a mismatch was noted since."""
    noted = plan.work / MISMATCH
    if not noted.exists():
        return choose_encoder(plan, stream, tokenizer, option)
    mismatch = EncoderMismatchError(json.loads(noted.read_text(encoding="utf-8")))
    choice = give_up(plan, tokenizer, option, mismatch)
    noted.unlink()
    return choice


def give_up(plan: Plan, tokenizer: TokenizerInfo, option: str, mismatch: EncoderMismatchError) -> EncoderChoice:
    """After a mismatch in the middle: keep the document as evidence, and begin again with the reference."""
    evidence = plan.folder / EVIDENCE
    write_whole(evidence, json.dumps(mismatch.evidence, indent=1))
    for rows in plan.work.glob("*.rows.arrow"):  # of units, none of which is used any more
        for path in plan.work.glob(f"{rows.name.partition('.')[0]}.*"):
            path.unlink()
    why = f"{fast_name()} gave other ids than {reference_name()} for a document, which is in {evidence}"
    print(f"encoder: {why}. Everything is done again with {reference_name()}.", flush=True)
    choice = EncoderChoice(reference_name(), False, why)
    key = [tokenizer.sha256, option, fast_name(), reference_name()]
    write_whole(plan.work / CHOICE, json.dumps({"key": key, "choice": asdict(choice)}))
    return choice


def _try(plan: Plan, stream: Stream, tokenizer: TokenizerInfo, option: str) -> EncoderChoice:
    reference = EncoderChoice(reference_name(), False)
    if any(source.entry.tokenized for source in plan.sources):
        return EncoderChoice("none", False, "the source is tokenized already")
    if option == "hf":
        return EncoderChoice(reference.name, False, "--encoder is hf")
    name = fast_name()
    if name is None:
        return EncoderChoice(reference.name, False, "gigatoken is not installed")
    disputed = _known_proof(tokenizer, name)
    if disputed is None:
        raw = load_tokenizer_json(plan.tokenizer_folder, tokenizer)
        problem = structure_problem(raw)
        if problem is not None:
            return EncoderChoice(reference.name, False, f"{name} is not proven for this tokenizer: {problem}")
        os.environ.pop("TOKENIZERS_PARALLELISM", None)  # this process forks nobody
        try:
            disputed = find_disputed(raw.get("pre_tokenizer"))
            encoder = Encoder(plan.tokenizer_folder, tokenizer, True, disputed)
        except Exception as error:  # whatever a foreign library raises: the reference works
            return EncoderChoice(reference.name, False, f"{name} cannot load this tokenizer ({error})")
        texts = hostile_texts([token["content"] for token in raw["added_tokens"]])
        wrong = first_difference(texts, encoder, encoder.reference)
        if wrong is not None:
            return EncoderChoice(reference.name, False, f"{name} gives other ids for the text {texts[wrong][:60]!r}")
        _remember_proof(tokenizer, name, disputed)
    return EncoderChoice(name, True, "", math.ceil(PROVEN_IDS / _count_units(stream)), disputed)


def first_difference(texts: list[str], fast: Encoder | FastEncoder, exact: ReferenceEncoder) -> int | None:
    """The first text that the two encode differently."""
    ids, lengths = fast.encode(texts)
    exact_ids, exact_lengths = exact.encode(texts)
    if np.array_equal(lengths, exact_lengths) and np.array_equal(ids, exact_ids):
        return None
    ends, exact_ends = np.cumsum(lengths), np.cumsum(exact_lengths)
    for i, (end, exact_end) in enumerate(zip(ends, exact_ends, strict=True)):
        ours = ids[end - lengths[i] : end]
        if not np.array_equal(ours, exact_ids[exact_end - exact_lengths[i] : exact_end]):
            return i
    raise AssertionError("different, but in no text")


def _count_units(stream: Stream) -> int:
    """At most as many units as there are: of sources that lie here all, of others one for each file."""
    count = 0
    for number, source in enumerate(stream.sources):
        if source.entry.path is None:
            count += sum(1 for n, file in stream.files if n == number and file.split == "train")
        else:
            count += sum(1 for _ in islice(stream.source_units(number), _MOST_UNITS))
    return max(1, count)


def _proofs_path() -> Path:
    return cache_dir() / "encoder_proofs.json"


def _known_proof(tokenizer: TokenizerInfo, name: str) -> Ranges | None:
    """The disputed characters beside which these encoders agreed on the hostile set."""
    ranges = _known_proofs().get(_proof_key(tokenizer, name))
    return None if ranges is None else tuple((first, last) for first, last in ranges)


def _remember_proof(tokenizer: TokenizerInfo, name: str, disputed: Ranges) -> None:
    with suppress(OSError):  # the next preparation proves it again
        cache_dir().mkdir(parents=True, exist_ok=True)
        write_whole(_proofs_path(), json.dumps({**_known_proofs(), _proof_key(tokenizer, name): disputed}))


def _known_proofs() -> dict[str, list[list[int]]]:
    with suppress(OSError, ValueError):
        return dict(json.loads(_proofs_path().read_text(encoding="utf-8")))
    return {}


def _proof_key(tokenizer: TokenizerInfo, name: str) -> str:
    code = [
        Path(__file__).with_name(each).read_bytes() for each in ("fast_encoder.py", "disputed.py")
    ]  # what was tried
    what = [*astuple(replace(tokenizer, source=None)), name, fast_checksum(), reference_name()]
    return hashlib.sha256(json.dumps(what).encode() + b"".join(code)).hexdigest()
