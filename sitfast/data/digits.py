"""The 1,797 real handwritten digits that scikit-learn ships: 8 × 8 pixels with values 0 … 16.

x = value / 8 − 1        fp32 [1, 8, 8] in [−1, 1]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sitfast.errors import SitfastError

if TYPE_CHECKING:
    from sitfast.config import DataConfig


class Digits:
    """All rows in memory: 460 kB."""

    channels = 1
    image_size = 8

    def __init__(self) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise SitfastError('data.source=digits needs scikit-learn: pip install "sitfast[demo]"') from None
        digits: Any = load_digits()
        self._images = torch.from_numpy(digits.images).to(torch.float32).div(8.0).sub(1.0).unsqueeze(1)
        self._labels: list[int] = digits.target.tolist()
        self.class_names = [str(name) for name in digits.target_names]
        self.num_rows = len(self._labels)
        self.num_classes = len(self.class_names)

    def load(self, row: int) -> tuple[Tensor, int]:
        return self._images[row], self._labels[row]


def build(data: DataConfig) -> Digits:
    if data.image_size != Digits.image_size:
        raise SitfastError(f"data.image_size={data.image_size} does not fit data.source=digits; the digits are 8")
    return Digits()
