"""metattn as an attention implementation of Hugging Face transformers: register() once, then choose it."""

from metattn.integrations.transformers import version  # noqa: F401, it refuses an older one

# isort: split

from metattn.integrations.transformers.attention import attend
from metattn.integrations.transformers.band_mask import BandMask
from metattn.integrations.transformers.interface import NAME, register
from metattn.integrations.transformers.masks import mask

__all__ = ["NAME", "BandMask", "attend", "mask", "register"]
