"""Landscapes with segmentation maps: data sets that the published code names and that were never public."""

from __future__ import annotations

from ldm.data.absent import AbsentDataset


class RFWTrain(AbsentDataset):
    """Landscape images with segmentation maps of 182 classes, for training."""

    provided = 'landscapes under "image" and maps of 182 classes (H, W, 182) under "segmentation"'
    instead = "set target to a data set of your own with these entries"


class RFWValidation(RFWTrain):
    """Landscape images with segmentation maps of 182 classes, for validation."""
