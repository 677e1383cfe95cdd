from collections.abc import Callable

import pytest
import torch
from torch import Tensor

PAD, EOS, VOCABULARY = 1, 2, 6


class History:
    """All tokens of each row and the sentence it belongs to."""

    def __init__(self, sentences: Tensor) -> None:
        self.sentences = sentences
        self.tokens = torch.empty(len(sentences), 0, dtype=torch.long)

    def reorder(self, index: Tensor, sentences: Tensor | None = None) -> None:
        if sentences is not None:
            kept = self.sentences[index].unique_consecutive()
            assert torch.equal(kept, self.sentences.unique_consecutive()[sentences])
        self.sentences, self.tokens = self.sentences[index], self.tokens[index]


class ToyModel:
    """Log-probabilities that depend on the sentence and on every token before, in order.

    So a row that continues the wrong history or the wrong sentence gets other numbers.
    """

    def __init__(self, *, seed: int = 0, sharpness: float = 2.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.by_place = torch.randn(12, VOCABULARY, VOCABULARY, generator=generator)
        self.by_sentence = torch.randn(8, VOCABULARY, generator=generator)
        self.sharpness = sharpness

    def start(self, sentences: list[int]) -> History:
        return History(torch.tensor(sentences))

    def step(self, tokens: Tensor, state: History) -> Tensor:
        assert len(tokens) == len(state.tokens)
        state.tokens = torch.cat((state.tokens, tokens[:, None]), dim=1)
        logits = self.by_sentence[state.sentences]
        for place, column in enumerate(state.tokens.unbind(1)):
            logits = torch.tanh(logits + self.by_place[place, column]) * self.sharpness
        return logits

    def score(self, sentence: int, tokens: list[int]) -> list[float]:
        """Log-probability of each token of a sequence, computed one sequence at a time."""
        state, last, scores = self.start([sentence]), EOS, []
        for token in tokens:
            log_probs = self.step(torch.tensor([last]), state).log_softmax(-1)
            scores.append(log_probs[0, token].item())
            last = token
        return scores


@pytest.fixture(scope="session")
def make_model() -> Callable[..., ToyModel]:
    return ToyModel
