"""The GPT.

Its parts, the whole, and the texts that it writes. Which rule and which derivative a part has is read from
the configuration when it is built. The names of parameters and buffers are those of every checkpoint.
"""

from localgpt_core.model.blocks import INIT_STD, Block, Cache, layer_norm
from localgpt_core.model.gpt import LocalGPT
from localgpt_core.model.sampling import sample_text, sample_texts

__all__ = ["Block", "Cache", "INIT_STD", "LocalGPT", "layer_norm", "sample_text", "sample_texts"]
