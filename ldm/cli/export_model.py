"""The command `export_model`: write a training checkpoint as a model folder.

The folder holds `config.yaml`, `model.safetensors`, and the text files that the model needs: its vocabulary and the
names of its classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.command import Parser, command, example, say
from ldm.cli.options import target_options
from ldm.config.model_config import read_config
from ldm.config.model_files import WEIGHTS, newest_match, trained_config
from ldm.errors import UserError
from ldm.io.files import sha256

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.pipelines.trained_parts import Part

DTYPES = ("float16", "bfloat16", "float32")


def make_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        description="Export a training checkpoint as a model folder: config.yaml, model.safetensors, and the text "
        "files that the model reads.",
        epilog=example("export_model", "--ckpt logs/<run>/checkpoints/last.ckpt --outdir models/ldm/<name>"),
        parents=[target_options()],
    )
    parser.add_argument(
        "--ckpt",
        required=True,
        metavar="FILE",
        help="the training checkpoint, e.g. last.ckpt, or an exported model; a path with * means its last match",
    )
    parser.add_argument("--outdir", required=True, metavar="DIR", help="folder of config.yaml and model.safetensors")
    parser.add_argument(
        "--config",
        metavar="YAML",
        help="configuration of the model (default: the newest *-project.yaml in the configs folder of the run)",
    )
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="export the averaged or the live weights (default: averaged if the checkpoint holds them)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of the parameters (default: %(default)s)")
    parser.add_argument(
        "--decoder", metavar="FILE", help="use the decoder of this first stage, which was trained with freeze_encoder"
    )
    parser.add_argument(
        "--shared-first-stage",
        metavar="FILE",
        help="leave the first stage out, and name that of this model in config.yaml; its encoder must be the same",
    )
    parser.add_argument(
        "--merged",
        action="store_true",
        help="of a run that trained a LoRA or an embedding, export the whole model with it (default: the LoRA or "
        "embedding alone, in the form of diffusers)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model in the folder")
    return parser


def find_config(ckpt: Path, config: str | None) -> Path:
    """Return `config`, or the configuration of the run that wrote `ckpt`.

    Raises:
        UserError: The run has no configuration.
    """
    if config is not None:
        return Path(config)
    found = trained_config(ckpt)
    if found is None:
        raise UserError(f'there is no *-project.yaml in the run of "{ckpt}"; give its configuration with --config')
    return found


def choose(weights: Mapping[str, Tensor], ema: bool | None, source: Path) -> tuple[dict[str, Tensor], str]:
    """Return the weights to export, under their live names, and their kind, "ema" or "live".

    Args:
        weights: the state dict of the checkpoint.
        ema: export the averaged weights; None exports them if there are any.
        source: the checkpoint; an exported model records its own kind.
    """
    from ldm.io.checkpoint.loading import choose_weights, ema_names
    from ldm.io.checkpoint.reading import read_checkpoint

    kind = "ema" if ema or (ema is None and ema_names(weights)) else "live"
    exported = read_checkpoint(source).get("metadata") or {}
    return choose_weights(weights, kind, source), exported.get("weights", kind)


def with_decoder(weights: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Return the weights of a diffusion model, with the decoder replaced by that of the first stage in `file`.

    Raises:
        UserError: The encoder in `file` differs from that of the diffusion model.
    """
    import torch

    from ldm.io.checkpoint.reading import read_state_dict

    stage = {f"first_stage_model.{name}": value for name, value in read_state_dict(file).items()}
    encodes = ("first_stage_model.encoder.", "first_stage_model.quant_conv.")
    for name in (name for name in weights if name.startswith(encodes)):
        if name not in stage or not torch.equal(stage[name].to(weights[name].dtype), weights[name]):
            raise UserError(
                f'"{file}" has another encoder ("{name}"); --decoder needs a first stage that was trained from it'
            )
    decodes = ("first_stage_model.decoder.", "first_stage_model.post_quant_conv.")
    return {name: stage.get(name, value) if name.startswith(decodes) else value for name, value in weights.items()}


def without_first_stage(state_dict: Mapping[str, Tensor], file: str) -> dict[str, Tensor]:
    """Return the weights of a diffusion model without its first stage, which that of the model in `file` replaces.

    Raises:
        UserError: The encoder of the model in `file` differs.
    """
    import torch

    from ldm.config.assets import locate
    from ldm.io.checkpoint.loading import part_of
    from ldm.io.checkpoint.reading import read_state_dict

    shared = part_of(read_state_dict(locate(file)), "first_stage_model.")
    stages = ("first_stage_model.", "cond_stage_model.")  # the conditioning stage may be the first stage
    for name, value in state_dict.items():
        stage, _, rest = name.partition(".")
        if stage == "first_stage_model" and rest.startswith(("encoder.", "quant_conv.", "quantize.")):
            other = shared.get(rest)
            if other is None or not torch.equal(other.to(value.dtype), value):
                raise UserError(f'"{file}" has another encoder ("{rest}"); give the model whose first stage was used')
    shared_names = {name.removeprefix(stages[0]) for name in state_dict if name.startswith(stages[0])}
    return {
        name: value
        for name, value in state_dict.items()
        if not (name.startswith(stages) and name.partition(".")[2] in shared_names)
    }


def convert(model: Any, dtype: str) -> dict[str, Tensor]:
    """Return the state dict with parameters in `dtype`; tables such as the noise schedule keep their dtype."""
    import torch

    from ldm.io.checkpoint.writing import cast

    state_dict = model.state_dict()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        state_dict[name] = cast(name, parameter, getattr(torch, dtype), "export with --dtype bfloat16")
    return state_dict


def export_parts(parts: Sequence[Part], folder: Path, args: argparse.Namespace, metadata: Mapping[str, Any]) -> None:
    """Write the parts that a run has trained beside a frozen model to `folder`.

    Raises:
        UserError: A value does not fit into the dtype, or a file exists and `--overwrite` is not given.
    """
    import torch

    from ldm.io.checkpoint.writing import cast

    dtype, remedy = getattr(torch, args.dtype), "export with --dtype bfloat16"
    for part in parts:
        weights = {name: cast(name, value, dtype, remedy) for name, value in part.weights.items()}
        if (folder / part.file).exists() and not args.overwrite:
            raise UserError(f'"{folder / part.file}" exists; choose another --outdir, or give --overwrite')
        path = replace(part, weights=weights).save(folder, metadata, args.overwrite)
        say(f"{path}: {part.what}, of step {metadata['step']} in {args.dtype}")


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = make_parser().parse_args(argv)
    source, folder = Path(newest_match(args.ckpt, "--ckpt")), Path(args.outdir)
    target = folder / "model.safetensors"
    for path in (folder / name for name in ("config.yaml", *WEIGHTS)):
        if path.exists() and not args.overwrite:
            raise UserError(f'"{path}" exists; choose another --outdir, or give --overwrite')

    from omegaconf import OmegaConf

    from ldm.io.checkpoint.reading import read_state_dict, training_step
    from ldm.io.checkpoint.writing import save_safetensors
    from ldm.io.files import atomic_path
    from ldm.pipelines.loading import build_model, for_inference
    from ldm.pipelines.model_texts import collect_texts
    from ldm.pipelines.trained_parts import trained_parts

    step = training_step(source) or "unknown"
    weights, kind = choose(read_state_dict(source), args.ema, source)
    if args.decoder:
        weights = with_decoder(weights, Path(args.decoder))
    metadata = {"source_sha256": sha256(source), "weights": kind, "step": step, "dtype": args.dtype}
    run_config = read_config(find_config(source, args.config))
    parts = [] if args.merged else trained_parts(weights, run_config)
    if parts:
        export_parts(parts, folder, args, metadata)
        return
    config = for_inference(run_config)
    state_dict = convert(build_model(config, weights, f'"{source}"'), args.dtype)
    if args.shared_first_stage:
        state_dict = without_first_stage(state_dict, args.shared_first_stage)
        config["params"]["first_stage_config"]["params"]["ckpt_path"] = args.shared_first_stage
    config, texts = collect_texts(config)
    with atomic_path(folder / "config.yaml", replace=args.overwrite) as temporary:
        OmegaConf.save(OmegaConf.create({"model": config}), temporary)
        for text in texts:
            text.write(folder, args.overwrite)
        save_safetensors(state_dict, target, metadata, replace=args.overwrite)
    size = target.stat().st_size / 1e6
    for text in texts:
        say(f"{folder / text.name}: copied from {text.source}")
    say(f"{target}: {size:.1f} MB, {kind} weights of step {step} in {args.dtype}")
