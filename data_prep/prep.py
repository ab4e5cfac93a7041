"""The story of a preparation: from the names of sources to a folder of blocks.

In: `Options`. Out: data/<dataset>/ with its manifest, or data/<dataset>/<bucket>/ for each bucket. Each numbered
paragraph can be interrupted; the same command goes on from there.
"""

import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.align import Taken
from data_prep.buckets import column_names
from data_prep.decontamination import INDEX_NAME, write_index
from data_prep.encoder import EncoderChoice
from data_prep.encoding_progress import EncodingProgress
from data_prep.errors import UserError
from data_prep.fast_encoder import EncoderMismatchError
from data_prep.filters import check_installed
from data_prep.jobs import make_jobs, make_screening, make_stream
from data_prep.ledger import describe_ledger, ledger_entry, no_value_rule
from data_prep.listing import list_all_files, list_far_files
from data_prep.manifest import MANIFEST_NAME, SPLITS, Manifest, TokenizerInfo, load_manifest, save_manifest, token_dtype
from data_prep.output import write_dataset, write_whole
from data_prep.packing import CONCAT
from data_prep.paths import as_argument
from data_prep.plan import Options, Plan, make_plan, val_threshold
from data_prep.progress import Progress
from data_prep.proof import choose_or_give_up, give_up
from data_prep.removed import describe_filters, describe_left_out
from data_prep.settled import (
    ALIGN_STATE,
    OWN_NAMES,
    is_complete,
    lock,
    refuse_changed_source,
    remove_leftovers,
    remove_unfinished,
    save_listing,
    save_request,
)
from data_prep.sources import SourceFile
from data_prep.stream import Stream
from data_prep.tokenizer_folder import describe_tokenizer, import_tokenizer
from data_prep.tokenizer_sample import DEFAULT_SAMPLE_BYTES, train_on_sample
from data_prep.tokenizer_training import ControlTokens
from data_prep.units import UNIT_BYTES
from data_prep.workers import NO_ROOM, Workers, explain_no_room

READ_TWICE_BYTES = 32_000_000  # of input, uncompressed: a moment
TOKENIZER_DONE = "tokenizer.json"  # in the working folder: what the finished tokenizer was made from


def prepare(options: Options) -> dict[str, Manifest]:
    """Prepare a dataset, or go on with it, or find it complete.

    Returns:
        The manifest of each bucket; of the one dataset without buckets by "".
    Raises:
        UserError: anything the user can mend.
        LedgerError: the counts do not add up.
    """
    # 1. What is asked for, and whether the folder already holds it.
    plan = make_plan(options)
    if is_complete(plan):
        remove_leftovers(plan)
        manifests = _load_manifests(plan)
        for bucket, folder in plan.outputs.items():
            print(f"{folder}: complete, nothing to do ({manifests[bucket].num_train_tokens:,} train tokens).")
        return manifests
    with lock(plan):
        if is_complete(plan):  # another process finished it while we waited for nothing
            return _load_manifests(plan)
        try:
            with Workers(_choose_num_proc(plan, options.num_proc)) as workers:
                return _prepare(plan, workers, options.encoder)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise explain_no_room(error, plan.folder) from error
            raise
        finally:
            _leave_nothing_unfinished(plan)


@dataclass
class Settled:
    """What is fixed before anything is encoded."""

    files: list[tuple[int, SourceFile]]
    validation: dict[str, Any]
    stream: Stream
    tokenizer: TokenizerInfo


def settle(plan: Plan) -> Settled:
    """Paragraphs 2 and 3: the files, the share of validation, and the tokenizer."""
    work = plan.work
    # 2. The files of all sources, those on the Hub pinned to a commit; the share of validation, fixed from their sizes.
    files = list_all_files(plan)
    validation = val_threshold(plan, files)
    stream = make_stream(plan, files)
    if _is_small_and_strict(plan):
        stream.check_readable()
    if plan.filters is not None:
        check_installed(plan.filters)
    work.mkdir(exist_ok=True)
    refuse_changed_source(plan)
    is_continued = save_request(plan)
    save_listing(plan, files)
    if not is_continued and (work / ALIGN_STATE).exists():
        print(f"{plan.folder}: the input changed since the last attempt, which starts anew.", file=sys.stderr)
        remove_unfinished(plan, OWN_NAMES)
        work.mkdir()
        save_request(plan)
        save_listing(plan, files)
    if plan.filters is not None and "decontaminate" in plan.filters.options:
        print("\n".join(write_index(plan.filters, work / INDEX_NAME)), file=sys.stderr)

    # 3. The tokenizer, beside the blocks it makes; one for all buckets, of all the text.
    return Settled(files, validation, stream, _settle_tokenizer(plan, stream, validation["threshold"], work))


def encode_all(plan: Plan, settled: Settled, workers: Workers, encoder_option: str) -> dict[str, Any]:
    """Paragraph 4: what of each unit is kept, the ledgers, and the encoder; from the working folder if it is there."""
    # 4. Encode: units, by any number of workers, each leaving a token run; caps end the stream. The fast encoder has
    # to prove itself; when it fails later, the reference does everything again.
    state_path = plan.work / ALIGN_STATE
    if state_path.exists():
        return json.loads(state_path.read_text(encoding="utf-8"))
    stream, tokenizer, threshold = settled.stream, settled.tokenizer, settled.validation["threshold"]
    choice = choose_or_give_up(plan, stream, tokenizer, encoder_option)
    try:
        units = _encode(plan, stream, tokenizer, choice, threshold, workers)
    except EncoderMismatchError as mismatch:
        choice = give_up(plan, tokenizer, encoder_option, mismatch)
        stream = make_stream(plan, settled.files)
        units = _encode(plan, stream, tokenizer, choice, threshold, workers)
    state = {
        "units": [asdict(unit) for unit in units],
        "ledgers": _make_ledgers(plan, stream),
        "encoder": choice.for_manifest(stream.num_compared),
    }
    _check_values(plan, stream)
    _check_length(plan, stream)
    write_whole(state_path, json.dumps(state))
    return state


def _prepare(plan: Plan, workers: Workers, encoder_option: str) -> dict[str, Manifest]:
    work, settled = plan.work, settle(plan)
    files, validation, tokenizer = settled.files, settled.validation, settled.tokenizer
    state = encode_all(plan, settled, workers, encoder_option)
    taken = [Taken(**unit) for unit in state["units"]]

    # 5. Align, for each bucket: runs into shards of whole blocks, tables into the document map; a ledger that balances.
    with Progress("writing", _num_bytes_to_write(state["ledgers"], tokenizer)) as progress:
        manifests = {
            bucket: write_dataset(
                plan, number, files, taken, state["ledgers"][bucket], tokenizer, state["encoder"], validation, progress
            )
            for number, bucket in enumerate(plan.outputs)
        }

    # 6. The manifests, written last, say that all is complete.
    for bucket, folder in plan.outputs.items():
        save_manifest(manifests[bucket], folder)
    shutil.rmtree(work)
    for number, (bucket, folder) in enumerate(plan.outputs.items()):
        if bucket:
            print(f"{bucket} ({plan.buckets[number].condition}):")
        print(describe_ledger(manifests[bucket].ledger, manifests[bucket].splits, plan.block_size))
        if plan.filters is not None:
            print(describe_filters(manifests[bucket].ledger))
        print(f"{folder}: complete. Look at it: python -m data_prep inspect {as_argument(folder)}")
    return manifests


def _load_manifests(plan: Plan) -> dict[str, Manifest]:
    return {bucket: load_manifest(folder) for bucket, folder in plan.outputs.items()}


def _is_small_and_strict(plan: Plan) -> bool:
    """Whether reading everything once before writing costs little: then every error comes first."""
    is_local = all(source.entry.path is not None for source in plan.sources)
    size = sum(file.text_bytes for files in plan.local_files.values() for file in files)
    if any(source.entry.tokenized for source in plan.sources):
        return False  # its ids mean nothing before there is a tokenizer
    is_strict = any(source.entry.on_bad_record == "fail" for source in plan.sources) and not plan.skip_failed
    return is_local and size <= READ_TWICE_BYTES and is_strict and plan.max_tokens is None


def train_from_sources(
    specs: list[str], vocab_size: int, out: Path, sample_bytes: int, text_column: str | None, control: ControlTokens
) -> None:
    """The command train-tokenizer: learn from the first `sample_bytes` of the sources, save as `out`.

    Raises:
        UserError: `out` exists, or as `prepare`.
    """
    if out.exists():
        raise UserError(f"{out}: exists already and is not overwritten. Remove it (rm -r {out}) or give another --out.")
    options = Options(
        tuple(specs), out=str(out), tokenizer=f"train:{vocab_size}", block_size=1, text_column=text_column
    )
    plan = make_plan(options)
    if plan.filters is not None:
        check_installed(plan.filters)
    files = [
        (number, file)
        for number, source in enumerate(plan.sources)
        for file in plan.local_files.get(number) or list_far_files(source.entry)
    ]
    downloads = tempfile.TemporaryDirectory()
    stream = make_stream(plan, files, Path(downloads.name))
    if _is_small_and_strict(plan):
        stream.check_readable()
    threshold = val_threshold(plan, files)["threshold"]  # what prep would hold out is not learned from
    try:
        train_on_sample(stream, threshold, sample_bytes, vocab_size, out, control)
    finally:
        stream.downloads.close()
        downloads.cleanup()
    with tempfile.TemporaryDirectory() as folder:  # both ways of loading agree, and prep need not ask again
        import_tokenizer(str(out), Path(folder) / "tokenizer")
    print(f"{out}: a tokenizer of {vocab_size:,} entries. Use it: python -m data_prep prep ... --tokenizer {out}")


def _settle_tokenizer(plan: Plan, stream: Stream, threshold: int, work: Path) -> TokenizerInfo:
    """The tokenizer in the dataset's folder; trained or loaded unless an earlier attempt did it from the same input."""
    folder, done = plan.tokenizer_folder, work / TOKENIZER_DONE
    settings = {**plan.settings(), "block_size": None, "packing": None, "skip_failed": None}
    settings["sources"] = [{**source, "on_bad_record": None} for source in settings["sources"]]
    key = json.dumps({**settings, "threshold": threshold}, sort_keys=True)
    if folder.exists() and done.exists() and done.read_text(encoding="utf-8") == key:
        return describe_tokenizer(folder, plan.tokenizer)
    temporary = work / "tokenizer"
    shutil.rmtree(temporary, ignore_errors=True)
    if "train" in plan.tokenizer:
        size = plan.tokenizer["train"]
        train_on_sample(stream, threshold, DEFAULT_SAMPLE_BYTES, size, temporary, ControlTokens())
    else:
        import_tokenizer(plan.tokenizer.get("path") or plan.tokenizer["id"], temporary)
    info = describe_tokenizer(temporary, plan.tokenizer)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    write_whole(done, key)
    return info


def _encode(
    plan: Plan, stream: Stream, tokenizer: TokenizerInfo, encoder: EncoderChoice, threshold: int, workers: Workers
) -> list[Taken]:
    progress = EncodingProgress(plan, stream)
    units = []
    screening = make_screening(plan)
    jobs = make_jobs(plan, stream, tokenizer, encoder, threshold, screening)
    try:
        for job, result in workers.run(progress.watch(jobs), progress.add_text):
            if job.is_screening:
                screening.take(job)
                progress.take(job, None)
                continue
            try:
                unit = stream.take(job, result)
                if screening is not None and unit is not None:
                    screening.settle(job, unit.num_rows)
            except UserError:
                (plan.work / f"{job.key}.json").unlink()  # a unit that ended at a bad record is not finished work
                raise
            stream.downloads.done_with(job.unit.pieces)
            progress.take(job, unit)
            if unit is not None:
                units.append(unit)
        progress.finish()
    finally:
        progress.close()
        stream.downloads.close()
    return units


def _choose_num_proc(plan: Plan, num_proc: int | None) -> int:
    """All cores this process may use, unless said otherwise; this process alone for what fits one unit."""
    if num_proc is not None:
        return num_proc
    is_local = all(source.entry.path is not None for source in plan.sources)
    if is_local and sum(file.size for files in plan.local_files.values() for file in files) <= UNIT_BYTES:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _num_bytes_to_write(ledgers: dict[str, dict], tokenizer: TokenizerInfo) -> int:
    """About the size of all shards together."""
    num_tokens = sum(
        entry[split]["num_tokens"] for each in ledgers.values() for entry in each.values() for split in SPLITS
    )
    return num_tokens * token_dtype(tokenizer.vocab_size).itemsize


def _make_ledgers(plan: Plan, stream: Stream) -> dict[str, dict]:
    """The ledger of each bucket, or the one."""
    beyond = stream.count_beyond_caps()
    ledgers: dict[str, dict] = {bucket: {} for bucket in plan.outputs}
    for number, source in enumerate(plan.sources):
        num_files = sum(1 for n, _ in stream.files if n == number)
        ignored = dict(plan.ignored_files.get(number, {}))
        for ledger, counts in zip(ledgers.values(), stream.counts[number], strict=True):
            ledger[source.label] = ledger_entry(counts, *beyond[number], num_files, ignored, stream.failed.get(number))
    return json.loads(json.dumps(ledgers, default=vars))


def _check_values(plan: Plan, stream: Stream) -> None:
    """A source without one value of a column that buckets are by is a misspelt column, not text to leave out."""
    for number, source in enumerate(plan.sources if plan.buckets else ()):
        counts = stream.counts[number][0]
        num_texts = counts.num_read - counts.num_empty - counts.num_bad
        if counts.num_filtered.get(no_value_rule(plan.buckets)) == num_texts > 0:
            remove_unfinished(plan, ("tokenizer",))
            columns = column_names(plan.buckets)
            kinds = ", ".join(plan.keep_columns[name] for name in columns)
            raise UserError(
                f"{source.label}: the buckets are by {', '.join(columns)} (read as {kinds}) but not one of its "
                f"{num_texts:,} documents has a value there. Check the spelling in the conditions and in the source."
            )


def _check_length(plan: Plan, stream: Stream) -> None:
    for number, folder in enumerate(plan.outputs.values()):
        num_tokens = sum(counts[number].splits["train"].num_tokens for counts in stream.counts.values())
        if num_tokens < (plan.block_size if plan.packing == CONCAT else 1):
            remove_unfinished(plan, ("tokenizer",))
            where = f"{folder} ({plan.buckets[number].condition})" if plan.buckets else str(folder)
            raise UserError(
                f"{where}: block_size is {plan.block_size:,} but the train documents have only {num_tokens:,} "
                "tokens together, "
                "so there is not one block to train on. Give more text, or a smaller block: "
                f"BLOCK_SIZE={2 ** (max(num_tokens, 2).bit_length() - 1)}."
                + describe_left_out(counts[number] for counts in stream.counts.values())
            )


def _leave_nothing_unfinished(plan: Plan) -> None:
    """After a failure in front of the first finished piece of work, leave the folder as it was found."""
    is_begun = any((folder / MANIFEST_NAME).exists() for folder in plan.outputs.values())
    if not is_begun and not (plan.work / TOKENIZER_DONE).exists():
        remove_unfinished(plan, ("tokenizer",))
