"""The options of `prep` that say how its sources are read.

In: the parser of `prep`. Out: the same, with them.
"""

import argparse

from data_prep.catalog import TOKENIZED


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
