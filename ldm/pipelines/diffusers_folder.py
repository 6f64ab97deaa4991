"""Write a model as a folder in the form of diffusers, and compare the outputs of both."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.io.diffusers import files, text_encoder, writing
from ldm.io.diffusers.writing import Network, Plan
from ldm.models.autoencoder import AutoencoderKL

logger = logging.getLogger(__name__)
CONTEXT_LENGTH = 4  # tokens of the contexts that the comparison uses
SEED = 0


def plan_of(model: Any, config: Mapping[str, Any]) -> Plan:
    """Return the content of the folder for a model.

    Args:
        model: a diffusion model or a first stage.
        config: its target and parameters.

    Raises:
        UserError: diffusers has no such model; the message states the reason.
    """
    if config["params"].get("personalization_config") is not None:
        raise UserError(
            "diffusers has files of their own for the vectors of new words; write them with ldm export_model, and "
            "convert the model that the run started from"
        )
    stage = config["params"].get("cond_stage_config")
    sizes = text_sizes(model.cond_stage_model, stage) if isinstance(stage, Mapping) else None
    return writing.plan(config, float(getattr(model, "scale_factor", 1.0)), sizes)


def text_sizes(encoder: Any, stage: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the sizes of a text encoder, see `text_encoder.theirs`; None for another conditioning stage."""
    target, params = stage.get("target"), stage.get("params") or {}
    if target == text_encoder.CLIP_EMBEDDER:
        return encoder.transformer.config.to_dict()
    if target == text_encoder.OPEN_CLIP_EMBEDDER:
        network = encoder.model
        projection = getattr(network, "text_projection", None)
        return {
            "vocab_size": network.token_embedding.num_embeddings,
            "context_length": network.context_length,
            "width": network.token_embedding.embedding_dim,
            "heads": network.transformer.resblocks[0].attn.num_heads,
            "layers": network.layers - encoder.layer_idx,
            "embed_dim": None if projection is None else projection.shape[1],
        }
    return dict(params) if target == text_encoder.BERT_EMBEDDER else None


def write_folder(
    model: Any, content: Plan, folder: Path, change: Callable[[str, Tensor], Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write a model to `folder`, which is created: its weights, configurations and vocabulary.

    Args:
        model: the model.
        content: the content of the folder, see `plan_of`.
        folder: the folder.
        change: function of a weight's name and value, such as a conversion to half precision.
        metadata: entries for the headers of the files of weights.

    Raises:
        UserError: the vocabulary of the model is not available.
    """
    writing.write(folder, content, model.state_dict(), change, metadata)
    if content.index is not None and files.TOKENIZER in content.index:
        _write_tokenizer(model.cond_stage_model, folder / files.TOKENIZER)


def _write_tokenizer(encoder: Any, folder: Path) -> None:
    folder.mkdir()
    words = getattr(encoder, "tknz_fn", None)
    if words is None:
        tokenizer = encoder.tokenizer
        pad = tokenizer.pad_token
        try:
            if encoder.pad_with_zero:
                tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
            tokenizer.model_max_length = encoder.max_length
            tokenizer.save_pretrained(folder)
        finally:
            tokenizer.pad_token = pad
        return
    ids = words.tokenizer.get_vocab()
    tokens = sorted(ids, key=ids.__getitem__)
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": words.max_length}
    writing.write_json(folder / "tokenizer_config.json", settings)


# -- comparison --------------------------------------------------------------------------------------------------


def largest_difference(model: Any, content: Plan, folder: Path) -> tuple[float, str] | None:
    """Compare a model with the networks in a folder on random inputs.

    Args:
        model: the model.
        content: the content of the folder.
        folder: the folder.

    Returns:
        The largest difference of an output, relative to the largest output of its network if that is above 1, and the
        name of the other package with its version; None if diffusers is not installed.
    """
    try:
        import diffusers
    except ImportError:
        return None
    with torch.no_grad(), _errors_only(diffusers.utils.logging):
        largest = max(_difference(*pair) for network in content.networks for pair in _outputs(model, network, folder))
    return largest, f"diffusers {diffusers.__version__}"


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / max(1.0, float(theirs.abs().max())))


def _outputs(model: Any, network: Network, folder: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pairs of outputs, of this package and of diffusers, for the same random inputs."""
    generator = torch.Generator().manual_seed(SEED)
    theirs = _their_network(network, folder / network.folder)
    if network.is_text_encoder:
        yield _text_outputs(model.cond_stage_model, theirs, generator)
    elif network.folder == files.UNET:
        yield _unet_outputs(model.model.diffusion_model, theirs, network.config, generator)
    else:
        yield from _first_stage_outputs(getattr(model, "first_stage_model", model), theirs, generator)


def _their_network(network: Network, folder: Path) -> Any:
    import diffusers
    from diffusers.pipelines.latent_diffusion import pipeline_latent_diffusion

    if network.class_name == text_encoder.CLIP:
        import transformers

        return transformers.CLIPTextModel.from_pretrained(str(folder)).float().eval()
    if network.class_name == text_encoder.LDM_BERT:
        return pipeline_latent_diffusion.LDMBertModel.from_pretrained(str(folder)).float().eval()
    cls = getattr(diffusers, network.class_name)
    return cls.from_pretrained(str(folder), low_cpu_mem_usage=False).float().eval()


@contextmanager
def _errors_only(*others: Any) -> Iterator[None]:
    """Let transformers, and other packages with its form of logging, print errors only."""
    try:
        from transformers.utils import logging as transformers_logging
    except ImportError:
        loggings = [*others]
    else:
        loggings = [transformers_logging, *others]
    before = [(each, each.get_verbosity(), getattr(each, "is_progress_bar_enabled", bool)()) for each in loggings]
    for each in loggings:
        each.set_verbosity_error()
        each.disable_progress_bar()
    try:
        yield
    finally:
        for each, verbosity, shows_progress in before:
            each.set_verbosity(verbosity)
            if shows_progress:
                each.enable_progress_bar()


def _text_outputs(encoder: Any, theirs: nn.Module, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    words = getattr(encoder, "tknz_fn", None)
    if words is None:
        size = next(weight for name, weight in encoder.named_parameters() if "token_embedding" in name).shape[0]
        tokens = torch.randint(0, size, (1, encoder.max_length), generator=generator)
        return encoder(tokens), theirs(tokens)[0]
    count = encoder.transformer.num_tokens
    tokens = torch.randint(0, count, (1, encoder.transformer.max_seq_len), generator=generator)
    return encoder.transformer(tokens, return_embeddings=True), theirs(tokens)[0]


def _unet_outputs(
    ours: nn.Module, theirs: Any, config: Mapping[str, Any], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    side = 2 * 2 ** (len(config["block_out_channels"]) - 1)
    x = torch.randn(2, config["in_channels"], side, side, generator=generator)
    t = torch.tensor([1, 500])
    classes = config.get("num_class_embeds")
    labels = torch.tensor([0, classes - 1]) if classes else None
    if "cross_attention_dim" not in config:
        return ours(x, t, y=labels), theirs(x, t, class_labels=labels).sample
    context = torch.randn(2, CONTEXT_LENGTH, config["cross_attention_dim"], generator=generator)
    return ours(x, t, context, labels), theirs(x, t, context, class_labels=labels).sample


def _first_stage_outputs(ours: Any, theirs: Any, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    factor = 2 ** (len(ours.encoder.down) - 1)
    x = torch.rand(1, ours.encoder.conv_in.in_channels, 2 * factor, 2 * factor, generator=generator) * 2 - 1
    if isinstance(ours, AutoencoderKL):
        z = theirs.encode(x).latent_dist.mode()
        yield ours.encode(x).mode(), z
        yield ours.decode(z), theirs.decode(z).sample
    else:
        z = theirs.encode(x).latents
        yield ours.encode_to_prequant(x), z
        yield ours.decode_code(ours.quantize(z)[2][2].view(1, *z.shape[2:])), theirs.decode(z).sample
