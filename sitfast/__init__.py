"""sitfast: a fast training engine for Scalable Interpolant Transformers (SiT) and Diffusion Transformers (DiT)."""

from sitfast.errors import SitfastError
from sitfast.interpolant import Interpolant
from sitfast.loss import interpolant_loss
from sitfast.model import DiT, SiT, build_model, count_parameters, forward_macs, interpolate_pos_embed, load_state
from sitfast.patch import patch, unpatch

__all__ = [
    "DiT",
    "Interpolant",
    "SiT",
    "SitfastError",
    "build_model",
    "count_parameters",
    "forward_macs",
    "interpolant_loss",
    "interpolate_pos_embed",
    "load_state",
    "patch",
    "unpatch",
]
