"""Measure how well a model of emoji scenes follows its conditioning, and write a sheet of its samples.

python scripts/evaluate_scenes.py --model logs/RUN/model --grid layout.png

The task follows from the model: unconditional, classes, layouts, label maps, or neighbours. In-painting and
super-resolution models have `scripts/evaluate_restoration.py --data`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import _checkout  # noqa: F401 (imports the code beside this script)
from _evaluation import EvaluatedModel, add_options, check_finite, choose, table, validation_set, write_scores

from ldm.cli.command import Parser, command, example
from ldm.cli.options import finite_float, model_options
from ldm.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from ldm.data.emoji import Drawings
    from ldm.data.emoji_neighbours import DrawingDatabase
    from ldm.data.emoji_scenes import SceneValidation
    from ldm.data.layout_tokens import DecodedLayout
    from ldm.pipelines.layout import Layout
    from ldm.pipelines.pipeline import Pipeline
    from ldm.retrieval.contexts import Context

SHOWN = 32  # samples on the sheet
COLUMNS = 4  # groups of images side by side
GUIDED_SCALE = 2.0  # for models that were trained for guidance


@dataclass(frozen=True)
class Row:
    """One score of one kind of images, and its protocol."""

    images: str
    value: float
    unit: str
    protocol: str


@dataclass(frozen=True)
class Evaluation:
    """Scores, the most important one first, and groups of images for the sheet, (H, W, 3) uint8."""

    rows: list[Row]
    shown: list[list[np.ndarray]]


@dataclass(frozen=True)
class Sampling:
    """Model to sample from, and the settings of samples."""

    model: Any
    args: argparse.Namespace
    scale: float

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of a pipeline."""
        return {"sampler": "ddim", "steps": self.args.steps, "eta": 0.0, "scale": self.scale}

    def images(self, pipeline: Pipeline, requests: Sequence[Any]) -> np.ndarray:
        """Return a sample (N, S, S, 3) in [-1, 1] of each request; image i uses the seed `args.seed` + i."""
        import numpy as np

        from ldm.config.model_info import ModelInfo
        from ldm.pipelines.run import run

        pipeline.check(ModelInfo.of(self.model))
        options: dict[str, Any] = {"seed": self.args.seed, "batch_size": self.args.batch_size, "output_type": "numpy"}
        return np.stack(run(pipeline, self.model, requests, **options)).astype(np.float32) / 127.5 - 1

    def reconstructions(self, images: np.ndarray) -> np.ndarray:
        """Return the images (N, S, S, 3) after encoding and decoding by the first stage."""
        import torch

        from ldm.pipelines.sampling import decode, encode

        batches = torch.from_numpy(images).permute(0, 3, 1, 2).split(self.args.batch_size)
        outputs = [check_finite(decode(self.model, encode(self.model, batch))) for batch in batches]
        return torch.cat(outputs).permute(0, 2, 3, 1).numpy()


def make_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        description="Measure how well a model of emoji scenes follows its conditioning.",
        epilog=example("evaluate_scenes", "--model logs/RUN/model --grid layout.png"),
        parents=[model_options()],
    )
    add_options(parser, "samples", 25, f"write {SHOWN} samples with their conditioning to this file")
    parser.add_argument(
        "--scale", type=finite_float, help=f"guidance scale (default: {GUIDED_SCALE:g} if trained for guidance, else 1)"
    )
    parser.add_argument(
        "--data", metavar="YAML", help="configuration with the validation set (default: that of configs/emoji)"
    )
    return parser


def evaluate_unconditional(sampling: Sampling, scenes: SceneValidation) -> Evaluation:
    """Compare the colours of samples with those of validation scenes."""
    import numpy as np
    from _scene_scores import frechet_distance

    from ldm.pipelines.classes import ClassToImage

    count = min(sampling.args.n, len(scenes) // 2)
    real = np.stack([scenes[index]["image"] for index in range(2 * count)])
    samples = sampling.images(ClassToImage(**sampling.settings), [None] * count)
    protocol = f"Fréchet distance of the colours of 4 × 4 cells to {count} validation scenes"
    rows = [
        Row("samples", frechet_distance(samples, real[:count]), "", protocol),
        Row("other validation scenes", frechet_distance(real[count:], real[:count]), "", protocol),
        Row(
            "their reconstructions",
            frechet_distance(sampling.reconstructions(real[count:]), real[:count]),
            "",
            protocol,
        ),
    ]
    return Evaluation(rows, [[image] for image in pixels(samples)])


def evaluate_classes(sampling: Sampling, scenes: SceneValidation) -> Evaluation:
    """Measure how often a sample has the background of its class."""
    import numpy as np
    from _scene_scores import nearest_backgrounds

    from ldm.data.emoji_scenes import LABELS
    from ldm.pipelines.classes import ClassRequest, ClassToImage

    items = [scenes[index] for index in choose(len(scenes), sampling.args)]
    labels = np.array([item["class_label"] for item in items])
    real = np.stack([item["image"] for item in items])
    samples = sampling.images(
        ClassToImage(**sampling.settings), [ClassRequest(int(label), LABELS[label]) for label in labels]
    )
    protocol = "of the eight backgrounds, the one nearest to the median edge colour is the class (chance: 12.5 %)"
    rows = [
        Row(name, 100 * float((nearest_backgrounds(images) == labels).mean()), "%", protocol)
        for name, images in (("samples", samples), ("validation scenes", real))
    ]
    return Evaluation(rows, [[image] for image in pixels(samples)])


def evaluate_layouts(sampling: Sampling, scenes: SceneValidation) -> Evaluation:
    """Measure how often the content of a box is nearest to the drawing that the layout names."""
    import numpy as np
    from _scene_scores import BoxContents, share_of_boxes

    from ldm.pipelines.layout import LayoutToImage

    items = [scenes[index] for index in choose(len(scenes), sampling.args)]
    layouts = [scenes.layout_tokens.decode(item["coordinates_bbox"]) for item in items]
    requests = [layout_request(layout, scenes.drawings.cldr_names) for layout in layouts]
    real = np.stack([item["image"] for item in items])
    samples = sampling.images(LayoutToImage(**sampling.settings), requests)
    contents = BoxContents(scenes.drawings, scenes.classes)
    count = sum(len(layout.boxes) for layout in layouts)
    protocol = (
        f"{count} boxes: of the {len(scenes.classes)} drawings, the one nearest to the content of the box is the named "
        f"one (chance: {100 / len(scenes.classes):.1f} %)"
    )
    kinds = {"samples": samples, "validation scenes": real, "their reconstructions": sampling.reconstructions(real)}
    rows = [Row(name, share_of_boxes(images, layouts, contents), "%", protocol) for name, images in kinds.items()]
    groups = zip(requests[:SHOWN], pixels(samples), pixels(real), strict=False)
    return Evaluation(rows, [[boxes_of(request), enlarged(a), enlarged(b)] for request, a, b in groups])


def layout_request(layout: DecodedLayout, names: Sequence[str]) -> Layout:
    """Return the request for a layout."""
    import numpy as np

    from ldm.pipelines.layout import LabelledBox, Layout

    corners = np.concatenate([layout.boxes[:, :2], layout.boxes[:, :2] + layout.boxes[:, 2:]], axis=1).clip(0, 1)
    boxes = zip(layout.labels.tolist(), corners.tolist(), strict=True)
    return Layout(tuple(LabelledBox(label, (*box,), names[label]) for label, box in boxes))


def boxes_of(request: Layout, side: int = 128) -> np.ndarray:
    """Return an image (side, side, 3) uint8 of the boxes of a request with their names."""
    from ldm.io.grids import draw_boxes
    from ldm.io.pixels import to_uint8

    boxes, names = [each.box for each in request.boxes], [each.name for each in request.boxes]
    return to_uint8(draw_boxes((side, side), boxes, names, 9))


def evaluate_label_maps(sampling: Sampling, scenes: SceneValidation) -> Evaluation:
    """Measure the mean IoU between the colours of samples and their label maps."""
    import numpy as np
    from _scene_scores import mean_iou

    from ldm.data.emoji_scenes import LABEL_COLOURS, label_map
    from ldm.pipelines.semantic import SemanticToImage

    items = [scenes[index] for index in choose(len(scenes), sampling.args)]
    real = np.stack([item["image"] for item in items])
    maps = label_map(real)
    pipeline = SemanticToImage(**sampling.settings, labels=len(LABEL_COLOURS))
    samples = sampling.images(pipeline, list(maps))
    protocol = "mean over eleven colours of the IoU between the map and the nearest colour of each pixel"
    kinds = {"samples": samples, "reconstructions of the scenes": sampling.reconstructions(real)}
    rows = [Row(name, mean_iou(label_map(images), maps), "", protocol) for name, images in kinds.items()]
    flat = np.array([np.bincount(each.ravel()).argmax() for each in maps])[:, None, None]
    others = {
        "most frequent colour of each map": np.broadcast_to(flat, maps.shape),
        "maps of other scenes": np.roll(maps, 1, axis=0),
    }
    rows += [Row(name, mean_iou(found, maps), "", protocol) for name, found in others.items()]
    colours = np.array(list(LABEL_COLOURS.values()), np.uint8)
    groups = zip(colours[maps][:SHOWN], pixels(samples), pixels(real), strict=False)
    return Evaluation(rows, [list(group) for group in groups])


def evaluate_neighbours(sampling: Sampling, pairs: Any) -> Evaluation:
    """Measure how often a sample follows the neighbours from another database than that of the query."""
    from _scene_scores import share_of_neighbours

    from ldm.data.emoji import load_drawings
    from ldm.data.emoji_neighbours import DrawingDatabase
    from ldm.pipelines.retrieval import RetrievalToImage

    drawings, knn = load_drawings(64), pairs.indices.shape[1]
    own, swapped = (DrawingDatabase(drawings, range(first, len(drawings), 2)) for first in (0, 1))
    queries = [int(own.classes[index]) for index in choose(len(own.classes), sampling.args)]
    protocol = (
        f"of all {len(drawings)} drawings, the one nearest to the sample is one of its {knn} neighbours (chance: "
        f"{100 * knn / len(drawings):.1f} %)"
    )
    rows, columns = [], [on_white(drawings, queries, pairs.dataset.size)]
    for name, database in (("swapped database", swapped), ("own database", own)):
        positions = database.neighbours(queries, knn)
        samples = sampling.images(RetrievalToImage(**sampling.settings), neighbour_requests(database, positions))
        rows.append(Row(name, share_of_neighbours(samples, drawings, database.classes[positions]), "%", protocol))
        nearest = [int(each) for each in database.classes[positions[:, 0]]]
        columns += [on_white(drawings, nearest, pairs.dataset.size), pixels(samples)]
    return Evaluation(rows, [list(group) for group in zip(*columns, strict=True)])


def neighbour_requests(database: DrawingDatabase, positions: np.ndarray) -> list[Context]:
    """Return a request with the neighbours at the positions (k,) of each item."""
    import torch

    from ldm.retrieval.contexts import Context

    return [Context(torch.from_numpy(database.vectors(each)), tuple(each.tolist())) for each in positions]


def on_white(drawings: Drawings, classes: Sequence[int], size: int) -> np.ndarray:
    """Return images (N, size, size, 3) uint8 of drawings on white."""
    import numpy as np

    from ldm.data.emoji import compose

    return pixels(np.stack([compose(drawings.rgba[index], "white", size=size) for index in classes]))


# Evaluations by the `cond_stage_key` of the model, None for an unconditional one, and their default configurations.
EVALUATIONS: dict[str | None, tuple[Callable[[Sampling, Any], Evaluation], str]] = {
    None: (evaluate_unconditional, "configs/emoji/scenes_unconditional.yaml"),
    "class_label": (evaluate_classes, "configs/emoji/scenes_class.yaml"),
    "coordinates_bbox": (evaluate_layouts, "configs/emoji/scenes_layout.yaml"),
    "segmentation": (evaluate_label_maps, "configs/emoji/scenes_semantic.yaml"),
    "nix": (evaluate_neighbours, "configs/emoji/drawings_retrieval.yaml"),
}


RESTORATION = "scripts/evaluate_restoration.py --data for in-painting and super-resolution"
OTHER_SCRIPTS = {"masked_image": RESTORATION, "LR_image": RESTORATION, "caption": "scripts/evaluate_emoji.py"}


def pixels(images: np.ndarray) -> np.ndarray:
    """Return images (N, S, S, 3) in [-1, 1] as uint8."""
    from ldm.io.pixels import to_uint8

    return to_uint8(images)


def enlarged(image: np.ndarray) -> np.ndarray:
    """Return an image with twice the size."""
    return image.repeat(2, axis=0).repeat(2, axis=1)


def score_table(rows: Sequence[Row]) -> str:
    """Return the rows in Markdown."""
    heads = {"images": "---", "score": "---:", "protocol": "---"}
    cells = [(row.images, f"{row.value:.{1 if row.unit else 3}f} {row.unit}".strip(), row.protocol) for row in rows]
    return table(heads, cells)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = make_parser().parse_args(argv)
    chosen = EvaluatedModel.chosen(args)
    info = chosen.info
    key = None if info.is_unconditional else info.cond_stage_key
    if key not in EVALUATIONS:
        other = OTHER_SCRIPTS.get(str(key), "a script of its task")
        raise UserError(f'the model "{info.name}" is conditioned on "{key}"; use {other}')
    info.check_steps(args.steps)
    evaluate, default = EVALUATIONS[key]
    dataset = validation_set(args.data or default)
    scale = args.scale if args.scale is not None else GUIDED_SCALE if info.params.get("cond_dropout") else 1.0
    model, precision = chosen.load(args)
    evaluation = evaluate(Sampling(model, args, scale), dataset)
    print(score_table(evaluation.rows))
    if args.json:
        run = {"model": info.name, "n": args.n, "seed": args.seed, "precision": str(precision)}
        write_scores(args.json, {**run, "steps": args.steps, "scale": scale}, evaluation.rows)
    if args.grid:
        from ldm.io.grids import make_sheet
        from ldm.io.images import save_png

        save_png(make_sheet(evaluation.shown[:SHOWN], COLUMNS), args.grid)


if __name__ == "__main__":
    sys.exit(main())
