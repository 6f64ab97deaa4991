"""Files of a preparation: tables of the images, names of the classes, and configurations."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from ldm.data.rows import Rows
from ldm.io.files import atomic_path
from ldm.preparation.recipes import TASKS, Recipe
from ldm.preparation.yaml_text import to_yaml

TRAIN, VALIDATION, CLASS_NAMES, VOCABULARY = "train.csv", "validation.csv", "class_names.txt", "vocab.txt"
FIRST_STAGE, LDM, RUNS, CACHE = "first_stage.yaml", "ldm.yaml", "runs", "latents.pt"


def write_results(
    rows: Rows, sides: tuple[Sequence[int], Sequence[int]], classes: Sequence[str], recipe: Recipe, out: Path
) -> tuple[Path, ...]:
    """Write the tables, the names of the classes and the configurations, and return their paths."""
    data, texts = recipe.data, {}
    if data.class_names is not None:
        texts[data.class_names] = "".join(f"{name}\n" for name in classes)
    if recipe.stage_plan is not None:
        texts[out / FIRST_STAGE] = to_yaml(recipe.first_stage(), _stage_comment(recipe))
    texts[out / LDM] = to_yaml(recipe.diffusion_model(), _model_comment(recipe))
    tables = [
        (table, side) for table, side in zip((data.train, data.validation), sides, strict=True) if table is not None
    ]
    for table, indices in tables:
        with atomic_path(table) as temporary:
            _write_table(temporary, rows, indices)
    for path, text in texts.items():
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
    own = [out / VOCABULARY] if data.vocabulary is not None and data.vocabulary.tokens else []
    return (*(table for table, _ in tables), *own, *texts)


def _write_table(path: Path, rows: Rows, indices: Sequence[int]) -> None:
    """Write a table of images with their captions or classes; names that are not valid UTF-8 keep their bytes."""
    columns = {"path": rows.files}
    for name, key in (("caption", "caption"), ("label", "human_label")):
        if key in rows.entries:
            columns[name] = rows.entries[key]
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([values[index] for values in columns.values()] for index in indices)


def _stage_comment(recipe: Recipe) -> str:
    data, plan, stage = recipe.data, recipe.stage_plan, recipe.stage
    assert plan is not None
    side = data.size // stage.factor
    start = f", fine-tuned from {stage.name}" if stage.weights is not None else ""
    return (
        f"First stage{start}: images of {data.size} px to latents of {side} × {side} × {stage.channels}, and back.\n"
        f"{plan.parameters / 1e6:.1f} million weights, {data.count:,} images, {plan.items} in a step.\n"
        f"Sized for {recipe.machine}. When the memory is too small, halve batch_size and double\n"
        "accumulate_grad_batches. Written by ldm prepare; every value may be changed."
    )


def _model_comment(recipe: Recipe) -> str:
    data, plan = recipe.data, recipe.plan
    key = TASKS[data.task]
    condition = f"conditioned on {key}" if key else "unconditional"
    return (
        f"Latent diffusion model of {data.size} px images, {condition}.\n"
        f"{plan.parameters / 1e6:.1f} million trained weights, {data.count:,} images, {plan.items} in a step.\n"
        f"Sized for {recipe.machine}. When the memory is too small, halve batch_size and double\n"
        "accumulate_grad_batches. Written by ldm prepare; every value may be changed."
    )
