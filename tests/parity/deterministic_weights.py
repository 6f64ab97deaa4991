"""Fill a module with weights that depend only on each entry's name, shape and a seed.

Two implementations whose state dicts have the same names and shapes receive the
same numbers, so their outputs can be compared without shipping any weights.
"""

import zlib

import torch

# Entries that a module computes itself (noise schedules, EMA bookkeeping, constants).
COMPUTED = {
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "scale_factor",
    "logvar",
    "model_ema.decay",
    "model_ema.num_updates",
    "shift",
    "scale",
}


def is_computed(name: str) -> bool:
    return name.removeprefix("low_scale_model.") in COMPUTED or name.endswith(
        (".shift", ".scale", ".position_ids", "num_batches_tracked")
    )


def values(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The float32 values of the entry `name`.

    Matrices and kernels: normal with standard deviation 1/sqrt(fan-in).
    Vectors named `...weight` or `...running_var`: 1 + 0.1 * normal, kept positive.
    All other vectors: 0.1 * normal.
    """
    generator = torch.Generator().manual_seed((zlib.crc32(name.encode()) + seed) % 2**31)
    noise = torch.randn(shape, generator=generator)
    if len(shape) >= 2:
        fan_in = noise[0].numel()
        return noise / fan_in**0.5
    # An EMA copy carries its parameter's name without dots ("...weight" stays a suffix).
    if name.endswith(("weight", "running_var")):
        return (1 + 0.1 * noise).clamp_min(0.05)
    return 0.1 * noise


@torch.no_grad()
def fill(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Overwrite every floating-point entry of `module.state_dict()` in place."""
    for name, entry in module.state_dict().items():
        if entry.is_floating_point() and not is_computed(name):
            entry.copy_(values(name, tuple(entry.shape), seed))
    return module
