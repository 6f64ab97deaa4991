from ldm.modules.losses.vqperceptual import (
    DummyLoss,
    VQLPIPSWithDiscriminator,
    adopt_weight,
    hinge_d_loss,
    vanilla_d_loss,
)

__all__ = ["DummyLoss", "VQLPIPSWithDiscriminator", "adopt_weight", "hinge_d_loss", "vanilla_d_loss"]
