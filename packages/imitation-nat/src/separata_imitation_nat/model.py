"""Imitation learning for non-autoregressive translation.

Wei, Wang, Zhou, Lin, Xie, Sun: "Imitation Learning for Non-Autoregressive Neural Machine
Translation", ACL 2019, arXiv:1906.02041. No code of the authors exists. Marks say how sure we are:
C confirmed by the abstract, later papers or public code; U known of the paper, but not checked
against a copy of it; I inferred. The numbers of the equations are ours.

Three models share one set of parts, and the names of their parameters: the *teacher*, a plain
Transformer, distils the targets and scores candidates; the *demonstrator* is a Transformer that
emits a distribution over K actions at every position of every layer; the *learner* has the same
decoder without the causal mask, reads a copy of the source and learns to emit the same actions.

    Eq. 1   pi = softmax(FFN_a(r))                    actions of a state r    U   actions.py
    Eq. 2   u = pi A                                  action vector           U   actions.py
    Eq. 3   r' = norm(r + u)                          new state               I   actions.py
    Eq. 4   w_ij = softmax_i(-|i - j| / tau)          soft copy               U   source_copy.py
    Eq. 5   y_j = sum_i w_ij H_i                      decoder input           U   source_copy.py
    Eq. 6   p(T - S) = softmax(W mean_i H_i)          length                  C   length.py
    Eq. 7   c <- alpha c + (1 - alpha) mean(pi)       use of the actions      U   losses.py
    Eq. 8   pi'_k ~ pi_k^2 / c_k                      balanced target         U   losses.py
    Eq. 9   L_pi = KL(pi' || pi)                      balance                 U   losses.py
    Eq. 10  L_IL = -sum_k pi_AT,k log pi_NAT,k        imitation               U   losses.py
    Eq. 11  L_AT* = L_CE + lambda_1 L_pi              demonstrator            U   objective.py
    Eq. 12  L_NAT* = L_CE + lambda_2 L_IL + L_length  learner                 U   objective.py

T counts the end mark: position t of the learner and step t of the demonstrator both predict y_t, so
their distributions are compared without a shift.

Shapes: B batch, N candidates (N = B * G, the G of a sentence together), S source length, T target
length, M model width, V vocabulary, L layers with actions, K actions, C length classes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from separata_shared.data.vocabulary import PAD, UNK
from separata_shared.nn import Decoder, Encoder, InputEmbedding, Transformer, padding_mask
from torch import Tensor, nn

from .actions import ActionTrace
from .length import LengthHead
from .losses import BalanceRegulariser


class Demonstrator(Transformer):
    """The autoregressive expert: a Transformer whose decoder layers show their actions.

    It is decoded like any Transformer, with ``start`` and ``step``.

    Args:
        balance: Keeps the running mean activation of the actions, so that checkpoints have it.
        parts: Those of a Transformer; the decoder is an ``ActionDecoder``.
    """

    def __init__(self, *, balance: BalanceRegulariser, **parts: Any) -> None:
        super().__init__(**parts)
        self.balance = balance

    def forward(self, source: Tensor, target: Tensor, trace: ActionTrace | None = None) -> Tensor:
        """Logits ``(B, T, V)``; as ``Transformer``, and ``trace`` gets the distributions.

        Training calls this, wrapped for several processes or not, and reads ``trace``.
        """
        return self.output(self.states(source, target, trace))

    def states(self, source: Tensor, target: Tensor, trace: ActionTrace | None) -> Tensor:
        """Top states of the decoder ``(B, T, M)``."""
        memory, mask = self.encode(source)
        x: Tensor = self.decoder(self.target(target), memory, memory_mask=mask, trace=trace)
        return x

    def actions(self, source: Tensor, decoder_input: Tensor) -> Tensor:
        """Log-probabilities of the actions ``(L, B, T, K)``, without a look at the vocabulary."""
        trace = ActionTrace()
        self.states(source, decoder_input, trace)
        return trace.log_pi


class Encoding(NamedTuple):
    """An encoded batch of sources, with all that decoding needs of it."""

    memory: Tensor
    """Top encoder states ``(B, S, M)``."""
    mask: Tensor
    """Boolean ``(B, S)``, True = real token."""
    copied: Tensor
    """What the learner copies, ``(B, S, M)``."""
    length_states: Tensor
    """What the length head averages, ``(B, S, M)``."""


class LearnerOutput(NamedTuple):
    """What a learner gives in training."""

    logits: Tensor
    """``(B, T, V)``."""
    log_pi: Tensor
    """Log-probabilities of the actions ``(L, B, T, K)``; empty without action modules."""
    length_logits: Tensor
    """``(B, C)``."""
    commitment: Tensor | None
    """What hard actions pay, ``(B, T)``; None with soft ones."""


class NonAutoregressive(nn.Module):
    """Encoder, decoder whose positions see each other, and length head; base of two models.

    Args:
        source: Embedding of the source tokens.
        encoder: Stack of encoder layers.
        target: Embedding of target tokens and positions.
        decoder: Stack of decoder layers, with attention that ignores causality.
        output: Projection of the decoder states to the vocabulary.
        padding_index: Token that fills short sequences.
        length: From encoder states to logits of length classes.
        run_encoder: Called as ``run_encoder(encoder, x, mask)``; gives the top states and those
            that the length head averages.
    """

    def __init__(
        self,
        *,
        source: InputEmbedding,
        encoder: Encoder,
        target: InputEmbedding,
        decoder: Decoder,
        output: Callable[[Tensor], Tensor],
        padding_index: int,
        length: LengthHead,
        run_encoder: Callable[[Encoder, Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__()
        self.source = source
        self.encoder = encoder
        self.target = target
        self.decoder = decoder
        self.output = output
        self.padding_index = padding_index
        self.length = length
        self.run_encoder = run_encoder

    def copied(self, source: Tensor, memory: Tensor) -> Tensor:
        """What of the source ``(B, S)`` and its states ``(B, S, M)`` may be copied."""
        return memory

    def encode(self, source: Tensor) -> Encoding:
        """Encode source tokens ``(B, S)``, padded on the right."""
        mask = padding_mask(source, self.padding_index)
        memory, length_states = self.run_encoder(self.encoder, self.source(source), mask)
        return Encoding(memory, mask[:, 0, 0], self.copied(source, memory), length_states)

    def predict_length(self, encoding: Encoding) -> Tensor:
        """Logits ``(B, C)`` of the length classes."""
        logits: Tensor = self.length(encoding.length_states, encoding.mask)  # Eq. 6
        return logits

    def decode_states(
        self, x: Tensor, encoding: Encoding, target_mask: Tensor, **options: Any
    ) -> Tensor:
        """The one decoder pass: inputs ``(N, T, M)`` and their mask to logits ``(N, T, V)``."""
        states = self.decoder(
            x,
            encoding.memory,
            memory_mask=encoding.mask[:, None, None],
            self_mask=target_mask[:, None, None],
            **options,
        )
        return self.output(states)


class Learner(NonAutoregressive):
    """The one-pass translator: a copy of the source goes in, all target words come out.

    Args:
        copy: Called as ``copy(copied, source_mask, target_mask)``; gives ``(N, T, M)``.
        copied_of: What is copied, a function of the learner, the source and its states.
        parts: Those of ``NonAutoregressive``.
    """

    def __init__(
        self,
        *,
        copy: nn.Module,
        copied_of: Callable[["Learner", Tensor, Tensor], Tensor],
        **parts: Any,
    ) -> None:
        super().__init__(**parts)
        self.copy = copy
        self.copied_of = copied_of

    def copied(self, source: Tensor, memory: Tensor) -> Tensor:
        """What is copied, ``(B, S, M)``."""
        return self.copied_of(self, source, memory)

    def decode(
        self, encoding: Encoding, target_mask: Tensor, trace: ActionTrace | None = None
    ) -> Tensor:
        """Predict all words of targets of given lengths in exactly one decoder pass.

        Args:
            encoding: Of ``B`` sentences.
            target_mask: Boolean ``(N, T)``, True at the first places of each row, as many as its
                length, which is at least 1. ``N`` is a multiple of ``B``; the rows of a sentence
                stand together and share its encoding.
            trace: Gets the distributions over actions.

        Returns:
            Logits ``(N, T, V)``.
        """
        y = self.copy(encoding.copied, encoding.mask, target_mask)  # Eq. 5
        places = target_mask.long() * (UNK - PAD) + PAD  # any real token has a position
        x = self.target.dropout(y + self.target.positions(places))
        return self.decode_states(x, encoding, target_mask, trace=trace)

    def forward(self, source: Tensor, target_mask: Tensor) -> LearnerOutput:
        """Everything that training needs of source ``(B, S)`` and target lengths ``(B, T)``."""
        encoding = self.encode(source)
        trace = ActionTrace(target_mask)
        logits = self.decode(encoding, target_mask, trace)
        return LearnerOutput(logits, trace.log_pi, self.predict_length(encoding), trace.commitment)


class MaskPredictor(NonAutoregressive):
    """The iterative peer (CMLM, Ghazvininejad et al. 2019): its decoder reads words and masks."""

    def decode(self, encoding: Encoding, tokens: Tensor) -> Tensor:
        """Logits ``(N, T, V)`` for targets ``tokens (N, T)``, some of them masked."""
        return self.decode_states(self.target(tokens), encoding, tokens.ne(self.padding_index))

    def forward(self, source: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the words ``(B, T, V)`` and of the length ``(B, C)``."""
        encoding = self.encode(source)
        return self.decode(encoding, tokens), self.predict_length(encoding)


def top_layer(encoder: Encoder, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Let the length head average the top states."""
    memory = encoder(x, mask=mask)
    return memory, memory


def all_layers(encoder: Encoder, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Let the length head average the sum of what all layers of ``encoder`` put out.

    A norm after the last layer is not in the sum.
    """
    total = torch.zeros_like(x)
    for layer in encoder.layers:
        x = layer(x, mask=mask)
        total = total + x
    return encoder.final_norm(x), total


def top_states(learner: Learner, source: Tensor, memory: Tensor) -> Tensor:
    """Copy the encoder's top states H, as in the paper."""
    return memory


def word_embeddings(learner: Learner, source: Tensor, memory: Tensor) -> Tensor:
    """Copy the scaled word vectors of the source, without positions."""
    embedded: Tensor = learner.source.tokens(source)
    return embedded
