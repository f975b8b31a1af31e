"""The GPT.

Its parts, and the whole with its sampling. Which rule and which derivative a part has is read from the
configuration when it is built. The names of parameters and buffers are those of every checkpoint.
"""

from localgpt_core.model.blocks import INIT_STD, Block, Cache, layer_norm
from localgpt_core.model.gpt import LocalGPT

__all__ = ["Block", "Cache", "INIT_STD", "LocalGPT", "layer_norm"]
