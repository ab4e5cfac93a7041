"""The story of a preparation: from the names of sources to a folder of blocks.

In: `Options`. Out: data/<dataset>/ with its manifest. Each numbered paragraph can be interrupted; the same command goes
on from there.
"""

import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from data_prep.align import Taken, write_document_map, write_split
from data_prep.documents import files_path
from data_prep.encoder import encoder_name
from data_prep.errors import UserError
from data_prep.hub import list_hub_files
from data_prep.jobs import make_jobs, make_stream
from data_prep.ledger import LedgerError, describe_ledger, find_imbalances, ledger_entry
from data_prep.lock import folder_lock
from data_prep.manifest import (
    MANIFEST_NAME,
    SPLITS,
    WORK_NAME,
    Manifest,
    SplitInfo,
    TokenizerInfo,
    content_fingerprint,
    load_manifest,
    save_manifest,
    token_dtype,
)
from data_prep.plan import Options, Plan, describe_files, make_plan, val_threshold
from data_prep.progress import Progress
from data_prep.settled import is_complete, save_request
from data_prep.sources import MAX_HASHED_BYTES, SourceFile
from data_prep.stream import Stream
from data_prep.tokenizer_folder import describe_tokenizer, import_tokenizer
from data_prep.tokenizer_training import DEFAULT_SAMPLE_BYTES, ControlTokens, iter_sample, train_tokenizer
from data_prep.units import UNIT_BYTES
from data_prep.workers import NO_ROOM, explain_no_room, run_jobs

TOKENIZER_DONE = "tokenizer.json"  # in the working folder: what the finished tokenizer was made from
ALIGN_STATE = "align.json"  # in the working folder: encoding is finished, and this is its order


def prepare(options: Options) -> Manifest:
    """Prepare a dataset, or go on with it, or find it complete.

    Raises:
        UserError: anything the user can mend.
        LedgerError: the counts do not add up.
    """
    # 1. What is asked for, and whether the folder already holds it.
    plan = make_plan(options)
    if is_complete(plan):
        shutil.rmtree(plan.folder / WORK_NAME, ignore_errors=True)
        manifest = load_manifest(plan.folder)
        print(f"{plan.folder}: complete, nothing to do ({manifest.num_train_tokens:,} train tokens).")
        return manifest
    with folder_lock(plan.folder, "is preparing it", "OUT=... or DATA_DIR"):
        if is_complete(plan):  # another process finished it while we waited for nothing
            return load_manifest(plan.folder)
        try:
            return _prepare(plan, options.num_proc)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise explain_no_room(error, plan.folder) from error
            raise
        finally:
            _leave_nothing_unfinished(plan.folder)


def _prepare(plan: Plan, num_proc: int | None) -> Manifest:
    folder, work = plan.folder, plan.folder / WORK_NAME
    # 2. The files of all sources, those on the Hub pinned to a commit; the share of validation, fixed from their sizes.
    files = _list_all_files(plan, work)
    validation = val_threshold(plan, files)
    stream = make_stream(plan, files)
    if _is_small_and_strict(plan):
        stream.check_readable()
    work.mkdir(exist_ok=True)
    is_continued = save_request(plan)
    if not is_continued and (work / ALIGN_STATE).exists():
        print(f"{folder}: the input changed since the last attempt, which starts anew.", file=sys.stderr)
        _remove(folder, (*SPLITS, "documents"), work)
        work.mkdir()
        save_request(plan)

    # 3. The tokenizer, beside the blocks it makes.
    tokenizer = _settle_tokenizer(plan, stream, validation["threshold"], work)
    dtype = token_dtype(tokenizer.vocab_size)

    # 4. Encode: units, by any number of workers, each leaving a token run; caps end the stream.
    state_path = work / ALIGN_STATE
    if state_path.exists():
        state = json.loads(state_path.read_text(encoding="utf-8"))
    else:
        units = _encode(plan, stream, tokenizer, validation["threshold"], _choose_num_proc(plan, num_proc))
        state = {"units": [asdict(unit) for unit in units], "ledger": _make_ledger(plan, stream)}
        _check_length(plan, stream)
        _write_whole(state_path, json.dumps(state))
    taken = [Taken(**unit) for unit in state["units"]]

    # 5. Align: runs into shards of whole blocks, tables into the document map.
    splits = {}
    (folder / "documents").mkdir(exist_ok=True)
    _write_whole(files_path(folder), describe_files(files, plan.sources))
    for name in SPLITS:
        shards = write_split(folder, work, name, taken, plan.block_size, dtype)
        counts = [entry[name] for entry in state["ledger"].values()]
        num_tokens, num_blocks = sum(each["num_tokens"] for each in counts), sum(shard.num_blocks for shard in shards)
        splits[name] = SplitInfo(
            num_documents=sum(each["num_documents"] for each in counts),
            num_bytes=sum(each["num_bytes"] for each in counts),
            num_tokens=num_tokens,
            num_blocks=num_blocks,
            remainder_tokens=num_tokens - num_blocks * plan.block_size,
            documents_sha256=write_document_map(folder, work, name, taken, plan.keep_columns),
            shards=shards,
        )

    # 6. The ledger must balance; the manifest, written last, says that the dataset is complete.
    problems = find_imbalances(state["ledger"], splits, plan.block_size)
    if problems:
        raise LedgerError(f"{folder}: the ledger does not balance, so no manifest is written:\n" + "\n".join(problems))
    manifest = Manifest(
        dataset=plan.dataset,
        licence=", ".join(dict.fromkeys(source.entry.licence for source in plan.sources)),
        fingerprint=content_fingerprint(tokenizer.sha256, plan.block_size, str(dtype), splits),
        block_size=plan.block_size,
        dtype=str(dtype),
        encoder=encoder_name(),
        tokenizer=tokenizer,
        validation=validation,
        splits=splits,
        ledger=state["ledger"],
        settings=plan.settings(),
    )
    save_manifest(manifest, folder)
    shutil.rmtree(work)
    print(describe_ledger(manifest.ledger, splits, plan.block_size))
    print(f"{folder}: complete. Look at it: python -m data_prep inspect {folder}")
    return manifest


def _list_all_files(plan: Plan, work: Path) -> list[tuple[int, SourceFile]]:
    files = []
    for number, source in enumerate(plan.sources):
        if source.entry.path is not None:
            found = plan.local_files[number]
        else:
            pinned = work / f"hub-{number}.json"  # an interrupted preparation goes on with the same commit
            if pinned.exists():
                found = [SourceFile(**file) for file in json.loads(pinned.read_text(encoding="utf-8"))]
            else:
                found = list_hub_files(source.entry)
                work.mkdir(exist_ok=True)
                _write_whole(pinned, json.dumps([asdict(file) for file in found]))
        files += [(number, file) for file in found]
    return files


def _is_small_and_strict(plan: Plan) -> bool:
    """Whether reading everything once before writing costs little: then every error comes first."""
    is_local = all(source.entry.path is not None for source in plan.sources)
    size = sum(file.size for files in plan.local_files.values() for file in files)
    is_strict = any(source.entry.on_bad_record == "fail" for source in plan.sources)
    return is_local and size <= MAX_HASHED_BYTES and is_strict and plan.max_tokens is None


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
    files = [
        (number, file)
        for number, source in enumerate(plan.sources)
        for file in plan.local_files.get(number) or list_hub_files(source.entry)
    ]
    stream = make_stream(plan, files)
    if _is_small_and_strict(plan):
        stream.check_readable()
    progress = Progress("reading for the tokenizer", min(sum(file.size for _, file in files), sample_bytes))
    threshold = val_threshold(plan, files)["threshold"]  # what prep would hold out is not learned from
    try:
        train_tokenizer(iter_sample(stream, threshold, sample_bytes, progress), vocab_size, out, control)
    finally:
        progress.close()
    print(f"{out}: a tokenizer of {vocab_size:,} entries. Use it: python -m data_prep prep ... --tokenizer {out}")


def _settle_tokenizer(plan: Plan, stream: Stream, threshold: int, work: Path) -> TokenizerInfo:
    """The tokenizer in the dataset's folder; trained or loaded unless an earlier attempt did it from the same input."""
    folder, done = plan.folder / "tokenizer", work / TOKENIZER_DONE
    key = json.dumps({**plan.settings(), "block_size": None, "threshold": threshold}, sort_keys=True)
    if folder.exists() and done.exists() and done.read_text(encoding="utf-8") == key:
        return describe_tokenizer(folder, plan.tokenizer)
    temporary = work / "tokenizer"
    shutil.rmtree(temporary, ignore_errors=True)
    if "train" in plan.tokenizer:
        size = sum(file.size for _, file in stream.files)
        progress = Progress("reading for the tokenizer", min(size, DEFAULT_SAMPLE_BYTES))
        print(f"training a tokenizer of {plan.tokenizer['train']:,} entries ...", file=sys.stderr)
        try:
            texts = iter_sample(stream, threshold, DEFAULT_SAMPLE_BYTES, progress)
            train_tokenizer(texts, plan.tokenizer["train"], temporary, ControlTokens())
        finally:
            progress.close()
    else:
        import_tokenizer(plan.tokenizer.get("path") or plan.tokenizer["id"], temporary)
    info = describe_tokenizer(temporary, plan.tokenizer)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    _write_whole(done, key)
    return info


def _encode(plan: Plan, stream: Stream, tokenizer: TokenizerInfo, threshold: int, num_proc: int) -> list[Taken]:
    work = plan.folder / WORK_NAME
    is_capped = plan.max_tokens or plan.max_docs or any(source.max_documents for source in plan.sources)
    progress = Progress("encoding", None if is_capped else sum(file.size for _, file in stream.files))
    units = []
    try:
        for job, result in run_jobs(make_jobs(plan, stream, tokenizer, threshold), num_proc, progress.add_text):
            progress.add_input(job.unit.num_bytes)
            try:
                unit = stream.take(job, result)
            except UserError:
                (work / f"{job.key}.json").unlink()  # a unit that ended at a bad record is not finished work
                raise
            if unit is not None:
                units.append(unit)
    finally:
        progress.close()
    return units


def _choose_num_proc(plan: Plan, num_proc: int | None) -> int:
    """All cores this process may use, unless said otherwise; this process alone for what fits one unit."""
    if num_proc is not None:
        return num_proc
    is_local = all(source.entry.path is not None for source in plan.sources)
    if is_local and sum(file.size for files in plan.local_files.values() for file in files) <= UNIT_BYTES:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _make_ledger(plan: Plan, stream: Stream) -> dict:
    beyond = stream.count_beyond_caps()
    ledger = {}
    for number, source in enumerate(plan.sources):
        num_files = sum(1 for n, _ in stream.files if n == number)
        ignored = dict(plan.ignored_files.get(number, {}))
        ledger[source.label] = ledger_entry(stream.counts[number], *beyond[number], num_files, ignored)
    return json.loads(json.dumps(ledger, default=vars))


def _check_length(plan: Plan, stream: Stream) -> None:
    num_tokens = sum(counts.splits["train"].num_tokens for counts in stream.counts.values())
    if num_tokens < plan.block_size:
        _remove(plan.folder, ("tokenizer",), plan.folder / WORK_NAME)
        raise UserError(
            f"{plan.folder}: block_size is {plan.block_size:,} but the train documents have only {num_tokens:,} "
            "tokens together, "
            "so there is not one block to train on. Give more text, or a smaller block: "
            f"BLOCK_SIZE={2 ** (max(num_tokens, 2).bit_length() - 1)}."
        )


def _leave_nothing_unfinished(folder: Path) -> None:
    """After a failure in front of the first finished piece of work, leave the folder as it was found."""
    work = folder / WORK_NAME
    if not (folder / MANIFEST_NAME).exists() and not (work / TOKENIZER_DONE).exists():
        _remove(folder, ("tokenizer",), work)


def _remove(folder: Path, names: tuple[str, ...], work: Path) -> None:
    for path in (*(folder / name for name in names), work):
        shutil.rmtree(path, ignore_errors=True)


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
