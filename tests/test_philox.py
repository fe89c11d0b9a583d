from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from sitfast import philox
from sitfast.philox import Stream, normal, philox4x32, uniform, words

ONES = 0xFFFFFFFF
# The known answers of Random123's kat_vectors for philox4x32-10: (counter, key, output).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    assert philox4x32(counter, key) == expected
    for dtype in (np.int64, np.uint64):
        out = philox4x32(tuple(np.array([c], dtype=dtype) for c in counter), key)
        assert tuple(int(w[0]) for w in out) == expected
    out = philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w[0]) for w in out) == expected


def test_python_numpy_and_torch_agree():
    rng = np.random.default_rng(0)
    counters = rng.integers(0, 1 << 32, size=(4, 500), dtype=np.int64)
    key = (0xDEADBEEF, 0x12345678)
    in_numpy = np.stack(philox4x32(tuple(counters), key))
    in_torch = torch.stack(philox4x32(tuple(torch.from_numpy(counters)), key)).numpy()
    in_python = np.array([philox4x32(tuple(int(c) for c in column), key) for column in counters.T]).T
    np.testing.assert_array_equal(in_numpy, in_python)
    np.testing.assert_array_equal(in_torch, in_python)


@pytest.mark.parametrize("seed", [0, 7, (1 << 40) + 3, -1])
def test_words_follow_the_stated_counter_layout(seed):
    index, step = (5 << 32) + 17, 300
    got = words(seed, torch.tensor([index]), Stream.SDE, 10, step=step)[0].tolist()
    key = (seed % (1 << 32), seed % (1 << 64) >> 32)
    blocks = [philox4x32((block, 6 + 256 * step, 17, 5), key) for block in range(3)]
    assert got == [word for block in blocks for word in block][:10]


def test_stream_numbers_are_pinned():
    """They are part of a run's identity: a renumbered stream would change every resumed run."""
    named = {"NOISE": 0, "TIME": 1, "LABEL_DROP": 2, "FLIP": 3, "VAE": 4, "SAMPLE": 5, "SDE": 6, "ORDER": 7}
    assert {name: int(Stream[name]) for name in named} == named


@pytest.mark.parametrize("draw", [uniform, normal])
def test_draws_do_not_depend_on_the_batch(draw):
    index = torch.tensor([3, 1 << 35, 0, 12, 3])
    whole = draw(11, index, Stream.NOISE, 2, 3, 5)
    assert whole.shape == (5, 2, 3, 5)
    assert whole.dtype == torch.float32
    parts = [draw(11, part, Stream.NOISE, 2, 3, 5) for part in (index[:1], index[1:4], index[4:])]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole[0], whole[4])
    assert torch.equal(draw(11, index, Stream.NOISE, 7), whole.flatten(1)[:, :7])  # a shorter draw is a prefix


def test_every_part_of_the_address_matters():
    index = torch.arange(4)
    base = words(1, index, Stream.NOISE, 8)
    others = [
        words(2, index, Stream.NOISE, 8),
        words(1 + (1 << 32), index, Stream.NOISE, 8),
        words(1, index + 4, Stream.NOISE, 8),
        words(1, index + (1 << 32), Stream.NOISE, 8),
        words(1, index, Stream.TIME, 8),
        words(1, index, Stream.NOISE, 8, step=1),
    ]
    everything = torch.cat([base, *others]).flatten()
    assert everything.unique().numel() == everything.numel()  # 224 words: a chance collision has p = 6e-6


@pytest.mark.parametrize("draw", [uniform, normal])
def test_an_empty_shape_is_one_value_a_sample(draw):
    index = torch.arange(40)
    assert draw(0, index, Stream.TIME).shape == (40,)
    assert torch.equal(draw(0, index, Stream.TIME), draw(0, index, Stream.TIME, 1)[:, 0])


def test_uniforms_are_uniform():
    draws = uniform(3, torch.arange(50_000), Stream.TIME, 4).double().numpy()
    # Standard errors for n = 200,000: mean sqrt(1/12/n) = 6.5e-4, variance sqrt((1/80 - 1/144)/n) = 1.7e-4. Four of each.
    assert abs(draws.mean() - 1 / 2) < 2.6e-3
    assert abs(draws.var() - 1 / 12) < 6.7e-4
    for column in draws.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    _assert_uncorrelated(draws)


def test_normals_are_normal():
    draws = normal(3, torch.arange(50_000), Stream.NOISE, 4).double().numpy()
    n = draws.size
    assert abs(draws.mean()) < 4 / np.sqrt(n)
    assert abs(draws.var() - 1) < 4 * np.sqrt(2 / n)
    assert abs(stats.skew(draws, axis=None)) < 4 * np.sqrt(6 / n)
    assert abs(stats.kurtosis(draws, axis=None)) < 4 * np.sqrt(24 / n)
    for column in draws.T:
        assert stats.kstest(column, "norm").pvalue > 1e-3
    # Box-Muller ties the two values of a pair together by the radius; they must still be independent.
    _assert_uncorrelated(draws)
    _assert_uncorrelated(draws**2)


def _assert_uncorrelated(draws: np.ndarray) -> None:
    """Neither within a sample nor between consecutive samples: 4 standard errors, 1/sqrt(n) each."""
    bound = 4 / np.sqrt(len(draws))
    columns = np.concatenate([draws[:-1], draws[1:]], axis=1)
    correlations = np.corrcoef(columns.T) - np.eye(columns.shape[1])
    assert np.abs(correlations).max() < bound


def test_normals_are_box_muller_of_the_words():
    index = torch.arange(6)
    unit = (words(9, index, Stream.VAE, 8).numpy().astype(np.float64) + 0.5) / 2**32
    radius, angle = np.sqrt(-2 * np.log(unit[:, 0::2])), 2 * np.pi * unit[:, 1::2]
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(6, 8)
    np.testing.assert_allclose(normal(9, index, Stream.VAE, 7).numpy(), expected[:, :7], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("word", [0, ONES])
def test_extreme_words_stay_inside_the_open_interval(monkeypatch, word):
    monkeypatch.setattr(
        philox, "words", lambda seed, index, stream, count, step=0: torch.full((len(index), count), word)
    )
    index = torch.arange(2)
    unit = uniform(0, index, Stream.TIME, 3)
    assert ((unit > 0) & (unit < 1)).all()
    assert torch.equal(unit.double(), torch.full((2, 3), (word >> 9) / 2**23 + 2**-24, dtype=torch.float64))  # exact
    assert normal(0, index, Stream.NOISE, 4).abs().max() < 6.8
