from ldm.modules.losses.discriminator import ActNorm, NLayerDiscriminator, weights_init

__all__ = ["ActNorm", "NLayerDiscriminator", "weights_init"]
