"""Images with captions: data sets that the published code names and that were never public."""

from __future__ import annotations

from ldm.data.absent import AbsentDataset


class PreviewsTrain(AbsentDataset):
    """Images with captions, for training."""

    provided = 'images under "image" and texts under "caption"'
    instead = "set target to a data set of your own with these entries, or try ldm.data.emoji.EmojiTrain"


class PreviewsValidation(AbsentDataset):
    """Images with captions, for validation."""

    provided = PreviewsTrain.provided
    instead = "set target to a data set of your own with these entries, or try ldm.data.emoji.EmojiValidation"
