"""Parameters of fairseq's Transformer under our names."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_RENAMES = (
    (r"\.self_attn\.", ".self_attention."),
    (r"\.encoder_attn\.", ".cross_attention."),
    (r"\.self_attn_layer_norm\.", ".self_attention_residual.norm."),
    (r"\.encoder_attn_layer_norm\.", ".cross_attention_residual.norm."),
    (r"\.final_layer_norm\.", ".feed_forward_residual.norm."),
    (r"\.(fc[12])\.", r".feed_forward.\1."),
    (r"^(encoder|decoder)\.layer_norm\.", r"\1.final_norm."),
    (r"^encoder\.embed_tokens\.", "source.tokens."),
    (r"^decoder\.embed_tokens\.", "target.tokens."),
    (r"^encoder\.embed_positions\.", "source.positions."),
    (r"^decoder\.embed_positions\.", "target.positions."),
    (r"^decoder\.output_projection\.", "output."),
)
_IGNORED = re.compile(r"\.version$|\.embed_positions\._float_tensor$")


def from_fairseq(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the parameters of a fairseq ``transformer`` to ours.

    Args:
        state: What a fairseq checkpoint holds under ``model``. Stacked ``in_proj_weight`` (before
            version 0.9), a separate ``embed_out`` and tied tables are understood.

    Returns:
        State dict for a ``Transformer`` with the same sharing of tables.

    Raises:
        ValueError: There is no encoder table, so this is not the state of a fairseq transformer.
    """
    if "encoder.embed_tokens.weight" not in state:
        raise ValueError("encoder.embed_tokens.weight: missing in the fairseq state")
    renamed: dict[str, Tensor] = {}
    for name, tensor in _unstacked(state).items():
        if _IGNORED.search(name):
            continue
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    if "decoder.embed_out" in renamed:
        renamed["output.weight"] = renamed.pop("decoder.embed_out")
    target = renamed.setdefault("target.tokens.weight", renamed["source.tokens.weight"])
    if "output.weight" in renamed and torch.equal(renamed["output.weight"], target):
        del renamed["output.weight"]  # a tied output is the target table itself
    return renamed


def _unstacked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split ``in_proj_weight`` and ``in_proj_bias`` into those of q, k and v."""
    split: dict[str, Tensor] = {}
    for name, tensor in state.items():
        prefix, stacked, part = name.rpartition("in_proj_")
        if stacked:
            names = [f"{prefix}{letter}_proj.{part}" for letter in "qkv"]
            split |= dict(zip(names, tensor.chunk(3), strict=True))
        else:
            split[name] = tensor
    return split
