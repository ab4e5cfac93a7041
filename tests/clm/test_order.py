"""The order is a pure function of (seed, stages, sample), a pass is a permutation, shares are exact."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clm.order import Order, OrderSource, OrderStage, permute


def order(*sources: tuple[int, str], seed: int = 1, shuffle: bool = True) -> Order:
    """One stage without an end over datasets of (number of blocks, weight)."""
    return staged([n for n, _ in sources], [(None, [w for _, w in sources])], seed, shuffle)


def staged(sizes: list[int], stages: list[tuple[int | None, list[str]]], seed: int = 1, shuffle: bool = True) -> Order:
    """Stages of (number of samples, weight of each dataset)."""
    parts = []
    for num_samples, weights in stages:
        total = sum(map(Fraction, weights))
        parts.append(OrderStage(num_samples, tuple(Fraction(w) / total for w in weights)))
    return Order([OrderSource(n) for n in sizes], parts, seed, shuffle)


THREE_STAGES = ([40, 90, 500], [(1500, ["1", "3", "0"]), (777, ["0", "1", "2"]), (None, ["1", "1", "8"])])


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4097])
def test_the_keyed_permutation_visits_every_number_once_and_can_be_undone(size):
    numbers = permute(np.arange(size), size, 42)
    assert sorted(numbers) == list(range(size))
    assert permute(numbers, size, 42, inverse=True).tolist() == list(range(size))
    one_by_one = [int(permute(np.array([i]), size, 42)[0]) for i in range(0, size, 97)]
    assert numbers[::97].tolist() == one_by_one, "looked up in tables or computed, it is the same"
    assert permute(np.arange(size), size, np.full(size, 42)).tolist() == numbers.tolist()


def test_the_first_blocks_are_these_on_every_platform():
    # These numbers are the definition of ORDER_VERSION 2: a change here breaks every running run.
    dataset, block = order((1000, "0.7"), (5000, "0.3"), seed=7).block_at(np.arange(8))
    assert dataset.tolist() == [1, 0, 0, 1, 1, 0, 0, 0]
    assert block.tolist() == [3083, 905, 769, 151, 2225, 728, 413, 388]


def test_a_pass_visits_every_block_once_and_the_next_pass_in_another_order():
    one = order((1000, "1"))
    first = one.block_at(np.arange(1000))[1]
    second = one.block_at(np.arange(1000, 2000))[1]
    assert sorted(first) == sorted(second) == list(range(1000))
    assert first.tolist() != second.tolist()
    assert np.count_nonzero(first == second) < 10


def test_the_order_does_not_depend_on_how_it_is_asked():
    mixture = staged(*THREE_STAGES)
    whole = np.stack(mixture.block_at(np.arange(5000)))
    shuffled = np.random.default_rng(0).permutation(5000)
    assert np.array_equal(np.stack(mixture.block_at(shuffled)), whole[:, shuffled])
    assert np.array_equal(np.stack(mixture.block_at(np.arange(4000).reshape(40, 100)))[:, 3, 7], whole[:, 307])


def test_another_seed_gives_another_order():
    assert (
        order((1000, "1"), seed=1).block_at(np.arange(20))[1].tolist()
        != order((1000, "1"), seed=2).block_at(np.arange(20))[1].tolist()
    )


def test_shares_are_within_one_block_at_every_window_border():
    mixture = order((10**6, "0.7"), (10**6, "0.2"), (10**6, "0.1"))
    window = 1024
    dataset, _ = mixture.block_at(np.arange(10 * window))
    for border in range(window, 10 * window + 1, window):
        had = np.bincount(dataset[:border], minlength=3)
        assert np.abs(had - border * np.array([0.7, 0.2, 0.1])).max() <= 1
        assert had.tolist() == mixture.counts_before(border)


def test_counts_before_any_sample_are_what_was_dealt():
    mixture = staged(*THREE_STAGES)
    dataset, _ = mixture.block_at(np.arange(4000))
    for sample in (0, 1, 1023, 1024, 1499, 1500, 1501, 2276, 2277, 2500, 4000):
        assert mixture.counts_before(sample) == np.bincount(dataset[:sample], minlength=3).tolist()


def test_every_dataset_is_passed_over_without_repetition_also_over_stage_borders():
    dataset, block = staged(*THREE_STAGES).block_at(np.arange(9000))
    for j, size in enumerate(THREE_STAGES[0]):
        mine = block[dataset == j]
        for start in range(0, len(mine), size):
            one_pass = mine[start : start + size]
            assert len(set(one_pass.tolist())) == len(one_pass), "a block came twice in one pass"
        visits = np.bincount(mine, minlength=size)
        assert visits.max() - visits.min() <= 1


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=4),
    lengths=st.lists(st.integers(0, 3000), max_size=3),
    data=st.data(),
    shuffle=st.booleans(),
)
def test_the_way_back_finds_every_sample_of_a_block(sizes, lengths, data, shuffle):
    weights = [
        data.draw(st.lists(st.sampled_from(["0", "0.1", "1", "7"]), min_size=len(sizes), max_size=len(sizes)))
        for _ in range(len(lengths) + 1)
    ]
    weights = [w if any(float(x) for x in w) else ["1"] * len(sizes) for w in weights]
    mixture = staged(sizes, list(zip([*lengths, None], weights, strict=True)), shuffle=shuffle)
    end = sum(lengths) + 1500
    dataset, block = mixture.block_at(np.arange(end))
    j = data.draw(st.integers(0, len(sizes) - 1))
    b = data.draw(st.integers(0, sizes[j] - 1))
    assert mixture.samples_of(j, b, end) == np.flatnonzero((dataset == j) & (block == b)).tolist()


def test_without_shuffle_each_dataset_keeps_its_written_order():
    assert order((1000, "1"), shuffle=False).block_at(np.arange(1500))[1].tolist() == [*range(1000), *range(500)]
    mixture = order((3000, "0.5"), (3000, "0.5"), shuffle=False)
    dataset, block = mixture.block_at(np.arange(2000))
    for j in (0, 1):
        assert block[dataset == j].tolist() == list(range(np.count_nonzero(dataset == j)))
    assert 400 < np.count_nonzero(dataset[:1000]) < 600


def test_a_corpus_of_a_trillion_blocks_costs_no_memory():
    dataset, block = order((10**12, "1")).block_at(np.array([0, 10**11, 10**12 - 1, 10**12]))
    assert dataset.tolist() == [0, 0, 0, 0]
    assert (block >= 0).all() and (block < 10**12).all()
    mixture = order((10**12, "0.3"), (10**11, "0.7"))
    where = np.array([5 * 10**11])
    j, b = (int(x[0]) for x in mixture.block_at(where))
    assert int(where[0]) in mixture.samples_of(j, b, 10**12)


def test_positions_are_spread_evenly():
    # chi-square over a 32 x 32 grid of (position, block); 99.9 % of a uniform order lies below
    block = order((32 * 1024, "1"), seed=3).block_at(np.arange(32 * 1024))[1]
    table = np.zeros((32, 32))
    np.add.at(table, (np.arange(32 * 1024) // 1024, block // 1024), 1)
    chi_square = ((table - 32) ** 2 / 32).sum()
    assert 800 < chi_square < 1105  # 961 degrees of freedom


@pytest.mark.parametrize("size", [1000, 4096, 50_000])
def test_neighbours_have_no_visible_structure(size):
    # For a uniform permutation the steps between neighbours are near uniform modulo the size, ascents are half,
    # and the serial correlation is within 4 / sqrt(size) of 0.
    for seed in range(5):
        block = order((size, "1"), seed=seed).block_at(np.arange(size))[1]
        correlation = np.corrcoef(block[:-1], block[1:])[0, 1]
        assert abs(correlation) < 4 / size**0.5
        ascents = np.count_nonzero(block[1:] > block[:-1]) / (size - 1)
        assert abs(ascents - 0.5) < 4 * (1 / 12 / size) ** 0.5
        gaps = np.bincount((np.diff(block) % size) * 20 // size, minlength=20)
        assert ((gaps - size / 20) ** 2 / (size / 20)).sum() < 50  # 19 degrees of freedom: 99.99 % lie below 50.8


def test_a_window_deals_every_dataset_evenly_over_its_slots():
    # every rank and micro-batch sees every source: 16 slices of each window against a share of 1/4
    dataset, _ = order((10**6, "3"), (10**6, "1")).block_at(np.arange(64 * 1024))
    table = np.add.reduceat(dataset.reshape(64, 1024), np.arange(0, 1024, 64), axis=1)  # (window, slice) counts of 1
    assert table.min() >= 2 and table.max() <= 32 and abs(table.mean() - 16) < 0.01


def test_passes_says_how_often_a_dataset_is_seen():
    assert order((128, "1"), (256, "3")).passes(1024) == [2.0, 3.0]
