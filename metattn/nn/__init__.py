"""Drop-in modules: their own parameters, metattn's attention inside."""

from metattn.nn.multihead import MultiheadAttention
from metattn.nn.pooling import AttentionPooling
from metattn.nn.replace import replace_attention

__all__ = ["AttentionPooling", "MultiheadAttention", "replace_attention"]
