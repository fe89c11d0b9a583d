"""The operations worth a kernel of their own, one file each.

Every file holds a plain PyTorch `reference` and one public function, which checks its operands and runs the kernel for
their device, or the reference where there is none (see `dispatch`).
"""

from sitfast.kernels.attention import attention
from sitfast.kernels.cross_attention import cross_attention
from sitfast.kernels.dispatch import use_reference
from sitfast.kernels.gated_residual import gated_residual_layernorm_modulate
from sitfast.kernels.layernorm_modulate import layernorm_modulate
from sitfast.kernels.linear import linear
from sitfast.kernels.mlp import mlp
from sitfast.kernels.qk_norm_rope import qk_norm_rope

__all__ = [
    "attention",
    "cross_attention",
    "gated_residual_layernorm_modulate",
    "layernorm_modulate",
    "linear",
    "mlp",
    "qk_norm_rope",
    "use_reference",
]
