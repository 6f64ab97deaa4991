from ldm.data.faceshq import CelebAHQTrain, CelebAHQValidation, FFHQTrain, FFHQValidation

__all__ = ["CelebAHQTrain", "CelebAHQValidation", "FFHQTrain", "FFHQValidation"]
