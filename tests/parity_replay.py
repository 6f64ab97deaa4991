"""Replay of every recorded case, and the error of its results.

`replay` returns all outputs of a case under their recorded names; `compare` measures them. The tests of the modules
that a case covers call `assert_replayed`, and `scripts/check_parity.py` reports on all cases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from parity_cases import Case, build, load_case, relative_error, weights_module
from torch import Tensor, nn

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.modules.diffusionmodules import schedule
from ldm.modules.diffusionmodules.util import timestep_embedding
from ldm.modules.ema import LitEma
from ldm.training import lr_scheduler

Outputs = dict[str, Any]
Runner = Callable[[Case], Outputs]

# The first pattern that matches `case/output` counts. Integers and random samples are exact, except that one codebook
# index in a thousand may differ, because two entries can be equally near.
TOLERANCES = (
    ("*/indices", 1e-3),
    ("*/num_updates", 0.0),
    ("*/n_intermediates", 0.0),
    ("schedules/ddim_timesteps_*", 0.0),
    ("*/first_noise", 0.0),
    ("schedules/*", 1e-6),
    ("noise_schedule/*", 1e-6),
    ("ema/*", 1e-6),
    ("class_embedder/*", 1e-6),
    ("spatial_rescaler/*", 1e-6),
    ("ddim_class_guidance/conditioning", 1e-6),
    ("*_embedder/*", 1e-5),
    ("unet_*", 1e-5),
    ("encoder_unet_*", 1e-5),
    ("*", 1e-4),
)
# How the published samplers chose their steps.
PUBLISHED = {"ddim_discretize": "uniform", "verbose": False}
SHAPE = (3, 16, 16)
# How the patchwise cases were recorded.
SPLIT = {
    "ks": (8, 8),
    "stride": (4, 4),
    "vqf": 2,
    "patch_distributed_vq": True,
    "tie_braker": False,
    "clip_max_weight": 0.5,
    "clip_min_weight": 0.01,
    "clip_max_tie_weight": 0.5,
    "clip_min_tie_weight": 0.01,
}
# Learning rates were recorded for 40 steps of these.
CYCLES = {
    "warm_up_steps": [5, 3],
    "f_min": [0.1, 0.2],
    "f_max": [1.0, 0.5],
    "f_start": [0.0, 0.05],
    "cycle_lengths": [20, 30],
}


@dataclass(frozen=True)
class Result:
    """Error of one output: relative, or for integers the share that differs."""

    case: str
    output: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """True if the error is within the tolerance; NaN is not."""
        return self.error <= self.tolerance


def replay(case: Case) -> Outputs:
    """Compute all outputs of a case; return them by their recorded names."""
    return next(runner for pattern, runner in _RUNNERS if fnmatch(case.name, pattern))(case)


def compare(case: Case, actual: Mapping[str, Any]) -> Iterator[Result]:
    """Yield the error of each recorded output; it is infinite if the output is missing or has another shape."""
    for name, expected in case.outputs.items():
        tolerance = next(tol for pattern, tol in TOLERANCES if fnmatch(f"{case.name}/{name}", pattern))
        yield Result(case.name, name, _error(actual.get(name), expected), tolerance)


def _error(actual: Any, expected: Tensor) -> float:
    if actual is None or torch.as_tensor(actual).shape != expected.shape:
        return float("inf")
    if not expected.is_floating_point():
        return float((torch.as_tensor(actual) != expected).double().mean())
    return relative_error(torch.as_tensor(actual), expected)


def assert_replayed(name: str, *outputs: str) -> None:
    """Assert that the outputs of a case, or some of them, are as recorded."""
    case = load_case(name)
    chosen = [result for result in compare(case, replay(case)) if not outputs or result.output in outputs]
    assert len(chosen) == len(outputs or case.outputs), f"{name} has no such output: {outputs}"
    far = [f"{r.output}: {r.error:.2e}, allowed {r.tolerance:.0e}" for r in chosen if not r.passed]
    assert not far, f"{name} differs from its record: {'; '.join(far)}"


_RUNNERS: list[tuple[str, Runner]] = []


def _replays(*patterns: str) -> Callable[[Runner], Runner]:
    def register(runner: Runner) -> Runner:
        _RUNNERS.extend((pattern, runner) for pattern in patterns)
        return runner

    return register


# -- networks --------------------------------------------------------------------------------------------------


@_replays("unet_*")
@torch.no_grad()
def _unet(case: Case) -> Outputs:
    x, t = case.inputs["x"], case.inputs["timesteps"]
    return {"eps": build(case)(x, t, context=case.inputs.get("context"), y=case.inputs.get("y"))}


@_replays("encoder_unet_*")
@torch.no_grad()
def _encoder_unet(case: Case) -> Outputs:
    return {"logits": build(case)(case.inputs["x"], case.inputs["timesteps"])}


@_replays("class_embedder")
@torch.no_grad()
def _class_embedder(case: Case) -> Outputs:
    return {"context": build(case)({"class_label": case.inputs["labels"]})}


@_replays("*_embedder")
@torch.no_grad()
def _embedder(case: Case) -> Outputs:
    return {"context": build(case).encode(case.inputs["tokens"])}


@_replays("spatial_rescaler")
@torch.no_grad()
def _spatial_rescaler(case: Case) -> Outputs:
    return {"rescaled": build(case).encode(case.inputs["x"])}


# -- first stages and their losses -----------------------------------------------------------------------------


@_replays("autoencoder_kl")
@torch.no_grad()
def _autoencoder_kl(case: Case) -> Outputs:
    model = build(case)
    posterior = model.encode(case.inputs["x"])
    torch.manual_seed(5)
    return {
        "sample_seed5": posterior.sample(),
        "mean": posterior.mean,
        "logvar": posterior.logvar,
        "mode": posterior.mode(),
        "kl": posterior.kl(),
        "nll": posterior.nll(case.inputs["sample"]),
        "decoded": model.decode(posterior.mode()),
    }


@_replays("vq_interface*")
@torch.no_grad()
def _vq_interface(case: Case) -> Outputs:
    model = build(case)
    latent = model.encode(case.inputs["x"])
    quantized, loss, (_, _, indices) = model.quantize(latent)
    return {
        "latent": latent,
        "quantized": quantized,
        "vq_loss": loss,
        "indices": indices,
        "decoded": model.decode(latent),
        "decoded_not_quantized": model.decode(latent, force_not_quantize=True),
    }


@_replays("vq_model")
@torch.no_grad()
def _vq_model(case: Case) -> Outputs:
    model = build(case)
    reconstruction, loss, indices = model(case.inputs["x"], return_pred_indices=True)
    entries = model.quantize.get_codebook_entry(case.outputs["indices"], shape=(2, 16, 16, 4))
    return {"reconstruction": reconstruction, "vq_loss": loss, "indices": indices, "codebook_entry": entries}


@_replays("*_loss_with_discriminator")
def _adversarial(case: Case) -> Outputs:
    outputs: Outputs = {}
    for step in (0, 10):  # the discriminator starts at 5
        outputs |= adversarial_step(build(case).train(), case.inputs["x"], step)
    return outputs


def adversarial_step(model: nn.Module, x: Tensor, step: int) -> Outputs:
    """Return both losses of a first stage at one step; `model` keeps the gradients of the discriminator's loss."""
    torch.manual_seed(7)
    rec = model.reconstruct({"image": x.permute(0, 2, 3, 1)})
    loss, log = model.adversarial_loss(rec, optimizer_idx=0, global_step=step)
    loss.backward()
    outputs = {
        f"generator_loss_step{step}": loss,
        f"grad_norm_encoder_step{step}": grad_norm(model.encoder),
        f"grad_norm_decoder_step{step}": grad_norm(model.decoder),
        **{f"step{step}.{key.replace('/', '.')}": value for key, value in log.items()},
    }
    model.zero_grad()
    loss, log = model.adversarial_loss(rec, optimizer_idx=1, global_step=step)
    loss.backward()
    return {
        **outputs,
        f"discriminator_loss_step{step}": loss,
        f"grad_norm_discriminator_step{step}": grad_norm(model.loss.discriminator),
        **{f"disc_step{step}.{key.replace('/', '.')}": value for key, value in log.items()},
    }


def grad_norm(module: nn.Module) -> Tensor:
    """Return the norm of all gradients of a module."""
    return torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm()


# -- schedules and averages ------------------------------------------------------------------------------------


@_replays("schedules")
def _schedules(case: Case) -> Outputs:
    rates = {
        "lr_warmup_cosine": lr_scheduler.LambdaWarmUpCosineScheduler(10, 0.1, 1.0, 0.01, 30),
        "lr_warmup_cosine2": lr_scheduler.LambdaWarmUpCosineScheduler2(**CYCLES),
        "lr_linear": lr_scheduler.LambdaLinearScheduler(**CYCLES),
    }
    outputs: Outputs = {name: [rate(n) for n in range(40)] for name, rate in rates.items()}
    for name in ("linear", "cosine", "sqrt_linear", "sqrt"):
        bounds = {} if name == "cosine" else {"linear_start": 0.0015, "linear_end": 0.0195}
        outputs[f"betas_{name}"] = schedule.make_beta_schedule(name, 50, **bounds)
    for method in ("uniform", "quad"):
        for steps in (5, 7, 50, 200):
            outputs[f"ddim_timesteps_{method}_{steps}"] = schedule.make_ddim_timesteps(method, steps, 1000)
    return {**outputs, "timestep_embedding_33": timestep_embedding(torch.tensor([0, 3, 999]), 33)}


@_replays("noise_schedule")
def _noise_schedule(case: Case) -> Outputs:
    model = build(case)
    return {name: getattr(model, name) for name in case.outputs}


@_replays("ema")
def _ema(case: Case) -> Outputs:
    linear = weights_module().fill(nn.Linear(3, 2), case.weights_seed)
    ema = LitEma(linear, decay=0.9)
    for _ in range(3):
        with torch.no_grad():
            linear.weight += 1
            linear.bias *= 2
        ema(linear)
    return {"weight": ema.weight, "bias": ema.bias, "num_updates": ema.num_updates}


# -- sampling --------------------------------------------------------------------------------------------------


def _sampled(case: Case, seed: int, sampler: type = DDIMSampler, S: int = 5, batch: int = 2, **options: Any) -> Outputs:
    """Return the latents of a published sampler for a seed, decoded if the case records images."""
    model = options.pop("model", None) or build(case)
    torch.manual_seed(seed)
    latent, steps = sampler(model).sample(S, batch, SHAPE, **options, **PUBLISHED)
    outputs = {"latent": latent, "first_noise": steps["x_inter"][0]}
    return {**outputs, "decoded": model.decode_first_stage(latent)} if "decoded" in case.outputs else outputs


@_replays("ddim_unconditional_eta0")
def _ddim(case: Case) -> Outputs:
    return _sampled(case, 3, eta=0.0)


@_replays("ddim_unconditional_eta1")
def _ddim_eta1(case: Case) -> Outputs:
    return _sampled(case, 4, eta=1.0)


@_replays("ddim_quantize_x0")
def _ddim_quantize_x0(case: Case) -> Outputs:
    return _sampled(case, 5, eta=0.0, quantize_x0=True)


@_replays("ddim_masked")
def _ddim_masked(case: Case) -> Outputs:
    return _sampled(case, 6, eta=0.5, temperature=0.7, mask=case.inputs["mask"], x0=case.inputs["x0"])


@_replays("ddim_given_noise")
def _ddim_given_noise(case: Case) -> Outputs:
    return _sampled(case, 7, S=7, eta=0.0, x_T=case.inputs["x_T"])


@_replays("plms_unconditional")
def _plms(case: Case) -> Outputs:
    return _sampled(case, 8, PLMSSampler, S=6)


@_replays("ddpm_ancestral")
def _ancestral(case: Case) -> Outputs:
    model = build(case)
    torch.manual_seed(9)
    latent, steps = model.p_sample_loop(None, (2, *SHAPE), return_intermediates=True, verbose=False)
    return {"latent": latent, "n_intermediates": len(steps)}


@_replays("ddpm_progressive")
def _progressive(case: Case) -> Outputs:
    model = build(case)
    torch.manual_seed(10)
    latent, estimates = model.progressive_denoising(None, SHAPE, batch_size=2, verbose=False)
    return {"latent": latent, "last_x0": estimates[-1], "n_intermediates": len(estimates)}


@_replays("ddim_class_guidance")
def _ddim_guidance(case: Case) -> Outputs:
    return _guided_by_class(case, 11, DDIMSampler, 5)


@_replays("plms_class_guidance")
def _plms_guidance(case: Case) -> Outputs:
    return _guided_by_class(case, 12, PLMSSampler, 6)


def _guided_by_class(case: Case, seed: int, sampler: type, S: int) -> Outputs:
    model = build(case)
    c, uc = (
        model.get_learned_conditioning({"class_label": torch.tensor(labels)}).detach() for labels in ([2, 7], [10, 10])
    )
    guidance = {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": uc}
    return {"conditioning": c, **_sampled(case, seed, sampler, S, model=model, conditioning=c, **guidance)}


@_replays("inpainting_pipeline")
@torch.no_grad()
def _inpainting(case: Case) -> Outputs:
    model = build(case)
    c = model.cond_stage_model.encode(case.inputs["masked_image"])
    c = torch.cat([c, nn.functional.interpolate(case.inputs["mask"], size=c.shape[-2:])], dim=1)
    return {"conditioning": c, **_sampled(case, 13, batch=1, model=model, conditioning=c)}


@_replays("super_resolution_pipeline")
def _super_resolution(case: Case) -> Outputs:
    return _sampled(case, 14, eta=1.0, conditioning=case.inputs["LR_image"])


@_replays("semantic_synthesis_pipeline")
@torch.no_grad()
def _semantic_synthesis(case: Case) -> Outputs:
    model = build(case)
    c = model.get_learned_conditioning(case.inputs["segmentation"])
    return {"conditioning": c, **_sampled(case, 15, model=model, conditioning=c)}


@_replays("text_to_image_pipeline")
@torch.no_grad()
def _text_to_image(case: Case) -> Outputs:
    model, tokens = build(case), case.inputs["tokens"]
    c, uc = (model.get_learned_conditioning(ids) for ids in (tokens, torch.zeros_like(tokens)))
    guidance = {"unconditional_guidance_scale": 5.0, "unconditional_conditioning": uc}
    return {"context": c, **_sampled(case, 16, model=model, conditioning=c, **guidance)}


@_replays("patchwise_decoding")
@torch.no_grad()
def _patchwise_decoding(case: Case) -> Outputs:
    model = build(case)
    model.split_input_params = SPLIT
    return {"decoded": model.decode_first_stage(case.inputs["z"])}


@_replays("patchwise_denoising")
@torch.no_grad()
def _patchwise_denoising(case: Case) -> Outputs:
    model = build(case)
    model.split_input_params = SPLIT
    return {"eps": model.apply_model(case.inputs["z"], torch.tensor([500]), case.inputs["LR_image"])}


# -- training --------------------------------------------------------------------------------------------------


@_replays("train_loss_*")
def _train_loss(case: Case) -> Outputs:
    model = build(case).train()
    z, t, noise = (case.inputs[name] for name in ("z", "timesteps", "noise"))
    loss, log = model.p_losses(z, None, t, noise=noise)
    loss.backward()
    unet = model.model.diffusion_model
    return {
        "loss": loss,
        **{name.replace("/", "."): value for name, value in log.items()},
        "grad_first_conv": unet.input_blocks[0][0].weight.grad,
        "grad_last_conv": unet.out[2].weight.grad,
        "grad_norm": grad_norm(model.model),
    }


@_replays("text_train_loss")
def _text_train_loss(case: Case) -> Outputs:
    model = build(case).train()
    z, t, noise = (case.inputs[name] for name in ("z", "timesteps", "noise"))
    loss, _ = model.p_losses(z, model.get_learned_conditioning(case.inputs["tokens"]), t, noise=noise)
    loss.backward()
    norms = {"grad_norm_unet": grad_norm(model.model), "grad_norm_cond": grad_norm(model.cond_stage_model)}
    return {"loss": loss, **norms}


# -- Stable Diffusion ------------------------------------------------------------------------------------------

LATENT = (4, 16, 16)


def _texts(case: Case, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the context of the prompts and of the negative prompts."""
    tokens = next(case.inputs[key] for key in ("tokens", "caption", "txt") if key in case.inputs)
    return model.get_learned_conditioning(tokens), model.get_learned_conditioning(case.inputs["uncond_tokens"])


def _guided(model: nn.Module, cond: Any, uncond: Any, scale: float, **options: Any) -> Outputs:
    latent, _ = DDIMSampler(model).sample(
        10,
        2,
        LATENT,
        cond,
        unconditional_guidance_scale=scale,
        unconditional_conditioning=uncond,
        **options,
        **PUBLISHED,
    )
    return {"latent": latent, "decoded": model.decode_first_stage(latent)}


@_replays("sd1_ddim_text_to_image", "sd2_ddim_v")
@torch.no_grad()
def _text_to_image(case: Case) -> Outputs:
    model = build(case)
    context, uncond = _texts(case, model)
    torch.manual_seed(42)
    scale = 7.5 if case.name.startswith("sd1") else 9.0
    return {"context": context, **_guided(model, context, uncond, scale, eta=0.0)}


@_replays("sd1_img2img")
@torch.no_grad()
def _image_to_image(case: Case) -> Outputs:
    model = build(case)
    context, uncond = _texts(case, model)
    sampler = DDIMSampler(model)
    sampler.make_schedule(10, "uniform", 0.0, verbose=False)
    torch.manual_seed(42)
    z0 = model.get_first_stage_encoding(model.encode_first_stage(case.inputs["image"]))
    z_enc = sampler.stochastic_encode(z0, torch.tensor([7, 7]))
    latent = sampler.decode(z_enc, context, 7, unconditional_guidance_scale=5.0, unconditional_conditioning=uncond)
    return {"z0": z0, "z_enc": z_enc, "latent": latent, "decoded": model.decode_first_stage(latent)}


@_replays("sd1_train_loss", "sd2_train_loss_v")
def _sd_train_loss(case: Case) -> Outputs:
    model = build(case).train()
    context = model.get_learned_conditioning(case.inputs["tokens"])
    return {"loss": model.p_losses(case.inputs["z"], context, case.inputs["timesteps"], case.inputs["noise"])[0]}


@_replays("sd2_ddim_inversion")
@torch.no_grad()
def _inversion(case: Case) -> Outputs:
    model = build(case)
    sampler = DDIMSampler(model)
    sampler.make_schedule(10, "uniform", 0.0, verbose=False)
    context = model.get_learned_conditioning(case.inputs["tokens"])
    return {"latent": sampler.encode(case.inputs["z0"], context, 5)[0]}


@_replays("sd_inpainting_conditioning")
@torch.no_grad()
def _inpainting_conditioning(case: Case) -> Outputs:
    model = build(case)
    torch.manual_seed(42)
    z, cond = model.get_input(case.inputs, "jpg")
    return {"z": z, "c_concat": cond["c_concat"][0], "c_crossattn": cond["c_crossattn"][0]}


@_replays("sd_inpainting_sample")
@torch.no_grad()
def _inpainting_sample(case: Case) -> Outputs:
    model = build(case)
    torch.manual_seed(42)
    _, cond = model.get_input(case.inputs, "jpg")
    uncond = {"c_concat": cond["c_concat"], "c_crossattn": [_texts(case, model)[1]]}
    torch.manual_seed(42)
    return _guided(model, cond, uncond, 7.5, eta=1.0, x_T=case.inputs["x_T"])


@_replays("sd_upscaler")
@torch.no_grad()
def _upscaler(case: Case) -> Outputs:
    model = build(case)
    torch.manual_seed(42)
    z, cond = model.get_input(case.inputs, "jpg")
    uncond = {**cond, "c_crossattn": [_texts(case, model)[1]]}
    sampled = _guided(model, cond, uncond, 9.0, eta=0.0, x_T=case.inputs["x_T"])
    return {"z": z, "c_concat": cond["c_concat"][0], "c_adm": cond["c_adm"], **sampled}
