"""Multi-head attention around an attention function.

Shapes: ``B`` batch, ``T`` queries, ``S`` keys, ``H`` heads, ``D`` width per head, ``M`` width.
"""

from torch import Tensor, nn

from separata_shared.attention import Attend, dense_attention
from separata_shared.nn.cache import Cache


class MultiHeadAttention(nn.Module):
    """Project to heads, attend, project back (Vaswani et al. 2017, section 3.2.2).

    The attention itself is the argument ``attend``: a function of tensors, or a module when it has
    parameters or must know whether it is being trained.

    Args:
        width: Model width ``M`` of queries and output.
        num_heads: Number of query heads ``H``; divides ``width``.
        attend: The attention function, see ``separata_shared.attention.Attend``.
        num_kv_heads: Number of key and value heads, which divides ``num_heads``; None for the same.
        key_width: Width of ``memory``; None for ``width``.
        dropout: Dropout on attention weights in training.

    Raises:
        ValueError: The heads do not divide the width or each other.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        attend: Attend = dense_attention,
        num_kv_heads: int | None = None,
        key_width: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        key_width = width if key_width is None else key_width
        if width % num_heads:
            raise ValueError(f"num_heads ({num_heads}) must divide the width ({width})")
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads ({num_kv_heads}) must divide num_heads ({num_heads})")
        self.num_heads = num_heads
        self.head_width = width // num_heads
        self.dropout = dropout
        self.attend = attend
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(key_width, num_kv_heads * self.head_width)
        self.v_proj = nn.Linear(key_width, num_kv_heads * self.head_width)
        self.out_proj = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights and zero biases.

        The projections of queries, keys and values get fairseq's gain of 1/sqrt(2) when all three
        read the same width.
        """
        same_width = self.k_proj.in_features == self.q_proj.in_features
        gain = 2**-0.5 if same_width else 1.0
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(projection.weight, gain=gain)
            nn.init.zeros_(projection.bias)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        memory: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        causal: bool = False,
        cache: Cache | None = None,
    ) -> Tensor:
        """Attend from ``query`` to ``memory``.

        Args:
            query: ``(B, T, M)``. When ``memory`` has fewer rows, groups of consecutive rows of
                ``query`` share one; ``mask``, ``bias`` and ``attend`` must then not depend on
                which query it is.
            memory: ``(B, S, key_width)``; None for self-attention.
            mask: Boolean, broadcastable to ``(B, H, T, S)``, True = may attend.
            bias: Added to the scaled scores, broadcastable to ``(B, H, T, S)``.
            causal: Query ``i`` sees key ``j`` only if ``j <= i + S - T``.
            cache: Keys and values of earlier calls.

        Returns:
            ``(B, T, M)``.

        Raises:
            ValueError: The rows of ``query`` are no multiple of those of ``memory``.
        """
        source = query if memory is None else memory
        keys, values = self._project(source) if cache is None else cache.read(source, self._project)
        if query.size(0) % keys.size(0):
            raise ValueError(
                f"query has {query.size(0)} rows, no multiple of the {keys.size(0)} of the keys"
            )
        # Queries that share their keys are more queries of one row: (B, H, G * T, D).
        heads = self.q_proj(query).reshape(keys.size(0), -1, self.num_heads, self.head_width)
        # One query, as in step-by-step decoding, sees all keys: no need to build a causal mask.
        causal = causal and query.size(1) > 1
        output = self.attend(
            heads.transpose(1, 2),
            keys,
            values,
            mask=mask,
            bias=bias,
            causal=causal,
            dropout=self.dropout if self.training else 0.0,
        )
        assert isinstance(output, Tensor)
        attended: Tensor = self.out_proj(output.transpose(1, 2).reshape(query.shape))
        return attended

    def replace_attend(self, attend: Attend) -> None:
        """Use another attention function or module from now on."""
        # torch refuses to assign a plain function over a registered module.
        del self.attend
        self.attend = attend

    def _project(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``(B, H, S, D)`` of ``source (B, S, key_width)``."""
        keys = self.k_proj(source).unflatten(-1, (-1, self.head_width))
        values = self.v_proj(source).unflatten(-1, (-1, self.head_width))
        return keys.transpose(1, 2), values.transpose(1, 2)


def padding_mask(tokens: Tensor, padding_index: int) -> Tensor:
    """Say which tokens may be attended: ``(B, S)`` tokens to a boolean ``(B, 1, 1, S)``."""
    return (tokens != padding_index)[:, None, None, :]
