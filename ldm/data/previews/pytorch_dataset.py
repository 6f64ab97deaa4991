"""Previews of pictures with captions, which the published code names and which were never public."""

from __future__ import annotations

from ldm.data.absent import AbsentDataset


class PreviewsTrain(AbsentDataset):
    """Pictures with captions."""

    served = 'pictures under "image" and texts under "caption"'
    instead = "set target to a data set of your own with these entries, or try ldm.data.emoji.EmojiTrain"


class PreviewsValidation(AbsentDataset):
    """The same for validation."""

    served = PreviewsTrain.served
    instead = "set target to a data set of your own with these entries, or try ldm.data.emoji.EmojiValidation"
