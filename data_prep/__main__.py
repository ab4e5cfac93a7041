"""`python -m data_prep`: the commands that make, look at and check prepared datasets.

Exit codes: 0 done, 1 a mistake of ours, 2 something the user can mend (one message, no traceback), 130 interrupted.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.cli_options import add_cluster_options, add_source_options
from data_prep.errors import UserError
from data_prep.packing import PACKINGS
from data_prep.sizes import parse_bytes, parse_count

SOURCES_HELP = (
    "a listed dataset (see `datasets`), a file, folder or glob, or a Hub id owner/name; "
    "name:100K takes the first 100,000 documents"
)
TOP = """examples:
  python -m data_prep datasets                          all named datasets, with sizes and licences
  python -m data_prep prep stdlib                       a named dataset, into data/stdlib
  python -m data_prep prep notes/ --tokenizer train:8000 --block-size 512 --out data/notes
  python -m data_prep inspect stdlib                    some documents and blocks, as text
  python -m data_prep check stdlib                      recount everything from the files
"""
PREP = """examples:
  python -m data_prep prep fineweb                      tokenizer and block size as its YAML says
  python -m data_prep prep fineweb:100K --out data/fineweb-small
  python -m data_prep prep books/ '*.jsonl.gz' --out data/mine --tokenizer gpt2 --block-size 1024
  python -m data_prep prep fineweb-edu-10bt/high        all its buckets by score: data/fineweb-edu-10bt/low and /high
  python -m data_prep prep fineweb --tokenizer gpt2 --estimate
  python -m data_prep prep 's3://bucket/x/*.parquet:1M' --sample spread --out data/sample
  python -m data_prep prep train.bin --tokenized stream --tokenizer gpt2 --block-size 1024 --out data/bin
  python -m data_prep prep tinystories wikitext103 --out data/both --tokenizer train:32000 --block-size 1024

A document is a file (.txt .md .py) or a record (.jsonl .jsonl.gz .jsonl.zst .parquet).
Killed or stopped, the same command continues; run again on the same input it does nothing.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code."""
    options = _make_parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; what is finished is kept, the same command continues.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `... | head`
        sys.stderr.close()
        return 0


def _make_parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m data_prep", description="Text to blocks of token ids.", epilog=TOP, formatter_class=formatter
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    prep = commands.add_parser(
        "prep", help="prepare a dataset", description="Prepare a dataset.", epilog=PREP, formatter_class=formatter
    )
    prep.add_argument("sources", nargs="+", metavar="NAME_OR_PATH", help=SOURCES_HELP)
    prep.add_argument("--tokenizer", metavar="T", help="a Hub id, a folder, or train:50000 (default: the dataset's)")
    prep.add_argument("--block-size", type=_count(1), metavar="N", help="tokens per block (default: the dataset's)")
    prep.add_argument("--out", metavar="DIR", help="folder to make (default: data/<dataset>)")
    prep.add_argument(
        "--text-column", metavar="NAME", help="where a record's text is (default: the dataset's, else text)"
    )
    prep.add_argument(
        "--num-proc",
        type=_count(1),
        metavar="N",
        help="worker processes (default: all cores); never changes the result",
    )
    prep.add_argument(
        "--val-fraction", type=float, metavar="F", help="share of documents for validation (default: 0.01)"
    )
    prep.add_argument(
        "--val-max-tokens",
        type=_count(0),
        default=10_000_000,
        metavar="N",
        help="about as many tokens at most (default: 10M)",
    )
    prep.add_argument(
        "--max-tokens", type=_count(1), metavar="N", help="the shortest prefix of documents with at least N tokens"
    )
    prep.add_argument("--max-docs", type=_count(1), metavar="N", help="the first N documents")
    prep.add_argument(
        "--on-bad-record", choices=("fail", "skip"), help="stop at a bad record, or count and skip it (default: fail)"
    )
    prep.add_argument("--split-lines", action="store_true", help="every line of a text file is a document")
    prep.add_argument(
        "--buckets",
        nargs="+",
        metavar="NAME=CONDITION",
        help="one dataset for each, DIR/NAME, in one pass: 'low=score < 3' 'high=score >= 3'",
    )
    prep.add_argument(
        "--filters",
        metavar="FILE",
        help="YAML that says what is left out or changed (docs/corpus.md), or none (default: the dataset's)",
    )
    prep.add_argument(
        "--packing",
        choices=PACKINGS,
        help="concat: one document after the other; best_fit: whole documents where they fit, little padding; pad: "
        "every document begins a block (default: the dataset's, else concat)",
    )
    prep.add_argument(
        "--encoder",
        choices=("auto", "hf"),
        default="auto",
        help="auto: the fast one where it proves itself, else Hugging Face's; never changes the result (default: auto)",
    )
    add_source_options(prep)
    add_cluster_options(prep)
    prep.set_defaults(run=_prep)

    train = commands.add_parser(
        "train-tokenizer", help="train a byte-level BPE", description="Train a byte-level BPE tokenizer."
    )
    train.add_argument("sources", nargs="+", metavar="NAME_OR_PATH", help=SOURCES_HELP)
    train.add_argument(
        "--vocab-size", type=_count(260), required=True, metavar="N", help="entries, the control tokens included: 50000"
    )
    train.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    train.add_argument(
        "--sample-bytes",
        type=_size,
        default=2_000_000_000,
        metavar="N",
        help="bytes of text to learn from (default: 2GB)",
    )
    train.add_argument("--text-column", metavar="NAME", help="where a record's text is")
    for name, token in (("bos", "[BOT]"), ("eos", "[EOT]"), ("pad", "[PAD]"), ("unk", "[UNK]")):
        train.add_argument(f"--{name}-token", default=token, metavar="WORD", help=f"default: {token}")
    train.set_defaults(run=_train_tokenizer)

    inspect = commands.add_parser(
        "inspect",
        help="show documents and blocks",
        description="Show documents, and open blocks: decoded, the borders of documents marked, with their sources.",
    )
    inspect.add_argument("dataset", help="a prepared dataset: its name or folder")
    inspect.add_argument("--split", choices=("train", "validation"), default="train")
    inspect.add_argument("--documents", type=_count(0), default=3, metavar="N", help="how many (default: 3)")
    inspect.add_argument(
        "--first", type=_count(0), default=0, metavar="N", help="number of the first document (default: 0)"
    )
    inspect.add_argument("--show", type=_count(0), default=3, metavar="N", help="how many blocks to open (default: 3)")
    inspect.add_argument(
        "--first-block", type=_count(0), default=0, metavar="N", help="number of the first block (default: 0)"
    )
    inspect.add_argument(
        "--tokens",
        type=_token_range,
        metavar="A-B",
        help="only the documents of tokens A to B of the split, with their byte ranges",
    )
    inspect.add_argument(
        "--whole", action="store_true", help="whole texts (default: the first and last 200 tokens of long ones)"
    )
    inspect.add_argument("--removed", action="store_true", help="what its filters left out and changed, with samples")
    inspect.set_defaults(run=_inspect)
    check = commands.add_parser(
        "check",
        help="recount everything from the files and compare it with the manifest",
        description="Recount everything from the files and compare it with the manifest.",
    )
    check.add_argument("dataset", help="a prepared dataset: its name or folder")
    check.set_defaults(run=_check)
    stat = commands.add_parser(
        "stat",
        help="count what is in a dataset, and draw it",
        description="Count what is in a dataset: lengths, copies, ids; a short table, and an HTML page with pictures.",
    )
    stat.add_argument("dataset", help="a prepared dataset: its name or folder")
    stat.add_argument("--html", metavar="FILE", help="where the page goes (default: stat.html in the dataset's folder)")
    stat.set_defaults(run=_stat)
    commands.add_parser("datasets", help="list the named datasets").set_defaults(run=_datasets)
    return parser


def _prep(options: argparse.Namespace) -> int:
    if options.num_proc != 1 and not options.estimate:
        from data_prep.worker_server import start_server

        start_server()
    from data_prep.ledger import LedgerError
    from data_prep.plan import Options
    from data_prep.prep import prepare

    names = set(Options.__dataclass_fields__) - {"specs"}
    chosen = Options(tuple(options.sources), **{name: value for name, value in vars(options).items() if name in names})
    if options.estimate:
        from data_prep.estimate import default_num_proc, describe_estimate
        from data_prep.plan import make_plan

        print(describe_estimate(make_plan(chosen), chosen.num_proc or default_num_proc()))
        return 0
    if options.executor is None and (options.tasks or options.slurm):
        raise UserError("prep: --tasks and --slurm are for --executor. Add --executor slurm, or leave them out.")
    try:
        if options.executor is None:
            prepare(chosen)
        else:
            _prepare_on(options, chosen)
    except LedgerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _prepare_on(options: argparse.Namespace, chosen: Any) -> None:
    from data_prep.cluster import prepare_on
    from data_prep.estimate import default_num_proc

    num_at_once = chosen.num_proc or default_num_proc()
    prepare_on(options.executor, chosen, options.tasks or num_at_once, num_at_once, options.slurm)


def _train_tokenizer(options: argparse.Namespace) -> None:
    from data_prep.prep import train_from_sources
    from data_prep.tokenizer_training import ControlTokens

    control = ControlTokens(options.bos_token, options.eos_token, options.pad_token, options.unk_token)
    train_from_sources(
        options.sources, options.vocab_size, Path(options.out), options.sample_bytes, options.text_column, control
    )


def _inspect(options: argparse.Namespace) -> None:
    from data_prep.paths import dataset_folder
    from data_prep.show import Wanted, iter_inspection
    from data_prep.vocabulary import has_colours

    folder = dataset_folder(options.dataset)
    if options.removed:
        from data_prep.removed import iter_removed

        print("\n".join(iter_removed(folder)))
        return
    wanted = Wanted(
        options.split,
        options.documents,
        options.first,
        options.show,
        options.first_block,
        options.tokens,
        options.whole,
    )
    for line in iter_inspection(folder, wanted, has_colours(sys.stdout)):
        print(line)


def _check(options: argparse.Namespace) -> None:
    from data_prep.check import check_dataset
    from data_prep.paths import dataset_folder

    manifest = check_dataset(dataset_folder(options.dataset))
    shards = sum(len(split.shards) for split in manifest.splits.values())
    print(
        f"{dataset_folder(options.dataset)}: every count and checksum holds ({shards} shards, "
        f"{manifest.num_train_tokens:,} train tokens)."
    )


def _stat(options: argparse.Namespace) -> None:
    from data_prep.paths import dataset_folder
    from data_prep.stat_page import write_page
    from data_prep.stat_text import describe_tally
    from data_prep.tally import tally_dataset

    folder = dataset_folder(options.dataset)
    tally = tally_dataset(folder)
    print(describe_tally(tally))
    path = Path(options.html) if options.html else folder / "stat.html"
    try:
        write_page(tally, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}). Name another file with --html.") from error
    print(f"pictures: {path}")


def _datasets(options: argparse.Namespace) -> None:
    from data_prep.show import describe_catalogue

    print(describe_catalogue())


def _count(smallest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        return _parse(parse_count, text, smallest)

    return parse


def _token_range(text: str) -> tuple[int, int]:
    """`1000-2000`, the second number not included."""
    first, _, end = text.partition("-")
    numbers = [_parse(parse_count, each, 0) for each in (first, end)]
    if numbers[0] >= numbers[1]:
        raise argparse.ArgumentTypeError(f"{text} is no range like 1000-2000, first token and the one behind the last")
    return numbers[0], numbers[1]


def _size(text: str) -> int:
    return _parse(parse_bytes, text, 1)


def _parse(parser: Callable[[Any], int], text: str, smallest: int) -> int:
    try:
        value = parser(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if value < smallest:
        raise argparse.ArgumentTypeError(f"{text} is below {smallest}")
    return value


if __name__ == "__main__":
    sys.exit(main())
