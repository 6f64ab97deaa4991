"""Names of CompVis/taming-transformers in published configurations, mapped to the classes of `ldm`."""
