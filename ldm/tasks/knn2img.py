"""Text to image with a retrieval-augmented model (arXiv:2204.11824)."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.command import Parser
from ldm.cli.options import image_side, non_negative_int, positive_int
from ldm.config.assets import locate
from ldm.config.model_config import ImageSize, read_config
from ldm.config.model_files import CONFIGS_ELSEWHERE, WEIGHTS, ModelFiles, find_model
from ldm.errors import UserError
from ldm.retrieval import MAX_NEIGHBOURS
from ldm.retrieval.folders import DATABASE_NAMES, find_database
from ldm.tasks.task import Inputs, Settings, Task
from ldm.tasks.text2img import check_text, read_lines

if TYPE_CHECKING:
    import numpy as np
    from tqdm import tqdm

    from ldm.models.diffusion.noise import SeededNoise
    from ldm.retrieval.contexts import Context, Contexts

logger = logging.getLogger(__name__)

PROMPT = "a happy bear reading a newspaper, oil on canvas"
DATABASE = "artbench-surrealism"
NEIGHBOURS = 10


class RetrievalToImage(Task):
    """Draw pictures from text, and from pictures near it in a database, with a retrieval-augmented model."""

    name = "knn2img"
    example = f'python scripts/knn2img.py --prompt "{PROMPT}" --use_neighbors --knn 10 --seed 1'
    outdir = "outputs/knn2img-samples"
    published = "rdm768x768"
    folder, default_config = Path("models/rdm/rdm768x768"), CONFIGS_ELSEWHERE[published]
    steps_flags, eta_flags = ("--ddim_steps",), ("--ddim_eta",)

    def __init__(self) -> None:
        self._contexts: Contexts | None = None
        self._made_for: tuple[Any, ...] = ()
        self._known: dict[str, Context] = {}

    # -- the command ---------------------------------------------------------------------------------------------

    def add_options(self, parser: Parser) -> None:
        """Those of the published script keep their names and defaults."""
        parser.description += f" Unless told it is the published one in {self.folder}, with {self.default_config}."
        text = parser.add_mutually_exclusive_group()
        text.add_argument("--prompt", metavar="TEXT", default=PROMPT, help='what to draw (default: "%(default)s")')
        text.add_argument("--from-file", metavar="FILE", help="draw each line of a text file; blank lines are skipped")
        for option, default, what in (
            ("--n_samples", 3, "pictures a round; of --from-file, pictures at once"),
            ("--n_iter", 1, "rounds of pictures"),
            ("--n_repeat", 1, "pictures of each line of --from-file in a round"),
        ):
            parser.add_argument(
                option, type=positive_int, default=default, metavar="N", help=f"{what} (default: %(default)s)"
            )
        parser.add_argument(
            "--n_rows",
            type=non_negative_int,
            default=0,
            metavar="N",
            help="pictures in a row of the grid (default: %(default)s, as many as --n_samples)",
        )
        self.sampler_options(parser, steps=50, scale=5.0)
        for option, side in (("--H", "height"), ("--W", "width")):
            help = f"{side} (default: the model's own, of the published one 768)"
            parser.add_argument(option, type=image_side, metavar="PIXELS", help=help)
        parser.add_argument(
            "--clip_type",
            default="ViT-L/14",
            metavar="NAME",
            help="the CLIP that the model was trained with: OpenAI's name, the hub's, or a folder "
            "(default: %(default)s)",
        )
        parser.add_argument("--use_neighbors", action="store_true", help="draw from neighbours of the prompt too")
        parser.add_argument(
            "--database",
            default=DATABASE,
            metavar="NAME",
            help=f"where neighbours come from: a folder, or one of {', '.join(DATABASE_NAMES)} (default: %(default)s)",
        )
        parser.add_argument(
            "--knn",
            type=neighbour_count,
            default=NEIGHBOURS,
            metavar="K",
            help=f"neighbours of a prompt, {MAX_NEIGHBOURS} at most (default: %(default)s)",
        )

    def choose_model(self, args: argparse.Namespace) -> ModelFiles:
        """The model asked for; what --config or --ckpt do not say is as published."""
        if args.model is not None:
            files = find_model(args.model, args.config, args.ckpt)
        else:
            checkpoint = locate(args.ckpt) if args.ckpt is not None else self.downloaded()
            beside = checkpoint.with_name("config.yaml")
            config = args.config or (beside if beside.is_file() else self.default_config)
            files = find_model(None, str(config), str(checkpoint))
        logger.info("model: %s, from %s", files.name, files.checkpoint)
        return files

    def downloaded(self) -> Path:
        """The published model's weights.

        Raises:
            UserError: they are not there.
        """
        folder = locate(self.folder)
        for name in WEIGHTS:
            if (folder / name).is_file():
                return folder / name
        raise UserError(f"there is no model to draw with; {self.download}, or name one with --ckpt")

    def settings(self, args: argparse.Namespace, files: ModelFiles, config: Mapping[str, Any]) -> Settings:
        """Sampler, size, CLIP, and for neighbours their number and database."""
        context_width(files.name, config)
        check_text("--prompt", args.prompt)
        size = ImageSize.of(config)
        height, width = size.check("--H", args.H or size.height), size.check("--W", args.W or size.width)
        settings = {"height": height, "width": width, "clip_type": args.clip_type}
        if args.use_neighbors:
            find_database(args.database)
            settings |= {"database": args.database, "knn": args.knn}
        elif args.database != DATABASE or args.knn != NEIGHBOURS:
            logger.warning("--database and --knn do nothing without --use_neighbors")
        return {**settings, **self.sampler_settings(args, config)}

    def inputs(self, args: argparse.Namespace, files: ModelFiles) -> list[Inputs]:
        """Each prompt as often as asked, with the neighbours that are found for it."""
        if args.from_file is not None:
            texts = [text for text in read_lines(args.from_file) for _ in range(args.n_repeat)]
        else:
            texts = [args.prompt] * args.n_samples
            if args.n_repeat > 1:
                logger.warning("--n_repeat is for --from-file; more pictures of --prompt come with --n_samples")
        settings = {"clip_type": args.clip_type}
        if args.use_neighbors:
            settings |= {"database": args.database, "knn": args.knn}
        self._made_for = ()  # files may have changed since another run
        contexts = self.contexts(settings)
        contexts.check_width(context_width(files.name, read_config(files.config)))
        prompts = list(dict.fromkeys(texts))
        self._known.update(zip(prompts, contexts.of(prompts), strict=True))
        return [self._described(text) for _ in range(args.n_iter) for text in texts]

    def _described(self, prompt: str) -> Inputs:
        neighbours = self._known[prompt].neighbours
        return {"prompt": prompt, "neighbours": list(neighbours)} if neighbours else {"prompt": prompt}

    def default_batch(self, args: argparse.Namespace) -> int:
        """A round."""
        return args.n_samples

    def sheet_columns(self, args: argparse.Namespace) -> int:
        """As asked, or a round is a row."""
        return args.n_rows or args.n_samples

    # -- the drawing ---------------------------------------------------------------------------------------------

    def contexts(self, settings: Settings) -> Contexts:
        """CLIP and the database that `settings` name, opened once for pictures that share them."""
        wanted = tuple(settings.get(name) for name in ("clip_type", "database", "knn"))
        if self._contexts is None or wanted != self._made_for:
            from ldm.retrieval.contexts import Contexts

            self._contexts, self._known = None, {}  # two databases at once may be too much for the memory
            self._contexts = Contexts(settings["clip_type"], settings.get("database"), settings.get("knn", 0))
            self._made_for = wanted
        return self._contexts

    def load(self, inputs: Inputs, settings: Settings) -> Context:
        """What the model is told of the prompt.

        Raises:
            UserError: the neighbours are no longer those that the picture was drawn from.
        """
        prompt, contexts = inputs["prompt"], self.contexts(settings)
        if prompt not in self._known:
            (self._known[prompt],) = contexts.of([prompt])
        context = self._known[prompt]
        if list(context.neighbours) != inputs.get("neighbours", []):
            raise UserError(
                f'the database "{settings["database"]}" gives other neighbours of "{prompt}" than those that the '
                "picture was drawn from; it, its index or the CLIP has changed"
            )
        return context

    def draw(
        self, model: Any, batch: Sequence[Context], settings: Settings, noise: SeededNoise, progress: tqdm
    ) -> Sequence[np.ndarray]:
        """One picture for each context."""
        import torch

        from ldm.io.pixels import to_uint8
        from ldm.pipelines.sampling import SamplerSettings, decode, sample_latents
        from ldm.retrieval.conditioning import unconditional_conditioning

        sampling = SamplerSettings.of(settings)
        context = torch.stack([each.vectors for each in batch]).to(model.device, model.dtype)
        unconditional = unconditional_conditioning(context) if sampling.scale != 1 else None
        size = (settings["height"] // model.downsampling, settings["width"] // model.downsampling)
        shape = (len(batch), model.channels, *size)
        return to_uint8(decode(model, sample_latents(model, shape, sampling, context, unconditional, noise, progress)))


def neighbour_count(text: str) -> int:
    """An argument type: how many neighbours the published models take."""
    count = positive_int(text)
    if count > MAX_NEIGHBOURS:
        raise argparse.ArgumentTypeError(f"{count} is too many; models were trained with {MAX_NEIGHBOURS} at most")
    return count


def context_width(name: str, config: Mapping[str, Any]) -> int:
    """D, of the vectors that the model takes.

    Raises:
        UserError: it makes its conditioning itself, or has none.
    """
    params = config["params"]
    conditioning, unet = params.get("cond_stage_config"), params.get("unet_config")
    target = conditioning.get("target") if isinstance(conditioning, Mapping) else None
    width = (unet.get("params") or {}).get("context_dim") if isinstance(unet, Mapping) else None
    if target != "torch.nn.Identity" or not isinstance(width, int):
        raise UserError(
            f'the model "{name}" does not draw from vectors of CLIP; choose a retrieval-augmented one, such as '
            "the published rdm768x768"
        )
    return width
