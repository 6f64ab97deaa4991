"""Values that commands and the library share. Needs no torch."""

PRECISIONS = ("float32", "bfloat16", "float16", "auto")
SAMPLERS = ("ddim", "plms", "dpm", "ddpm")
SEED_RANGE = 2**63  # of torch's generators: seeds are 0 … SEED_RANGE - 1
