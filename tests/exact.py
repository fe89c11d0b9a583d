"""Independent fp64 references: the paths as printed in the SiT paper, and Gaussian data whose flow is known exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def path(name: str, t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """alpha, sigma, alpha', sigma' in fp64."""
    t = np.asarray(t, dtype=np.float64)
    if name == "linear":
        return t, 1 - t, np.ones_like(t), -np.ones_like(t)
    if name == "gvp":
        sigma = np.sin(np.pi * (1 - t) / 2)
        return np.sin(np.pi * t / 2), sigma, np.pi / 2 * sigma, -np.pi / 2 * np.sin(np.pi * t / 2)
    log_alpha = -((1 - t) ** 2) * 19.9 / 4 - (1 - t) * 0.1 / 2
    half_beta = (0.1 + (1 - t) * 19.9) / 2
    alpha = np.exp(log_alpha)
    sigma = np.sqrt(-np.expm1(2 * log_alpha))
    return alpha, sigma, alpha * half_beta, -(alpha**2) * half_beta / sigma


def drift_variance(name: str, t: np.ndarray) -> np.ndarray:
    """sigma^2 alpha'/alpha - sigma sigma', half the squared diffusion of the classical score SDE."""
    alpha, sigma, d_alpha, d_sigma = path(name, t)
    return sigma**2 * d_alpha / alpha - sigma * d_sigma


@dataclass
class Gaussian:
    """Data N(mean, std^2) in every dimension; what a perfect model of each kind would answer."""

    path: str
    mean: float = 0.7
    std: float = 0.4

    def __call__(self, kind: str, x: np.ndarray, t: np.ndarray) -> np.ndarray:
        alpha, sigma, d_alpha, d_sigma = path(self.path, t)
        score = -(x - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)
        data = self.mean - alpha * self.std**2 * score
        noise = -sigma * score
        return {"score": score, "data": data, "noise": noise, "velocity": d_alpha * data + d_sigma * noise}[kind]

    def end(self, x: np.ndarray, start: float, end: float) -> np.ndarray:
        """Where the exact flow carries x: the same quantile of the later Gaussian."""
        (a0, s0, *_), (a1, s1, *_) = path(self.path, np.float64(start)), path(self.path, np.float64(end))
        ratio = np.sqrt((a1**2 * self.std**2 + s1**2) / (a0**2 * self.std**2 + s0**2))
        return a1 * self.mean + ratio * (x - a0 * self.mean)

    def model(self, kind: str):
        """As a model (x, t, y) -> out."""

        def forward(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            times = t.double().numpy().reshape(-1, *(1,) * (x.ndim - 1))
            return torch.from_numpy(self(kind, x.double().numpy(), times)).float()

        return forward
