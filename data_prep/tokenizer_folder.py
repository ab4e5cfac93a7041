"""The tokenizer of a prepared dataset: a Hugging Face tokenizer folder that lies beside the blocks.

In: a Hub id or a folder. Out: the same tokenizer saved as `data/<dataset>/tokenizer/`, and what the rest needs to know
of it.
"""

import hashlib
import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.errors import UserError
from data_prep.manifest import TokenizerInfo, sha256_of
from data_prep.paths import cache_dir

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTROL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
# Both ways of loading must agree on these, or the ids of training would not be those of use.
PROBES = (
    "Hello world",
    "  two  spaces\n\tand a tab\r\n",
    "naïve 日本語 🙂\u200d e\u0301",
    "x" * 50,
    "1234567",
    " \u3000\u00a0",
    "[EOT] </s>",
)


def import_tokenizer(id_or_path: str, folder: Path) -> None:
    """Load a tokenizer by Hub id or folder and save it as `folder`.

    Raises:
        UserError: it does not exist, cannot be reached, is gated, or has no fast (tokenizers) form.
    """
    if Path(id_or_path).is_file():
        raise UserError(f"--tokenizer is {id_or_path} but that is a file. Give the folder that holds tokenizer.json.")
    known = _imported_before(Path(id_or_path))
    if known is not None and known.is_dir():
        shutil.copytree(known, folder)
        return
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(id_or_path)
    except (
        Exception
    ) as error:  # transformers raises OSError, ValueError, KeyError, ImportError ... for a folder it cannot use
        raise UserError(_explain(id_or_path, error)) from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UserError(
            f"--tokenizer is {id_or_path} but it has no fast form (tokenizer.json), which the encoder needs. "
            "Choose another."
        )
    tokenizer.save_pretrained(folder)
    check_both_loaders_agree(folder, id_or_path)
    if known is not None:
        _remember(folder, known)


def _imported_before(source: Path) -> Path | None:
    """Where a local folder's tokenizer lies as it was saved when it was last imported: without transformers, whose
    import takes seconds. None for one that does not lie here."""
    if not (source / "tokenizer.json").is_file():
        return None
    return cache_dir() / "tokenizers" / _digest(source)


def _digest(folder: Path) -> str:
    """Of all that a tokenizer folder says, and of the libraries that read it."""
    digest = hashlib.sha256(f"{version('transformers')} {version('tokenizers')}".encode())
    for path in sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in (".json", ".jinja")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:32]


def _remember(folder: Path, known: Path) -> None:
    with suppress(OSError):  # then the next import takes its seconds
        temporary = known.with_name(f"{known.name}.{os.getpid()}")
        known.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(folder, temporary)
        os.rename(temporary, known)


def check_both_loaders_agree(folder: Path, name: str) -> None:
    """Raise a UserError unless AutoTokenizer and tokenizer.json give the same ids.

    Data is made with one, models are used with the other.
    """
    from transformers import AutoTokenizer

    through_transformers, direct = AutoTokenizer.from_pretrained(folder), load_backend(folder)
    for text in PROBES:
        ours, theirs = direct.encode(text).ids, through_transformers(text)["input_ids"]
        if ours != theirs:
            raise UserError(
                f"tokenizer {name}: AutoTokenizer and its tokenizer.json disagree on {text!r} ({theirs[:8]} and "
                f"{ours[:8]}). "
                "A model trained on one would be used with the other. Choose another tokenizer, or another "
                "version of transformers."
            )


def load_backend(folder: Path) -> "Tokenizer":
    """The tokenizer as the `tokenizers` library reads it from tokenizer.json."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises a bare Exception
        raise UserError(
            f"{folder}/tokenizer.json cannot be read: {error}. Prepare the dataset again, or choose another tokenizer."
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def describe_tokenizer(folder: Path, source: Any) -> TokenizerInfo:
    """What a tokenizer folder holds.

    Raises:
        UserError: it has no end-of-document token, or puts something other than one BOS in front of a text.
    """
    known = cache_dir() / "tokenizers" / f"{_digest(folder)}.json"  # loading it takes some tenths of a second
    with suppress(OSError, ValueError, TypeError):
        return TokenizerInfo(**json.loads(known.read_text(encoding="utf-8")), source=source)
    info = _describe(folder, source)
    with suppress(OSError):
        known.parent.mkdir(parents=True, exist_ok=True)
        temporary = known.with_name(f"{known.name}.{os.getpid()}")
        temporary.write_text(json.dumps({name: value for name, value in asdict(info).items() if name != "source"}))
        os.replace(temporary, known)
    return info


def _describe(folder: Path, source: Any) -> TokenizerInfo:
    backend = load_backend(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    ids = {}
    for name in CONTROL_NAMES:
        token = config.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        ids[name] = backend.token_to_id(content) if content else None
    if ids["eos_token"] is None:
        raise UserError(
            f"tokenizer {source}: has no eos_token, so the end of a document cannot be written. Choose one that has."
        )
    return TokenizerInfo(
        sha256=sha256_of(folder / "tokenizer.json"),
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        bos_token_id=ids["bos_token"],
        eos_token_id=ids["eos_token"],
        pad_token_id=ids["pad_token"],
        unk_token_id=ids["unk_token"],
        is_bos_written=_writes_bos(backend, ids["bos_token"], source),
        source=source,
    )


def _writes_bos(backend: "Tokenizer", bos_token_id: int | None, source: Any) -> bool:
    plain = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    prefix = next((full[:start] for start in range(len(full)) if full[start : start + len(plain)] == plain), None)
    if prefix == []:
        return False
    if prefix == [bos_token_id]:
        return True
    raise UserError(
        f"tokenizer {source}: puts {prefix} in front of a text, which is not its bos_token. Choose one for "
        "causal models."
    )


def _explain(name: str, error: Exception) -> str:
    text = str(error)
    if isinstance(error.__cause__, Exception):
        text += str(error.__cause__)
    if "gated" in text:
        return (
            f"--tokenizer {name}: it is gated. Accept its terms at https://huggingface.co/{name}, then log in "
            "with `hf auth login` "
            "(or set HF_TOKEN)."
        )
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1 or Path(name).exists()
    if looks_local:
        reason = "no such folder" if not Path(name).exists() else " ".join(str(error).split())[:200]
        return (
            f"--tokenizer {name}: not a tokenizer folder ({reason}). Give a folder with tokenizer.json, a Hub "
            "id, or train:50000."
        )
    return (
        f"--tokenizer {name}: cannot be loaded from the Hub ({type(error).__name__}: "
        f"{' '.join(str(error).split())[:200]}). "
        "Check the name and the network (HF_ENDPOINT, HF_HUB_OFFLINE), give a folder, or train one: "
        "--tokenizer train:50000."
    )
