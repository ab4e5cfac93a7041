"""`python -m clm <verb>`: what surrounds a run. `python -m clm --help` lists the verbs.

Arguments are declared here and the work is imported when its verb is called, so that --help needs no torch.
"""

from __future__ import annotations

import argparse
import os
import sys

EXAMPLES = """examples:
  python -m clm check recipes/llama_170m.yaml                 is this recipe right, and is its data there?
  python -m clm sample demo --prompt "import os" --num 3      three texts from runs/demo/final
  python -m clm sample llama_170m --checkpoint 4000           from a checkpoint of a run that still trains
  python -m clm export demo --what both --dtype bfloat16      LlamaModel and LlamaForCausalLM, each in its folder
  python -m clm extend llama_170m --tokens 20B                 train longer
  python -m clm anneal runs/x/checkpoint-40000 --tokens 1B     a finished model off a run that goes on
  python -m clm convert runs/x/checkpoint-200                 of ZeRO, for another number of processes or launcher
  python -m clm push demo --repo-id user/name --private       runs/demo/final to the Hub
  python -m clm explain demo --step 1200                      what did step 1200 train on? coloured by loss
  python -m clm explain demo --grep "import os"               at which steps was, or will, this text be seen?
  python -m clm verify recipes/demo.yaml                      is a killed and resumed run the uninterrupted one?
  python -m clm tune recipes/llama_170m.yaml                  which micro-batch is fastest on this machine?
  python -m clm mirror llama_170m s3://bucket/llama_170m      its checkpoints outlive the machine
  python -m clm reload demo                                   does final/ give the training's validation loss again?

RUN is a name under runs/ (or under $RUNS_DIR), or the path of a run's folder.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line of `python -m clm`."""
    parser = argparse.ArgumentParser(
        prog="python -m clm",
        description="What surrounds a run: check it before, look at it, sample from it, export and push it after.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    # check and prep have command lines of their own; main() hands them over before argparse sees them.
    verbs.add_parser("check", help="check a recipe and its data without training", add_help=False)
    verbs.add_parser("prep", help="prepare all data that a recipe needs", add_help=False)

    sample = _add_run_verb(verbs, "sample", "write texts with a run's model")
    sample.add_argument(
        "--checkpoint", type=_positive_integer, metavar="STEP", help="take checkpoint-STEP instead of final/"
    )
    sample.add_argument(
        "--prompt", nargs="+", metavar="TEXT", help="default: run.samples.prompts of the recipe, else none"
    )
    sample.add_argument("--max-new-tokens", type=_positive_integer, default=100, metavar="N", help="default: 100")
    sample.add_argument(
        "--temperature", type=_not_negative, default=0.7, metavar="T", help="0 takes the likeliest; default: 0.7"
    )
    sample.add_argument("--top-k", type=_not_negative_integer, default=20, metavar="K", help="0 means all; default: 20")
    sample.add_argument(
        "--seed", type=_not_negative_integer, default=0, metavar="N", help="same seed, same texts; default: 0"
    )
    sample.add_argument("--num", type=_positive_integer, default=1, metavar="N", help="texts per prompt; default: 1")

    export = _add_run_verb(verbs, "export", "write the model as folders in Hub format, and prove that they load")
    export.add_argument(
        "--checkpoint", type=_positive_integer, metavar="STEP", help="take checkpoint-STEP instead of final/"
    )
    export.add_argument(
        "--what",
        choices=("base", "lm", "both"),
        default="lm",
        help="without the output head, with it, or both; default: lm",
    )
    export.add_argument("--ema", action="store_true", help="the averaged weights of run.ema")
    export.add_argument("--out", metavar="DIR", help="default: RUN/export, or RUN/export/base or .../lm")
    export.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the stored weights; default: float32"
    )

    push = _add_run_verb(verbs, "push", "upload final/ to the Hub")
    push.add_argument("--repo-id", metavar="USER/NAME", help="default: training.hub_model_id of the recipe")
    push.add_argument("--private", action=argparse.BooleanOptionalAction, help="when the repository is made now")
    push.add_argument("--revision", metavar="BRANCH", help="default: main")

    explain = _add_run_verb(verbs, "explain", "show what a step trained on, or which steps see a block, text or token")
    what = explain.add_mutually_exclusive_group(required=True)
    what.add_argument("--step", type=_positive_integer, metavar="N", help="the batch of step N, done or to come")
    what.add_argument("--block", metavar="DATASET:N", help="block N of a dataset of the run, from 0")
    what.add_argument("--grep", metavar="TEXT", help="every place of a text in the train blocks; exact, with its steps")
    what.add_argument("--token", metavar="ID", help="every place of a token: its id, its text or its name")
    explain.add_argument(
        "--checkpoint",
        metavar="STEP",
        help="with --step or --block: weights for the losses; a step, final or none; "
        "default: the newest checkpoint at or before the step, else final/",
    )
    explain.add_argument(
        "--max-rows", type=_positive_integer, metavar="N", help="with --step or --block: rows to print; default: 8"
    )
    explain.add_argument(
        "--out", metavar="FILE", help="with --step or --block: the HTML file; default: RUN/explain/step-N.html"
    )
    explain.add_argument(
        "--limit", type=_positive_integer, metavar="N", help="with --grep or --token: places to print; default: 20"
    )

    extend = _add_run_verb(verbs, "extend", "give a run another length, and say what its learning rate will do")
    extend.add_argument("--tokens", type=_count, required=True, metavar="N", help="of the whole run, e.g. 20B")
    extend.add_argument(
        "--from-step", type=_positive_integer, metavar="STEP", help="go on from this checkpoint; default: the newest"
    )
    text = "fork a finished model off a run: from a checkpoint, a stage that cools the learning rate down to 0"
    anneal = verbs.add_parser("anneal", help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
    anneal.add_argument("checkpoint", metavar="CHECKPOINT", help="runs/<trunk>/checkpoint-<step>; the trunk may go on")
    anneal.add_argument("--tokens", type=_count, required=True, metavar="N", help="of the new stage, e.g. 1B")
    anneal.add_argument("--data", metavar="DATA", help="a dataset, or a list as data.mixture; default: the trunk's")
    anneal.add_argument("--name", metavar="NAME", help="of the new run; default: <trunk>-anneal-<step>")

    text = "let any number of processes, and other launchers, continue from a checkpoint of DeepSpeed ZeRO"
    convert = verbs.add_parser("convert", help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
    convert.add_argument("checkpoint", metavar="CHECKPOINT", help="runs/<name>/checkpoint-<step>; what it holds stays")

    text = "kill and resume a small copy of a recipe's run, and prove that nothing changed by it"
    verify = verbs.add_parser("verify", help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
    verify.add_argument("recipe", metavar="RECIPE", help="a YAML file, e.g. recipes/demo.yaml; its data is prepared")
    verify.add_argument("overrides", nargs="*", metavar="section.key=value", help="as for run_clm.py")
    verify.add_argument("--kills", type=_positive_integer, default=3, metavar="N", help="SIGKILLs; default: 3")
    verify.add_argument("--steps", type=_positive_integer, default=24, metavar="N", help="of the copy; default: 24")
    verify.add_argument(
        "--processes", type=_positive_integer, default=2, metavar="N", help="of the other layout; default: 2"
    )
    verify.add_argument(
        "--seed", type=_not_negative_integer, metavar="N", help="of the random moments; default: another each time"
    )

    text = "find the fastest micro-batch for this machine at the recipe's global batch"
    tune = verbs.add_parser("tune", help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
    tune.add_argument("recipe", metavar="RECIPE", help="a YAML file, e.g. recipes/demo.yaml; its data is prepared")
    tune.add_argument("overrides", nargs="*", metavar="section.key=value", help="as for run_clm.py")
    tune.add_argument(
        "--processes", type=_positive_integer, metavar="N", help="of the run; default: as many as there are GPUs"
    )
    tune.add_argument(
        "--steps", type=_positive_integer, default=5, metavar="N", help="measured of each, at least; default: 5"
    )
    tune.add_argument("--write", action="store_true", help="put the value into the recipe; everything else stays")

    mirror = _add_run_verb(verbs, "mirror", "keep a copy of a run in a bucket or folder, or bring it back from there")
    mirror.add_argument("place", metavar="PLACE", help="s3://bucket/x, gs://bucket/x, a folder: what fsspec knows")
    mirror.add_argument("--restore", action="store_true", help="from there to here, where it has a newer checkpoint")
    mirror.add_argument("--once", action="store_true", help="one copy, now; default: until the run has finished")
    mirror.add_argument("--every", type=_not_negative, default=60, metavar="S", help="seconds; default: 60")

    _add_run_verb(
        verbs, "reload", "load final/ afresh and compute the validation loss again; exit code 1 when it differs"
    )
    _add_run_verb(verbs, "yardstick", "bits per byte of the model beside zlib and lzma on the same text")
    _add_run_verb(verbs, "demo", "what `make demo` shows at its end")
    _add_run_verb(verbs, "curve", "draw curve.svg from metrics.jsonl")
    card = _add_run_verb(verbs, "card", "write the model card of final/")
    card.add_argument("--checkpoint", type=_positive_integer, metavar="STEP", help="of checkpoint-STEP instead")
    return parser


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line; overrides may stand behind options, as for run_clm.py, which argparse's verbs do not know."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def run_verb(args: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit code."""
    if args.verb == "sample":
        from clm.sample import print_samples

        print_samples(
            args.run,
            args.checkpoint,
            args.prompt,
            args.max_new_tokens,
            args.temperature,
            args.top_k,
            args.seed,
            args.num,
        )
    elif args.verb == "export":
        from clm.export import print_export

        print_export(args.run, args.checkpoint, args.what, args.out, args.dtype, args.ema)
    elif args.verb == "push":
        from clm.push import push_run

        push_run(args.run, args.repo_id, args.private, args.revision)
    elif args.verb == "explain":
        return _explain(args)
    elif args.verb == "extend":
        from clm.fork import extend_run

        print(extend_run(args.run, args.tokens, args.from_step))
    elif args.verb == "anneal":
        from clm.fork import anneal_run

        print(anneal_run(args.checkpoint, args.tokens, args.data, args.name))
    elif args.verb == "convert":
        from clm.universal import convert_checkpoint

        print(convert_checkpoint(args.checkpoint))
    elif args.verb == "verify":
        from clm.verify import verify_recipe

        return verify_recipe(args.recipe, args.overrides, args.kills, args.steps, args.processes, args.seed)
    elif args.verb == "tune":
        from clm.tune import tune_recipe

        return tune_recipe(args.recipe, args.overrides, args.processes, args.steps, args.write)
    elif args.verb == "mirror":
        from clm.mirror import mirror_run, restore_run
        from clm.run_folder import run_path

        if args.restore:
            restore_run(run_path(args.run), args.place)
        else:
            mirror_run(run_path(args.run), args.place, args.every, args.once)
    elif args.verb == "reload":
        from clm.reload import reload_run

        return reload_run(args.run)
    elif args.verb == "yardstick":
        from clm.yardstick import print_yardstick

        print_yardstick(args.run)
    elif args.verb == "demo":
        from clm.demo import show_run

        return show_run(args.run)
    elif args.verb == "curve":
        from clm.curve import draw_curve
        from clm.run_folder import find_run

        print(draw_curve(find_run(args.run)))
    elif args.verb == "card":
        from clm.card import write_card
        from clm.run_folder import find_run, model_folder

        run = find_run(args.run)
        print(write_card(run, model_folder(run, args.checkpoint)))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run one verb; what the user can mend is one `error:` on stderr and exit code 2."""
    from data_prep.errors import UserError

    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["check"]:
            from clm.check import main as check

            return check(argv[1:]) or 0
        if argv[:1] == ["prep"]:
            from clm.prepare import main as prepare

            return prepare(argv[1:]) or 0
        return run_verb(parse_arguments(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `... | head` has read enough; without this Python complains again while it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _add_run_verb(verbs: argparse._SubParsersAction, name: str, text: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="a run's name under runs/, or its folder")
    return parser


def _explain(args: argparse.Namespace) -> int:
    from data_prep.errors import UserError

    is_search = args.grep is not None or args.token is not None
    for name in ("checkpoint", "max_rows", "out") if is_search else ("limit",):
        if getattr(args, name) is not None:
            option, others = f"--{name.replace('_', '-')}", "--grep and --token" if is_search else "--step and --block"
            raise UserError(f"{option} is given but says nothing about {others}. Leave it out.")
    if is_search:
        from clm.explain_search import print_search

        return print_search(args.run, args.grep, args.token, args.limit or 20)
    from clm.explain import print_explanation

    print_explanation(args.run, args.step, args.block, args.checkpoint, args.max_rows or 8, args.out)
    return 0


def _count(text: str) -> int:
    from data_prep.sizes import parse_count

    try:
        return parse_count(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive_integer(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def _not_negative_integer(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} must not be negative")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be a number, not negative")
    return value


if __name__ == "__main__":
    sys.exit(main())
