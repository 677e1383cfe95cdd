"""``nn.MultiheadAttention`` that keeps the k highest-scoring keys, under the same names.

Shapes: B batch, T queries, S keys, H heads, D width per head, M model width.
"""

from collections.abc import Mapping
from typing import Literal, TypedDict, Unpack

import torch
import torch.nn.functional as F
from separata_shared.attention import topk_attention
from separata_shared.attention.topk.api import check_top_k
from torch import Tensor, nn


class SelectionOptions(TypedDict, total=False):
    """Which keys are kept; see ``separata_shared.attention.topk_attention``."""

    top_k: int | Tensor
    ratio: float
    min_keys: int
    ties: Literal["keep", "exact"]


class TopKMultiheadAttention(nn.Module):
    """Top-k attention in the place of ``torch.nn.MultiheadAttention``.

    Arguments, call, parameters and the names in the state dict are those of the torch module, so
    that the state dict of one loads into the other. With k at least the number of keys, output,
    weights and gradients are equal too. Three things differ: a query without any allowed key gives
    zeros where torch gives NaN; the returned weights are those before dropout; the learned extra
    key (``add_bias_kv``) and the zero key (``add_zero_attn``) are not offered, because it would be
    undefined whether they count for k.

    Args:
        embed_dim: Model width M.
        num_heads: Heads H; divides ``embed_dim``.
        dropout: Dropout on the weights.
        bias: Whether the projections have a bias.
        kdim: Width of the keys; None for ``embed_dim``.
        vdim: Width of the values; None for ``embed_dim``.
        batch_first: Whether inputs are ``(B, T, M)`` instead of ``(T, B, M)``.
        **selection: ``top_k`` or ``ratio``, and optionally ``min_keys`` and ``ties``. Kept as the
            attribute ``selection``, which may be changed between calls.

    Raises:
        ValueError: The heads do not divide the width, a number is out of range, or neither or both
            of ``top_k`` and ``ratio`` are given.
        TypeError: An argument is unknown or not offered.
    """

    in_proj_weight: nn.Parameter | None
    in_proj_bias: nn.Parameter | None
    q_proj_weight: nn.Parameter
    k_proj_weight: nn.Parameter
    v_proj_weight: nn.Parameter

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        dropout: float = 0.0,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        **selection: Unpack[SelectionOptions],
    ) -> None:
        super().__init__()
        if unknown := sorted(set(selection) - SelectionOptions.__optional_keys__):
            raise TypeError(f"TopKMultiheadAttention does not offer {', '.join(unknown)}")
        check_selection(selection)
        sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "kdim": kdim, "vdim": vdim}
        for name, size in sizes.items():
            if size is not None:
                _check_at_least_one(name, size)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be at least 0 and below 1, not {dropout}")
        if embed_dim % num_heads:
            raise ValueError(f"num_heads ({num_heads}) must divide embed_dim ({embed_dim})")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.dropout = dropout
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.batch_first = batch_first
        self.selection = selection
        # torch's encoder layer must not replace this module by its fused dense attention when it
        # predicts; it asks this attribute of torch's own attention module.
        self._qkv_same_embed_dim = False
        if self.kdim == self.vdim == embed_dim:
            shapes = {"in_proj": (3 * embed_dim, embed_dim)}
        else:
            widths = {"q_proj": embed_dim, "k_proj": self.kdim, "v_proj": self.vdim}
            shapes = {name: (embed_dim, width) for name, width in widths.items()}
        for name in ("in_proj", "q_proj", "k_proj", "v_proj"):
            weight = nn.Parameter(torch.empty(shapes[name])) if name in shapes else None
            self.register_parameter(f"{name}_weight", weight)
        in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim)) if bias else None
        self.register_parameter("in_proj_bias", in_proj_bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights and zero biases; the output weight is left as it was made."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("_weight"):
                nn.init.xavier_uniform_(parameter)
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)

    @classmethod
    def from_dense(
        cls, dense: nn.MultiheadAttention, **selection: Unpack[SelectionOptions]
    ) -> "TopKMultiheadAttention":
        """Make the sparse module of a trained dense one, with a copy of its parameters.

        Args:
            dense: Module to copy.
            **selection: As for the constructor.

        Returns:
            Module on the same device, in the same precision and mode.

        Raises:
            ValueError: The dense module has an extra key (``add_bias_kv``, ``add_zero_attn``).
        """
        if dense.bias_k is not None or dense.add_zero_attn:
            raise ValueError(
                "a module with add_bias_kv or add_zero_attn cannot become sparse: "
                "it is undefined whether the extra key counts for k"
            )
        sparse = cls(
            dense.embed_dim,
            dense.num_heads,
            dropout=dense.dropout,
            bias=dense.in_proj_bias is not None,
            kdim=dense.kdim,
            vdim=dense.vdim,
            batch_first=dense.batch_first,
            **selection,
        )
        sparse.to(device=dense.out_proj.weight.device, dtype=dense.out_proj.weight.dtype)
        sparse.load_state_dict(dense.state_dict())
        return sparse.train(dense.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; the shapes are those of ``batch_first=True``, without B for single sequences.

        Args:
            query: ``(B, T, M)``.
            key: ``(B, S, kdim)``.
            value: ``(B, S, vdim)``.
            key_padding_mask: ``(B, S)``, boolean with True = masked, or added to the scores.
            need_weights: Whether to return the weights.
            attn_mask: ``(T, S)`` or ``(B * H, T, S)``, boolean with True = masked, or added to the
                scores.
            average_attn_weights: Whether to return the mean of the weights over the heads.
            is_causal: The mask is causal; without ``attn_mask``, apply that mask.

        Returns:
            Output ``(B, T, M)``, and weights ``(B, T, S)`` or ``(B, H, T, S)`` or None.

        Raises:
            ValueError: An input or a mask has another shape or precision; the message names it.
            TypeError: An input is no tensor.
        """
        self._check_inputs(query, key, value)
        single = query.dim() == 2
        if single:
            query, key, value = (x[None] for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        _check_masks(key_padding_mask, attn_mask, query, key, self.num_heads)
        mask, bias = self._mask_and_bias(key_padding_mask, attn_mask)
        heads = (self.num_heads, self.head_dim)
        projected = self._project(query, key, value)
        attended = topk_attention(
            *(x.reshape(*x.shape[:2], *heads).transpose(1, 2) for x in projected),
            mask=mask,
            bias=bias,
            causal=is_causal and attn_mask is None,
            dropout=self.dropout if self.training else 0.0,
            return_weights=need_weights,
            **self.selection,
        )
        output, weights = attended if isinstance(attended, tuple) else (attended, None)
        output = self.out_proj(output.transpose(1, 2).flatten(2))
        if weights is not None:
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights[0] if single else weights
        if single:
            return output[0], weights
        return (output if self.batch_first else output.transpose(0, 1)), weights

    def extra_repr(self) -> str:
        """Show the sizes and the selection when the module is printed."""
        options = ", ".join(f"{name}={value}" for name, value in self.selection.items())
        return f"{self.embed_dim}, {self.num_heads}, {options}"

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Refuse what would end in the projections, or let sentences read one another."""
        inputs = {"query": (query, self.embed_dim), "key": (key, self.kdim)}
        for name, (x, width) in (inputs | {"value": (value, self.vdim)}).items():
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
            if x.dim() not in (2, 3) or x.dim() != query.dim() or x.shape[-1] != width:
                raise ValueError(
                    f"{name} must have 3 dimensions, or all inputs 2 for a single sequence, and "
                    f"the width {width}, not {tuple(x.shape)}"
                )
            dtype = self.out_proj.weight.dtype  # autocast casts to one precision itself
            if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
                raise ValueError(f"{name} must be {dtype} as the parameters are, not {x.dtype}")
        if value.shape[:-1] != key.shape[:-1]:
            raise ValueError(
                f"value {tuple(value.shape)} must have the batch and length of key "
                f"{tuple(key.shape)}"
            )
        place = 0 if self.batch_first else 1
        if query.dim() == 3 and key.shape[place] != query.shape[place]:
            raise ValueError(
                f"key {tuple(key.shape)} must have the batch of query {tuple(query.shape)}, "
                f"which is dimension {place} with batch_first={self.batch_first}"
            )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        if self.in_proj_weight is not None:
            weights = list(self.in_proj_weight.chunk(3))
        else:
            weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        biases = [None] * 3 if self.in_proj_bias is None else list(self.in_proj_bias.chunk(3))
        inputs = (query, key, value)
        return [F.linear(*parts) for parts in zip(inputs, weights, biases, strict=True)]

    def _mask_and_bias(
        self, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Turn torch's masks (True = masked, or added) into ours (True = allowed) and a bias."""
        mask: Tensor | None = None
        bias: Tensor | None = None
        if attn_mask is not None and attn_mask.dim() == 3:
            # Not -1 for the batch, which would be anything where there are no sentences.
            batch = attn_mask.shape[0] // self.num_heads
            attn_mask = attn_mask.view(batch, self.num_heads, *attn_mask.shape[1:])
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask[:, None, None, :]
        for given in (attn_mask, key_padding_mask):
            if given is None:
                continue
            if given.dtype == torch.bool:
                mask = ~given if mask is None else mask & ~given
            else:
                bias = given if bias is None else bias + given
        return mask, bias


def _check_at_least_one(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, not {value!r}")


def check_selection(selection: SelectionOptions) -> None:
    """Refuse, when a module is made, what each of its calls would refuse.

    Raises:
        ValueError: An option is out of range; the message names it.
    """
    if ("top_k" in selection) == ("ratio" in selection):
        raise ValueError("exactly one of top_k and ratio must be given")
    top_k, ratio = selection.get("top_k", 1), selection.get("ratio", 1.0)
    if not isinstance(top_k, Tensor):  # whether a tensor fits depends on the inputs
        check_top_k(top_k, (1, 1, 1))
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not ratio > 0:
        raise ValueError(f"ratio must be a positive number, not {ratio!r}")
    _check_at_least_one("min_keys", selection.get("min_keys", 1))
    if (ties := selection.get("ties", "keep")) not in ("keep", "exact"):
        raise ValueError(f"ties must be 'keep' or 'exact', not {ties!r}")


def _check_masks(
    padding: Tensor | None, hidden: Tensor | None, query: Tensor, key: Tensor, num_heads: int
) -> None:
    """Refuse a mask that would be broadcast; query and key begin with the batch."""
    batch, target, source = query.shape[0], query.shape[1], key.shape[1]
    shapes: list[tuple[int, ...]] = [(target, source), (batch * num_heads, target, source)]
    masks = (("key_padding_mask", padding, [(batch, source)]), ("attn_mask", hidden, shapes))
    for name, mask, allowed in masks:
        if mask is None:
            continue
        if mask.shape not in allowed:
            listed = " or ".join(map(str, allowed))
            raise ValueError(f"{name} must have the shape {listed}, not {tuple(mask.shape)}")
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(
                f"{name} must be boolean (True = masked) or floating (added to the scores), "
                f"not {mask.dtype}"
            )


def from_fairseq_attention(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the parameters of one fairseq attention to those of ``nn.MultiheadAttention``.

    Args:
        state: ``q_proj.weight``, ``k_proj.weight``, ``v_proj.weight``, ``out_proj.weight`` and
            the biases, if there are any.

    Returns:
        State dict for ``TopKMultiheadAttention`` and ``nn.MultiheadAttention``.

    Raises:
        ValueError: A parameter is missing or unknown.
    """
    inputs = ("q_proj", "k_proj", "v_proj")
    renamed = {name: tensor for name, tensor in state.items() if name.startswith("out_proj.")}
    names = {f"{name}.{part}" for name in inputs for part in ("weight", "bias")}
    if unknown := sorted(set(state) - set(renamed) - names):
        raise ValueError(f"{unknown[0]}: no parameter of a fairseq attention")
    missing = [f"{name}.weight" for name in inputs if f"{name}.weight" not in state]
    if missing or "out_proj.weight" not in renamed:
        raise ValueError(f"{(missing or ['out_proj.weight'])[0]}: missing in a fairseq attention")
    weights = [state[f"{name}.weight"] for name in inputs]
    if len({weight.shape for weight in weights}) == 1:
        renamed["in_proj_weight"] = torch.cat(weights)
    else:
        renamed |= {f"{n}_weight": weight for n, weight in zip(inputs, weights, strict=True)}
    if "q_proj.bias" in state:
        renamed["in_proj_bias"] = torch.cat([state[f"{name}.bias"] for name in inputs])
    return renamed
