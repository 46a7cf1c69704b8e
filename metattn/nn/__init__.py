"""Drop-in modules: their own parameters, metattn's attention inside."""

from metattn.nn.blocks import ISAB, MAB, PMA, SAB, CausalBlock, CrossAttentionBlock
from metattn.nn.multihead import MultiheadAttention
from metattn.nn.norm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
)
from metattn.nn.pooling import AttentionPooling
from metattn.nn.replace import replace_attention, replace_norms, restore_attention, restore_norms

__all__ = [
    "ISAB",
    "MAB",
    "PMA",
    "SAB",
    "AttentionPooling",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "CausalBlock",
    "CrossAttentionBlock",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "MultiheadAttention",
    "replace_attention",
    "replace_norms",
    "restore_attention",
    "restore_norms",
]
