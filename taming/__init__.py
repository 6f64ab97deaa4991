"""The names of CompVis/taming-transformers that published configurations use, for the classes of `ldm`."""
