"""The same batches, encoded, in the same order, each asked for when the one before is at work; and the time lost to them."""

import itertools
import time

import pytest
import torch

from sitfast.data import Batch
from sitfast.data.ahead import Ahead

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CPU = torch.device("cpu")


class Double:
    """A VAE that takes its time and depends on the index."""

    def __init__(self):
        self.calls = 0

    def encode(self, x, index):
        self.calls += 1
        for _ in range(50 if x.is_cuda else 1):
            x = x * 1.0
        return 2 * x + index[:, None]


def fetching(device):
    for number in itertools.count():
        index = torch.arange(4 * number, 4 * number + 4)
        yield Batch(torch.full((4, 1 << 18), float(number)), index % 3, index, (str(number),)).to(device)


@pytest.mark.parametrize("device", DEVICES)
def test_batches_come_in_order_and_encoded_and_none_before_it_is_due(device):
    vae, source = Double(), fetching(device)
    ahead = Ahead(lambda: next(source), vae, torch.device(device))
    for number, batch in enumerate(itertools.islice(ahead, 30)):
        index = torch.arange(4 * number, 4 * number + 4)
        assert torch.equal(batch.index.cpu(), index) and torch.equal(batch.y.cpu(), index % 3)
        assert torch.equal(batch.x.cpu(), (2.0 * number + index)[:, None].expand(4, 1 << 18))
        assert batch.skipped == (str(number),)
        assert vae.calls == number + 1
        del batch  # its memory may be taken by the next one


def test_an_error_comes_when_its_batch_is_due_and_ends_nothing_else():
    def fetch():
        if next(numbers) == 1:
            raise RuntimeError("no batch")
        return next(source)

    numbers, source = itertools.count(), fetching("cpu")
    ahead = Ahead(fetch, Double(), CPU)
    assert next(ahead).skipped == ("0",)
    with pytest.raises(RuntimeError, match="no batch"):
        next(ahead)
    assert next(ahead).skipped == ("1",)


def test_the_time_spent_waiting():
    def fetch():
        time.sleep(0.05)
        return next(source)

    source = fetching("cpu")
    ahead = Ahead(fetch, Double(), CPU)
    assert ahead.take_waited() == 0
    next(ahead), next(ahead)
    assert 0.1 <= ahead.take_waited() < 1
    time.sleep(0.05)  # the model works
    assert ahead.take_waited() == 0


@pytest.mark.gpu
@pytest.mark.parametrize(("fetch_s", "share"), [(0.02, 0), (0.06, 1 / 3)])
def test_a_gpu_waits_for_what_takes_longer_than_its_own_work(fetch_s, share):
    """Steps of 40 ms: what is fetched meanwhile costs nothing; what takes longer, the rest."""
    device = torch.device("cuda", torch.cuda.current_device())

    def fetch():
        time.sleep(fetch_s)
        return next(source)

    def busy(ms):  # by the GPU's clock
        for _ in range(round(ms / unit)):
            torch.mm(a, a)

    a = torch.randn(2048, 2048, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.mm(a, a)
    start.record()
    for _ in range(100):
        torch.mm(a, a)
    end.record()
    end.synchronize()
    unit = start.elapsed_time(end) / 100
    source = fetching(device)
    ahead = Ahead(fetch, Double(), device)
    for _ in range(4):
        next(ahead)
        busy(40)
    torch.cuda.synchronize()
    ahead.take_waited()
    begin = time.perf_counter()
    for _ in range(20):
        next(ahead)
        busy(40)
    torch.cuda.synchronize()
    elapsed = time.perf_counter() - begin
    assert ahead.take_waited() / elapsed == pytest.approx(share, abs=0.1)


@pytest.mark.gpu
def test_the_host_does_not_run_away():
    """It is never more than two batches of work before the GPU."""
    device = torch.device("cuda", torch.cuda.current_device())
    a, source, ends = torch.randn(4096, 4096, device=device), fetching(device), []
    ahead = Ahead(lambda: next(source), Double(), device)
    for number in range(12):
        next(ahead)
        assert all(end.query() for end in ends[: max(0, number - 2)])
        for _ in range(20):
            torch.mm(a, a)
        ends.append(torch.cuda.current_stream().record_event())
