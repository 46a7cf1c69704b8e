"""Drop-in modules: their own parameters, metattn's attention inside."""

from metattn.nn.blocks import ISAB, MAB, PMA, SAB, CausalBlock, CrossAttentionBlock
from metattn.nn.multihead import MultiheadAttention
from metattn.nn.norm import LayerNorm
from metattn.nn.pooling import AttentionPooling
from metattn.nn.replace import replace_attention, restore_attention

__all__ = [
    "ISAB",
    "MAB",
    "PMA",
    "SAB",
    "AttentionPooling",
    "CausalBlock",
    "CrossAttentionBlock",
    "LayerNorm",
    "MultiheadAttention",
    "replace_attention",
    "restore_attention",
]
