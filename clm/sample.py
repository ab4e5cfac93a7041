"""Texts from a trained model.

In: a model, its tokenizer and prompts. Out: one text per prompt and number, prompt included.
An empty prompt starts where documents start: at BOS, or at EOS for a tokenizer without BOS.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from clm.run_folder import find_run, model_folder, read_recipe, tokenizer_folder
from data_prep.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int = 100,
    temperature: float = 0.7,
    top_k: int = 20,
    seed: int = 0,
    num_per_prompt: int = 1,
    is_shared: bool = False,
) -> list[str]:
    """Sample texts; len(prompts) * num_per_prompt of them, those of one prompt side by side.

    Each prompt has its own random stream, so a text does not depend on the other prompts. The global random state and
    the model's training mode are as before afterwards: training may call this between two steps.

    Args:
        temperature: 0 takes the likeliest token each time.
        top_k: only the k likeliest tokens are drawn from; 0 means all.
        is_shared: the model is divided among processes, which all call this with the same arguments.
    Raises:
        UserError: several texts at temperature 0, or prompt and new tokens do not fit the model's positions.
    """
    import torch
    from transformers import GenerationConfig

    is_greedy = temperature == 0
    if is_greedy and num_per_prompt > 1:
        raise UserError(
            f"num is {num_per_prompt} but temperature is 0, which always gives the same text. Raise --temperature."
        )
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=not is_greedy,
        temperature=None if is_greedy else temperature,
        top_k=None if is_greedy else top_k,
        num_return_sequences=num_per_prompt,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        use_cache=True,  # Trainer switches the model's own off
    )
    was_training = model.training
    model.eval()
    texts: list[str] = []
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            for prompt in prompts:
                ids = encode_prompt(tokenizer, prompt)
                positions = model.config.max_position_embeddings
                if len(ids) + max_new_tokens > positions:
                    raise UserError(
                        f"max_new_tokens is {max_new_tokens} but the prompt has {len(ids)} tokens and the model "
                        f"{positions} positions. Ask for at most {max(positions - len(ids), 0)} new tokens."
                    )
                torch.manual_seed(zlib.crc32(f"{seed} {prompt}".encode()))  # torch uses 32 bits on a CPU
                inputs = torch.tensor([ids], device=model.device)
                rows = model.generate(
                    inputs, attention_mask=torch.ones_like(inputs), generation_config=config, synced_gpus=is_shared
                )
                texts += tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    finally:
        model.train(was_training)
    return texts


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The ids to continue: as a document begins, so with BOS where the tokenizer adds it and never with EOS behind."""
    ids = list(tokenizer(prompt)["input_ids"])
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    if not ids:
        ids = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    return ids


def load_model(run: Path, checkpoint: int | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a run in fp32 on the best device, and its tokenizer."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.logging.disable_progress_bar()
    folder = model_folder(run, checkpoint)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(run, folder), local_files_only=True)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def default_prompts(run: Path) -> list[str]:
    """The prompts of the recipe's run.samples, else one empty prompt: the model begins a document of its own."""
    samples = (read_recipe(run).get("run") or {}).get("samples") or {}
    return list(samples.get("prompts") or [""])


def print_samples(
    name: str,
    checkpoint: int | None,
    prompts: list[str] | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    num: int,
) -> None:
    """`python -m clm sample`: print samples of a run."""
    run = find_run(name)
    prompts = prompts or default_prompts(run)
    model, tokenizer = load_model(run, checkpoint)
    texts = generate_samples(model, tokenizer, prompts, max_new_tokens, temperature, top_k, seed, num)
    print(format_samples([prompt for prompt in prompts for _ in range(num)], texts))


def format_samples(prompts: list[str], texts: list[str]) -> str:
    """Prompts and their texts for a terminal: each text below a ruler that names its prompt."""
    shown = (f"--- {prompt!r}" if prompt else "--- (from the start of a document)" for prompt in prompts)
    return "\n".join(f"{ruler}\n{text.strip()}\n" for ruler, text in zip(shown, texts, strict=True))
