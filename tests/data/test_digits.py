"""The digits of scikit-learn as a source."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from sitfast.data import build_source
from sitfast.errors import SitfastError


def test_all_digits_in_range_with_their_labels():
    source = build_source(SimpleNamespace(source="digits", path=None, image_size=8))
    real = load_digits()
    assert (source.num_rows, source.num_classes, source.channels, source.image_size) == (1797, 10, 1, 8)
    assert source.class_names == list("0123456789")
    images, labels = zip(*(source.load(row) for row in range(source.num_rows)), strict=True)
    x = torch.stack(images)
    assert x.dtype == torch.float32 and x.shape == (1797, 1, 8, 8)
    assert np.array_equal(x[:, 0].numpy(), real.images / 8 - 1)
    assert (x.min(), x.max()) == (-1, 1)
    assert list(labels) == real.target.tolist()


def test_another_image_size_is_an_error():
    with pytest.raises(SitfastError, match=r"data.image_size=32 .* the digits are 8"):
        build_source(SimpleNamespace(source="digits", path=None, image_size=32))
