from ldm.config.targets import allow

__all__ = ["allow"]
