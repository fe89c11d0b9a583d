"""Batches of several sizes: how many images, which size when, and that no sample is lost or comes twice."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from sitfast import config
from sitfast.data import build_source
from sitfast.data.buckets import Bucket, Buckets, kinds
from sitfast.data.image import Crop, adm_crop, adm_plan
from sitfast.data.loader import Loader
from sitfast.data.sampler import Order
from sitfast.errors import SitfastError
from sitfast.philox import Stream, philox4x32

SIZES = [[8, 8], [16, 8], [8, 16], [16, 16]]
SEED = 3


def settings(path="images", **changes):
    fields = {"data.resolutions": SIZES, "data.image_size": 8, "data.batch_size": 24, "data.batch_multiple": 6}
    fields |= {"data.num_workers": 0, "data.flip": True, **changes}
    return config.load(None, [f"data.path={path}", "vae.id=null", *(f"{k}={v}" for k, v in fields.items())]).data


def loader(folder, *, step=0, rank=0, world_size=1, accumulate=1, **changes):
    data = settings(folder, **changes)
    buckets = Buckets(data, SEED)
    source = build_source(data)
    return Loader(
        source,
        np.arange(source.num_rows),
        data=data,
        seed=SEED,
        consumed=buckets.samples(0, step),
        step=step,
        buckets=buckets,
        accumulate=accumulate,
        rank=rank,
        world_size=world_size,
        device="cpu",
        quarantine=None,
    )


def take(batches, count):
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def test_a_batch_has_the_pixels_of_the_reference_rounded_down_to_the_multiple():
    assert kinds(settings()) == (Bucket(8, 8, 24), Bucket(16, 8, 12), Bucket(8, 16, 12), Bucket(16, 16, 6))
    assert kinds(settings(**{"data.batch_size": 40})) == (
        Bucket(8, 8, 36), Bucket(16, 8, 18), Bucket(8, 16, 18), Bucket(16, 16, 6)
    )  # fmt: skip
    assert kinds(settings(**{"data.resolutions": []})) == (Bucket(8, 8, 24),)
    with pytest.raises(
        SitfastError,
        match=r"data.batch_size=23 of 8 × 8 pixels has no room for data.batch_multiple=6 images of 16 × 16;"
        r" use data.batch_size=24 or more",
    ):
        settings(**{"data.batch_size": 23})


def test_the_size_of_a_step_is_a_word_of_philox_and_each_is_as_likely():
    buckets = Buckets(settings(), SEED)
    steps = [0, 1, 1023, 1024, 5000, 2**33]
    for step in steps:
        word = philox4x32((0, int(Stream.BUCKET), step & 0xFFFFFFFF, step >> 32), (SEED, 0))[0]
        assert buckets[step] == buckets.kinds[4 * word >> 32], step
    counts = Counter(buckets[step] for step in range(8000))
    assert sum((counts[kind] - 2000) ** 2 / 2000 for kind in buckets.kinds) < 25  # chi-square, 3 degrees: 1.5e-5
    assert [Buckets(settings(), 4)[step] for step in range(50)] != [buckets[step] for step in range(50)]
    double = Buckets(settings(**{"data.resolutions": [[8, 8], [8, 8], [8, 8], [16, 16]]}), SEED)
    assert 0.7 < sum(double[step].height == 8 for step in range(1000)) / 1000 < 0.8  # 0.75, standard deviation 0.014


def test_the_samples_of_steps_add_up():
    buckets = Buckets(settings(), SEED)
    for start, stop in ((0, 0), (0, 10), (0, 3000), (0, 7), (5, 7), (0, 3001), (2000, 2100)):
        assert buckets.samples(start, stop) == sum(buckets[step].images for step in range(start, stop))
    assert Buckets(settings(**{"data.resolutions": []}), SEED).samples(3, 10) == 7 * 24


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (3, 1), (1, 3), (3, 2)])
def test_each_row_once_an_epoch_at_any_number_of_ranks(image_folder, world_size, accumulate):
    """36 rows; the indices are those of the run's one sequence, and the ranks' shares make the whole batch."""
    steps, buckets = 14, Buckets(settings(), SEED)
    ranks = [
        take(loader(image_folder, rank=rank, world_size=world_size, accumulate=accumulate), steps * accumulate)
        for rank in range(world_size)
    ]
    whole = take(loader(image_folder), steps)
    index = []
    for step in range(steps):
        parts = [ranks[rank][step * accumulate + micro] for micro in range(accumulate) for rank in range(world_size)]
        assert {part.x.shape[2:] for part in parts} == {(buckets[step].height, buckets[step].width)}
        assert len({len(part.x) for part in parts}) == 1
        for name in ("x", "y", "index"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole[step], name))
        index += whole[step].index.tolist()
    assert index == list(range(buckets.samples(0, steps))) and len(index) > 3 * 36
    rows = Order(36, SEED).rows(np.array(index))
    for epoch in range(len(index) // 36):
        assert sorted(rows[36 * epoch : 36 * (epoch + 1)].tolist()) == list(range(36))


@pytest.mark.parametrize("workers", [0, 2])
def test_continues_exactly_with_other_workers(image_folder, workers):
    whole = take(loader(image_folder, accumulate=2), 24)
    rest = take(loader(image_folder, accumulate=2, step=7, **{"data.num_workers": workers}), 10)
    for one, other in zip(whole[14:], rest, strict=True):
        assert torch.equal(one.x, other.x) and torch.equal(one.y, other.y) and torch.equal(one.index, other.index)


@pytest.mark.parametrize("full", [(640, 427), (427, 640), (31, 90), (33, 33), (1000, 20)])
@pytest.mark.parametrize("size", [(48, 48), (32, 80), (80, 32), (47, 63)])
def test_a_rectangle_is_covered_and_cut_from_the_middle(full, size):
    """The image scaled as little as covers the size: one axis fits exactly, the other is cut on both sides alike."""
    width, height = full
    plan = adm_plan(width, height, size)
    scale = max(size[0] / height, size[1] / width)
    assert (plan.scaled[0] == size[1]) or (plan.scaled[1] == size[0])
    assert plan.scaled[0] >= size[1] and plan.scaled[1] >= size[0]
    # Halving floors odd sides, which moves the ratio by at most a pixel in the smallest image that is left.
    assert abs(plan.scaled[0] - width * scale) <= 2 + width * scale / 20
    assert plan.left == (plan.scaled[0] - size[1]) // 2 and plan.top == (plan.scaled[1] - size[0]) // 2
    image = adm_crop(Image.new("RGB", full, (9, 99, 200)), size)
    assert image.size == (size[1], size[0])
    assert np.array(image).reshape(-1, 3).min(0).tolist() == [9, 99, 200]


def test_a_square_is_a_rectangle_of_equal_sides():
    for full in itertools.product((7, 64, 100, 333), repeat=2):
        for crop in (None, Crop(0.0, 0.3, 0.9), Crop(0.99, 0.5, 0.1)):
            assert adm_plan(*full, 48, crop) == adm_plan(*full, (48, 48), crop)


def test_a_random_rectangle_lies_inside_and_moves():
    places = set()
    for zoom, top, left in np.random.default_rng(0).uniform(size=(200, 3)):
        plan = adm_plan(100, 70, (24, 40), Crop(zoom, top, left))
        assert 0 <= plan.left <= plan.scaled[0] - 40 and 0 <= plan.top <= plan.scaled[1] - 24
        assert min(plan.scaled[0] / 40, plan.scaled[1] / 24) <= 1 / 0.8 + 0.05
        places.add((plan.scaled, plan.left, plan.top))
    assert len(places) > 100
