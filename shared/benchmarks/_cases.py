"""What is timed, and what it must show."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Mode = Literal["forward", "training", "step"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape and one way to run it.

    ``forward`` is the operation alone, ``training`` forward and backward, and ``step`` a training
    step of a whole Transformer.
    """

    mode: Mode
    source: int
    target: int | None = None
    batch: int = 4
    heads: int = 8
    width: int = 64
    top_k: int = 8
    dtype: Literal["float32", "bfloat16"] = "float32"
    causal: bool = False

    @property
    def queries(self) -> int:
        """Queries of a sentence, as many as keys unless said otherwise."""
        return self.source if self.target is None else self.target

    @property
    def scores(self) -> int:
        """Scores of all heads and sentences."""
        return self.batch * self.heads * self.queries * self.source

    def columns(self) -> dict[str, Any]:
        """For the CSV."""
        return {**asdict(self), "target": self.queries}

    def __str__(self) -> str:
        """For tables."""
        size = f"S={self.source}" if self.target is None else f"T={self.target} S={self.source}"
        causal = " causal" if self.causal else ""
        return f"{self.mode} B={self.batch} {size} k={self.top_k} {self.dtype}{causal}"


@dataclass(frozen=True)
class Goal:
    """Largest ratios to SDPA and to the best dense form that an implementation may have."""

    case: Case
    implementation: str
    to_sdpa: float | None
    to_best_dense: float | None


GOALS = [
    Goal(Case(mode="forward", source=1024), "native", 0.30, 0.55),
    Goal(Case(mode="forward", source=2048), "native", 0.25, 0.45),
    Goal(Case(mode="forward", source=8192), "native", 0.24, 0.45),
    Goal(Case(mode="training", source=1024), "native", 0.12, 0.22),
    Goal(Case(mode="training", source=2048), "native", 0.09, 0.16),
    Goal(Case(mode="training", source=4096), "native", 0.08, 0.14),
    Goal(Case(mode="training", source=2048, dtype="bfloat16"), "native", 0.09, 0.25),
    Goal(Case(mode="training", source=2048, causal=True), "native", 0.11, 0.20),
    Goal(Case(mode="forward", source=128), "native", 0.6, 1.0),
    Goal(Case(mode="training", source=128), "native", 0.3, 0.8),
    Goal(Case(mode="training", source=4096, top_k=64), "native", 0.20, 0.35),
    Goal(Case(mode="training", source=2048), "blocked", 0.4, None),
    Goal(Case(mode="training", source=4096), "blocked", 0.3, None),
    Goal(Case(mode="training", source=32, batch=64), "auto", None, 1.3),
    Goal(Case(mode="training", source=64, batch=64), "auto", None, 1.3),
    Goal(Case(mode="forward", source=4096, target=1, batch=16), "auto", 1.0, None),
    Goal(Case(mode="step", source=1024, batch=1), "auto medium", None, 1.0),
]
GPU_GOALS = [
    Goal(Case(mode="forward", source=8192, dtype="bfloat16"), "triton", 1.2, None),
    Goal(Case(mode="training", source=8192, dtype="bfloat16"), "triton", 0.5, None),
]

MODES: tuple[Mode, Mode] = ("forward", "training")
TOP_K = (4, 16, 32, 64, 128)

QUICK = [Case(mode="training", source=256, batch=1, heads=2)]


def grid() -> list[Case]:
    """All lengths at k = 8, also causal and in bfloat16, and all k; with 4096 tokens a batch."""
    plain = [
        Case(mode=mode, source=source, batch=max(4096 // source, 1))
        for source in (128, 256, 512, 1024, 2048, 4096, 8192)
        for mode in MODES
    ]
    return [
        *plain,
        *(replace(case, top_k=k) for case in plain if case.source in (1024, 4096) for k in TOP_K),
        *(replace(case, causal=True) for case in plain),
        *(replace(case, dtype="bfloat16") for case in plain),
    ]


def suite(name: Literal["quick", "main", "full"], device: str) -> list[Case]:
    """The cases of a suite, each once."""
    if name == "quick":
        return QUICK
    if name == "full":
        return grid()
    return list(dict.fromkeys(goal.case for goal in goals(device)))


def goals(device: str) -> list[Goal]:
    """The goals of a kind of device."""
    return GOALS if device == "cpu" else GPU_GOALS
