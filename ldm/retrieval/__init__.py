"""Retrieval-augmented diffusion (arXiv:2204.11824): databases of CLIP embeddings, and nearest-neighbour search."""

# The published models were trained with this number of neighbours of an image, and support no more.
MAX_NEIGHBOURS = 20
