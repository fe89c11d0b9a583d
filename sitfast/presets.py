"""The published sizes of SiT and DiT, by name: "SiT-XL/2" is size XL with patches of 2."""

from __future__ import annotations

from sitfast.errors import SitfastError

_SIZES = {
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}
PRESETS: dict[str, dict[str, int]] = {
    f"{family}-{size}/{patch_size}": {**shape, "patch_size": patch_size}
    for family in ("SiT", "DiT")
    for size, shape in _SIZES.items()
    for patch_size in (2, 4, 8, 16)
}


def preset_kwargs(name: str) -> dict[str, int]:
    """hidden_size, depth, num_heads and patch_size of a preset such as "SiT-XL/2"."""
    if name not in PRESETS:
        raise SitfastError(f"model.preset={name!r} is unknown; choose one of {', '.join(PRESETS)}")
    return dict(PRESETS[name])
