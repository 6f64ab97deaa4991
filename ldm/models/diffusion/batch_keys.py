"""Names of the entries of a batch that diffusion models read. Imports nothing, so that commands can use it cheaply.

The entries of texts are `ldm.config.model_config.TEXT_KEYS`.
"""

# Moments that the first stage computed earlier: (B, 2c, h, w), mean and log-variance.
LATENT_KEY = "latent_moments"
# Output that the conditioning stage computed earlier: (B, c', h, w).
CONDITIONING_KEY = "conditioning"
# Class labels: (B,) int64; and their names: B strings.
CLASS_KEY, CLASS_NAME_KEY = "class_label", "human_label"
# Conditioning of an inpainting model: images with black in the masked region, and the mask.
MASKED_KEY, MASK_KEY = "masked_image", "mask"
# Tokens of layouts, see `ldm.modules.encoders.layout`: (B, L) int64.
LAYOUT_KEY = "coordinates_bbox"
# Label maps, one channel a class: (B, H, W, K).
SEGMENTATION_KEY = "segmentation"
# Small images of a super-resolution model: (B, h, w, 3).
LOW_RESOLUTION_KEY = "LR_image"
# Embeddings of nearest neighbours, the context of a retrieval-augmented model: (B, k, D). The name is as published.
NEIGHBOURS_KEY = "nix"
