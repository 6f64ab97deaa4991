"""The same weights give the same numbers here and in diffusers, and the same schedules the same samples.

The tables say which name of diffusers is which of ours. `{i}` is a level and `{j}` a block within it, counted in the
direction of diffusers; R is the number of residual blocks a level, L the number of levels.
"""

from __future__ import annotations

import re

import diffusers
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from parity_cases import assert_close
from tiny_models import randomise

from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ancestral import AncestralSampler
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import DDPM
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampler import SamplingOptions
from ldm.modules.diffusionmodules import schedule
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.diffusionmodules.schedule import make_beta_schedule
from ldm.modules.packing import packed_weights

pytestmark = pytest.mark.usefixtures("seed")

TOLERANCE = 1e-5
INDEX = r"(\d+)"

# --- the U-Net with transformers. A transformer block's own names are the same.

UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "down_blocks.{i}.resnets.{j}": lambda i, j, R: f"input_blocks.{i * (R + 1) + j + 1}.0",
    "down_blocks.{i}.attentions.{j}": lambda i, j, R: f"input_blocks.{i * (R + 1) + j + 1}.1",
    "down_blocks.{i}.downsamplers.{j}.conv": lambda i, j, R: f"input_blocks.{(i + 1) * (R + 1)}.0.op",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.{i}.resnets.{j}": lambda i, j, R: f"output_blocks.{i * (R + 1) + j}.0",
    "up_blocks.{i}.attentions.{j}": lambda i, j, R: f"output_blocks.{i * (R + 1) + j}.1",
    "up_blocks.{i}.upsamplers.{j}.conv": lambda i, j, R: f"output_blocks.{i * (R + 1) + R}.LAST.conv",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESIDUAL_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}

# --- the autoencoder. Its attention multiplies by matrices there, by 1 x 1 convolutions here.

AUTOENCODER = {
    "encoder.conv_in": "encoder.conv_in",
    "encoder.down_blocks.{i}.resnets.{j}": lambda i, j, L: f"encoder.down.{i}.block.{j}",
    "encoder.down_blocks.{i}.attentions.{j}": lambda i, j, L: f"encoder.down.{i}.attn.{j}",
    "encoder.down_blocks.{i}.downsamplers.{j}.conv": lambda i, j, L: f"encoder.down.{i}.downsample.conv",
    "decoder.conv_in": "decoder.conv_in",
    "decoder.up_blocks.{i}.resnets.{j}": lambda i, j, L: f"decoder.up.{L - 1 - i}.block.{j}",
    "decoder.up_blocks.{i}.attentions.{j}": lambda i, j, L: f"decoder.up.{L - 1 - i}.attn.{j}",
    "decoder.up_blocks.{i}.upsamplers.{j}.conv": lambda i, j, L: f"decoder.up.{L - 1 - i}.upsample.conv",
    **{
        f"{side}.{theirs}": f"{side}.{ours}"
        for side in ("encoder", "decoder")
        for theirs, ours in {
            "mid_block.resnets.0": "mid.block_1",
            "mid_block.attentions.0": "mid.attn_1",
            "mid_block.resnets.1": "mid.block_2",
            "conv_norm_out": "norm_out",
            "conv_out": "conv_out",
        }.items()
    },
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
}
AUTOENCODER_RESIDUAL_BLOCK = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {
    "conv_shortcut": "nin_shortcut"
}
AUTOENCODER_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def translate(name, table, parts, number):
    """Our name for diffusers' `name`: the table gives its module, `parts` what stands inside blocks."""
    for theirs, ours in table.items():
        pattern = re.escape(theirs).replace(r"\{i\}", INDEX).replace(r"\{j\}", INDEX)
        match = re.match(rf"{pattern}\.(.+)$", name)
        if match:
            *indices, rest = match.groups()
            module = ours if isinstance(ours, str) else ours(*map(int, indices), number)
            inner, _, kind = rest.rpartition(".")
            inner = next((table[inner] for table in parts if inner in table), inner)
            return ".".join(part for part in (module, inner, kind) if part)
    raise AssertionError(f"no entry for {name}")


def convert(weights, model, table, parts, number):
    """Our state dict in diffusers' names and shapes; every one of our weights has its place there."""
    converted, used = {}, set()
    for name, value in model.state_dict().items():
        ours = translate(name, table, parts, number)
        if "LAST" in ours:  # the upsampling layer comes last, after the attention where a level has it
            ours = max(ours.replace("LAST", str(k)) for k in (1, 2) if ours.replace("LAST", str(k)) in weights)
        converted[name] = weights[ours].reshape(value.shape)
        used.add(ours)
    assert used == weights.keys()
    return converted


UNETS = {
    "two blocks a level, attention on two of three": {
        "channels": (32, 64, 64),
        "blocks": 2,
        "attention": (True, False, True),
        "heads": 4,
        "depth": 1,
    },
    "attention on all but the last, two transformers deep": {
        "channels": (32, 64),
        "blocks": 1,
        "attention": (True, False),
        "heads": 2,
        "depth": 2,
    },
}


def unets(channels, blocks, attention, heads, depth):
    """The same U-Net here and in diffusers, with the same random weights."""
    ours = UNetModel(
        image_size=8,
        in_channels=4,
        model_channels=channels[0],
        out_channels=4,
        num_res_blocks=blocks,
        attention_resolutions=[2**level for level, wanted in enumerate(attention) if wanted],
        channel_mult=[width // channels[0] for width in channels],
        num_heads=heads,
        use_spatial_transformer=True,
        transformer_depth=depth,
        context_dim=24,
    )
    kinds = ["CrossAttn" if wanted else "" for wanted in attention]
    theirs = diffusers.UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=channels,
        layers_per_block=blocks,
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
        attention_head_dim=heads,  # the number of heads, in spite of its name
        transformer_layers_per_block=depth,
        cross_attention_dim=24,
    )
    randomise(ours)
    theirs.load_state_dict(convert(ours.state_dict(), theirs, UNET, [UNET_RESIDUAL_BLOCK], blocks))
    return ours.eval().requires_grad_(False), theirs.eval().requires_grad_(False)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("options", UNETS.values(), ids=UNETS)
def test_the_text_conditional_unet_agrees(options, packed):
    ours, theirs = unets(**options)
    x, t, context = torch.randn(3, 4, 8, 16), torch.tensor([1, 500, 999]), torch.randn(3, 7, 24)
    expected = theirs(x, t, context).sample
    with packed_weights(*[ours] if packed else []):
        assert_close(ours(x, t, context), expected, TOLERANCE)
    assert not torch.allclose(ours(x, t, -context), expected, rtol=0.01), "the context counts"


@pytest.fixture(scope="module", params=[(), (8,)], ids=["attention in the middle", "attention on a level too"])
def autoencoders(request):
    """The same autoencoder here and in diffusers, with the same random weights."""
    channels, blocks = (32, 64, 64), 2
    sizes = [16 // 2**level for level in range(3)]
    ours = AutoencoderKL(
        ddconfig={
            "double_z": True,
            "z_channels": 4,
            "resolution": 16,
            "in_channels": 3,
            "out_ch": 3,
            "ch": channels[0],
            "ch_mult": [width // channels[0] for width in channels],
            "num_res_blocks": blocks,
            "attn_resolutions": list(request.param),
        },
        lossconfig={"target": "torch.nn.Identity"},
        embed_dim=4,
    )
    kinds = ["Attn" if size in request.param else "" for size in sizes]
    theirs = diffusers.AutoencoderKL(
        block_out_channels=channels,
        layers_per_block=blocks,
        down_block_types=[f"{kind}DownEncoderBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)],
        latent_channels=4,
    )
    randomise(ours)
    parts = [AUTOENCODER_RESIDUAL_BLOCK, AUTOENCODER_ATTENTION]
    theirs.load_state_dict(convert(ours.state_dict(), theirs, AUTOENCODER, parts, len(channels)))
    return ours.eval().requires_grad_(False), theirs.eval().requires_grad_(False)


def test_encoding_agrees(autoencoders):
    ours, theirs = autoencoders
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    posterior, expected = ours.encode(x), theirs.encode(x).latent_dist
    assert_close(posterior.mode(), expected.mode(), TOLERANCE)
    assert_close(posterior.std, expected.std, TOLERANCE)


def test_decoding_agrees(autoencoders):
    ours, theirs = autoencoders
    z = torch.randn(2, 4, 4, 6)
    assert_close(ours.decode(z), theirs.decode(z).sample, TOLERANCE)


# --- samplers: a small network as the denoiser, the same in both loops

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",  # what is called linear here: linear in the square root
}
GRID = {"steps_offset": 1, "set_alpha_to_one": False, "timestep_spacing": "leading"}
SHAPE = (2, 3, 8, 8)


@pytest.fixture(scope="module")
def model():
    unet = {
        "image_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 32,
        "num_res_blocks": 1,
        "attention_resolutions": [],
        "channel_mult": [1],
        "num_heads": 1,
    }
    config = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet}
    model = DDPM(config, linear_start=0.00085, linear_end=0.012, use_ema=False, clip_denoised=False, image_size=8)
    return randomise(model).eval().requires_grad_(False)


def walk(scheduler, model, x, **options):
    """diffusers' way of sampling, from `x` down."""
    for t in scheduler.timesteps:
        output = model.apply_model(scheduler.scale_model_input(x, t), t.expand(len(x)))
        x = scheduler.step(output, t, x, **options).prev_sample
    return x


def test_schedules_agree(model):
    torch.testing.assert_close(
        model.alphas_cumprod, diffusers.DDIMScheduler(**SCHEDULE).alphas_cumprod, rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("steps", [5, 20])
def test_ddim_agrees(model, steps, eta):
    scheduler = diffusers.DDIMScheduler(**SCHEDULE, **GRID, clip_sample=False)
    scheduler.set_timesteps(steps)
    x = torch.randn(SHAPE)
    torch.manual_seed(1)
    ours, _ = DDIMSampler(model).sample(steps, 2, SHAPE[1:], eta=eta, x_T=x, verbose=False)
    torch.manual_seed(1)  # the noises of the steps
    assert_close(ours, walk(scheduler, model, x, eta=eta), TOLERANCE)


@pytest.mark.parametrize("steps", [5, 20])
def test_plms_agrees(model, steps):
    scheduler = diffusers.PNDMScheduler(**SCHEDULE, **GRID, skip_prk_steps=True)
    scheduler.set_timesteps(steps)
    x = torch.randn(SHAPE)
    ours, _ = PLMSSampler(model).sample(steps, 2, SHAPE[1:], x_T=x, verbose=False)
    assert_close(ours, walk(scheduler, model, x), TOLERANCE)


def test_ancestral_sampling_agrees(model):
    """The first 40 steps of the model, i.e. the last ones of the walk."""
    scheduler = diffusers.DDPMScheduler(**SCHEDULE, clip_sample=False, variance_type="fixed_small")
    scheduler.set_timesteps(timesteps=list(range(39, -1, -1)))
    # Computed there in single precision from the start, 1 - ᾱ has lost digits at these steps.
    scheduler.alphas_cumprod = torch.tensor(make_beta_schedule("linear", 1000, 0.00085, 0.012)).neg().add(1).cumprod(0)
    x = torch.randn(SHAPE)
    torch.manual_seed(1)
    ours, _ = AncestralSampler(model).run(SHAPE, torch.arange(40).numpy(), None, SamplingOptions(verbose=False), x)
    torch.manual_seed(1)
    assert_close(ours, walk(scheduler, model, x), TOLERANCE)


# --- zero terminal SNR: the rescaled schedule, the trailing grid and prediction of v

ZERO_SNR = {**SCHEDULE, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}


def make_zero_snr_model(network, **options):
    """Return a model with a given denoising network, whose schedule ends at ᾱ = 0."""
    options |= {"linear_start": 0.00085, "linear_end": 0.012, "use_ema": False, "image_size": 8}
    options |= {"parameterization": "v", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    zero_snr = DDPM({"target": "torch.nn.Identity"}, clip_denoised=False, **options)
    zero_snr.model = network
    return zero_snr.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def zero_snr_model(model):
    return make_zero_snr_model(model.model)


@pytest.mark.parametrize("name", ["linear", "cosine", "sqrt_linear"])
def test_rescaled_schedules_agree(name):
    betas = make_beta_schedule(name, 1000)
    expected = rescale_zero_terminal_snr(torch.from_numpy(betas))
    torch.testing.assert_close(torch.from_numpy(schedule.rescale_zero_terminal_snr(betas)), expected, rtol=1e-9, atol=0)
    # diffusers computes in single precision.
    single = diffusers.DDIMScheduler(trained_betas=betas, rescale_betas_zero_snr=True).alphas_cumprod
    ours = torch.from_numpy(1 - schedule.rescale_zero_terminal_snr(betas)).cumprod(0).float()
    assert single[-1] == ours[-1] == 0
    torch.testing.assert_close(ours, single, rtol=0, atol=1e-5)


@pytest.mark.parametrize("S", [S for S in range(1, 1001) if 1000 % S == 0] + [3, 7, 15, 27, 300, 999])
def test_trailing_grids_agree(S):
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(S)
    ours = schedule.make_ddim_timesteps("trailing", S, 1000)
    assert ours[::-1].tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("steps", [1, 5, 20])
def test_ddim_at_zero_terminal_snr_agrees(zero_snr_model, steps, eta):
    scheduler = diffusers.DDIMScheduler(**ZERO_SNR, rescale_betas_zero_snr=True, clip_sample=False)
    scheduler.set_timesteps(steps)
    scheduler.alphas_cumprod = zero_snr_model.alphas_cumprod  # computed there in single precision from the start
    x = torch.randn(SHAPE)
    torch.manual_seed(1)
    ours, _ = DDIMSampler(zero_snr_model).sample(steps, 2, SHAPE[1:], eta=eta, x_T=x, verbose=False)
    torch.manual_seed(1)
    # The first steps, at small ᾱ, amplify differences of rounding between the two orders of operations.
    assert_close(ours, walk(scheduler, zero_snr_model, x, eta=eta), 5 * TOLERANCE)


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_dpm_solver_at_zero_terminal_snr_agrees(model, steps):
    """diffusers replaces ᾱ = 0 by 2⁻²⁴, which changes the first two steps."""
    scheduler = diffusers.DPMSolverMultistepScheduler(**ZERO_SNR, rescale_betas_zero_snr=True)
    zero, above_zero = make_zero_snr_model(model.model), make_zero_snr_model(model.model)
    above_zero.alphas_cumprod[-1] = 2**-24
    scheduler.alphas_cumprod = above_zero.alphas_cumprod
    scheduler.set_timesteps(steps)
    x = torch.randn(SHAPE)
    expected = walk(scheduler, above_zero, x)
    for ours, tol in ((above_zero, TOLERANCE), (zero, 5e-3)):
        samples, _ = DPMSolverSampler(ours).sample(steps, 2, SHAPE[1:], x_T=x, verbose=False)
        assert_close(samples, expected, tol)


@pytest.mark.parametrize("steps", [5, 20])
def test_dpm_solver_agrees(model, steps):
    scheduler = diffusers.DPMSolverMultistepScheduler(**SCHEDULE, timestep_spacing="trailing")
    scheduler.alphas_cumprod = model.alphas_cumprod
    scheduler.set_timesteps(steps)
    x = torch.randn(SHAPE)
    ours, _ = DPMSolverSampler(model).sample(steps, 2, SHAPE[1:], x_T=x, ddim_discretize="trailing", verbose=False)
    assert_close(ours, walk(scheduler, model, x), TOLERANCE)


def test_ancestral_sampling_at_zero_terminal_snr_agrees(model):
    short = make_zero_snr_model(model.model, timesteps=20)
    scheduler = diffusers.DDPMScheduler(
        **{**ZERO_SNR, "num_train_timesteps": 20}, rescale_betas_zero_snr=True, clip_sample=False
    )
    scheduler.set_timesteps(20)
    betas = schedule.rescale_zero_terminal_snr(make_beta_schedule("linear", 20, 0.00085, 0.012))
    scheduler.alphas_cumprod = torch.from_numpy(betas).neg().add(1).cumprod(0)
    x = torch.randn(SHAPE)
    torch.manual_seed(1)
    ours, _ = AncestralSampler(short).run(SHAPE, torch.arange(20).numpy(), None, SamplingOptions(verbose=False), x)
    torch.manual_seed(1)
    assert_close(ours, walk(scheduler, short, x), TOLERANCE)
