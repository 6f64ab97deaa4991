"""Training of small additions to a frozen diffusion model: low-rank updates, and vectors of new words.

Both are submodules of the parts that they extend. Checkpoints contain them beside the weights of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ldm.config.instantiate import instantiate_from_config
from ldm.errors import UserError
from ldm.io.checkpoint.names import EMA_PREFIX
from ldm.models.diffusion.conditioning import DiffusionWrapper
from ldm.modules.ema import EmaMixin, LitEma
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.encoders.text import TextEncoder
from ldm.modules.lora import LoRA

NETWORK = "model.diffusion_model."  # prefixes of names in the state dict of a model: the network,
UPDATES = "model.lora."  # its low-rank updates,
LEARNED_WORDS = "cond_stage_model.embedding_manager."  # and the vectors of new words


class Adaptation(EmaMixin):
    """Mixin of `LatentDiffusion`: the additions of `lora_config` and `personalization_config`, and their training."""

    model: DiffusionWrapper
    cond_stage_model: Any  # the configuration chooses its class
    cond_stage_trainable: bool
    adapted = False
    passes_texts = True  # `get_input` leaves texts to `forward`, which encodes them with gradients

    def adapt(
        self,
        lora_config: Mapping[str, Any] | None,
        personalization_config: Mapping[str, Any] | None,
        use_ema: bool,
    ) -> None:
        """Freeze the model, and add what the configurations describe; without any, change nothing.

        Args:
            lora_config: target and parameters of the low-rank updates.
            personalization_config: target and parameters of the vectors of new words.
            use_ema: average the low-rank updates. Vectors are not averaged.

        Raises:
            UserError: the configurations contradict each other, or the model has no suitable part.
        """
        if lora_config is None and personalization_config is None:
            return
        self.adapted = True
        self.model.requires_grad_(False)
        if lora_config is not None:
            if self.cond_stage_trainable and personalization_config is None:
                raise UserError("lora_config trains low-rank updates alone; set cond_stage_trainable: false")
            self.model.lora = instantiate_from_config(lora_config, network=self.model.diffusion_model)
            self.use_ema = use_ema
            if use_ema:
                self.model_ema = LitEma(self.model)
        if personalization_config is not None:
            self._add_words(personalization_config)

    def _add_words(self, config: Mapping[str, Any]) -> None:
        encoder = self.cond_stage_model
        if not self.passes_texts or not isinstance(encoder, TextEncoder):
            part = type(encoder).__name__ if self.passes_texts else type(self).__name__
            raise UserError(
                "personalization_config needs a text-to-image model with a text encoder of Stable Diffusion, and this "
                f"configuration names {part}; remove personalization_config"
            )
        encoder.freeze()
        encoder.embedding_manager = instantiate_from_config(config, embedder=encoder)
        self.cond_stage_trainable = True  # the text is encoded with gradients
        self.__dict__["embedding_manager"] = encoder.embedding_manager  # the published name; the encoder contains it

    @property
    def low_rank_updates(self) -> LoRA | None:
        """Low-rank updates of the network; None without any."""
        return getattr(self.model, "lora", None)

    @property
    def learned_words(self) -> EmbeddingManager | None:
        """Vectors of new words; None without any."""
        return getattr(self.cond_stage_model, "embedding_manager", None)

    def adapted_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the additions."""
        updates = [] if self.low_rank_updates is None else list(self.low_rank_updates.parameters())
        return updates if self.learned_words is None else [*updates, *self.learned_words.embedding_parameters()]

    def additions_missing_in(self, names: Iterable[str], prefix: str = "") -> list[str]:
        """Return the prefixes of the additions of which a file contains nothing; they keep their initial values.

        Args:
            names: names of the weights in the file.
            prefix: prefix that these names lack.
        """
        if not self.adapted:
            return []
        names = list(names)
        own = [each.removeprefix(prefix) for each in (UPDATES, LEARNED_WORDS) if each.startswith(prefix)]
        missing = [each for each in own if not any(name.startswith(each) for name in names)]
        # Averages of a file without updates are those of the network.
        return [*missing, EMA_PREFIX] if UPDATES.removeprefix(prefix) in missing else missing

    def initialise_words(self, start: bool, path: str | None) -> None:
        """Set the vectors of new words.

        Args:
            start: set those that are zero to the embeddings of their initializer words.
            path: file of vectors that replace others.
        """
        if self.learned_words is None:
            if path:
                raise UserError("embedding_manager_ckpt needs a personalization_config, which names the tokens")
            return
        if start:
            self.learned_words.initialise()
        if path:
            self.learned_words.load(path)
