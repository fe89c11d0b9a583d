"""One batch ahead: the same batches, encoded, in the same order."""

import itertools

import pytest
import torch

from sitfast.data import Batch
from sitfast.data.ahead import Ahead


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


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_batches_come_in_order_and_encoded(device, early):
    vae, source = Double(), fetching(device)
    ahead = Ahead(lambda: next(source), vae, torch.device(device), early=early)
    for number, batch in enumerate(itertools.islice(ahead, 30)):
        index = torch.arange(4 * number, 4 * number + 4)
        assert torch.equal(batch.index.cpu(), index) and torch.equal(batch.y.cpu(), index % 3)
        assert torch.equal(batch.x.cpu(), (2.0 * number + index)[:, None].expand(4, 1 << 18))
        assert batch.skipped == (str(number),)
        assert vae.calls == number + 1 + early
        del batch  # its memory may be taken by the next one


def test_only_a_gpu_is_ahead_by_itself():
    assert not Ahead(lambda: None, None, torch.device("cpu")).early


def test_an_error_comes_when_its_batch_is_due_or_one_before():
    def fetch():
        raise RuntimeError("no batch")

    with pytest.raises(RuntimeError, match="no batch"):
        next(Ahead(fetch, None, torch.device("cpu"), early=True))
