"""The files of all sources of a plan, wherever they lie.

In: a plan. Out: its files in reading order, each with its source's number. What lies elsewhere is pinned in the working
folder, so that an interrupted preparation goes on with the same files.
"""

import json
import sys
from dataclasses import asdict

from data_prep.catalog import DatasetEntry
from data_prep.errors import UserError
from data_prep.hub import list_hub_files
from data_prep.jobs import make_stream
from data_prep.output import write_whole
from data_prep.plan import Plan
from data_prep.sources import SourceFile
from data_prep.urls import list_url_files


def list_all_files(plan: Plan) -> list[tuple[int, SourceFile]]:
    """All files, those of the Hub pinned to a commit.

    Raises:
        UserError: a source's files cannot be listed, and it may not be left out.
    """
    work, files = plan.work, []
    for number, source in enumerate(plan.sources):
        if number in plan.failed:
            print(f"warning: source {source.label} failed and is left out: {plan.failed[number]}", file=sys.stderr)
            continue
        if source.entry.path is not None:
            found = plan.local_files[number]
        else:
            pinned = work / f"hub-{number}.json"  # an interrupted preparation goes on with the same commit
            if pinned.exists():
                found = [SourceFile(**file) for file in json.loads(pinned.read_text(encoding="utf-8"))]
            else:
                try:
                    found = list_far_files(source.entry)
                except UserError as error:
                    make_stream(plan, []).fail(number, error)  # which it does not survive, unless it may be left out
                    plan.failed[number] = str(error)
                    continue
                work.mkdir(exist_ok=True)
                write_whole(pinned, json.dumps([asdict(file) for file in found]))
        files += [(number, file) for file in found]
    if not files:
        raise UserError(f"{plan.folder}: no source is left to read. " + " ".join(plan.failed.values()))
    return files


def list_far_files(entry: DatasetEntry, is_remembered: bool = True) -> list[SourceFile]:
    """The files of a source that does not lie here.

    Args:
        is_remembered: Write those of the Hub down for times without network.
    """
    return list_hub_files(entry, is_remembered) if entry.repository is not None else list_url_files(entry)
