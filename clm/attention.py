"""Which attention a run uses and why; and a causal attention that needs no mask.

In: `model.attention`, the model's config, the machine. Out: a name for transformers, one sentence, or a UserError.

transformers builds a dense (B, 1, T, T) mask where a model is compiled, although rows are plainly causal
(transformers/masking_utils.py, _ignore_causal_mask_sdpa): PyTorch then cannot take its Flash or cuDNN kernel and
computes the full square. Where it is not compiled, finding out that there is no mask waits for the GPU in every forward
(find_packed_sequence_indices). An attention that is registered under a name without a mask function gets none:
`sdpa_causal` is transformers' own SDPA code under such a name. It knows neither padding nor documents, so only rows of
full blocks go through it (clm/loss_only.py); everything else, generation among it, runs as `sdpa`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from data_prep.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MASK_FREE = "sdpa_causal"
# What a recipe may say; `flex` is short for flex_attention.
ATTENTION_CHOICES = (
    "auto",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex",
    "flex_attention",
    "eager",
)
_PACKAGES = {f"flash_attention_{n}": "flash-attn" if n == 2 else f"flash-attn-{n}" for n in (2, 3, 4)}


def choose_attention(
    wanted: str,
    bf16: bool,
    has_gpu: bool,
    has_document_mask: bool = False,
    why_masked: str | None = None,
) -> tuple[str, str]:
    """The attention implementation and one sentence that says why.

    Args:
        wanted: model.attention.
        has_document_mask: rows hold several documents that must not see each other.
        why_masked: why a mask is needed even without that (`needs_mask`), or None.
    Raises:
        UserError: FlashAttention without bf16, without a GPU, or not installed; FlexAttention without a GPU.
    """
    name = "flex_attention" if wanted == "flex" else wanted
    if name in ("auto", "sdpa"):
        return _choose_sdpa(name, bf16 and has_gpu, has_document_mask, why_masked)
    if name == "flex_attention" and not has_gpu:
        raise UserError(
            f"model.attention is {wanted} but there is no CUDA GPU, and on a CPU PyTorch has no backward for it. "
            "Set model.attention: sdpa."
        )
    if name in _PACKAGES:
        if not has_gpu:
            raise UserError(f"model.attention is {wanted} but there is no CUDA GPU. Set model.attention: sdpa.")
        if not bf16:
            raise UserError(
                f"model.attention is {wanted} but the run is fp32, which its kernels do not have. "
                "Set training.bf16: true, or model.attention: sdpa."
            )
        if not _is_installed(name):
            package = _PACKAGES[name]
            install = "pip install -e '.[flash]'" if name == "flash_attention_2" else f"pip install {package}"
            raise UserError(
                f"model.attention is {wanted} but its package is not installed. Run {install}, or set "
                "model.attention: sdpa."
            )
    return name, "as the recipe says"


def _choose_sdpa(wanted: str, is_gpu_bf16: bool, has_document_mask: bool, why_masked: str | None) -> tuple[str, str]:
    by = "auto" if wanted == "auto" else "as the recipe says"
    if wanted == "auto" and has_document_mask and is_gpu_bf16 and _is_installed("flash_attention_2"):
        return "flash_attention_2", f"{by}: it computes only what lies inside documents, sdpa the whole square"
    if has_document_mask:
        return "sdpa", f"{by}: PyTorch's kernels with a mask that keeps documents apart"
    if why_masked is not None:
        return "sdpa", f"{by}: PyTorch's kernels with transformers' mask, since {why_masked}"
    return MASK_FREE, f"{by}: rows are plainly causal, so PyTorch may take its fastest kernel, which knows no mask"


def _is_installed(name: str) -> bool:
    from transformers.utils import import_utils

    check = getattr(import_utils, f"is_flash_attn_{name[-1]}_available")
    return bool(check())


def needs_mask(config: PretrainedConfig | None, block_size: int) -> str | None:
    """Why rows of `block_size` tokens are not plainly causal in this model, or None."""
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"the model has layers of {', '.join(sorted(kinds))}"
    if window is not None and window < block_size:
        return f"the model has a sliding window of {window} tokens"
    return None


def register_mask_free() -> None:
    """Make `sdpa_causal` known to transformers; twice does no harm."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(MASK_FREE, sdpa_attention_forward)


@contextlib.contextmanager
def with_masks(config: PretrainedConfig) -> Iterator[None]:
    """Within it a mask-free model is plain sdpa, which knows padding, caches and documents."""
    before = config._attn_implementation
    if before != MASK_FREE:
        yield
        return
    config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = before
