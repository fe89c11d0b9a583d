"""Weights at another patch size: what the network answers afterwards, and what comes back."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sitfast.model import SiT
from sitfast.resize import enlargement, fit

SIZES = {"hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 3, "in_channels": 3}


def model(patch_size: int, grid: int = 3, **changes) -> SiT:
    torch.manual_seed(patch_size)
    made = SiT(
        input_size=grid * patch_size, patch_size=patch_size, **{**SIZES, "learn_sigma": False, **changes}
    ).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


def fitted(source: SiT, patch_size: int) -> SiT:
    made = model(patch_size, source.grid, learn_sigma=source.config["learn_sigma"])
    made.load_state_dict(fit(source.state_dict(), made.config))
    return made


def enlarged(x: torch.Tensor, old: int, new: int) -> torch.Tensor:
    """Each patch of x [B, C, H, W] by itself, bilinearly, written as sums over the nearest two pixels of each axis."""
    axis = np.zeros((new, old))
    for i in range(new):
        centre = min(max((i + 0.5) * old / new - 0.5, 0), old - 1)
        low = int(min(np.floor(centre), max(old - 2, 0)))
        axis[i, low] += 1 - (centre - low)
        if centre > low:
            axis[i, low + 1] += centre - low
    b, c, h, w = x.shape
    patches = x.reshape(b, c, h // old, old, w // old, old)
    a = torch.from_numpy(axis)
    out = torch.einsum("ip,bcrpsq,jq->bcrisj", a, patches, a)
    return out.reshape(b, c, h // old * new, w // old * new)


CASES = [(2, 4), (1, 2), (2, 3), (3, 5), (4, 16)]


@pytest.mark.parametrize(("small", "large"), CASES)
def test_a_grown_patch_answers_the_enlarged_image_with_the_enlarged_answer(small, large):
    old = model(small)
    new = fitted(old, large)
    x, t, y = torch.randn(2, 3, 3 * small, 3 * small, dtype=torch.float64), torch.rand(2), torch.tensor([0, 2])
    expected = enlarged(old(x, t, y), small, large)
    assert torch.allclose(new(enlarged(x, small, large), t, y), expected, atol=1e-9)
    assert old(x, t, y).std() > 0.1


@pytest.mark.parametrize(("small", "large"), CASES)
def test_a_shrunk_patch_answers_with_the_patch_that_enlarges_to_the_nearest_answer(small, large):
    old = model(large)
    new = fitted(old, small)
    x, t, y = torch.randn(2, 3, 3 * small, 3 * small, dtype=torch.float64), torch.rand(2), torch.tensor([0, 2])
    answer, wanted = new(x, t, y), old(enlarged(x, small, large), t, y)
    best = (enlarged(answer, small, large) - wanted).square().sum()
    for _ in range(5):  # no other small answer is nearer
        other = answer + 0.01 * torch.randn_like(answer)
        assert (enlarged(other, small, large) - wanted).square().sum() > best


@pytest.mark.parametrize(("small", "large"), CASES)
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_growing_and_shrinking_gives_back_the_weights(small, large, learn_sigma):
    old = model(small, learn_sigma=learn_sigma)
    back = fitted(fitted(old, large), small).state_dict()
    for name, value in old.state_dict().items():
        torch.testing.assert_close(back[name], value, rtol=0, atol=1e-10, msg=name)


def test_the_first_layer_is_the_least_squares_solution_of_flexivit():
    """ŵ = argmin over ŵ of E (xᵀw − (Bx)ᵀŵ)², x ~ N(0, 1): the smallest solution of Bᵀŵ = w."""
    old = model(2)
    new = fitted(old, 4)
    b = enlargement(2, 4)
    w = old.x_embedder.proj.weight.detach().flatten(2).reshape(-1, 4).T
    expected = torch.linalg.lstsq(b.T, w, driver="gelsd").solution
    torch.testing.assert_close(new.x_embedder.proj.weight.detach().flatten(2).reshape(-1, 16).T, expected)


def test_the_enlargement_is_that_of_torch_and_loses_nothing():
    for small in range(1, 9):
        for large in range(small, 17):
            b = enlargement(small, large)
            x = torch.randn(1, 1, small, small, dtype=torch.float64)
            expected = F.interpolate(x, size=(large, large), mode="bilinear", align_corners=False)
            torch.testing.assert_close((b @ x.flatten()).view(1, 1, large, large), expected)
            # Full column rank, and far from losing it: B⁺ amplifies rounding by 1 / the least singular value.
            assert torch.linalg.svdvals(b).min() > 0.2


def test_weights_of_the_same_sizes_are_left_as_they_are():
    old = model(2)
    for name, value in fit(old.state_dict(), old.config).items():
        assert torch.equal(value, old.state_dict()[name]), name
