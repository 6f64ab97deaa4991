"""`ldm evaluate samples`: measure images, or a model that is sampled first."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.options import sampler_settings
from ldm.config.assets import locate
from ldm.errors import UserError

if TYPE_CHECKING:
    from ldm.evaluation.features import SetFeatures
    from ldm.evaluation.image_sets import ImageSet
    from ldm.evaluation.network import FeatureNetwork
    from ldm.evaluation.results import Result
    from ldm.evaluation.scores import Settings

logger = logging.getLogger(__name__)


def evaluate_samples(args: argparse.Namespace) -> int | None:
    """Measure samples; return the exit status of sampling if it fails."""
    from ldm.cli.evaluated_output import load_feature_network, write_result
    from ldm.evaluation.features import check_sizes, collect
    from ldm.evaluation.image_sets import open_images
    from ldm.evaluation.reference import parts_folder
    from ldm.evaluation.results import result_path
    from ldm.evaluation.scores import Settings, check_count, check_counts, score
    from ldm.evaluation.weights import images_of_run

    settings = Settings(args.metrics, args.is_splits, args.kid_subsets, args.kid_subset_size, args.allow_few)
    network = load_feature_network(args)
    reference_set = _reference_set(args)
    if network.dimension is not None:
        for name, count in _known_counts(args, reference_set):
            check_count(settings, name, count, network.dimension)
    path = args.samples and images_of_run(locate(args.samples))
    if path is None:
        path, status = sample_model(args)
        if status or path is None:
            return status
    images = open_images(path, args.size, args.n)
    if reference_set is not None:
        check_sizes([(images.name, images.size()), (reference_set.name, reference_set.size())])
    if network.dimension is not None:
        check_count(settings, images.name, len(images), network.dimension)
    reference = None if {*args.metrics} == {"is"} else _reference(args, reference_set, network, settings)
    most = args.most_features if args.keep_features or _needs_features(settings) else 0
    has_logits = "is" in settings.metrics
    parts = parts_folder(images, network, most + has_logits, _cache(args))
    features = collect(images, network, args.batch_size, most_kept=most, keep_logits=has_logits, folder=parts)
    sets = [("the set of samples", features)] + ([] if reference is None else [("the reference", reference)])
    check_counts(settings, sets)
    check_sizes([(name, each.size) for name, each in sets])
    protocol = {
        "features": network.protocol(),
        "metrics": settings.protocol(),
        "images": len(images),
        "size": features.size,
        "preparation": images.preparation,
        "reference": None if reference is None else _reference_protocol(reference_set, reference),
        "most_features": args.most_features if _needs_features(settings) else None,
    }
    result = _result(args, path, protocol, features.digest)
    result.figures = {"": score(features, reference or features, settings, network.device)}
    target = result_path(args.json, "samples", result.name)
    write_result(result, target, features if args.keep_features else None, reference)
    return None


def _result(args: argparse.Namespace, path: Path, protocol: dict[str, Any], digest: str) -> Result:
    """Return a result without figures, with the facts about the run that made the samples."""
    from ldm.evaluation.results import Result
    from ldm.evaluation.weights import run_of, sampled_model, sampling_of

    run = run_of(path)
    model, averaging = (None, None) if run is None else sampled_model(run)
    return Result(
        "samples",
        path.stem if run is None else str(run.get("model")),
        protocol,
        sampling=None if run is None else {**sampling_of(run), "weights": averaging},
        subject={
            "samples": str(args.samples or path),
            "sha256": digest,
            "model": model,
            "reference": args.reference or args.reference_config,
        },
    )


def _needs_features(settings: Settings) -> bool:
    return bool({"kid", "prc"} & {*settings.metrics})


def _known_counts(args: argparse.Namespace, reference: ImageSet | None) -> list[tuple[str, int]]:
    """Return the sets whose number of images is known before anything is sampled or read."""
    found = [("the set of samples", args.n)] if args.samples is None else []
    return found + ([(reference.name, len(reference))] if reference is not None else [])


def _reference_set(args: argparse.Namespace) -> ImageSet | None:
    """Return the images of the reference; None for statistics, or without a reference."""
    from ldm.evaluation.data_sets import configured_images
    from ldm.evaluation.image_sets import has_statistics, open_images
    from ldm.evaluation.reference import FEATURES
    from ldm.io.npz import array_shapes

    if args.reference_config is not None:
        return configured_images(args.reference_config, args.split, args.reference_n)
    if args.reference is None:
        return None
    found = locate(args.reference)
    if found.suffix == ".npz" and found.is_file() and (has_statistics(found) or FEATURES in array_shapes(found)):
        return None
    return open_images(args.reference, None if found.suffix == ".npz" else args.size, args.reference_n)


def _cache(args: argparse.Namespace) -> Path | None:
    """Return the folder of the cache; None without one."""
    from ldm.evaluation.reference import cache_folder

    return None if args.no_cache else Path(args.cache) if args.cache else cache_folder()


def _reference(
    args: argparse.Namespace, images: ImageSet | None, network: FeatureNetwork, settings: Settings
) -> SetFeatures:
    from ldm.evaluation.reference import cached_features, read_reference

    folder = _cache(args)
    most = args.most_features if _needs_features(settings) else 0
    if images is not None:
        return cached_features(images, network, args.batch_size, most, folder)
    statistics = read_reference(args.reference, network, args.batch_size, most, folder)
    assert statistics is not None
    if "fid" in settings.metrics and statistics.gaussian is None:
        raise UserError(f'"{args.reference}" has no statistics mu and sigma for FID; choose --metrics kid,prc')
    return statistics


def _reference_protocol(images: ImageSet | None, reference: SetFeatures) -> dict[str, Any]:
    return {
        "origin": reference.origin,
        "preparation": "not stated" if images is None else images.preparation,
        "images": reference.count,
        "sha256": reference.digest,
    }


# -- sampling ----------------------------------------------------------------------------------------------------


def sample_model(args: argparse.Namespace) -> tuple[Path | None, int]:
    """Sample the model with `sample_diffusion`; return the folder of the samples and the exit status.

    The same options continue an interrupted run, and use the samples of a finished one.
    """
    from ldm.cli import sample_diffusion
    from ldm.evaluation.weights import RUN_FILE

    words, folder = _sampling_words(args)
    runs = sorted(folder.glob(f"*/samples/*/*/{RUN_FILE}"))
    size = ["-n", str(args.n)]
    if runs:
        logger.info("continuing the samples in %s", runs[-1].parent)
        where = ["--device", args.device] if args.device else []
        status = sample_diffusion.main(["--continue", str(runs[-1].parent), *size, *where, *_allowed(args)])
    else:
        status = sample_diffusion.main([*words, "-l", str(folder), *size])
        runs = sorted(folder.glob(f"*/samples/*/*/{RUN_FILE}"))
    return (runs[-1].parent / "img" if runs else None), status


def _sampling_words(args: argparse.Namespace) -> tuple[list[str], Path]:
    """Return the options of `sample_diffusion`, and a folder of their own for the samples."""
    chosen = sampler_settings(args)
    words = ["--precision", args.precision, "-c", str(chosen["steps"]), "--scale", str(chosen["scale"])]
    words += ["--eta", str(chosen["eta"]), "--seed", str(args.seed)]
    words += [f"--{chosen['sampler']}"] if chosen["sampler"] != "ddim" else []
    for name in ("model", "config", "ckpt", "timestep_spacing"):
        if getattr(args, name) is not None:
            words += [f"--{name}", str(getattr(args, name))]
    words += ["--classes", *args.classes] if args.classes else []
    weights = _weights_of(args)
    key = hashlib.sha256(json.dumps([words, str(weights), weights.stat().st_mtime_ns]).encode()).hexdigest()[:12]
    words += [*_allowed(args), *(["--device", args.device] if args.device else [])]
    return words, Path(args.outdir) / key


def _weights_of(args: argparse.Namespace) -> Path:
    from ldm.config.model_files import find_model

    files = find_model(args.model, args.config, args.ckpt)
    assert files is not None
    return files.checkpoint.resolve()


def _allowed(args: argparse.Namespace) -> list[str]:
    return [word for prefix in args.allow_target or () for word in ("--allow-target", prefix)]
