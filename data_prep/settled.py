"""Whether a folder already holds what is asked for.

In: a `Plan` and its folder. Out: True when the dataset is complete and the same, False when there is work to do, and a
UserError when the folder holds something else, which is never overwritten.
"""

import json
import shlex
import shutil
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from data_prep.align import read_rows
from data_prep.documents import files_path
from data_prep.errors import UserError
from data_prep.lock import LOCK_NAME, folder_lock
from data_prep.manifest import MANIFEST_NAME, load_manifest, prep_command
from data_prep.packing import CONCAT
from data_prep.plan import Plan, describe_files, other_folder
from data_prep.sources import SourceFile

REQUEST_NAME = "request.json"
LISTING_NAME = "files.jsonl"  # in the working folder
ALIGN_STATE = "align.json"  # in the working folder: encoding is finished, and this is its order
OWN_NAMES = ("train", "validation", "documents", "tokenizer")


def is_complete(plan: Plan) -> bool:
    """Whether the folder holds exactly this dataset (or all its buckets), complete.

    Raises:
        UserError: it holds another one, complete or interrupted, or files of somebody else.
    """
    done = [folder for folder in plan.outputs.values() if (folder / MANIFEST_NAME).exists()]
    for folder in done:
        manifest = load_manifest(folder)
        _refuse_other(plan, folder, manifest.settings, manifest.tokenizer.sha256)
        failed = [label for label, entry in manifest.ledger.items() if "failed" in entry]
        if failed and not plan.skip_failed:
            raise UserError(
                f"{folder}: was made with --skip-failed, and {', '.join(failed)} failed: it does not hold all of it. "
                f"Nothing is overwritten. Accept it as it is with --skip-failed, prepare all beside it: "
                f"{other_folder(plan, 'whole')}; or remove that one first: {_remove_command(plan)}"
            )
    if len(done) == len(plan.outputs):
        return True
    if done and not (plan.work / ALIGN_STATE).exists():
        raise UserError(
            f"{plan.folder}: of its buckets only {', '.join(folder.name for folder in done)} is complete, and all are "
            f"prepared together. Remove what is there, and the same command prepares all: "
            f"{_remove_command(plan)}"
        )
    request_path = plan.work / REQUEST_NAME
    if request_path.exists():
        earlier = json.loads(request_path.read_text(encoding="utf-8"))
        earlier = {"packing": CONCAT, **earlier}
        for key in ("tokenizer", "block_size", "packing"):
            if not _is_same_tokenizer(earlier[key], plan.settings()[key], None):
                _refuse_key(plan, plan.folder, key, earlier[key], "holds an interrupted preparation")
        begun = [plan.folder / name for name in earlier.get("buckets", {})]
        if (plan.work / ALIGN_STATE).exists() and set(begun) - set(plan.outputs.values()):
            raise UserError(
                f"{plan.folder}: holds an interrupted preparation with buckets {earlier['buckets']}. Nothing is "
                f"overwritten. Prepare it beside the other: {other_folder(plan, 'new')}; or remove that one first: "
                f"rm -rf {' '.join(shlex.quote(str(folder)) for folder in (plan.work, *begun))}"
            )
        return False
    for folder in plan.outputs.values():
        if any((folder / name).exists() for name in OWN_NAMES):
            raise UserError(
                f"{folder}: is not empty and was not made by prep (it has no {MANIFEST_NAME}). Nothing is overwritten. "
                f"Give another folder: {other_folder(plan, 'new')}"
            )
    return False


def lock(plan: Plan) -> AbstractContextManager[None]:
    """The right to write in the plan's folder, which one process has.

    Raises:
        UserError: another one has it, or nothing can be written there.
    """
    return folder_lock(plan.folder, "is preparing it", "OUT=... or DATA_DIR")


def remove_leftovers(plan: Plan) -> None:
    """Remove what a process left that was killed after its last file; one that is about to end removes its own."""
    if plan.work.exists() or (plan.folder / LOCK_NAME).exists():
        with suppress(UserError), lock(plan):
            shutil.rmtree(plan.work, ignore_errors=True)


def remove_unfinished(plan: Plan, names: tuple[str, ...]) -> None:
    """Remove what an unfinished preparation made: these of each dataset, and the working folder."""
    for folder in plan.outputs.values():
        for name in names:
            shutil.rmtree(folder / name, ignore_errors=True)
    shutil.rmtree(plan.work, ignore_errors=True)


def refuse_changed_source(plan: Plan) -> None:
    """A source that changed since the preparation was interrupted does not belong to what is finished.

    A file that had been in the way (a bad record, say) may be mended or removed: nothing was made of it.

    Raises:
        UserError: a file of which something was made is another or gone, or there is a new one.
    """
    path, listing = plan.work / REQUEST_NAME, plan.work / LISTING_NAME
    if not path.exists() or not listing.exists():
        return
    earlier, now = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(plan.settings()))
    if earlier == now or {**earlier, "local_files": None} != {**now, "local_files": None}:
        return
    changes, finished = _changes(plan, listing), _finished_files(plan.work, listing)
    if finished and (changes["new"] or finished & {*changes["changed"], *changes["gone"]}):
        owned = [folder / name for folder in plan.outputs.values() for name in OWN_NAMES if (folder / name).exists()]
        remove = " ".join(shlex.quote(str(each)) for each in (plan.work, *owned))
        raise UserError(
            f"{plan.folder}: its input changed since the preparation was interrupted: "
            f"{_describe_changes(plan, listing)}. What is finished was made of the old one. Put the old one back, and "
            f"the same command continues; or begin anew with the new one: rm -rf {remove}"
        )


def save_listing(plan: Plan, files: list[tuple[int, SourceFile]]) -> None:
    """Note in the working folder which files units are made of."""
    path, text = plan.work / LISTING_NAME, describe_files(files, plan.sources)
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return  # also where many processes do this at once
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def save_request(plan: Plan) -> bool:
    """Note in the working folder what is prepared; True if an earlier attempt at exactly this is continued."""
    path = plan.work / REQUEST_NAME
    text = json.dumps(plan.settings(), indent=2, sort_keys=True)
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return True
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return False


def _refuse_other(plan: Plan, folder: Path, earlier: dict[str, Any], tokenizer_sha256: str) -> None:
    what = "holds a dataset made"
    now = json.loads(json.dumps(plan.settings()))
    if not _is_same_tokenizer(earlier["tokenizer"], now["tokenizer"], tokenizer_sha256):
        _refuse_key(plan, folder, "tokenizer", earlier["tokenizer"], what)
    # what manifests did not always have
    earlier = {"buckets": {}, "filters": {}, "packing": CONCAT, "sample": "first", **earlier}
    for key in ("block_size", "packing"):
        if earlier[key] != now[key]:
            _refuse_key(plan, folder, key, earlier[key], what)
    for key in ("val_fraction", "val_max_tokens", "max_tokens", "max_docs", "buckets", "filters", "sample", "sources"):
        if earlier[key] != now[key]:
            _refuse_setting(plan, folder, key, earlier[key], now[key])
    if earlier["local_files"] != now["local_files"]:
        changes = _describe_changes(plan, files_path(folder))
        raise UserError(
            f"{folder}: was made from other input: {changes}. The prepared blocks are not touched. "
            f"Prepare the new input beside it: {other_folder(plan, 'new')}; or remove the old one first: "
            f"{_remove_command(plan)} && {prep_command(folder)}"
        )


def _is_same_tokenizer(earlier: Any, now: Any, sha256: str | None) -> bool:
    if not isinstance(now, dict) or "path" not in now:
        return earlier == now
    return now["sha256"] is not None and now["sha256"] in (earlier.get("sha256"), sha256)


def _remove_command(plan: Plan) -> str:
    folders = [folder for folder in plan.outputs.values() if folder.exists()]
    if not plan.buckets and any(plan.folder.glob(f"*/{MANIFEST_NAME}")):  # its buckets lie beside it and stay
        folders = [plan.folder / name for name in (MANIFEST_NAME, *OWN_NAMES)]
    return f"rm -r {' '.join(shlex.quote(str(folder)) for folder in folders)}"


def _refuse_key(plan: Plan, folder: Path, key: str, earlier: Any, what: str) -> None:
    now = plan.settings()[key]
    suffix = str(now).replace("_", "-")
    if key == "tokenizer":
        suffix = _describe_tokenizer(now).rstrip("/").split("/")[-1].replace(":", "-")
    shown = [_describe_tokenizer(value) if key == "tokenizer" else value for value in (earlier, now)]
    raise UserError(
        f"{folder}: {what} with {key} {shown[0]} but {key} {shown[1]} is asked for. Nothing is overwritten. "
        f"Prepare it beside the other: {other_folder(plan, suffix)} "
        f"{key.upper()}={shown[1]}"
    )


def _refuse_setting(plan: Plan, folder: Path, key: str, earlier: Any, now: Any) -> None:
    if key == "sources" and len(earlier) == len(now):
        pairs = [(name, a.get(name), b.get(name)) for a, b in zip(earlier, now, strict=True) for name in {**a, **b}]
        key, earlier, now = next((name, a, b) for name, a, b in pairs if a != b)
    if key == "filters":
        name = next(name for name in {**earlier, **now} if earlier.get(name) != now.get(name))
        key, earlier, now = f"filters.{name}", earlier.get(name, "off"), now.get(name, "off")
    raise UserError(
        f"{folder}: was made with {key} {earlier!r} but {now!r} is asked for. Nothing is overwritten. "
        f"Prepare it beside the other: {other_folder(plan, 'new')}; or remove that one first: {_remove_command(plan)}"
    )


def _describe_tokenizer(source: dict[str, Any]) -> str:
    return f"train:{source['train']}" if "train" in source else str(source.get("id") or source["path"])


def _describe_changes(plan: Plan, listing: Path) -> str:
    changes = _changes(plan, listing)
    return ", ".join(
        f"{len(names)} {'file' if len(names) == 1 else 'files'} {what} ({names[0]}{' ...' if len(names) > 1 else ''})"
        for what, names in changes.items()
        if names
    )


def _changes(plan: Plan, listing: Path) -> dict[str, list[str]]:
    """Of the sources that lie here the files that changed since they were listed, are new, or are gone, by name."""
    earlier = {}
    for line in listing.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        earlier[row["source"], row["name"]] = (row["size"], row["identity"])
    now: dict[tuple[str, str], SourceFile] = {}
    for number, files in plan.local_files.items():
        now.update({(plan.sources[number].label, file.name): file for file in files})
    local = {plan.sources[number].label for number in plan.local_files}
    return {
        "changed": [
            name
            for source, name in now
            if (source, name) in earlier and earlier[source, name] != _key(now[source, name])
        ],
        "new": [name for source, name in now if (source, name) not in earlier],
        "gone": [name for source, name in earlier if source in local and (source, name) not in now],
    }


def _finished_files(work: Path, listing: Path) -> set[str]:
    """The names of files that finished units are made of."""
    import pyarrow.compute as pc

    names = [json.loads(line)["name"] for line in listing.read_text(encoding="utf-8").splitlines()]
    finished: set[str] = set()
    for path in work.glob("*.rows.arrow"):
        if (work / f"{path.name.partition('.')[0]}.json").exists():
            finished |= {names[i] for i in pc.unique(read_rows(work, path.name.partition(".")[0])["file"]).to_pylist()}
    return finished


def _key(file: SourceFile) -> tuple[int, str]:
    return (file.size, file.identity)
