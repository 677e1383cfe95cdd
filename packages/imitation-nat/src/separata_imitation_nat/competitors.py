"""What ``bench`` times: the same sentences through every model, engine, precision and search.

All systems write targets of one length, which is given to them: random weights know no end, and
trained ones would stop at different places.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from separata_shared.data.vocabulary import EOS, PAD
from separata_shared.decoding import beam_search, greedy_search
from separata_shared.nn import Transformer
from torch import Tensor

from .config import ModelConfig
from .decode import Lengths, parallel_decode, teacher_scorer
from .fast import Precision, accelerate
from .length import LengthHead, length_window
from .model import Learner
from .outside import OutsideTranslator

OURS, PLAIN, OUTSIDE = "torch", "torch, as trained", "CTranslate2"
OUTSIDE_PRECISIONS: tuple[Literal["float32", "int8"], ...] = ("float32", "int8")
Tokens = list[list[int]]
Translate = Callable[[], Tokens]


@dataclass(frozen=True, kw_only=True)
class Work:
    """The sentences of a measurement."""

    source: Tensor
    """``(B, S)``, each ending in EOS, without padding."""
    target_length: int
    """Tokens of every translation, EOS counted."""
    beam: int
    """Beam size."""
    candidates: int
    """Lengths among which the teacher chooses."""


@dataclass(frozen=True)
class Competitor:
    """A model, and what it does with the work in which engine and precision."""

    system: str
    search: str
    engine: str
    precision: str
    translate: Translate
    """Gives the tokens of each sentence, without EOS."""

    @property
    def name(self) -> str:
        """What tells it from the others."""
        return ", ".join((self.system, self.search, self.engine, self.precision))


class Models:
    """The models that are timed, prepared for each precision when they are first needed.

    Args:
        deep: The autoregressive teacher.
        shallow: Another with one decoder layer.
        learner: The one-pass model.
        configs: Sizes of ``deep`` and ``shallow``.
        threads: Threads of CTranslate2.
    """

    def __init__(
        self,
        deep: Transformer,
        shallow: Transformer,
        learner: Learner,
        *,
        configs: tuple[ModelConfig, ModelConfig],
        threads: int,
    ) -> None:
        self.learner = learner
        self.threads = threads
        self.configs = {name_of(config): config for config in configs}
        if len(self.configs) < 2:
            raise ValueError("teacher and shallow: both have the same numbers of layers")
        self.deep, self.shallow = self.configs
        self.autoregressive = dict(zip(self.configs, (deep, shallow), strict=True))
        self._fast: dict[tuple[str, str], Transformer] = {}
        self._learners: dict[str, Learner] = {}
        self._outside: dict[tuple[str, str], OutsideTranslator] = {}

    def fast(self, system: str, precision: Precision) -> Transformer:
        """An autoregressive model for inference."""
        if (system, precision) not in self._fast:
            self._fast[system, precision] = accelerate(self.autoregressive[system], precision)
        return self._fast[system, precision]

    def fast_learner(self, precision: Precision) -> Learner:
        """The learner for inference."""
        if precision not in self._learners:
            self._learners[precision] = accelerate(self.learner, precision)
        return self._learners[precision]

    def outside(self, system: str, precision: Literal["float32", "int8"]) -> OutsideTranslator:
        """An autoregressive model in CTranslate2."""
        if (system, precision) not in self._outside:
            self._outside[system, precision] = OutsideTranslator(
                self.autoregressive[system],
                self.configs[system],
                precision=precision,
                threads=self.threads,
            )
        return self._outside[system, precision]


def name_of(config: ModelConfig) -> str:
    """``AT 6-6``: an autoregressive model by its numbers of layers."""
    return f"AT {config.encoder_layers}-{config.decoder_layers}"


def competitors(
    models: Models, work: Work, precisions: Sequence[Precision]
) -> Iterator[Competitor]:
    """Every system; the order of ``precisions`` counts.

    Args:
        models: What is timed.
        work: On what.
        precisions: Of our models.
    """
    plain = models.autoregressive[models.deep]
    yield Competitor(models.deep, "greedy", PLAIN, "float32", partial(greedy, plain, work))
    yield Competitor("NAT", "one pass", PLAIN, "float32", partial(one_pass, models.learner, work))
    for precision in precisions:
        for system in models.configs:
            network = models.fast(system, precision)
            common = (OURS, precision)
            yield Competitor(system, "greedy", *common, partial(greedy, network, work))
            yield Competitor(system, f"beam {work.beam}", *common, partial(beam, network, work))
        yield from learners(models, work, precision)
    for system in models.configs:
        for outside in OUTSIDE_PRECISIONS:
            translator = models.outside(system, outside)
            for search, size in (("greedy", 1), (f"beam {work.beam}", work.beam)):
                translate = partial(elsewhere, translator, work, size)
                yield Competitor(system, search, OUTSIDE, outside, translate)


def learners(models: Models, work: Work, precision: Precision) -> Iterator[Competitor]:
    """The learner with one length, and with several that the teacher scores."""
    learner = models.fast_learner(precision)
    teacher = models.fast(models.deep, precision)
    yield Competitor("NAT", "one pass", OURS, precision, partial(one_pass, learner, work))
    search = f"{work.candidates} lengths, rescored"
    yield Competitor("NAT", search, OURS, precision, partial(rescored, learner, teacher, work))


def rescoring(models: Models, work: Work, precisions: Sequence[Precision]) -> Iterator[Competitor]:
    """Beam search and the learner with several lengths alone."""
    for precision in precisions:
        network = models.fast(models.deep, precision)
        translate = partial(beam, network, work)
        yield Competitor(models.deep, f"beam {work.beam}", OURS, precision, translate)
        yield from learners(models, work, precision)


@torch.inference_mode()
def greedy(network: Transformer, work: Work) -> Tokens:
    """Cached greedy search for exactly the target's length."""
    batch, longest = len(work.source), work.target_length - 1
    found = greedy_search(
        network.step,
        network.start(work.source),
        work.source.new_full((batch,), EOS),
        max_lengths=[longest] * batch,
        min_length=longest,
        eos_index=EOS,
        padding_index=PAD,
    )
    return [row[:-1].tolist() for row in found]


@torch.inference_mode()
def beam(network: Transformer, work: Work) -> Tokens:
    """Cached beam search for exactly the target's length."""
    batch, longest = len(work.source), work.target_length - 1
    found = beam_search(
        network.step,
        network.start(work.source),
        work.source.new_full((batch,), EOS),
        beam_size=work.beam,
        max_lengths=[longest] * batch,
        min_length=longest,
        eos_index=EOS,
        padding_index=PAD,
    )
    return [hypotheses[0].tokens[:-1].tolist() for hypotheses in found]


def one_pass(learner: Learner, work: Work) -> Tokens:
    """The learner at the target's length."""
    found = parallel_decode(learner, work.source, lengths=_around(work.target_length, 1))
    return [row[: work.target_length - 1].tolist() for row in found.tokens]


def rescored(learner: Learner, teacher: Transformer, work: Work) -> Tokens:
    """The learner at several lengths around the target's; the teacher chooses."""
    found = parallel_decode(
        learner,
        work.source,
        lengths=_around(work.target_length, work.candidates),
        scorer=teacher_scorer(teacher),
    )
    return [[token for token in row.tolist() if token not in (PAD, EOS)] for row in found.tokens]


def elsewhere(translator: OutsideTranslator, work: Work, beam: int) -> Tokens:
    """CTranslate2, which makes as many steps: it writes a word where we write EOS."""
    rows = translator.translate(
        work.source.tolist(), beam=beam, shortest=work.target_length, longest=work.target_length
    )
    return [row[: work.target_length - 1] for row in rows]


def _around(length: int, number: int) -> Lengths:
    """The ``number`` lengths around ``length``, whatever the length head says."""

    def lengths(
        logits: Tensor, head: LengthHead, source_lengths: Tensor, longest: Tensor
    ) -> Tensor:
        return length_window(torch.full_like(source_lengths, length), number)

    return lengths
