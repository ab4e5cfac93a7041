"""What the filters of a corpus may be told: `filters` in a dataset's YAML, or the file that `--filters` names.

In: a mapping of filters to their options. Out: `Filters`, every option checked and every default filled in, so that
equal settings are equal. The options are those of datatrove's classes, under their names and with their defaults
(tests/data_prep/test_filter_settings.py compares them); nothing is imported to check them.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from data_prep.errors import UserError, did_you_mean

LID_COMMAND = "curl -LO https://dl.fbaipublicfiles.com/fasttext/supervised-models/lid.176.bin"
REPETITION_TOP = [[2, 0.2], [3, 0.18], [4, 0.16]]
REPETITION_DUP = [[5, 0.15], [6, 0.14], [7, 0.13], [8, 0.12], [9, 0.11], [10, 0.1]]
ENGLISH = {"language": "eng"}  # whose rules split a text into words and sentences
# Every filter with its options and their defaults, in the order in which they are applied; [] asks for texts.
OPTIONS: dict[str, dict[str, Any]] = {
    "normalize": {
        "unescape_html": "auto",
        "remove_terminal_escapes": True,
        "fix_encoding": True,
        "restore_byte_a0": True,
        "replace_lossy_sequences": True,
        "decode_inconsistent_utf8": True,
        "fix_c1_controls": True,
        "fix_latin_ligatures": False,
        "fix_character_width": False,
        "uncurl_quotes": False,
        "fix_line_breaks": False,
        "fix_surrogates": True,
        "remove_control_chars": True,
        "normalization": None,
        "code": False,  # ours: also in .py files and in fenced code
    },
    "language": {"model": "", "keep": [], "threshold": 0.65},
    "gopher_repetition": {
        "dup_line_frac": 0.3,
        "dup_para_frac": 0.3,
        "dup_line_char_frac": 0.2,
        "dup_para_char_frac": 0.2,
        "top_n_grams": REPETITION_TOP,
        "dup_n_grams": REPETITION_DUP,
        **ENGLISH,
    },
    "gopher_quality": {
        "min_doc_words": 50,
        "max_doc_words": 100000,
        "min_avg_word_length": 3,
        "max_avg_word_length": 10,
        "max_symbol_word_ratio": 0.1,
        "max_bullet_lines_ratio": 0.9,
        "max_ellipsis_lines_ratio": 0.3,
        "max_non_alpha_words_ratio": 0.8,
        "min_stop_words": 2,
        "stop_words": None,
        **ENGLISH,
    },
    "c4": {
        "split_paragraph": True,
        "remove_citations": True,
        "filter_no_terminal_punct": True,
        "min_num_sentences": 5,
        "min_words_per_line": 3,
        "max_word_length": 1000,
        "filter_lorem_ipsum": True,
        "filter_javascript": True,
        "filter_curly_bracket": True,
        "filter_policy": True,
        **ENGLISH,
    },
    "fineweb": {
        "line_punct_thr": 0.12,
        "line_punct_exclude_zero": False,
        "short_line_thr": 0.67,
        "short_line_length": 30,
        "char_duplicates_ratio": 0.01,
        "new_line_ratio": 0.3,
        **ENGLISH,
    },
    "pii": {
        "remove_emails": True,
        "remove_ips": True,
        "only_remove_public_ips": True,
        "email_replacement": ["email@example.com", "firstname.lastname@example.org"],
        "ip_replacement": [
            "22.214.171.124",
            "126.96.36.199",
            "188.8.131.52",
            "184.108.40.206",
            "220.127.116.11",
            "18.104.22.168",
        ],
    },
    "decontaminate": {"files": [], "n_grams": 13, "remove": True, **ENGLISH},
    "exact_duplicates": {},
    "near_duplicates": {"n_grams": 5, "num_buckets": 14, "hashes_per_bucket": 8, "seed": 1, **ENGLISH},
    "duplicate_lines": {"min_characters": 30, "code": False},  # code: also in .py files
}
CHANGING = ("normalize", "c4", "pii", "duplicate_lines")  # these change texts; the others only leave documents out
SCREENED = ("exact_duplicates", "near_duplicates", "duplicate_lines")  # these look at all documents in front of one
NEEDS_DATATROVE = set(OPTIONS) - {"exact_duplicates", "duplicate_lines"}
CHOICES = {
    ("normalize", "normalization"): (None, "NFC", "NFD", "NFKC", "NFKD"),
    ("normalize", "unescape_html"): ("auto", True, False),
}
NULL_IS_OFF = ("gopher_repetition", "gopher_quality")  # a number may be null there: that rule is off
NOTHING_LEFT, OTHER = "nothing left", "other"
_SIZES = ["short_doc", "long_doc", "below_avg_threshold", "above_avg_threshold"]
_SIGNS = ["too_many_hashes", "too_many_ellipsis", "too_many_bullets", "too_many_end_ellipsis"]
_REPETITION = ["empty", "dup_para_frac", "dup_para_char_frac", "dup_line_frac", "dup_line_char_frac"]
REASONS = {  # why a document is left out, where a filter has several reasons
    "normalize": [NOTHING_LEFT],
    "gopher_repetition": _REPETITION,  # and one for each length of its n-grams
    "gopher_quality": [*_SIZES, *_SIGNS, "below_alpha_threshold", "enough_stop_words"],
    "c4": ["lorem_ipsum", "curly_bracket", "too_few_sentences", NOTHING_LEFT],
    "fineweb": ["empty", "line_punct_ratio", "short_line_ratio", "char_dup_ratio", "list_ratio"],
    "pii": [NOTHING_LEFT],
    "duplicate_lines": [NOTHING_LEFT],
}


@dataclass(frozen=True)
class Filters:
    """The filters that are on, in the order in which they are applied, each with all its options.

    `content` has a hash of every file that an option names; `path` is the file that --filters named, if any.
    """

    options: dict[str, dict[str, Any]]
    content: dict[str, str]
    path: str | None = None

    @property
    def is_screened(self) -> bool:
        """Whether some look at other documents, so that all are read once before the encoding."""
        return any(name in self.options for name in SCREENED)

    @property
    def changing(self) -> list[str]:
        """Those that change texts."""
        return [name for name in self.options if name in CHANGING]

    @property
    def rules(self) -> list[str]:
        """The name of every reason to leave a document out: `language`, `gopher_quality: short_doc`."""
        rules = []
        for name, options in self.options.items():
            reasons = [*REASONS.get(name, [])]
            if name == "gopher_repetition":
                reasons += [f"top_{n}_gram" for n, _ in options["top_n_grams"]]
                reasons += [f"duplicated_{n}_n_grams" for n, _ in options["dup_n_grams"]]
            rules += [f"{name}: {reason}" for reason in (*reasons, OTHER)] if reasons else [name]
        return rules

    def settings(self) -> dict[str, Any]:
        """What the result depends on: the options, and of a file its content instead of its path."""
        settings = json.loads(json.dumps(self.options))
        if "language" in settings:
            settings["language"]["model"] = self.content[self.options["language"]["model"]]
        if "decontaminate" in settings:
            settings["decontaminate"]["files"] = [self.content[path] for path in settings["decontaminate"]["files"]]
        return settings


def library_versions(filters: Filters) -> dict[str, str | None]:
    """The versions of the libraries whose rules these filters are; None for one that is not installed."""
    names = ["datatrove", "spacy"] if NEEDS_DATATROVE & set(filters.options) else []
    names += ["ftfy"] if "normalize" in filters.options else []
    names += ["fasttext-community"] if "language" in filters.options else []
    return {name: _version(name) for name in names}


@cache
def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def rule_filter(rule: str) -> str:
    """The filter that a rule belongs to."""
    return rule.partition(":")[0]


def load_filters(path: str) -> dict[str, Any]:
    """The mapping in the file that `--filters` names: what a dataset's YAML has under `filters`, with that key or not.

    Raises:
        UserError: no such file, no YAML, no mapping.
    """
    import yaml

    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise UserError(
            f"prep: --filters is {path} but it cannot be read ({why}). Give a YAML file of filters, or none."
        ) from error
    if isinstance(raw, dict) and list(raw) == ["filters"]:
        raw = raw["filters"]
    if not isinstance(raw, dict):
        raise UserError(f"{path}: must be a mapping of filters to options, such as `exact_duplicates: true`.")
    return raw


def make_filters(raw: dict[str, Any], where: str, path: str | None = None) -> Filters | None:
    """Filters with all defaults; None when none is on. Looks at the files that they name.

    Args:
        where: how the place is named in messages, in front of a filter's name.
    Raises:
        UserError: all problems at once.
    """
    problems = find_filter_problems(raw, where)
    if problems:
        raise UserError("\n".join(problems))
    options = {}
    for name, defaults in OPTIONS.items():
        given = raw.get(name)
        if isinstance(given, list):
            given = {"files": given}
        if given is not None and given is not False:
            options[name] = {**defaults, **(given if isinstance(given, dict) else {})}
    if not options:
        return None
    content = {}
    if "language" in options:
        model = options["language"]["model"]
        content[model] = _hash_file(model, f"{where}language.model", f"Download it: {LID_COMMAND}")
    if "decontaminate" in options:
        for each in options["decontaminate"]["files"]:
            content[each] = _hash_file(
                each, f"{where}decontaminate", "Give JSON lines, one item of the evaluation set each."
            )
    return Filters(options, content, path)


def find_filter_problems(raw: Any, where: str) -> list[str]:
    """Everything that is wrong with a mapping of filters, without a look at the files that they name."""
    if not isinstance(raw, dict):
        return [f"{where.rstrip('. ')} is {raw!r} but must be a mapping of filters: {{exact_duplicates: true}}"]
    problems = []
    for name, given in raw.items():
        if name not in OPTIONS:
            problems.append(f"{where}{name}: unknown filter. {did_you_mean(str(name), OPTIONS)}")
            continue
        if name == "decontaminate" and isinstance(given, list):
            given = {"files": given}
        if given is None or given is False:
            continue
        if given is not True and not isinstance(given, dict):
            problems.append(f"{where}{name} is {given!r} but must be true, false or a mapping of its options")
            continue
        for option, value in (given if isinstance(given, dict) else {}).items():
            if option not in OPTIONS[name]:
                known = did_you_mean(str(option), OPTIONS[name]) if OPTIONS[name] else "It has none; write true."
                problems.append(f"{where}{name}.{option}: unknown option. {known}")
            elif (kind := _wrong_kind(name, option, value)) is not None:
                problems.append(f"{where}{name}.{option} is {value!r} but must be {kind}")
        for option in [option for option, default in OPTIONS[name].items() if default in ("", [])]:
            if not isinstance(given, dict) or option not in given:
                problems.append(f"{where}{name}.{option} is missing. {_explain_missing(name)}")
    return problems


def _explain_missing(name: str) -> str:
    if name == "decontaminate":
        return "Write decontaminate: [hellaswag.jsonl]"
    return f"Write language: {{model: lid.176.bin, keep: [en]}}; the model is fastText's: {LID_COMMAND}"


def _wrong_kind(name: str, option: str, value: Any) -> str | None:
    """What the value must be, if it is something else."""
    default = OPTIONS[name][option]
    if (name, option) in CHOICES:
        choices = CHOICES[name, option]
        is_one = any(value is each or (isinstance(value, str) and value == each) for each in choices)
        return None if is_one else f"one of {', '.join(map(json.dumps, choices))}"
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, str):
        return None if isinstance(value, str) and value else "text"
    if default in (REPETITION_TOP, REPETITION_DUP):
        is_pairs = isinstance(value, list) and all(
            isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is int and _is_number(pair[1]) for pair in value
        )
        return None if is_pairs else f"pairs of a length and a share, such as {default[:2]}"
    if isinstance(default, list) or option == "stop_words":
        is_texts = isinstance(value, list) and value and all(isinstance(each, str) and each for each in value)
        return None if is_texts or (value is None and default is None) else "a list of texts, not empty"
    if value is None and name in NULL_IS_OFF:
        return None
    if isinstance(default, int) and name != "gopher_quality":
        least = -1 if name == "c4" else 0 if option == "seed" else 1
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= least
        return None if is_count else f"a whole number of at least {least}"
    return None if _is_number(value) and value >= 0 else "a number of at least 0"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _hash_file(path: str, key: str, remedy: str) -> str:
    try:
        with open(path, "rb") as file:
            return "blake2b:" + hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise UserError(f"{key} is {path} but it cannot be read ({error.strerror}). {remedy}") from error
