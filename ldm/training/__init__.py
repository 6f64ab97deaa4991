"""Training: Lightning adapters around plain models, the data module, callbacks, and the run that combines them."""
