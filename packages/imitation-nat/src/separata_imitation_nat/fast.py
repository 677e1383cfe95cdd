"""Copies of trained models for inference on a CPU: the same function from fewer, larger products.

``accelerate`` keeps the model's code and replaces its parts:

- A linear layer holds its weights in the order in which they are read: one row at a time (greedy
  search of one sentence) needs the transposed matrix, several rows the blocks of oneDNN.
- Queries, keys and values of self-attention come out of one product, keys and values of
  cross-attention out of another.
- A product cuts its negative results off itself where a rectifier follows.
- Attention does without the checks and the care for rows without any key, which these models do not
  have: every sentence has an end mark.
- ``int8`` rounds the weights of each output to 8 bits, and the inputs of each product while it
  runs; ``bfloat16`` converts everything. Both change results a little.

Shapes: ``B`` batch, ``T`` queries, ``S`` keys, ``H`` heads, ``D`` width per head, ``M`` width.
"""

import copy
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from separata_shared.attention import dense_attention
from separata_shared.data.vocabulary import PAD
from separata_shared.nn import DecoderLayer, EncoderLayer, FeedForward, MultiHeadAttention
from separata_shared.nn.cache import Cache
from torch import Tensor, nn
from torch.nn import functional as F

from .actions import FFN, ActionTrace, SoftActions
from .build import all_positions
from .decode import ParallelTranslation, parallel_decode
from .model import Learner

Precision = Literal["float32", "bfloat16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "int8")

ModelT = TypeVar("ModelT", bound=nn.Module)

Then = Literal["none", "relu"]
"""What a product does to its result."""

MakeLinear = Callable[..., nn.Module]
"""Makes a linear layer of weights ``(out, in)``, biases ``(out,)`` or None, and a ``Then``."""

Product = Callable[[Tensor], Tensor]
Attend = Callable[..., Tensor]

# Rows that oneDNN lays the weights out for; other numbers of rows are served as well.
TYPICAL_ROWS = 32


def accelerate(model: ModelT, precision: Precision = "float32") -> ModelT:
    """A copy of a teacher, demonstrator or learner for inference on a CPU.

    Args:
        model: Stays as it is.
        precision: Of weights and products.

    Returns:
        The copy, in evaluation mode and without gradients; it is called like the model.

    Raises:
        ValueError: The model is not on a CPU, or this torch has no 8-bit products here.
    """
    if next(model.parameters()).device.type != "cpu":
        raise ValueError("accelerate serves models on a CPU")
    fast = copy.deepcopy(model).eval().requires_grad_(False)
    if precision == "bfloat16":
        fast.bfloat16()
    make: MakeLinear = QuantisedLinear if precision == "int8" else PackedLinear
    _replace(fast, make)
    output = getattr(fast, "output", None)
    if output is not None and not isinstance(output, nn.Module):
        fast.output = make(output.__self__.weight, None)  # the table of the target tokens
    return fast


def compile_learner(
    learner: Learner, *, multiple: int = 8, **options: Any
) -> Callable[..., ParallelTranslation]:
    """Parallel decoding with a compiled encoder and decoder, for few different shapes.

    Sources and targets are padded to multiples of a length, so a program serves a whole range of
    lengths. Torch keeps eight programs of each part, and computes further shapes without one. An
    encoder all of whose layers the length head averages is not compiled.

    Args:
        learner: Stays as it is.
        multiple: What lengths are rounded up to.
        options: For ``torch.compile``.

    Returns:
        A function of sources ``(B, S)`` and the options of ``parallel_decode``.

    Raises:
        ValueError: ``multiple`` is below 1.
    """
    if multiple < 1:
        raise ValueError(f"multiple: must be at least 1, got {multiple}")
    fast = copy.deepcopy(learner).eval().requires_grad_(False)
    for part in (fast.encoder, fast.decoder):
        part.compile(dynamic=False, **options)

    def decode(source: Tensor, **how: Any) -> ParallelTranslation:
        padded = F.pad(source, (0, -source.size(1) % multiple), value=PAD)
        return parallel_decode(fast, padded, round_up=lambda n: n + -n % multiple, **how)

    return decode


def _replace(module: nn.Module, make: MakeLinear) -> None:
    """Replace linear layers and attentions below ``module``, in place."""
    if isinstance(module, EncoderLayer | DecoderLayer):
        module.self_attention = _attention(module.self_attention, SelfAttention, make)
    if isinstance(module, DecoderLayer):
        module.cross_attention = _attention(module.cross_attention, CrossAttention, make)
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, make(child.weight, child.bias))
        elif isinstance(child, nn.Dropout):
            setattr(module, name, nn.Identity())
        elif isinstance(child, SoftActions):
            setattr(module, name, MixedActions(child, make))
        elif isinstance(child, FFN) or _rectifies(child):
            setattr(module, name, _two_layers(child, make))
        elif not isinstance(child, SelfAttention | CrossAttention):
            _replace(child, make)


def _rectifies(module: nn.Module) -> bool:
    """Whether it is a feed-forward network of two layers with ``max(0, x)`` between them."""
    return isinstance(module, FeedForward) and module.activation is F.relu


def _two_layers(module: Any, make: MakeLinear) -> nn.Module:
    """``fc2(relu(fc1(x)))`` without dropout."""
    return nn.Sequential(make(*_pair(module.fc1), "relu"), make(*_pair(module.fc2)))


def _attention(
    module: nn.Module, kind: "type[SelfAttention | CrossAttention]", make: MakeLinear
) -> nn.Module:
    """The lean form of an attention module; the module itself where there is none."""
    if not isinstance(module, MultiHeadAttention):
        return module
    looks: dict[object, Attend] = {
        dense_attention: attend,
        all_positions: partial(attend, both_ways=True),
    }
    lean = looks.get(module.attend)
    return module if lean is None else kind(module, make, lean)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None,
    causal: bool,
    both_ways: bool = False,
) -> Tensor:
    """Attention ``softmax(q k^T) v`` of queries that are scaled already.

    Args:
        query: ``(B, H, T, D)``.
        key: ``(B, H, S, D)``.
        value: ``(B, H, S, D)``.
        mask: Boolean, broadcastable to ``(B, H, T, S)``; every row may attend a key.
        causal: Query i attends keys ``j <= i + S - T``.
        both_ways: Whether to disregard ``causal``.

    Returns:
        ``(B, H, T, D)``.
    """
    scores = query @ key.mT
    if causal and not both_ways and query.size(2) > 1:
        size = scores.shape[-2:]
        past = torch.ones(size, dtype=torch.bool, device=scores.device).tril(size[1] - size[0])
        mask = past if mask is None else mask & past
    if mask is not None:
        scores = scores.masked_fill_(~mask, -torch.inf)
    return scores.softmax(dim=-1) @ value


class SelfAttention(nn.Module):
    """Self-attention with one product for queries, keys and values."""

    def __init__(self, attention: MultiHeadAttention, make: MakeLinear, attend: Attend) -> None:
        super().__init__()
        self.shape = (-1, attention.head_width)
        self.attend = attend
        parts = [_scaled(attention), _pair(attention.k_proj), _pair(attention.v_proj)]
        self.sizes = [len(weight) for weight, _ in parts]
        self.projection = make(*(torch.cat(each) for each in zip(*parts, strict=True)))
        self.out_proj = make(*_pair(attention.out_proj))

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        cache: Cache | None = None,
    ) -> Tensor:
        """Arguments and result as in ``MultiHeadAttention``."""
        parts = self.projection(x).split(self.sizes, dim=-1)
        query, key, value = (part.unflatten(-1, self.shape).transpose(1, 2) for part in parts)
        if cache is not None:
            key, value = cache.read(x, lambda source: (key, value))
        output = self.attend(query, key, value, mask=mask, causal=causal)
        attended: Tensor = self.out_proj(output.transpose(1, 2).flatten(2))
        return attended


class CrossAttention(nn.Module):
    """Attention to the encoder's states, whose keys and values come out of one product."""

    def __init__(self, attention: MultiHeadAttention, make: MakeLinear, attend: Attend) -> None:
        super().__init__()
        self.shape = (-1, attention.head_width)
        self.attend = attend
        self.query = make(*_scaled(attention))
        parts = [_pair(attention.k_proj), _pair(attention.v_proj)]
        self.memory = make(*(torch.cat(each) for each in zip(*parts, strict=True)))
        self.out_proj = make(*_pair(attention.out_proj))

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        *,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Arguments and result as in ``MultiHeadAttention``."""
        key, value = self._project(memory) if cache is None else cache.read(memory, self._project)
        # Rows of x that share a row of memory are more queries of that row: (B, G * T, M).
        query = self.query(x).reshape(len(key), -1, *key.shape[1::2]).transpose(1, 2)
        output = self.attend(query, key, value, mask=mask, causal=False)
        attended: Tensor = self.out_proj(output.transpose(1, 2).reshape(x.shape))
        return attended

    def _project(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``(B, H, S, D)`` of the encoder's states ``(B, S, M)``."""
        parts = self.memory(source).chunk(2, dim=-1)
        keys, values = (part.unflatten(-1, self.shape).transpose(1, 2) for part in parts)
        return keys, values


class MixedActions(nn.Module):
    """Soft actions whose codebook is a linear layer."""

    def __init__(self, actions: SoftActions, make: MakeLinear) -> None:
        super().__init__()
        self.scores = _two_layers(actions.scores, make)
        self.mix = make(actions.codebook.A.detach().t().contiguous(), None)

    def forward(self, r: Tensor, trace: ActionTrace | None = None) -> Tensor:
        """Map states ``r (B, T, M)`` to action vectors ``(B, T, M)``."""
        scores = self.scores(r)
        if trace is not None:
            trace.add(scores.float().log_softmax(dim=-1))
        mixed: Tensor = self.mix(scores.softmax(dim=-1))
        return mixed


class PackedLinear(nn.Module):
    """``x W^T + b`` in float32 or bfloat16 with weights in the order of their use.

    Args:
        weight: ``W (out, in)``.
        bias: ``b (out,)``; None for none.
        then: What is done to the result.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, then: Then = "none") -> None:
        super().__init__()
        weight = weight.detach()
        bias = None if bias is None else bias.detach()
        plain: Product = partial(_plain_product, weight, bias, then)
        self.more_rows = plain
        if _has_blocks(weight.dtype):
            blocks = torch.ops.mkldnn._reorder_linear_weight(weight.clone(), TYPICAL_ROWS)
            self.more_rows = partial(_block_product, blocks, bias, then)
        if weight.dtype == torch.bfloat16:
            self.one_row = self.more_rows
        elif weight.size(0) >= weight.size(1):  # below, reading a transposed matrix does not pay
            self.one_row = partial(_row_product, weight.t().contiguous(), bias, then)
        else:
            self.one_row = plain

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        return self.one_row(x) if x.numel() == x.size(-1) else self.more_rows(x)


def _has_blocks(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in this type on this machine."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # torch gives no types
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _plain_product(weight: Tensor, bias: Tensor | None, then: Then, x: Tensor) -> Tensor:
    return _finish(F.linear(x, weight, bias), then)


def _row_product(transposed: Tensor, bias: Tensor | None, then: Then, x: Tensor) -> Tensor:
    row = x.view(1, -1)
    product = row @ transposed if bias is None else torch.addmm(bias, row, transposed)
    return _finish(product.view(*x.shape[:-1], -1), then)


def _block_product(blocks: Tensor, bias: Tensor | None, then: Then, x: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, blocks, bias, then, [], "")
    return product


def _finish(product: Tensor, then: Then) -> Tensor:
    return product.relu_() if then == "relu" else product


class QuantisedLinear(nn.Module):
    """``x W^T + b`` in 8-bit integers: weights per output, inputs per call.

    Args:
        weight: ``W (out, in)``.
        bias: ``b (out,)``; None for none.
        then: What is done to the result.

    Raises:
        ValueError: This torch has no 8-bit products here.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, then: Then = "none") -> None:
        super().__init__()
        weight = weight.detach().float()
        products = torch.ops.quantized
        self.product = products.linear_relu_dynamic if then == "relu" else products.linear_dynamic
        scales = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        zeros = torch.zeros_like(scales, dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces that its quantised tensors move
            try:
                rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
                self.packed = torch.ops.quantized.linear_prepack(
                    rounded, None if bias is None else bias.detach().float()
                )
            except (RuntimeError, AttributeError) as error:
                reason = str(error).partition("\n")[0]
                raise ValueError(f"int8 products are missing in this torch: {reason}") from None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        # Half the range of the inputs: older CPUs add pairs of products in 16 bits.
        output: Tensor = self.product(x, self.packed, True)
        return output


def _pair(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    return linear.weight, linear.bias


def _scaled(attention: MultiHeadAttention) -> tuple[Tensor, Tensor]:
    """Weights and bias of the queries, with the factor ``1 / sqrt(D)`` of the scores in them."""
    scale = 1 / math.sqrt(attention.head_width)
    return attention.q_proj.weight * scale, attention.q_proj.bias * scale
