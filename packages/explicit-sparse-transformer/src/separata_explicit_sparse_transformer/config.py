"""What an experiment consists of: frozen dataclasses, checked when they are made.

A YAML file holds one group per dataclass (``model``, ``data``, ``train``, ``decode``).
"""

from dataclasses import dataclass, field
from typing import Literal

from separata_shared.translation import DecodeConfig, TransformerConfig
from separata_shared.translation.model import Site

__all__ = ["SITES", "AttentionConfig", "DecodeConfig", "ModelConfig", "Site"]

SITES: tuple[Site, ...] = ("encoder_self", "decoder_self", "cross")
_PATTERNS = ("out_of_window", "window", "block", "dilated", "global", "random", "big_bird")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Which keys a query keeps, where in the model, and when."""

    kind: Literal[
        "topk",
        "ratio",
        "official_ratio",
        "dense",
        "sparsemax",
        "entmax15",
        "straight_through",
        "softmax_topk",
        "softmax_topk_softmax",
        "selection_before_masking",
        "joint_heads",
        "out_of_window",
        "window",
        "block",
        "dilated",
        "global",
        "random",
        "big_bird",
    ] = "topk"
    """``topk`` is the method. ``ratio`` keeps a share of each row's valid keys, ``official_ratio``
    a share of the padded length as the published code does. ``dense``, ``sparsemax`` and
    ``entmax15`` are baselines. ``straight_through`` selects forward and passes the dense gradient
    backward. ``softmax_topk`` to ``joint_heads`` are the orders of operations found in the authors'
    tensor2tensor code. ``out_of_window`` attends a local window and the best keys outside it; the
    kinds after it are fixed patterns to compare with, all for self-attention."""

    top_k: int | list[int] | list[list[int]] = 8
    """Keys kept per query: one number, one per layer, or one per layer and head."""

    ratio: float = 4.0
    """Divisor of the number of keys, for ``ratio`` and ``official_ratio``."""

    min_keys: int = 1
    """Lower bound of the keys kept, for ``ratio`` and ``official_ratio``."""

    ties: Literal["keep", "exact"] = "keep"
    """``keep`` keeps every key equal to the k-th score (authors' code); ``exact`` keeps k."""

    sites: list[Site] = field(default_factory=lambda: list(SITES))
    """The attentions that are sparse; the others are dense."""

    phase: Literal["both", "train", "predict"] = "both"
    """When the sparse attention is used; dense in the other phase."""

    start_top_k: int | None = None
    """With ``topk``: k of the first update, moving linearly to ``top_k``. Null: no schedule."""

    schedule_steps: int = 0
    """Updates after which a scheduled k has arrived at ``top_k``."""

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        flat = self.top_k if isinstance(self.top_k, list) else [self.top_k]
        numbers = [k for row in flat for k in (row if isinstance(row, list) else [row])]
        if not numbers or any(k < 1 for k in numbers):
            raise ValueError(f"model.attention.top_k: every k must be at least 1, got {self.top_k}")
        if self.kind == "out_of_window" and min(numbers) < 2:
            raise ValueError("model.attention.top_k: out_of_window needs 2, half for the window")
        per_head = isinstance(self.top_k, list) and any(isinstance(k, list) for k in self.top_k)
        if per_head and self.kind in (*_PATTERNS, "joint_heads"):
            raise ValueError(f"model.attention.top_k: {self.kind} takes no k per head")
        if self.kind in _PATTERNS and "cross" in self.sites:
            raise ValueError(
                f"model.attention.sites: {self.kind} compares positions of queries and keys, which "
                "makes sense in self-attention only; leave out cross"
            )
        if self.kind == "official_ratio" and self.ties == "exact":
            raise ValueError("model.attention.ties: official_ratio keeps ties, as the authors do")
        if not self.ratio >= 1:
            raise ValueError(f"model.attention.ratio: must be at least 1, got {self.ratio}")
        if self.min_keys < 1:
            raise ValueError(f"model.attention.min_keys: must be at least 1, got {self.min_keys}")
        self._check_schedule()

    def _check_schedule(self) -> None:
        if self.start_top_k is None:
            return
        if self.start_top_k < 1 or self.schedule_steps < 1:
            raise ValueError(
                "model.attention.start_top_k: a schedule needs start_top_k >= 1 "
                "and schedule_steps >= 1"
            )
        if self.kind != "topk" or not isinstance(self.top_k, int):
            raise ValueError(
                "model.attention.start_top_k: a schedule needs kind topk and one number as top_k"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig(TransformerConfig):
    """Sizes, wiring and attention of the encoder-decoder."""

    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """The sparse attention."""

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        super().__post_init__()
        top_k, deepest = self.attention.top_k, max(self.encoder_layers, self.decoder_layers)
        if isinstance(top_k, list):
            if len(top_k) < deepest:
                raise ValueError(
                    f"model.attention.top_k: {len(top_k)} entries for {deepest} layers"
                )
            for row in top_k:
                if isinstance(row, list) and len(row) != self.num_heads:
                    raise ValueError(
                        f"model.attention.top_k: {len(row)} entries for {self.num_heads} heads"
                    )
