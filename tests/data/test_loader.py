"""The loader: the same samples however they are fetched, replacement of unreadable rows, quarantine, errors, flips."""

import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sitfast import philox
from sitfast.data import Batch, Unreadable, build_source
from sitfast.data.loader import Loader, fixed_batches
from sitfast.data.sampler import Order
from sitfast.errors import SitfastError

ROWS = 37


class Numbers:
    """Row r is an image whose pixels say r, then 0 … 11; the rows in `broken` cannot be read."""

    num_rows, num_classes, channels, image_size = ROWS, 5, 1, 4

    def __init__(self, broken=()):
        self.class_names = list("abcde")
        self.broken = set(broken)

    def load(self, row):
        if row in self.broken:
            raise Unreadable(f"row-{row}", "made\nto\tfail")
        image = torch.arange(16, dtype=torch.uint8).view(1, 4, 4).clone()
        image[0, 0] = row
        return image, row % 5


class Crashing(Numbers):
    def load(self, row):
        raise KeyError("a mistake\nin the source")


class Complaining(Numbers):
    def load(self, row):
        raise SitfastError("the source says what to do")


class Dying(Numbers):
    def load(self, row):
        os.kill(os.getpid(), signal.SIGKILL)


def settings(**changes):
    return SimpleNamespace(
        **{
            "batch_size": 10,
            "num_workers": 0,
            "prefetch": 2,
            "flip": False,
            "max_unreadable": 0.5,
            "decoder": "pil",
            "crop": "center",
            **changes,
        }
    )


def loader(source=None, rows=None, *, consumed=0, accumulate=1, rank=0, world_size=1, quarantine=None, **data):
    return Loader(
        source or Numbers(),
        np.arange(ROWS) if rows is None else rows,
        data=settings(**data),
        seed=3,
        consumed=consumed,
        accumulate=accumulate,
        rank=rank,
        world_size=world_size,
        device="cpu",
        quarantine=quarantine,
    )


def take(batches, count):
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def rows_of(batch):
    return ((batch.x[:, 0, 0, 0] + 1) * 127.5).round().to(torch.int64)


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.x, other.x) and torch.equal(one.y, other.y) and torch.equal(one.index, other.index)
        assert one.skipped == other.skipped


def test_batches_hold_the_rows_of_the_order():
    rows = np.arange(4, 30)
    order = Order(len(rows), 3)
    for k, batch in enumerate(take(loader(rows=rows), 6)):  # two epochs and a bit; one batch crosses their border
        index = np.arange(10 * k, 10 * (k + 1))
        assert batch.index.tolist() == index.tolist()
        assert rows_of(batch).tolist() == rows[order.rows(index)].tolist()
        assert batch.y.tolist() == (rows[order.rows(index)] % 5).tolist()
        assert (batch.x.dtype, batch.y.dtype, batch.index.dtype) == (torch.float32, torch.int64, torch.int64)
        assert batch.skipped == ()


def test_pixels_become_fp32_between_minus_one_and_one():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    zero = torch.zeros(1, dtype=torch.int64)
    batch = Batch(x, zero, zero, ("a",)).to("cpu")
    expected = np.arange(256, dtype=np.float64).reshape(1, 1, 16, 16) / 127.5 - 1
    assert batch.x.dtype == torch.float32 and batch.skipped == ("a",)
    np.testing.assert_allclose(batch.x.numpy(), expected, rtol=0, atol=1.2e-7)  # two roundings to fp32 below 2
    assert (batch.x.min(), batch.x.max()) == (-1, 1)
    floats = torch.rand(1, 1, 2, 2)
    assert torch.equal(Batch(floats, zero, zero).to("cpu").x, floats)


def test_the_number_of_workers_changes_nothing():
    broken = Numbers(broken=[1, 5, 6, 20])
    changes = {"flip": True, "accumulate": 2}
    assert_same(take(loader(broken, **changes), 12), take(loader(broken, num_workers=2, **changes), 12))


@pytest.mark.parametrize("accumulate", [1, 5])
def test_continues_exactly_from_what_was_consumed(accumulate):
    whole = take(loader(Numbers(broken=[2, 3]), flip=True, accumulate=accumulate), 8 * accumulate)
    rest = take(loader(Numbers(broken=[2, 3]), flip=True, accumulate=accumulate, consumed=50), 3 * accumulate)
    assert_same(whole[5 * accumulate :], rest)


def test_ranks_share_one_global_batch():
    whole = take(loader(flip=True), 4)
    ranks = [take(loader(flip=True, rank=rank, world_size=2), 4) for rank in range(2)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(batch.x, torch.cat([part.x for part in parts]))
        assert torch.equal(batch.index, torch.cat([part.index for part in parts]))


def test_flips_are_those_of_philox():
    batches = take(loader(flip=True), 20)
    index = torch.cat([batch.index for batch in batches])
    x = torch.cat([batch.x for batch in batches])
    mirrored = x[:, 0, 1, 0] > x[:, 0, 1, 3]  # the second image row counts upwards
    assert torch.equal(mirrored, philox.uniform(3, index, philox.Stream.FLIP) < 0.5)
    assert 60 < mirrored.sum() < 140
    plain = torch.cat([batch.x for batch in take(loader(), 20)])
    assert torch.equal(torch.where(mirrored[:, None, None, None], x.flip(-1), x), plain)


def test_an_unreadable_row_is_replaced_by_the_next_readable_one():
    batches = take(loader(Numbers(broken=[5, 6, ROWS - 1])), 4)
    index = np.arange(40)
    stand_in = {5: 7, 6: 7, ROWS - 1: 0}
    expected = [stand_in.get(row, row) for row in Order(ROWS, 3).rows(index).tolist()]
    assert torch.cat([rows_of(batch) for batch in batches]).tolist() == expected
    skipped = {name for batch in batches for name in batch.skipped}
    assert skipped == {"row-5", "row-6", f"row-{ROWS - 1}"}


def test_texts_are_those_of_the_rows_that_came():
    class Captioned(Numbers):
        captioned = True

        def caption(self, row):
            return f"row {row}"

    for batch in take(loader(Captioned(broken=[5, 6, ROWS - 1])), 4):
        assert batch.captions == tuple(f"row {row}" for row in rows_of(batch))
    (batch,) = fixed_batches(Captioned(broken=[3]), np.arange(2, 5), batch_size=5, device="cpu")
    assert batch.captions == ("row 2", "row 4")
    assert take(loader(), 1)[0].captions == ()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_quarantine_lists_each_image_once_also_across_restarts(tmp_path, num_workers):
    file = tmp_path / "run" / "quarantine.tsv"
    changes = {"quarantine": file, "num_workers": num_workers}
    first = loader(Numbers(broken=[5, 6]), **changes)
    take(first, 12)
    assert first.unreadable == 2
    assert sorted(file.read_text().splitlines()) == ["row-5\tmade to fail", "row-6\tmade to fail"]
    second = loader(Numbers(broken=[5, 6, 7]), **changes)
    assert second.unreadable == 2
    take(second, 12)
    assert second.unreadable == 3
    assert sorted(line.split("\t")[0] for line in file.read_text().splitlines()) == ["row-5", "row-6", "row-7"]


def test_another_rank_has_listed_it_already(tmp_path):
    file = tmp_path / "quarantine.tsv"
    ranks = [loader(Numbers(broken=[5, 6]), rank=rank, world_size=2, quarantine=file) for rank in range(2)]
    for _ in range(40):
        for rank in ranks:
            next(rank)
    assert len(file.read_text().splitlines()) == 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_large_a_share_stops_the_run(tmp_path, num_workers):
    file = tmp_path / "quarantine.tsv"
    changes = {"max_unreadable": 0.1, "num_workers": num_workers}
    take(loader(Numbers(broken=[1, 10, 20]), quarantine=file, **changes), 8)  # 3 ≤ 0.1 · 37
    batches = loader(Numbers(broken=[1, 10, 20, 30]), quarantine=file, **changes)
    with pytest.raises(SitfastError) as caught:
        take(batches, 8)
    start, end = str(caught.value).split(" (latest: ")
    assert start == "4 of 37 images (10.81%) are unreadable, more than data.max_unreadable=0.1 allows"
    assert end.endswith(
        f": made to fail); repair or remove the files listed in {file}, then delete that list, "
        "or raise data.max_unreadable"
    )


def test_a_list_from_before_does_not_stop_a_repaired_folder_but_the_next_bad_image_does(tmp_path):
    file = tmp_path / "quarantine.tsv"
    file.write_text("".join(f"old-{number}\tgone\n" for number in range(10)))
    assert len(take(loader(quarantine=file, max_unreadable=0.1), 8)) == 8
    with pytest.raises(SitfastError, match="11 of 37 images"):
        take(loader(Numbers(broken=[1]), quarantine=file, max_unreadable=0.1), 8)


def test_no_unreadable_image_allowed_and_no_quarantine_file():
    with pytest.raises(SitfastError, match=r"1 of 37 .*data.max_unreadable=0.0 .*; repair or remove them"):
        take(loader(Numbers(broken=[1]), max_unreadable=0.0), 4)


def test_nothing_readable_ends_soon():
    with pytest.raises(SitfastError, match=r"4 of 37 images \(10.81%\) are unreadable"):
        take(loader(Numbers(broken=range(ROWS)), max_unreadable=0.1), 1)
    with pytest.raises(SitfastError, match=r"none of the 37 images can be read \(latest: row-\d+: "):
        take(loader(Numbers(broken=range(ROWS)), max_unreadable=1.0), 1)


def test_a_quarantine_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SitfastError, match="cannot write the quarantine file"):
        take(loader(Numbers(broken=[1]), quarantine=tmp_path / "file" / "quarantine.tsv"), 4)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_of_a_worker_come_out_as_one_line(num_workers):
    with pytest.raises(SitfastError) as caught:
        take(loader(Crashing(), num_workers=num_workers), 1)
    assert str(caught.value) == r"reading the data failed: KeyError: 'a mistake\nin the source'"
    assert "in load" in str(caught.value.__cause__)  # the traceback is kept for those who ask
    with pytest.raises(SitfastError, match=r"^the source says what to do$"):
        take(loader(Complaining(), num_workers=num_workers), 1)


def test_a_worker_that_is_killed():
    with pytest.raises(SitfastError, match=r"a data worker process ended .*data.num_workers"):
        take(loader(Dying(), num_workers=1), 1)


def test_workers_ignore_signals_and_close_ends_them():
    batches = loader(num_workers=2)
    next(batches)
    workers = batches._batches._workers
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    for _ in range(20):
        next(batches)
    assert all(worker.is_alive() for worker in workers)
    start = time.perf_counter()
    batches.close()
    batches.close()  # once more does no harm
    assert time.perf_counter() - start < 3
    assert not any(worker.is_alive() for worker in workers)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    take(loader(num_workers=1, flip=True), 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_fixed_batches_keep_the_index_of_every_row():
    rows = np.arange(2, 15)
    batches = list(fixed_batches(Numbers(broken=[3, 9]), rows, batch_size=5, device="cpu"))
    assert [len(batch.x) for batch in batches] == [4, 4, 3]
    index = torch.cat([batch.index for batch in batches])
    assert index.tolist() == [position for position in range(13) if position not in (1, 7)]
    assert torch.cat([rows_of(batch) for batch in batches]).tolist() == rows[index.numpy()].tolist()
    assert torch.cat([batch.y for batch in batches]).tolist() == (rows[index.numpy()] % 5).tolist()
    assert [batch.skipped for batch in batches] == [("row-3",), ("row-9",), ()]
    assert all(batch.x[0, 0, 1, 0] < batch.x[0, 0, 1, 3] for batch in batches)  # unflipped


def test_a_real_folder_through_workers(tmp_path):
    colours = {"blue": (0, 0, 255), "red": (255, 0, 0)}
    for name, colour in colours.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (20, 16), colour).save(tmp_path / "data" / name / f"{number}.png")
    bad = tmp_path / "data" / "red" / "2\t.png"
    bad.write_text("not an image")
    source = build_source(SimpleNamespace(source="folder", path=str(tmp_path / "data"), image_size=8))
    file = tmp_path / "quarantine.tsv"
    batches = loader(source, np.arange(source.num_rows), num_workers=2, quarantine=file, batch_size=13)
    for batch in take(batches, 4):
        assert batch.x.shape == (13, 3, 8, 8)
        expected = torch.tensor([[-1.0, -1, 1], [1, -1, -1]])[batch.y]
        assert torch.equal(batch.x, expected[:, :, None, None].expand_as(batch.x))
        assert str(bad) in batch.skipped
    path, reason = file.read_text().rstrip("\n").split("\t")
    assert path == str(bad).replace("\t", "\\t")
    assert reason == "UnidentifiedImageError: no PNG, JPEG or WebP image"
