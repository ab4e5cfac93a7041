"""From a recipe's data section to the stages of the timeline: shares from weights or amounts, steps from tokens.

In: the data section and, per dataset, its block size and number of tokens. Out: `Stage`s, or recorded problems.

    mixture [{a, tokens: 6B}, {b, epochs: 2}] with b of 1B tokens -> the stage has 8B tokens, shares 6/8 and 2/8
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Protocol

from clm.order import Order, OrderSource
from clm.problems import Problems
from clm.recipe_sections import DataSection, MixtureItem, StageItem
from clm.timeline import Ranges, Stage, Timeline
from data_prep.sizes import format_count


class Split(Protocol):
    """What is needed of a prepared train split."""

    block_size: int
    num_blocks: int
    num_tokens: int


def lay_out(data: DataSection, splits: list[Split], problems: Problems) -> list[Stage]:
    """The stages of the run.

    Args:
        data: the recipe's section.
        splits: one for each of `data.datasets`, in that order, all of one block size.
        problems: what does not fit together is recorded here.
    """
    sizes = {name: split.num_tokens for name, split in zip(data.datasets, splits, strict=True)}
    prepared = splits[0].block_size
    stages: list[Stage] = []
    for index, item in enumerate(data.all_stages):
        key = f"data.stages[{index}]" if data.stages else "data"
        mixture = data.mixture_of(item)
        tokens = _stage_tokens(item, mixture, sizes, key, problems)
        amounts = [_amount(entry, sizes) for entry in mixture]
        shares = dict.fromkeys(sizes, Fraction(0))
        for entry, amount in zip(mixture, amounts, strict=True):
            shares[entry.dataset] = amount / sum(amounts)
        tokens_per_step = item.tokens_per_step or data.tokens_per_step
        stages.append(
            Stage(
                index=index,
                name=item.name,
                first_step=stages[-1].last_step if stages else 0,
                num_steps=max(1, math.ceil(tokens / tokens_per_step)),
                block_size=item.block_size or data.block_size,
                tokens_per_step=tokens_per_step,
                samples_per_step=max(1, tokens_per_step // prepared),
                shares=tuple(shares.values()),
                schedule=item.schedule,
                rope=tuple(item.rope.items()),
            )
        )
    if stages[-1].block_size != data.block_size:
        problems.add(
            "data.block_size",
            f"is {data.block_size} but the last stage trains rows of {stages[-1].block_size}. data.block_size is "
            f"that of the finished model; set it to {stages[-1].block_size}.",
        )
    return stages


def make_order(timeline: Timeline, splits: list[Split], seed: int, shuffle: bool) -> Order:
    """The order of the blocks of these splits along a timeline."""
    return Order([OrderSource(max(1, s.num_blocks)) for s in splits], timeline.order_stages(), seed, shuffle)


def make_timeline(stages: list[Stage], excluded: Ranges = ()) -> Timeline:
    """The stages with what rollbacks took out."""
    return Timeline(stages, tuple(sorted(excluded)))


def _amount(item: MixtureItem, sizes: dict[str, int]) -> Fraction:
    """How much of a dataset, in tokens or, for weights, on the weights' own scale."""
    if item.tokens is not None:
        return Fraction(item.tokens)
    if item.epochs is not None:
        return Fraction(str(item.epochs)) * max(1, sizes[item.dataset])
    return Fraction(str(item.weight))


def _stage_tokens(
    item: StageItem, mixture: tuple[MixtureItem, ...], sizes: dict[str, int], key: str, problems: Problems
) -> int:
    if mixture[0].weight is not None:
        return item.tokens or 1
    total = math.ceil(sum(_amount(entry, sizes) for entry in mixture))
    if item.tokens is not None and item.tokens != total:
        problems.add(
            f"{key}.tokens",
            f"is {format_count(item.tokens)} but the amounts of its mixture add up to {total:,} tokens. Leave "
            f"{key}.tokens out, or give shares by weight.",
        )
    return total
