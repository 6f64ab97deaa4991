"""Values that commands and the library share. Needs no torch."""

PRECISIONS = ("float32", "bfloat16", "float16", "auto")
PUBLISHED_PRECISIONS = {"full": "float32", "autocast": "auto"}  # names of the scripts of Stable Diffusion
SAMPLERS = ("ddim", "plms", "dpm", "ddpm")
TIMESTEP_SPACINGS = ("exact", "logsnr", "trailing", "uniform", "quad")  # see `schedule.make_ddim_timesteps`
MASK_MODES = ("nearest", "max")  # reductions of a mask to the size of the latents
SEED_RANGE = 2**63  # of torch's generators: seeds are 0 … SEED_RANGE - 1
