"""Names of CompVis/taming-transformers that configurations and programs of latent diffusion use.

Most are classes of `ldm`. The transformers and the data sets of taming-transformers are not included.
"""
