"""Numbers of channels that the parts of a model's configuration state, and where they disagree. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

OWN_PACKAGES = ("ldm.", "taming.")
FIRST_STAGES = ("AutoencoderKL", "VQModel", "VQModelInterface")
# Parameter that states the channels of a context, by the class of the conditioning stage.
CONTEXTS = {"BERTEmbedder": "n_embed", "TransformerEmbedder": "n_embed", "ClassEmbedder": "embed_dim"}
MASKED_KEY = "masked_image"


def channel_faults(model: Mapping[str, Any], key: str = "model") -> Iterator[str]:
    """Yield where the numbers of channels in the configuration of a model disagree.

    Parts whose channels the configuration does not state, such as classes of a user, are not checked.

    Args:
        model: `target` and `params` of a first stage or a diffusion model.
        key: dotted key of the configuration, for the messages.
    """
    params = _params(model)
    if _class_of(model) in FIRST_STAGES:
        yield from _first_stage_faults(params, f"{key}.params")
    if not isinstance(params.get("unet_config"), Mapping) or not _is_own(model):
        return
    stage = params.get("first_stage_config")
    if isinstance(stage, Mapping):
        yield from channel_faults(stage, f"{key}.params.first_stage_config")
    if "first_stage_config" in params:
        yield from _Parts(params, f"{key}.params").faults()


def _first_stage_faults(params: Mapping[str, Any], key: str) -> Iterator[str]:
    ddconfig, loss = params.get("ddconfig"), params.get("lossconfig")
    if not isinstance(ddconfig, Mapping):
        return
    inputs, outputs = ddconfig.get("in_channels"), ddconfig.get("out_ch")
    if _differ(inputs, outputs):
        yield f"{key}.ddconfig.out_ch is {outputs} and in_channels is {inputs}; set both to the channels of the images"
    loss_params = _params(loss)
    if "disc_start" in loss_params and loss_params.get("disc_factor", 1.0):
        seen = loss_params.get("disc_in_channels", 3)
        if _differ(seen, inputs):
            yield (
                f"{key}.lossconfig.params.disc_in_channels is {seen} and the images have {inputs} channels; "
                f"set disc_in_channels: {inputs}"
            )


@dataclass(frozen=True)
class _Parts:
    """Parts of a latent diffusion model.

    Attributes:
        params: parameters of the model.
        key: dotted key of these parameters.
    """

    params: Mapping[str, Any]
    key: str

    def faults(self) -> Iterator[str]:
        """Yield where the channels of latents, conditioning and U-Net disagree."""
        latent, unet = self._latent(), _params(self.params["unet_config"])
        if latent is not None:
            yield from self._latent_faults(latent, unet)
        yield from self._context_faults(unet, f"{self.key}.unet_config.params")

    def _latent_faults(self, latent: int, unet: Mapping[str, Any]) -> Iterator[str]:
        stage_key, unet_key = f"{self.key}.first_stage_config.params.embed_dim", f"{self.key}.unet_config.params"
        outputs, channels, concat = unet.get("out_channels"), self.params.get("channels", 3), self._concat(latent)
        if _differ(outputs, latent) and outputs == channels:
            yield (
                f"{stage_key} is {latent}, and the U-Net and {self.key}.channels need latents of {outputs} channels; "
                f"set it to {outputs}, or their channels to {latent}"
            )
            return
        source = f"the first stage, whose latents have {latent} channels (embed_dim)"
        if _differ(outputs, latent):
            yield f"{unet_key}.out_channels is {outputs} and does not fit {source}; set {latent}"
        if _differ(channels, latent):
            yield f"{self.key}.channels is {channels} and does not fit {source}; set {latent}"
        if concat is not None and _differ(unet.get("in_channels"), latent + concat):
            also = f" and its conditioning of {concat} channels" if concat else ""
            inputs = unet["in_channels"]
            yield f"{unet_key}.in_channels is {inputs} and does not fit {source}{also}; set {latent + concat}"

    def _latent(self) -> int | None:
        """Return the channels of a latent; None if they are not stated."""
        stage = self.params["first_stage_config"]
        return _number(_params(stage).get("embed_dim")) if _class_of(stage) in FIRST_STAGES else None

    def _conditioning_key(self) -> str | None:
        if self.params.get("cond_stage_config") == "__is_unconditional__":
            return None
        given = self.params.get("conditioning_key")
        return given or ("concat" if self.params.get("concat_mode", True) else "crossattn")

    def _concat(self, latent: int) -> int | None:
        """Return the channels that the conditioning adds to the input of the U-Net; None if they are not stated."""
        conditioning = self._conditioning_key()
        if conditioning in (None, "crossattn", "adm", "crossattn-adm"):
            return 0
        if conditioning != "concat":
            return None
        stage = self.params.get("cond_stage_config")
        params, mask = _params(stage), int(self.params.get("cond_stage_key") == MASKED_KEY)
        if stage == "__is_first_stage__":
            return latent + mask
        name = _class_of(stage)
        if name in FIRST_STAGES and "embed_dim" in params:
            own = _number(params["embed_dim"])
            return None if own is None else own + mask
        if name == "SpatialRescaler":
            return _number(params.get("out_channels") or params.get("in_channels", 3))
        return None

    def _context_faults(self, unet: Mapping[str, Any], unet_key: str) -> Iterator[str]:
        stage = self.params.get("cond_stage_config")
        name = CONTEXTS.get(_class_of(stage) or "")
        width = _number(_params(stage).get(name)) if name else None
        if width is None or self._conditioning_key() not in ("crossattn", "hybrid"):
            return
        stated = unet.get("context_dim")
        if _differ(stated, width):
            yield (
                f"{unet_key}.context_dim is {stated} and the conditioning has {width} channels ({name} of "
                f"cond_stage_config); set both to the same number"
            )


def _is_own(config: Any) -> bool:
    return isinstance(config, Mapping) and str(config.get("target")).startswith(OWN_PACKAGES)


def _class_of(config: Any) -> str | None:
    """Return the name of the class of this package that a configuration names."""
    return str(config["target"]).rpartition(".")[2] if _is_own(config) else None


def _params(config: Any) -> Mapping[str, Any]:
    params = config.get("params") if isinstance(config, Mapping) else None
    return params if isinstance(params, Mapping) else {}


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _differ(one: Any, other: Any) -> bool:
    """Return whether two values are different numbers."""
    return _number(one) is not None and _number(other) is not None and one != other
