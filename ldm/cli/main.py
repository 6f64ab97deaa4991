"""The command `ldm`: its sub-commands, each a module of this package with a `main`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from ldm.errors import did_you_mean

# Name → description; the module of the same name in this package is imported when its command runs.
COMMANDS = {
    "txt2img": "sample images from text",
    "img2img": "sample images from images and text",
    "inpaint": "fill the masked parts of images",
    "superres": "enlarge images",
    "class2img": "sample images of classes",
    "layout2img": "sample images from layouts of labelled boxes",
    "semantic2img": "sample images from label maps",
    "knn2img": "sample images with a retrieval-augmented model",
    "sample_diffusion": "sample many images, to measure a model",
    "reconstruct": "encode and decode images with a first stage, and measure the loss",
    "evaluate": "measure samples, reconstructions and restorations, and compare the figures",
    "replay": "sample images again from the settings in their files",
    "prepare": "prepare a folder of images for training",
    "train": "train a model from YAML configurations",
    "doctor": "diagnose a trained model, and name what is wrong",
    "export_model": "export a training checkpoint as a model folder",
    "convert_checkpoint": "convert a checkpoint to safetensors or to the form of diffusers, or back (also: convert)",
    "download_weights": "download published weights",
    "train_searcher": "build the search index of a retrieval database",
}
ALIASES = {"convert": "convert_checkpoint"}


def usage() -> str:
    """Return the help of `ldm`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ldm COMMAND [options]",
            "",
            "Latent diffusion models: train them, and sample from them.",
            "",
            "commands:",
            *lines,
            "",
            "ldm COMMAND --help shows the options of a command; ldm --version shows the version.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sub-command that the first word names; return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    first = words[0] if words else "--help"
    if first in ("-h", "--help", "help"):
        sys.stdout.write(f"{usage()}\n")
        return 0
    if first == "--version":
        from ldm.config.distribution import version

        sys.stdout.write(f"ldm {version()}\n")
        return 0
    name = first.replace("-", "_")
    name = ALIASES.get(name, name)
    if name not in COMMANDS:
        sys.stderr.write(f'error: there is no command "{first}"{did_you_mean(name, COMMANDS)}; see ldm --help\n')
        return 2
    from ldm.cli.command import set_program

    set_program(f"ldm {name}")
    try:
        return import_module(f"ldm.cli.{name}").main(words[1:])
    finally:
        set_program(None)


if __name__ == "__main__":
    sys.exit(main())
