"""The options of `prep` that say how its sources are read, and where it runs.

In: the parser of `prep`. Out: the same, with them.
"""

import argparse

from data_prep.catalog import TOKENIZED


def add_cluster_options(prep: argparse.ArgumentParser) -> None:
    """Those that say where it runs."""
    prep.add_argument(
        "--executor",
        choices=("local", "slurm", "ray"),
        help="run it by datatrove (pip install -e '.[cluster]'): on processes here, as jobs of Slurm, or on Ray",
    )
    prep.add_argument(
        "--tasks",
        type=_positive,
        metavar="N",
        help="with --executor: how many tasks the work is divided into (default: --num-proc); never changes the result",
    )
    prep.add_argument(
        "--slurm",
        nargs="+",
        default=[],
        type=_setting,
        metavar="KEY=VALUE",
        help="with --executor slurm: partition=cpu time=24:00:00, and every other argument of datatrove's "
        "SlurmPipelineExecutor; sbatch.account=x goes to sbatch as --account=x",
    )


def _setting(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not key or not sign:
        raise argparse.ArgumentTypeError(f"{text} is not written like partition=cpu")
    return key, value


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)


def add_source_options(prep: argparse.ArgumentParser) -> None:
    """Add them."""
    prep.add_argument(
        "--sample",
        choices=("first", "spread"),
        help="what a cap takes: the first documents, or row groups drawn over all files (default: the dataset's, else "
        "first)",
    )
    prep.add_argument(
        "--tokenized",
        choices=TOKENIZED,
        help="the source holds ids of --tokenizer: a column input_ids, a row being a document or part of a stream "
        "that is cut at each EOS, or a .bin (nanoGPT's), always a stream",
    )
    prep.add_argument(
        "--estimate",
        action="store_true",
        help="say documents, tokens, disk and time of it from a small sample, and write nothing",
    )
    prep.add_argument(
        "--skip-failed",
        action="store_true",
        help="a source that cannot be read (on) ends there, which the ledger says, instead of ending the preparation",
    )
    prep.add_argument(
        "--keep-downloads",
        action="store_true",
        help="files of the Hub stay in its cache (default: removed when they are encoded)",
    )
