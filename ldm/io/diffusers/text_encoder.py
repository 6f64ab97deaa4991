"""Text encoders of diffusers' pipelines: `CLIPTextModel` of transformers, and `LDMBertModel`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.errors import UserError
from ldm.io.diffusers.entries import check_fixed, required
from ldm.io.diffusers.translation import Layer

CLIP, LDM_BERT = "CLIPTextModel", "LDMBertModel"
CLIP_EMBEDDER = "ldm.modules.encoders.modules.FrozenCLIPEmbedder"
OPEN_CLIP_EMBEDDER = "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder"
BERT_EMBEDDER = "ldm.modules.encoders.modules.BERTEmbedder"
EMBEDDERS = (CLIP_EMBEDDER, OPEN_CLIP_EMBEDDER, BERT_EMBEDDER)
# The activation of CLIP is that of Stable Diffusion 1, the one of OpenCLIP that of Stable Diffusion 2.
CLIP_ACTIVATION, OPEN_CLIP_ACTIVATION = "quick_gelu", "gelu"
CLIP_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "projection_dim",
    "hidden_act",
    "layer_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
FIXED_OPEN_CLIP: dict[str, Any] = {"layer_norm_eps": 1e-5}
FIXED_BERT: dict[str, Any] = {
    "activation_function": "gelu",
    "encoder_attention_heads": 8,
    "head_dim": 64,
    "scale_embedding": False,
}
# Weights that do not condition a diffusion model, and tables that are computed.
UNUSED = ("text_projection", "logit_scale")
POSITION_IDS = "embeddings.position_ids"


# -- configuration -----------------------------------------------------------------------------------------------


def ours(config: Mapping[str, Any], where: str, tokenizer: str | None) -> dict[str, Any]:
    """Return target and parameters of the conditioning stage for a configuration of a text encoder.

    Args:
        config: entries of `text_encoder/config.json` or `bert/config.json`.
        where: the file, for messages.
        tokenizer: folder of the vocabulary; None for the published one.

    Raises:
        UserError: the text encoder is of another kind.
    """
    kind = (config.get("architectures") or [config.get("_class_name")])[0]
    if kind is None:
        kind = {"clip_text_model": CLIP, "ldmbert": LDM_BERT}.get(config.get("model_type", ""))
    if kind == LDM_BERT:
        return {"target": BERT_EMBEDDER, "params": _bert(config, where, tokenizer)}
    if kind not in (CLIP, f"{CLIP}WithProjection"):
        raise UserError(f'{where}: the text encoder "{kind}" is not supported; supported are {CLIP} and {LDM_BERT}')
    words = {} if tokenizer is None else {"tokenizer": tokenizer}
    if config.get("hidden_act", CLIP_ACTIVATION) == OPEN_CLIP_ACTIVATION:
        return {"target": OPEN_CLIP_EMBEDDER, "params": {**_open_clip(config, where), **words}}
    sizes = {key: config[key] for key in CLIP_SIZES if key in config}
    length = config.get("max_position_embeddings", 77)
    return {"target": CLIP_EMBEDDER, "params": {"text_config": sizes, "max_length": length, **words}}


def _open_clip(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the parameters of `FrozenOpenCLIPEmbedder`. The blocks that it would leave out are not in the file."""
    check_fixed(config, FIXED_OPEN_CLIP, where)
    width = required(config, "hidden_size", where)
    if config.get("intermediate_size", 4 * width) != 4 * width:
        raise UserError(f'{where}: "intermediate_size" is not 4 times "hidden_size", which is not supported')
    length = config.get("max_position_embeddings", 77)
    sizes = {
        "vocab_size": config.get("vocab_size", 49408),
        "context_length": length,
        "width": width,
        "heads": required(config, "num_attention_heads", where),
        "layers": required(config, "num_hidden_layers", where),
        "embed_dim": None,
    }
    return {"freeze": True, "layer": "last", "max_length": length, "text_config": sizes}


def _bert(config: Mapping[str, Any], where: str, tokenizer: str | None) -> dict[str, Any]:
    check_fixed(config, FIXED_BERT, where)
    width = config.get("d_model", 1280)
    if config.get("encoder_ffn_dim", 4 * width) != 4 * width:
        raise UserError(f'{where}: "encoder_ffn_dim" is not 4 times "d_model", which is not supported')
    return {
        "n_embed": width,
        "n_layer": config.get("encoder_layers", 32),
        "vocab_size": config.get("vocab_size", 30522),
        "max_seq_len": config.get("max_position_embeddings", 77),
        **({} if tokenizer is None else {"vocab": tokenizer}),
    }


def width(stage: Mapping[str, Any]) -> Any:
    """Return the channels of the context that a conditioning stage of `ours` computes; None if they are not stated."""
    sizes = stage["params"].get("text_config", {})
    names = {CLIP_EMBEDDER: "hidden_size", OPEN_CLIP_EMBEDDER: "width"}
    target = stage["target"]
    return stage["params"]["n_embed"] if target == BERT_EMBEDDER else sizes.get(names[target])


def theirs(target: str, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of transformers for a text encoder.

    Args:
        target: its class.
        sizes: of a `FrozenCLIPEmbedder` the settings of transformers, of a `BERTEmbedder` its parameters, of a
            `FrozenOpenCLIPEmbedder` those of `OpenCLIPText` with the number of `layers` that condition the model.

    Raises:
        UserError: transformers has no such text encoder.
    """
    if target == CLIP_EMBEDDER:
        return {
            "architectures": [CLIP],
            "model_type": "clip_text_model",
            **{k: sizes[k] for k in CLIP_SIZES if k in sizes},
        }
    if target == OPEN_CLIP_EMBEDDER:
        return {
            "architectures": [CLIP],
            "model_type": "clip_text_model",
            "vocab_size": sizes["vocab_size"],
            "hidden_size": sizes["width"],
            "intermediate_size": 4 * sizes["width"],
            "num_hidden_layers": sizes["layers"],
            "num_attention_heads": sizes["heads"],
            "max_position_embeddings": sizes["context_length"],
            "projection_dim": sizes.get("embed_dim") or sizes["width"],
            "hidden_act": OPEN_CLIP_ACTIVATION,
            "bos_token_id": 0,
            "eos_token_id": 2,  # transformers then takes the token with the largest id as the end
            "pad_token_id": 1,
            **FIXED_OPEN_CLIP,
        }
    if target == BERT_EMBEDDER:
        return {
            "architectures": [LDM_BERT],
            "model_type": "ldmbert",
            "vocab_size": sizes.get("vocab_size", 30522),
            "d_model": sizes["n_embed"],
            "encoder_layers": sizes["n_layer"],
            "encoder_ffn_dim": 4 * sizes["n_embed"],
            "max_position_embeddings": sizes.get("max_seq_len", 77),
            "pad_token_id": 0,
            **FIXED_BERT,
        }
    raise UserError(f"diffusers has no text encoder like {target}; it has {CLIP} and {LDM_BERT}")


# -- weights -----------------------------------------------------------------------------------------------------


def layers(target: str, params: Mapping[str, Any] | None = None) -> list[Layer]:
    """Return the layers of a conditioning stage.

    Args:
        target: its class.
        params: its parameters; only those of `BERTEmbedder` are used.

    Raises:
        UserError: diffusers has no such text encoder.
    """
    if target == BERT_EMBEDDER:
        return _bert_layers((params or {})["n_layer"])
    if target == OPEN_CLIP_EMBEDDER:
        return _open_clip_layers()
    if target == CLIP_EMBEDDER:
        # Some versions of transformers leave the first part of the names out.
        names = ("embeddings.", "encoder.", "final_layer_norm.")
        return [Layer(f"transformer.text_model.{name}", (f"text_model.{name}",), (name,)) for name in names]
    raise UserError(f"diffusers has no text encoder like {target}; it has {CLIP} and {LDM_BERT}")


MAX_LAYERS = 100  # of a text encoder; names beyond the last layer occur in no file
OPEN_CLIP_BLOCK = {
    "ln_1.": ("layer_norm1.",),
    "attn.in_proj_": ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."),
    "attn.out_proj.": ("self_attn.out_proj.",),
    "ln_2.": ("layer_norm2.",),
    "mlp.c_fc.": ("mlp.fc1.",),
    "mlp.c_proj.": ("mlp.fc2.",),
}
BERT_ATTENTION = {"to_q.": "q_proj.", "to_k.": "k_proj.", "to_v.": "v_proj.", "to_out.": "out_proj."}


def _open_clip_layers() -> list[Layer]:
    table: dict[str, tuple[str, ...]] = {
        "token_embedding.": ("embeddings.token_embedding.",),
        "positional_embedding": ("embeddings.position_embedding.weight",),
        "ln_final.": ("final_layer_norm.",),
    }
    for i in range(MAX_LAYERS):
        for ours, theirs in OPEN_CLIP_BLOCK.items():
            table[f"transformer.resblocks.{i}.{ours}"] = tuple(f"encoder.layers.{i}.{name}" for name in theirs)
    return [
        Layer(f"model.{ours}", tuple(f"text_model.{name}" for name in theirs), theirs) for ours, theirs in table.items()
    ]


def _bert_layers(count: int) -> list[Layer]:
    table = {
        "token_emb.": "model.embed_tokens.",
        "pos_emb.emb.": "model.embed_positions.",
        "norm.": "model.layer_norm.",
        "to_logits.": "to_logits.",
    }
    for i in range(count):
        attention, perceptron, theirs = f"{2 * i}.", f"{2 * i + 1}.", f"model.layers.{i}."
        table |= {f"attn_layers.layers.{attention}0.": f"{theirs}self_attn_layer_norm."}
        table |= {
            f"attn_layers.layers.{attention}1.{ours}": f"{theirs}self_attn.{name}"
            for ours, name in BERT_ATTENTION.items()
        }
        table |= {
            f"attn_layers.layers.{perceptron}0.": f"{theirs}final_layer_norm.",
            f"attn_layers.layers.{perceptron}1.net.0.0.": f"{theirs}fc1.",
            f"attn_layers.layers.{perceptron}1.net.2.": f"{theirs}fc2.",
        }
    return [Layer(f"transformer.{ours}", (theirs,)) for ours, theirs in table.items()]


def without_unused(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights of a text encoder of transformers without those that condition nothing."""
    return {
        name: value
        for name, value in weights.items()
        if not name.startswith(UNUSED) and not name.endswith(POSITION_IDS)
    }
