"""Builds the model: from a config with documented random weights, or from an existing checkpoint.

In: the recipe's model section, the tokenizer of the prepared data. Out: a transformers model in fp32 whose special
token ids are the tokenizer's. Everything that can be refused is refused before weights exist (`check_model`).

Initial weights are a pure function of (config, seed): each matrix is drawn from its own generator, keyed by seed and
parameter name, so neither the launcher nor the order of construction matters. Matrices are normal(0, initializer_range)
as in GPT-2 (Radford et al. 2019, section 2.3); with `scaled_init` the matrices that write into the residual stream
(o_proj, down_proj) get std / sqrt(2 * layers), the scaling of the same section. Norm weights are 1, biases 0.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clm.attention import register_mask_free
from clm.order import derive_key
from clm.problems import Problems
from clm.recipe_sections import ModelSection, SampleSettings
from data_prep.errors import UserError, nearest

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from clm.plan import Plan
    from clm.timeline import Stage

RESIDUAL_WRITERS = ("o_proj.weight", "down_proj.weight", "w2.weight")
# A vocabulary may be padded up to a multiple of 64, 128 or 256 rows for speed; more than that is another tokenizer.
MAX_VOCABULARY_PADDING = 256


def load_config(path: str) -> PretrainedConfig:
    """Read a model_configs/*.json strictly.

    Raises:
        UserError: not JSON, no or an unknown model_type, a key its config class does not know, or a `dtype`.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}.") from None
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind not in CONFIG_MAPPING:
        raise UserError(f"{path}: model_type is {kind!r}, which transformers does not know. Write for example llama.")
    for name in ("dtype", "torch_dtype"):
        if name in raw:
            raise UserError(
                f"{path}: {name} is {raw[name]!r} but weights are always trained as fp32 masters. Remove the key; "
                "precision is training.bf16."
            )
    config = AutoConfig.for_model(kind)
    known = {*config.to_dict(), *vars(config), *config.attribute_map, "architectures", "rope_theta", "rope_scaling"}
    for name in raw:
        if name not in known and not hasattr(config, name):
            near = nearest(name, sorted(known))
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise UserError(f"{path}: {name} is not a key of {type(config).__name__}.{hint}")
    try:
        return AutoConfig.from_pretrained(path)
    except Exception as error:  # transformers validates with several exception types
        raise UserError(f"{path}: {type(config).__name__} refuses it: {error}") from None


def load_checkpoint_config(init: str) -> PretrainedConfig:
    """The config of `model.init: <folder or Hub id>`."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(init)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.init is {init!r}, which cannot be loaded: {str(error).splitlines()[0]} Name a folder with "
            "config.json and model.safetensors, or a Hub id that this machine can reach (gated models: hf auth login)."
        ) from None


def check_samples(
    settings: SampleSettings, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, problems: Problems
) -> None:
    """Prompts and what is generated after them must fit the model's positions."""
    positions = getattr(config, "max_position_embeddings", None)
    for prompt in settings.prompts:
        length = len(tokenizer(prompt)["input_ids"])
        if positions is not None and length + settings.max_new_tokens > positions:
            problems.add(
                "run.samples",
                f"has the prompt {prompt[:40]!r} of {length} tokens and max_new_tokens {settings.max_new_tokens}, "
                f"together more than the model's {positions} positions. Shorten one of them.",
            )


def check_model(
    section: ModelSection,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    dataset: str,
    problems: Problems,
) -> None:
    """Compare model and tokenizer before anything is spent; problems are collected."""
    source = section.config if section.init == "random" else section.init
    size, rows = len(tokenizer), config.vocab_size
    if rows < size:
        problems.add(
            "model.config" if section.init == "random" else "model.init",
            f"is {source} with vocab_size {rows} but the tokenizer of {dataset} has {size} tokens. Ids above "
            f"{rows - 1} would have no embedding. Set vocab_size to {size}, or prepare the data with the model's own "
            "tokenizer.",
        )
    elif section.init == "random" and rows - size >= MAX_VOCABULARY_PADDING:
        problems.add(
            "model.config",
            f"is {source} with vocab_size {rows} but the tokenizer of {dataset} has {size} tokens. "
            f"{rows - size} rows would never be trained. Set vocab_size to {size}, or use data with that tokenizer.",
        )
    if section.init != "random":
        _check_checkpoint_tokenizer(section.init, tokenizer, dataset, problems)


def _check_checkpoint_tokenizer(init: str, tokenizer: Any, dataset: str, problems: Problems) -> None:
    from transformers import AutoTokenizer

    try:
        own = AutoTokenizer.from_pretrained(init)
    except (OSError, ValueError, KeyError):
        problems.add(
            "model.init",
            f"is {init}, which has no tokenizer to compare with the one of {dataset}. Put its tokenizer files beside "
            "the weights.",
        )
        return
    if own.get_vocab() != tokenizer.get_vocab():
        problems.add(
            "model.init",
            f"is {init} with a tokenizer of {len(own)} tokens, which is not the one {dataset} was prepared with "
            f"({len(tokenizer)} tokens). The same id would mean another text. Prepare the data with it: "
            f"set data.tokenizer to {init} and run make prep RECIPE=<recipe>.",
        )
        return
    for name in ("bos_token_id", "eos_token_id"):
        ours, theirs = getattr(tokenizer, name), getattr(own, name)
        if theirs is not None and ours != theirs:
            problems.add(
                "model.init",
                f"is {init} whose {name} is {theirs} but {dataset} was prepared with {ours}. "
                f"Prepare it with data.tokenizer: {init}.",
            )


def with_rope(config: PretrainedConfig, rope: dict[str, Any], key: str) -> PretrainedConfig:
    """A copy of the config with other RoPE settings; `rope` may also raise max_position_embeddings.

    Raises:
        UserError: the model has no RoPE, or a key or value that transformers does not know.
    """
    if not rope:
        return config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

    config = copy.deepcopy(config)
    settings = dict(rope)
    positions = settings.pop("max_position_embeddings", None)
    known = [*RopeParameters.__annotations__, "max_position_embeddings"]
    for name in settings:
        if name not in known:
            near = nearest(name, known)
            hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(known)}."
            raise UserError(f"{key}.{name} is not a RoPE setting of transformers. {hint}")
    if not getattr(config, "rope_parameters", None):
        raise UserError(f"{key} is set but a {config.model_type} model has no RoPE. Remove it.")
    kinds = ["default", *ROPE_INIT_FUNCTIONS]
    if settings.get("rope_type", "default") not in kinds:
        raise UserError(f"{key}.rope_type is {settings['rope_type']!r}, unknown. Known: {', '.join(kinds)}.")
    config.rope_parameters = {**config.rope_parameters, **settings}
    try:
        config.validate_rope()
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{key} is {rope}, which transformers refuses: {error}") from None
    if positions is not None:
        if isinstance(positions, bool) or not isinstance(positions, int) or positions < 1:
            raise UserError(f"{key}.max_position_embeddings is {positions!r} but must be a whole number above 0.")
        config.max_position_embeddings = positions
    return config


def set_special_ids(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Put the tokenizer's bos, eos and pad ids into the config; an id the tokenizer does not have becomes None.

    A config class brings its own defaults (Llama's: bos 1, eos 2), which in another tokenizer are ordinary tokens.
    """
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))


def build_model(
    section: ModelSection,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    attention: str,
    seed: int,
    rope: dict[str, Any] | None = None,
    loss: str | None = None,
    is_fast: bool = False,
    is_sharded: bool = False,
    z_loss: float | None = None,
) -> PreTrainedModel:
    """The model with its first weights, fp32 on the CPU (partitioned under ZeRO stage 3).

    Args:
        rope: the stage's.
        loss: how the loss-only forward computes (clm/loss_only.py); None leaves the model its own.
        is_fast: experts follow autocast (clm/mixed_precision.py).
        is_sharded: FSDP2: its matrices have no memory yet; clm/fsdp.py divides and fills them.
        z_loss: its coefficient in training, for the loss-only forward.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.integrations import is_deepspeed_zero3_enabled

    from clm.host_memory import freed_memory_goes_back
    from clm.loss_only import install
    from clm.mixed_precision import cast_residual_stream, use_autocast_experts, use_fp8

    register_mask_free()

    config = with_rope(config, {**section.rope, **(rope or {})}, "model.rope")
    set_special_ids(config, tokenizer)
    if is_sharded:
        from clm.first_weights import build_empty_model

        model = build_empty_model(section, config, attention, seed)
    elif section.init == "random":
        torch.manual_seed(seed)
        with freed_memory_goes_back() if is_deepspeed_zero3_enabled() else contextlib.nullcontext():
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
            draw_weights(model, seed, section.scaled_init)
    else:
        # transformers' default is the checkpoint's own dtype: bf16 weights would be trained without fp32 masters
        try:
            model = AutoModelForCausalLM.from_pretrained(
                section.init, config=config, attn_implementation=attention, dtype=torch.float32
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"model.init is {section.init!r}, whose weights cannot be loaded: {error}") from None
    generation = model.generation_config
    if generation is not None:
        generation.bos_token_id, generation.pad_token_id = config.bos_token_id, config.pad_token_id
        generation.eos_token_id = config.eos_token_id
    if section.residual_dtype == "bf16":
        cast_residual_stream(model)
    if section.fp8:
        use_fp8(model)
    if is_fast:
        use_autocast_experts(model)
    if loss is not None:
        install(model, loss, z_loss)
    return model


def build_planned_model(plan: Plan, stage: Stage, is_sharded: bool = False) -> PreTrainedModel:
    """`build_model` with everything as the plan says it, for one stage."""
    section, speed = plan.recipe.model, plan.speed
    first = (section, plan.config, plan.tokenizer, plan.attention, plan.seed, dict(stage.rope))
    return build_model(*first, speed.loss, speed.is_fast, is_sharded, plan.recipe.run.z_loss)


def draw_weights(model: PreTrainedModel, seed: int, scaled: bool) -> None:
    """Draw every matrix anew, as the module says; one-dimensional parameters stay as the class made them."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():  # tied weights appear once, under their first name
            with _gathered(parameter):
                if parameter.dim() >= 2:
                    parameter.copy_(draw_matrix(model.config, seed, scaled, name, parameter.shape))


def draw_matrix(config: PretrainedConfig, seed: int, scaled: bool, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The first values of one matrix, fp32 on the CPU, the same under every launcher."""
    import torch

    std = getattr(config, "initializer_range", 0.02)
    if scaled and name.endswith(RESIDUAL_WRITERS):
        std /= math.sqrt(2 * config.num_hidden_layers)
    generator = torch.Generator().manual_seed(derive_key(seed, "weights", name) >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def _gathered(parameter: Any) -> contextlib.AbstractContextManager:
    """Under ZeRO stage 3 a parameter is empty on every rank; gather it, and let rank 0's values be scattered again."""
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


def count_parameters(config: PretrainedConfig) -> int:
    """The exact number of parameters, tied ones once, without allocating any."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())
