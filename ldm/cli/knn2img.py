"""The command `knn2img`: sample images with a retrieval-augmented model."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.command import Parser
from ldm.cli.input_files import check_text, read_prompts
from ldm.cli.options import (
    add_count,
    add_prompts,
    add_sampler,
    add_size,
    non_negative_int,
    positive_int,
    sampler_settings,
)
from ldm.cli.run import command_of
from ldm.cli.task import Inputs, Task
from ldm.config.assets import locate
from ldm.config.model_files import CONFIGS_ELSEWHERE, WEIGHTS, ModelFiles, find_model
from ldm.config.model_info import ModelInfo
from ldm.errors import UserError
from ldm.retrieval import MAX_NEIGHBOURS
from ldm.retrieval.folders import DATABASE_NAMES, find_database

if TYPE_CHECKING:
    from ldm.pipelines.retrieval import RetrievalToImage
    from ldm.retrieval.contexts import Context, ContextEncoder

logger = logging.getLogger(__name__)

PROMPT = "a happy bear reading a newspaper, oil on canvas"
DATABASE = "artbench-surrealism"
NEIGHBOURS = 10


class Knn2Img(Task["RetrievalToImage"]):
    """Sample images from text, and from similar images in a database, with a retrieval-augmented model."""

    name = "knn2img"
    arguments = f'--prompt "{PROMPT}" --use_neighbors --knn 10 --seed 1'
    outdir = "outputs/knn2img-samples"
    pipeline_path = "ldm.pipelines.retrieval.RetrievalToImage"
    published = "rdm768x768"
    folder, default_config = Path("models/rdm/rdm768x768"), CONFIGS_ELSEWHERE[published]

    def __init__(self) -> None:
        self._contexts: ContextEncoder | None = None
        self._contexts_key: tuple[Any, ...] = ()
        self._cache: dict[str, Context] = {}

    # -- options -------------------------------------------------------------------------------------------------

    def add_options(self, parser: Parser) -> None:
        """Add the options of the published script, with its names and defaults, and a few more."""
        default = f"The default model is the published one in {self.folder}, with {self.default_config}."
        parser.description = f"{parser.description} {default}"
        add_prompts(parser, PROMPT)
        add_count(parser, "--n_samples", 3, "images a round; of --from-file, images sampled at once")
        add_count(parser, "--n_iter", 1, "rounds of images")
        add_count(parser, "--n_repeat", 1, "images of each line of --from-file in a round")
        parser.add_argument(
            "--n_rows",
            type=non_negative_int,
            default=0,
            metavar="N",
            help="images in a row of the grid (default: %(default)s, as many as --n_samples)",
        )
        add_sampler(parser, 50, scale=5.0, steps_flags=("--ddim_steps",), eta_flags=("--ddim_eta",))
        add_size(parser, "that of the model, of the published one 768")
        parser.add_argument(
            "--clip_type",
            default="ViT-L/14",
            metavar="NAME",
            help="the CLIP that the model was trained with: the name of OpenAI or of the hub, or a folder "
            "(default: %(default)s)",
        )
        parser.add_argument(
            "--use_neighbors", action="store_true", help="condition on neighbours of the prompt as well"
        )
        parser.add_argument(
            "--database",
            default=DATABASE,
            metavar="NAME",
            help=f"database of neighbours: a folder, or one of {', '.join(DATABASE_NAMES)} (default: %(default)s)",
        )
        parser.add_argument(
            "--knn",
            type=neighbour_count,
            default=NEIGHBOURS,
            metavar="K",
            help=f"neighbours of a prompt, {MAX_NEIGHBOURS} at most (default: %(default)s)",
        )

    def choose_model(self, args: argparse.Namespace) -> ModelFiles:
        """Return the model that the options name; what --config or --ckpt leave out is as published."""
        if args.model is not None:
            files = find_model(args.model, args.config, args.ckpt)
        else:
            checkpoint = locate(args.ckpt) if args.ckpt is not None else self._downloaded()
            beside = checkpoint.with_name("config.yaml")
            config = args.config or (beside if beside.is_file() else self.default_config)
            files = find_model(None, str(config), str(checkpoint))
        logger.info("model: %s, from %s", files.name, files.checkpoint)
        return files

    def _downloaded(self) -> Path:
        """Return the weights of the published model.

        Raises:
            UserError: They are missing.
        """
        folder = locate(self.folder)
        for name in WEIGHTS:
            if (folder / name).is_file():
                return folder / name
        raise UserError(
            f"there is no model to sample from; run ldm download_weights {self.published}, or name one with --ckpt"
        )

    def pipeline(self, args: argparse.Namespace, info: ModelInfo) -> RetrievalToImage:
        """See `Task.pipeline`."""
        from ldm.pipelines.retrieval import RetrievalToImage, context_width

        context_width(info)
        check_text("--prompt", args.prompt)
        size = info.size
        height, width = size.check("--H", args.H or size.height), size.check("--W", args.W or size.width)
        neighbours: dict[str, Any] = {}
        if args.use_neighbors:
            find_database(args.database)
            neighbours = {"database": args.database, "knn": args.knn}
        elif args.database != DATABASE or args.knn != NEIGHBOURS:
            logger.warning("--database and --knn have no effect without --use_neighbors")
        return RetrievalToImage(
            **sampler_settings(args), height=height, width=width, clip_type=args.clip_type, **neighbours
        )

    # -- inputs --------------------------------------------------------------------------------------------------

    def inputs(self, args: argparse.Namespace, info: ModelInfo) -> list[Inputs]:
        """Return each prompt, as often as the options ask for, with its neighbours."""
        from ldm.pipelines.retrieval import context_width

        if args.from_file is not None:
            texts = [text for text in read_prompts(args.from_file) for _ in range(args.n_repeat)]
        else:
            texts = [args.prompt] * args.n_samples
            if args.n_repeat > 1:
                logger.warning("--n_repeat belongs to --from-file; use --n_samples for more images of --prompt")
        database, knn = (args.database, args.knn) if args.use_neighbors else (None, None)
        self._contexts_key = ()  # the files may have changed since an earlier run
        contexts = self._open_contexts(args.clip_type, database, knn)
        contexts.check_width(context_width(info))
        prompts = list(dict.fromkeys(texts))
        self._cache.update(zip(prompts, contexts.encode(prompts), strict=True))
        return [self._described(text) for _ in range(args.n_iter) for text in texts]

    def _described(self, prompt: str) -> Inputs:
        neighbours = self._cache[prompt].neighbours
        return {"prompt": prompt, "neighbours": list(neighbours)} if neighbours else {"prompt": prompt}

    def _open_contexts(self, clip_type: str, database: str | None, knn: int | None) -> ContextEncoder:
        """Return CLIP and the database, opened once for images that share them."""
        key = (clip_type, database, knn)
        if self._contexts is None or key != self._contexts_key:
            from ldm.retrieval.contexts import ContextEncoder

            self._contexts, self._cache = None, {}  # two databases at once may exceed the memory
            self._contexts = ContextEncoder(clip_type, database, knn or 0)
            self._contexts_key = key
        return self._contexts

    def read(self, inputs: Inputs, pipeline: RetrievalToImage) -> Context:
        """Return the context of the prompt.

        Raises:
            UserError: The neighbours differ from the recorded ones.
        """
        prompt = inputs["prompt"]
        contexts = self._open_contexts(pipeline.clip_type, pipeline.database, pipeline.knn)
        if prompt not in self._cache:
            (self._cache[prompt],) = contexts.encode([prompt])
        context = self._cache[prompt]
        if list(context.neighbours) != inputs.get("neighbours", []):
            raise UserError(
                f'the neighbours of "{prompt}" in the database "{pipeline.database}" differ from those that the image '
                "was sampled with; the database, its index or the CLIP has changed"
            )
        return context

    def default_batch_size(self, args: argparse.Namespace) -> int:
        """Return the number of images in a round."""
        return args.n_samples

    def grid_columns(self, args: argparse.Namespace) -> int:
        """Return the number that the options ask for, or the number of images in a round."""
        return args.n_rows or args.n_samples


def neighbour_count(text: str) -> int:
    """Parse a number of neighbours that the published models take."""
    count = positive_int(text)
    if count > MAX_NEIGHBOURS:
        raise argparse.ArgumentTypeError(f"{count} is too many; models were trained with {MAX_NEIGHBOURS} at most")
    return count


main = command_of(Knn2Img())
