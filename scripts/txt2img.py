"""Draw pictures from text.

python scripts/txt2img.py --prompt "rocket on a blue background"
"""

from __future__ import annotations

import argparse
import logging
import re
import secrets
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a bare clone too

from ldm.cli import Parser, command, finite_float, model_options, non_negative_float, positive_int, seed
from ldm.model_files import (
    CONFIGS_ELSEWHERE,
    WEIGHTS,
    ModelFiles,
    PictureSize,
    check_text_model,
    find_model,
    locate,
    named_model,
    read_config,
)
from ldm.util import UserError

if TYPE_CHECKING:  # numpy and torch take seconds to import; mistakes are told before
    import numpy as np

logger = logging.getLogger("ldm.txt2img")

PUBLISHED, BUNDLED = "text2img-large", "emoji64"
PUBLISHED_CKPT = Path(f"models/ldm/{PUBLISHED}/model.ckpt")
DOWNLOAD = f"put https://ommer-lab.com/files/latent-diffusion/nitro/txt2img-f8-large/model.ckpt at {PUBLISHED_CKPT}"
PROMPTS = {PUBLISHED: "a painting of a virus monster playing guitar", BUNDLED: "rocket on a blue background"}
BATCH_FROM_FILE = 16


def make_parser() -> Parser:
    """The options; those of the published script keep their names and defaults."""
    parser = Parser(description="Draw pictures from text.", parents=[model_options()])
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt", metavar="TEXT", help="what to draw (default: an example that suits the model)")
    text.add_argument("--from-file", metavar="FILE", help="draw each line of a text file; blank lines are skipped")
    parser.add_argument(
        "--negative_prompt", metavar="TEXT", default="", help="what to lead away from; needs --scale above 1"
    )
    parser.add_argument("--outdir", metavar="DIR", default="outputs/txt2img-samples", help="default: %(default)s")
    parser.add_argument("--ddim_steps", type=positive_int, default=200, metavar="N", help="default: %(default)s")
    sampler = parser.add_mutually_exclusive_group()
    sampler.add_argument("--plms", action="store_true", help="sample with PLMS instead of DDIM")
    sampler.add_argument(
        "--dpm", action="store_true", help="sample with DPM-Solver++, for which 20 --ddim_steps are enough"
    )
    parser.add_argument(
        "--ddim_eta",
        type=non_negative_float,
        default=0.0,
        metavar="ETA",
        help="0 is deterministic, the default; 1 is as DDPM",
    )
    parser.add_argument(
        "--n_iter", type=positive_int, default=1, metavar="N", help="batches to draw (default: %(default)s)"
    )
    parser.add_argument("--H", type=positive_int, metavar="PIXELS", help="height (default: the model's own)")
    parser.add_argument("--W", type=positive_int, metavar="PIXELS", help="width (default: the model's own)")
    parser.add_argument(
        "--n_samples", type=positive_int, default=4, metavar="N", help="pictures a batch (default: %(default)s)"
    )
    parser.add_argument("--scale", type=finite_float, default=5.0, help="guidance; 1 is none (default: %(default)s)")
    parser.add_argument(
        "--seed", type=seed, metavar="N", help="the same seed gives the same pictures (default: drawn anew)"
    )
    parser.add_argument(
        "--batch_size",
        type=positive_int,
        metavar="N",
        help=f"pictures at once (default: n_samples; from a file at least {BATCH_FROM_FILE})",
    )
    parser.add_argument("--skip_grid", action="store_true", help="write the single pictures only")
    return parser


def choose_model(args: argparse.Namespace) -> ModelFiles:
    """The model asked for, else the published one where it was downloaded, else the bundled one."""
    files = find_model(args.model, args.config, args.ckpt)
    if files is not None:
        logger.info("model: %s, from %s", files.name, files.checkpoint)
        return files
    candidates = (locate(PUBLISHED_CKPT.with_name(name)) for name in WEIGHTS)
    published = next((path for path in candidates if path.is_file()), None)
    if published is not None:
        logger.info("model: %s, from %s (the bundled one: --model %s)", PUBLISHED, published, BUNDLED)
        beside = published.with_name("config.yaml")
        config = beside if beside.is_file() else locate(CONFIGS_ELSEWHERE[PUBLISHED])
        return ModelFiles(PUBLISHED, config, published)
    try:
        files = named_model(BUNDLED)
    except UserError:
        raise UserError(f"there is no model to draw with; {DOWNLOAD}, or name one with --model or --ckpt") from None
    logger.info("model: %s, the bundled one of small drawings; for the published 1.45B model %s", BUNDLED, DOWNLOAD)
    return files


def read_prompts(args: argparse.Namespace, model: str) -> list[str]:
    """The texts to draw."""
    for option, value in (("--prompt", args.prompt), ("--negative_prompt", args.negative_prompt)):
        if value and not value.isascii() and value != value.encode(errors="ignore").decode():
            raise UserError(f"{option} is not valid text; give it in UTF-8")
    if args.from_file is None:
        return [args.prompt if args.prompt is not None else PROMPTS.get(model, PROMPTS[BUNDLED])]
    try:
        lines = Path(args.from_file).read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise UserError(f'there is no prompt file "{args.from_file}"; check the path') from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'cannot read the prompt file "{args.from_file}": {error}; give UTF-8 text') from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f'the prompt file "{args.from_file}" is empty; write one prompt a line')
    return prompts


def check(args: argparse.Namespace, files: ModelFiles) -> tuple[int, int]:
    """Everything that can be wrong before the model is built; gives the latents' height and width."""
    config = read_config(files.config)
    check_text_model(files.name, config, "--ddim_steps", args.ddim_steps)
    sampler = sampler_name(args)
    if sampler != "ddim" and args.ddim_eta:
        raise UserError(f"--{sampler} is deterministic; leave out --ddim_eta {args.ddim_eta:g}, or --{sampler}")
    if args.negative_prompt and args.scale == 1:
        raise UserError("--negative_prompt does nothing without guidance; give a --scale above 1")
    if Path(args.outdir).exists() and not Path(args.outdir).is_dir():
        raise UserError(f'--outdir "{args.outdir}" is a file; name a folder')
    size = PictureSize.of(config)
    height = size.check("--H", args.H or size.height)
    width = size.check("--W", args.W or size.width)
    return height // size.factor, width // size.factor


def sampler_name(args: argparse.Namespace) -> str:
    """The sampler that the options ask for, as `ldm.inference.make_sampler` calls it."""
    return "plms" if args.plms else "dpm" if args.dpm else "ddim"


def settings_text(args: argparse.Namespace, files: ModelFiles, settings: Any, precision: str) -> dict[str, Any]:
    """What is written into each picture: enough to draw it again."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        release = version("ldm")
    except PackageNotFoundError:
        release = "unknown"
    run = {"n_samples": args.n_samples, "n_iter": args.n_iter, "batch_size": args.batch_size}
    text = {"negative_prompt": args.negative_prompt, "seed": args.seed, **asdict(settings), **run}
    return {**text, "model": files.name, "precision": precision, "version": f"ldm {release}"}


def draw(
    args: argparse.Namespace, model: Any, prompts: list[str], latent: tuple[int, int], text: dict
) -> list[np.ndarray]:
    """Draw every prompt, writing each batch's pictures as soon as they are done."""
    from tqdm import tqdm

    from ldm.images import next_index, save_png, to_uint8
    from ldm.inference import SamplerSettings, prepared, text_to_images

    folder = Path(args.outdir) / "samples"
    first = next_index(folder)
    wanted = [prompt for prompt in prompts for _ in range(args.n_iter * args.n_samples)]
    batches = [wanted[i : i + args.batch_size] for i in range(0, len(wanted), args.batch_size)]
    settings = SamplerSettings(text["sampler"], text["steps"], text["eta"], text["scale"])
    pictures: list[np.ndarray] = []
    with prepared(model), tqdm(total=len(batches) * settings.steps, desc="drawing", unit="step") as progress:
        for batch in batches:
            images = text_to_images(model, batch, latent, settings, args.negative_prompt, progress=progress)
            for prompt, image in zip(batch, to_uint8(images), strict=True):
                index = len(pictures)
                save_png(image, folder / f"{first + index:04}.png", {"prompt": prompt, **text, "index": index})
                pictures.append(image)
    print(f"{len(pictures)} pictures: {folder}/{first:04}.png to {first + len(pictures) - 1:04}.png")
    return pictures


def grid_path(outdir: Path, prompts: Sequence[str], from_file: bool) -> Path:
    """Where the grid goes: named after its prompt, or numbered; never over another file."""
    from ldm.images import next_index

    if from_file:
        return outdir / f"grid-{next_index(outdir, 'grid-'):04}.png"
    name = re.sub(r'[/\\:*?"<>|\x00-\x1f]', "", prompts[0].strip()).replace(" ", "-").lstrip(".")
    name = name.encode()[:150].decode(errors="ignore") or "grid"
    candidates = (outdir / f"{name}{suffix}.png" for suffix in ("", *(f"-{n}" for n in range(1, 100_000))))
    return next(path for path in candidates if not path.exists())


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    args = make_parser().parse_args(argv)
    files = choose_model(args)
    latent = check(args, files)
    prompts = read_prompts(args, files.name)
    if args.seed is None:
        args.seed = secrets.randbelow(2**32)
    if args.batch_size is None:
        args.batch_size = args.n_samples if args.from_file is None else max(args.n_samples, BATCH_FROM_FILE)

    import numpy as np
    import torch

    from ldm.images import make_grid, save_png
    from ldm.inference import SamplerSettings, choose_device, load_model, unknown_words

    device = choose_device(args.device)
    precision = getattr(torch, args.precision)
    model = load_model(files.config, files.checkpoint, device, precision)
    unknown = unknown_words(model, [*prompts, args.negative_prompt])
    if unknown:
        logger.warning("these words are not in the model's vocabulary: %s", ", ".join(unknown))

    settings = SamplerSettings(sampler_name(args), args.ddim_steps, args.ddim_eta, args.scale)
    text = settings_text(args, files, settings, str(precision).removeprefix("torch."))
    torch.manual_seed(args.seed)
    pictures = draw(args, model, prompts, latent, text)
    if not args.skip_grid:
        path = grid_path(Path(args.outdir), prompts, args.from_file is not None)
        grid_text = {"prompt": "\n".join(prompts), **text}
        save_png(make_grid(np.stack(pictures), nrow=args.n_samples), path, grid_text)
        print(f"grid: {path}")


if __name__ == "__main__":
    sys.exit(main())
