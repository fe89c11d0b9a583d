"""The order of the samples: permutations, micro-batches and the held-out rows."""

import itertools

import numpy as np
import pytest

from sitfast.data.sampler import Order, held_out, micro_batches
from sitfast.errors import SitfastError


def epoch_of(num_rows, seed, epoch):
    return Order(num_rows, seed).rows(np.arange(num_rows) + epoch * num_rows)


@pytest.mark.parametrize("num_rows", [*range(1, 40), 255, 256, 257, 1797, 4096, 4097, 100_003])
def test_every_epoch_visits_each_row_once(num_rows):
    for epoch in (0, 1, 2**33 // num_rows):
        assert np.array_equal(np.sort(epoch_of(num_rows, 7, epoch)), np.arange(num_rows))


def test_epochs_and_seeds_have_different_orders():
    orders = [epoch_of(1797, seed, epoch) for seed in (0, 1, 2**32, -1) for epoch in (0, 1, 2)]
    for first, second in itertools.combinations(orders, 2):
        assert np.mean(first == second) < 0.01  # two random permutations agree in one place on average


def test_three_rows_take_all_six_orders():
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(6000):
        order = tuple(epoch_of(3, 0, epoch).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 30  # chi-square, 5 degrees: P(> 30) = 1.5e-5


def test_positions_are_uniform_and_neighbours_unrelated():
    num_rows, epochs = 97, 4000
    rows = Order(num_rows, 3).rows(np.arange(num_rows * epochs)).reshape(epochs, num_rows)
    table = np.zeros((num_rows, num_rows))
    for position in range(num_rows):
        table[position] = np.bincount(rows[:, position], minlength=num_rows)
    expected = epochs / num_rows
    freedom = (num_rows - 1) ** 2
    chi_square = ((table - expected) ** 2 / expected).sum()
    assert abs(chi_square - freedom) < 6 * np.sqrt(2 * freedom)
    steps = np.bincount(((rows[:, 1:] - rows[:, :-1]) % num_rows).ravel(), minlength=num_rows)[1:]
    expected = epochs * (num_rows - 1) / (num_rows - 1)
    assert abs(((steps - expected) ** 2 / expected).sum() - (num_rows - 2)) < 6 * np.sqrt(2 * (num_rows - 2))


def test_a_batch_crosses_the_end_of_an_epoch():
    order = Order(10, 5)
    both = np.concatenate([epoch_of(10, 5, 0), epoch_of(10, 5, 1)])
    assert np.array_equal(order.rows(np.arange(7, 14)), both[7:14])
    assert np.array_equal(order.rows(np.array([13, 2, 13])), both[[13, 2, 13]])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulate", [1, 2, 5])
def test_micro_batches_partition_the_global_batch(world_size, accumulate):
    batch_size, consumed = 120, 120 * 3
    ranks = [
        micro_batches(consumed, batch_size=batch_size, accumulate=accumulate, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    expected = consumed
    for _ in range(2 * accumulate):  # two global batches
        micro = [index for rank in ranks for index in next(rank)]
        assert micro == list(range(expected, expected + batch_size // accumulate))
        expected += batch_size // accumulate


def test_micro_batches_continue_from_any_sample():
    settings = {"batch_size": 12, "accumulate": 3, "rank": 1, "world_size": 2}
    whole = list(itertools.islice(micro_batches(0, **settings), 30))
    assert list(itertools.islice(micro_batches(12 * 7, **settings), 9)) == whole[21:]


def test_held_out_rows_are_fixed_disjoint_and_spread():
    train, val = held_out(1797, 180)
    assert len(val) == 180
    assert np.array_equal(np.sort(np.concatenate([train, val])), np.arange(1797))
    assert np.all(np.diff(train) > 0) and np.all(np.diff(val) > 0)
    assert 45 < np.sum(val < 1797 // 2) < 135  # spread over the data: 90 expected, standard deviation 6.4
    assert set(val) <= set(held_out(1797, 400)[1])  # holding out more keeps what was held out
    assert val[:6].tolist() == [9, 12, 21, 28, 37, 38]  # the same rows for every run there will ever be


def test_nothing_held_out():
    train, val = held_out(5, 0)
    assert train.tolist() == [0, 1, 2, 3, 4]
    assert len(val) == 0


def test_holding_out_everything_is_an_error():
    with pytest.raises(SitfastError, match=r"data.val_samples=5 .* has 5 rows"):
        held_out(5, 5)
