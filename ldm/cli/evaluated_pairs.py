"""`ldm evaluate reconstructions` and `ldm evaluate restorations`: measure images against their originals."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.command import say
from ldm.cli.evaluated_output import check_output, load_feature_network, load_lpips_network, write_result
from ldm.config.assets import locate
from ldm.errors import UserError

if TYPE_CHECKING:
    from ldm.evaluation.features import SetFeatures
    from ldm.evaluation.image_sets import ImageSet
    from ldm.evaluation.network import FeatureNetwork
    from ldm.evaluation.reconstructions import Reconstructed
    from ldm.evaluation.scores import Figure
    from ldm.modules.losses.lpips import LPIPS

PSNR = "torchmetrics, values in [-1, 1], at most 100 dB"
SSIM = "torchmetrics, Gaussian of 11 px with sigma 1.5"


# -- reconstructions ---------------------------------------------------------------------------------------------


def evaluate_reconstructions(args: argparse.Namespace) -> None:
    """Measure a first stage."""
    from ldm.config.model_files import FIRST_STAGES, MODELS, find_model
    from ldm.config.model_info import ModelInfo
    from ldm.evaluation.reconstructions import evaluate_first_stage
    from ldm.evaluation.results import Result, result_path
    from ldm.evaluation.scores import Settings, check_count
    from ldm.evaluation.weights import averaging, hash_weights
    from ldm.modules.precision import choose_precision
    from ldm.pipelines.loading import choose_device, load_first_stage

    check_output(args)
    files = find_model(args.model, args.config, args.ckpt, (FIRST_STAGES, MODELS))
    if files is None:
        raise UserError("name the first stage with --model, or with --config and --ckpt")
    images = _image_set(args)
    settings = Settings(() if args.no_fid else ("fid",), allow_few=args.allow_few)
    network = None if args.no_fid else load_feature_network(args)
    if network is not None and network.dimension is not None:
        check_count(settings, images.name, len(images), network.dimension)
    lpips = load_lpips_network(args)
    device = choose_device(args.device)
    precision = choose_precision(args.precision, device)
    stage = load_first_stage(files.config, files.checkpoint, device, precision)
    most = args.most_features if args.keep_features else 0
    found = evaluate_first_stage(stage, images, network, lpips, args.batch_size, most)
    originals, results = found.features or (None, None)
    result = Result(
        "reconstructions",
        files.name,
        protocol={
            **_pair_protocol(network, lpips, len(found.names), found.size),
            "values": "float, clamped to [-1, 1]; rounded to 8 bits for rFID",
            "originals": {"preparation": images.preparation, "sha256": _digest(originals, images)},
            "precision": str(precision).removeprefix("torch."),
        },
        subject={
            "originals": args.images or args.data,
            "model": files.name,
            "checkpoint": str(files.checkpoint),
            "weights_sha256": hash_weights(files.checkpoint),
            "weights": averaging(files.checkpoint, ModelInfo.read(files).params),
        },
        figures={"": _reconstruction_figures(found)},
        per_image={"": found.pairs.values},
        images=found.names,
        extra={"latents": found.latents, "codebook": found.codebook},
    )
    say(_findings(found.latents, found.codebook))
    target = result_path(args.json, "reconstructions", result.name)
    write_result(result, target, results if args.keep_features else None, originals)


def _reconstruction_figures(found: Reconstructed) -> dict[str, Figure]:
    from ldm.evaluation.scores import Figure, fid

    figures = found.pairs.figures()
    originals, results = found.features or (None, None)
    if originals is not None and results is not None and originals.gaussian and results.gaussian:
        return {"rfid": Figure(fid(results.gaussian, originals.gaussian)), **figures}
    return figures


def _image_set(args: argparse.Namespace) -> ImageSet:
    from ldm.evaluation.data_sets import configured_images
    from ldm.evaluation.image_sets import open_images

    if args.data is None:
        return open_images(args.images, args.size, args.n)
    if args.size is not None:
        raise UserError("the data set of --data resizes its images; leave out --size")
    return configured_images(args.data, args.split, args.n)


def _digest(features: SetFeatures | None, images: ImageSet) -> str:
    """Return the SHA-256 of the pixels of the originals."""
    if features is not None:
        return features.digest
    digest = hashlib.sha256()
    for _, pixels in images.batches(1):
        digest.update(pixels.tobytes())
    return digest.hexdigest()


def _findings(latents: dict[str, Any], codebook: dict[str, Any] | None) -> str:
    """Return the statistics of the latents and of the codebook in words."""
    pairs = zip(latents["mean"], latents["deviation"], strict=True)
    channels = ", ".join(f"{mean:.3f} ± {deviation:.3f}" for mean, deviation in pairs)
    factor = latents["scale_factor"]
    lines = [f"latents, mean and deviation by channel: {channels}"]
    lines += [] if factor is None else [f"scale factor that makes their deviation 1: {factor:.5f}"]
    if codebook is not None:
        lines.append(
            f"codebook: {codebook['used']:,} of {codebook['entries']:,} entries used ({codebook['share']:.1%}), "
            f"perplexity {codebook['perplexity']:.1f}"
        )
    return "\n".join(lines)


def _pair_protocol(network: FeatureNetwork | None, lpips: LPIPS | None, count: int, size: str) -> dict[str, Any]:
    from ldm.evaluation.pairs import lpips_protocol

    return {
        "features": None if network is None else network.protocol(),
        "psnr": PSNR,
        "ssim": SSIM,
        "lpips": None if lpips is None else lpips_protocol(lpips),
        "images": count,
        "size": size,
    }


# -- restorations ------------------------------------------------------------------------------------------------


def evaluate_restored(args: argparse.Namespace) -> None:
    """Measure restorations."""
    from ldm.evaluation.features import kept_indices
    from ldm.evaluation.restorations import evaluate_restorations, find_items
    from ldm.evaluation.results import Result, result_path
    from ldm.evaluation.scores import Settings
    from ldm.evaluation.weights import hash_weights

    check_output(args)
    masks, small = (None if path is None else locate(path) for path in (args.masks, args.small))
    items = find_items(locate(args.results), locate(args.originals), masks, small)
    kind = "inpainting" if args.masks else "superresolution" if args.small else "restorations"
    metrics = () if args.no_fid else ("fid",) if args.masks else ("fid", "is")
    settings = Settings(metrics, args.is_splits, allow_few=args.allow_few)
    network = None if args.no_fid else load_feature_network(args)
    lpips = load_lpips_network(args)
    kept = kept_indices(len(items), args.most_features) if args.keep_features else None
    restored = evaluate_restorations(items, network, lpips, args.batch_size, settings, kept=kept)
    digest = hashlib.sha256()
    for item in items:
        for path in (item.original, item.mask, item.small):
            digest.update(b"" if path is None else hash_weights(path).encode())
    result = Result(
        "restorations",
        Path(args.results).name,
        protocol={
            "kind": kind,
            **_pair_protocol(network, lpips, len(items), restored.size),
            "metrics": settings.protocol(),
            "originals": {"sha256": digest.hexdigest()},
        },
        subject={"results": args.results, "originals": args.originals, "masked": restored.shares},
        figures=restored.figures,
        per_image=restored.per_image,
        images=restored.names,
    )
    target = result_path(args.json, kind, result.name)
    write_result(result, target, restored.results if args.keep_features else None, restored.originals)
