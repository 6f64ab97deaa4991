"""Landscapes with segmentation maps, which the published code names and which were never public."""

from __future__ import annotations

from ldm.data.absent import AbsentDataset


class RFWTrain(AbsentDataset):
    """Pictures of landscapes with maps of 182 classes."""

    served = 'landscapes under "image" and maps of 182 classes (H, W, 182) under "segmentation"'
    instead = "set target to a data set of your own with these entries"


class RFWValidation(RFWTrain):
    """The same for validation."""
