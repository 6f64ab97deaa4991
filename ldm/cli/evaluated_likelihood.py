"""`ldm evaluate likelihood`: measure the variational bound of a diffusion model."""

from __future__ import annotations

import argparse
import itertools

import numpy as np

from ldm.cli.command import say
from ldm.cli.evaluated_output import check_output, write_result
from ldm.errors import UserError


def evaluate_likelihood(args: argparse.Namespace) -> None:
    """Measure the variational bound."""
    from ldm.config.model_files import find_model
    from ldm.config.model_info import ModelInfo
    from ldm.evaluation.data_sets import configured_images
    from ldm.evaluation.likelihood import measure_bound
    from ldm.evaluation.results import Result, result_path
    from ldm.evaluation.scores import Figure
    from ldm.evaluation.weights import averaging, hash_weights
    from ldm.modules.precision import choose_precision
    from ldm.pipelines.loading import choose_device, load_files

    check_output(args)
    files = find_model(args.model, args.config, args.ckpt)
    if files is None:
        raise UserError("name the model with --model, or with --config and --ckpt")
    info = ModelInfo.read(files)
    images = configured_images(args.data, args.split, args.n)
    device = choose_device(args.device)
    precision = choose_precision(args.precision, device)
    model = load_files(files, info.config, device, precision)
    if not hasattr(model, "lvlb_weights"):
        raise UserError(f'"{files.name}" is not a diffusion model; choose another --model')
    bound = measure_bound(model, images, args.every, args.batch_size, args.seed)
    result = Result(
        "likelihood",
        files.name,
        protocol={
            "data": {"preparation": images.preparation, "key": images.key()},
            "images": len(bound.total),
            "latents": list(bound.size),
            "every": args.every,
            "seed": args.seed,
            "precision": str(precision).removeprefix("torch."),
        },
        subject={
            "originals": args.data,
            "checkpoint": str(files.checkpoint),
            "weights_sha256": hash_weights(files.checkpoint),
            "weights": averaging(files.checkpoint, info.params),
        },
        figures={"": {"bits": Figure(float(np.mean(bound.total)), float(np.std(bound.total)))}},
        per_image={"": {"bits": bound.total}},
        images=[str(number) for number in range(len(bound.total))],
        extra={"prior": float(np.mean(bound.prior)), "ranges": bound.ranges},
    )
    steps = np.linspace(0, model.num_timesteps, len(bound.ranges) + 1).round().astype(int)
    for (first, last), value in zip(itertools.pairwise(steps), bound.ranges, strict=True):
        say(f"timesteps {first} to {last - 1}: {value:.4f} bits/dim")
    say(f"prior: {result.extra['prior']:.4f} bits/dim")
    write_result(result, result_path(args.json, "likelihood", result.name))
