"""Neighbours for retrieval-augmented diffusion (arXiv:2204.11824): databases of CLIP embeddings, and search in them."""

# The published models were trained with this many neighbours of a picture, and take no more.
MAX_NEIGHBOURS = 20
