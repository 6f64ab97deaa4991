"""Parts of small training runs: a first stage, the checkpoint of a run, and its comparison."""

import torch
from tiny_models import text_config

FIRST_STAGE = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {
        "monitor": "val/rec_loss",
        "embed_dim": 3,
        "ddconfig": text_config()["params"]["first_stage_config"]["params"]["ddconfig"],
        "lossconfig": {
            "target": "ldm.modules.losses.LPIPSWithDiscriminator",
            "params": {"disc_start": 2, "perceptual_weight": 0.0, "disc_num_layers": 1},
        },
    },
}


def only_run(folder):
    (run,) = folder.iterdir()
    return run


def state(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same(a, b, path=""):
    """Assert that two nested structures are equal, bit for bit."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_same(left, right, f"{path}/{index}")
    else:
        assert a == b, path
