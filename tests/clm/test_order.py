"""The order is a pure function of (seed, mixture, sample), a pass is a permutation, shares are exact."""

from fractions import Fraction

import numpy as np
import pytest

from clm.order import Order, OrderSource, permute


def order(*sources: tuple[int, str], seed: int = 1, shuffle: bool = True) -> Order:
    return Order([OrderSource(n, Fraction(w)) for n, w in sources], seed, shuffle)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4097])
def test_the_keyed_permutation_visits_every_number_once(size):
    assert sorted(permute(np.arange(size), size, 42)) == list(range(size))


def test_the_first_blocks_are_these_on_every_platform():
    # These numbers are the definition of ORDER_VERSION 1: a change here breaks every running run.
    dataset, block = order((1000, "0.7"), (5000, "0.3"), seed=7).block_at(np.arange(8))
    assert dataset.tolist() == [0, 1, 0, 1, 0, 0, 1, 1]
    assert block.tolist() == [795, 4751, 671, 3564, 477, 632, 1263, 1844]


def test_a_pass_visits_every_block_once_and_the_next_pass_in_another_order():
    one = order((1000, "1"))
    first = one.block_at(np.arange(1000))[1]
    second = one.block_at(np.arange(1000, 2000))[1]
    assert sorted(first) == sorted(second) == list(range(1000))
    assert first.tolist() != second.tolist()
    assert np.count_nonzero(first == second) < 10


def test_the_order_does_not_depend_on_how_it_is_asked():
    mixture = order((1000, "2"), (77, "1"))
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
    dataset, _ = mixture.block_at(np.arange(10 * mixture.window))
    for border in range(mixture.window, 10 * mixture.window + 1, mixture.window):
        had = np.bincount(dataset[:border], minlength=3)
        assert np.abs(had - border * np.array([0.7, 0.2, 0.1])).max() <= 1
        assert had.tolist() == mixture.counts_before(border)


def test_each_dataset_of_a_mixture_is_passed_over_without_repetition():
    mixture = order((300, "0.6"), (5000, "0.4"))
    dataset, block = mixture.block_at(np.arange(4 * mixture.window))
    counts = mixture.counts_before(4 * mixture.window)
    assert len(set(block[dataset == 1].tolist())) == counts[1]
    visits = np.bincount(block[dataset == 0], minlength=300)
    assert visits.max() - visits.min() <= 1


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


def test_positions_are_spread_evenly():
    # chi-square over a 32 x 32 grid of (position, block); 99.9 % of a uniform order lies below
    block = order((32 * 1024, "1"), seed=3).block_at(np.arange(32 * 1024))[1]
    table = np.zeros((32, 32))
    np.add.at(table, (np.arange(32 * 1024) // 1024, block // 1024), 1)
    chi_square = ((table - 32) ** 2 / 32).sum()
    assert 800 < chi_square < 1105  # 961 degrees of freedom


def test_passes_says_how_often_a_dataset_is_seen():
    assert order((100, "1"), (100, "3")).passes(400) == [1.0, 3.0]
