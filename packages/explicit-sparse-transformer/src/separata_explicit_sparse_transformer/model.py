"""Explicit Sparse Transformer.

Zhao, Lin, Zhang, Ren, Su, Sun: "Explicit Sparse Transformer: Concentrated Attention Through
Explicit Selection", arXiv:1912.11637. The equations are numbered here in the order in which the
method needs them; the numbers are ours.

    Eq. 1   P = Q K^T / sqrt(D)                              scores, (B,H,T,S)
    Eq. 2   t_i = the k-th largest allowed P_ij of row i     threshold, (B,H,T)
    Eq. 3   M_ij = P_ij if P_ij >= t_i, else -inf            selection
    Eq. 4   A = softmax(M)                                   weights, zero outside the selection
    Eq. 5   C = A V                                          output, (B,H,T,D)
    Eq. 6   Q, K, V from the same states                     self-attention
    Eq. 7   Q from the target, K and V from the source       context attention
    Eq. 8   p(y_t | y_<t, x) = softmax(W h_t)                next token

Shapes: B batch, T target length (queries), S source length (keys), H heads, D width per head,
M model width, V vocabulary.
"""

from typing import Any, Literal

from separata_shared.attention import dense_attention, topk_attention
from separata_shared.nn import MultiHeadAttention, Transformer
from torch import Tensor, nn


class TopKAttention(nn.Module):
    """Softmax attention over the k highest-scoring keys of each query.

    Args:
        top_k: Keys kept per query; a number, or one number per head as a tensor (H, 1).
        ties: ``"keep"`` keeps every key equal to the k-th score, ``"exact"`` exactly k keys.
    """

    def __init__(self, top_k: int | Tensor, *, ties: Literal["keep", "exact"] = "keep") -> None:
        super().__init__()
        self.top_k = top_k
        self.ties = ties

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        """Attend from ``query`` (B,H,T,D) to ``key`` (B,H,S,D) and ``value`` (B,H,S,D).

        The five equations run fused; ``separata_shared.attention.topk.reference`` spells them out.
        Masks come before the selection: a key that may not be attended takes nobody's place.
        """
        return topk_attention(
            query,
            key,  # Eq. 1
            value,  # Eq. 5
            top_k=self.top_k,  # Eq. 2
            ties=self.ties,  # Eq. 3
            **options,  # mask, bias, causal; dropout acts on the result of Eq. 4
        )

    def extra_repr(self) -> str:
        """Show k when the model is printed."""
        return f"top_k={self.top_k}, ties={self.ties!r}"


class ExplicitSparseTransformer(Transformer):
    """The Transformer whose attentions are those it was built with, sparse where configured.

    Eq. 6 is the self-attention of ``separata_shared.nn.EncoderLayer`` and ``DecoderLayer``, Eq. 7
    the cross-attention of the latter; the output projection gives the logits of Eq. 8.
    ``build_model(ModelConfig(...))`` composes one.
    """


def sparse_attentions(model: nn.Module) -> dict[str, MultiHeadAttention]:
    """The attentions of ``model`` that are not dense, by name: 18 in a model of 6+6 layers."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MultiHeadAttention) and module.attend is not dense_attention
    }


def set_top_k(model: nn.Module, top_k: int) -> None:
    """Let every explicit sparse attention of ``model`` keep ``top_k`` keys from now on."""
    for module in model.modules():
        if isinstance(module, TopKAttention):
            module.top_k = top_k
