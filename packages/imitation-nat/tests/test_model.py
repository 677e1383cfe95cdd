"""Demonstrator and learner (specification, acceptance checks 1 to 3, 5 and 10)."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from separata_imitation_nat.actions import ActionLayer, ActionTrace
from separata_imitation_nat.build import (
    build_demonstrator,
    build_learner,
    build_mask_predictor,
    build_teacher,
    initialise,
)
from separata_imitation_nat.config import ModelConfig
from separata_imitation_nat.length import length_mask
from separata_imitation_nat.model import Learner
from separata_shared.data.vocabulary import EOS, PAD
from separata_shared.decoding import beam_search, greedy_search, power_penalty
from torch import Tensor, nn
from torch.testing import assert_close

properties = settings(deadline=None, max_examples=8)
VOCABULARY = 13
OPTIONS: list[dict[str, Any]] = [
    {},
    {"actions": "hard"},
    {"combine": "gate", "action_layers": "last"},
    {"combine": "concat", "share_codebook": True},
    {"normalisation": "pre", "positions": "learned", "activation": "gelu", "action_layers": [0]},
    {"copy": "uniform", "copy_from": "embeddings", "num_actions": 0},
    {"copy": "soft_relative", "length_offset": 20, "length_detach": True, "length_from": "all"},
    {"copy": "zero", "embeddings": "separate"},
    {"actions": "hard", "share_codebook": True, "embeddings": "target"},
]


def config(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {"width": 8, "num_heads": 2, "hidden_width": 12, "max_length": 64}
    sizes |= {"encoder_layers": 2, "decoder_layers": 2, "num_actions": 5, "dropout": 0.0}
    types = {"source_vocabulary_size": VOCABULARY, "target_vocabulary_size": VOCABULARY}
    return ModelConfig(**sizes | types | changes)


def sentences(lengths: list[int], seed: int = 0) -> Tensor:
    """Random tokens (B, S), each ending in EOS, padded on the right."""
    random = torch.Generator().manual_seed(seed)
    sizes = torch.tensor(lengths)
    tokens = torch.randint(4, VOCABULARY, (len(lengths), max(lengths)), generator=random)
    tokens = tokens.masked_fill(~length_mask(sizes, max(lengths)), PAD)
    return tokens.scatter(1, sizes[:, None] - 1, EOS)


def shifted(target: Tensor) -> Tensor:
    """Decoder input: the target moved one place to the right, from EOS."""
    return torch.nn.functional.pad(target, (1, -1), value=EOS)


class Given(nn.Module):
    """Stands in for the copy: the decoder reads what it is told."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x

    def forward(self, states: Tensor, source_mask: Tensor, target_mask: Tensor) -> Tensor:
        return self.x


lengths = st.lists(st.integers(1, 7), min_size=1, max_size=3)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_learner_looks_both_ways(options) -> None:
    torch.manual_seed(1)
    learner = build_learner(config(**options)).eval()
    encoding, mask = learner.encode(sentences([4])), torch.ones(1, 5, dtype=bool)
    x = torch.randn(1, 5, 8)
    learner.copy = Given(x)
    before = learner.decode(encoding, mask)
    changed = x.clone()
    changed[:, 4] += torch.randn(8)
    learner.copy = Given(changed)
    assert not torch.isclose(learner.decode(encoding, mask)[:, 0], before[:, 0]).all()


@properties
@given(length=st.integers(2, 7), data=st.data())
def test_the_demonstrator_never_looks_ahead(length, data) -> None:
    torch.manual_seed(1)
    demonstrator = build_demonstrator(config()).eval()
    t = data.draw(st.integers(1, length - 1))
    source, target = sentences([5]), shifted(sentences([length + 1]))[:, :length]
    changed = target.clone()
    changed[:, t] = 4 + (target[:, t] - 3) % (VOCABULARY - 4)
    (logits, log_pi), (new_logits, new_log_pi) = (
        (demonstrator(source, tokens), demonstrator.actions(source, tokens))
        for tokens in (target, changed)
    )
    assert torch.equal(logits[:, :t], new_logits[:, :t])
    assert torch.equal(log_pi[:, :, :t], new_log_pi[:, :, :t])
    assert not torch.isclose(logits[:, t], new_logits[:, t]).all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@properties
@given(sources=lengths, targets=lengths, seed=st.integers(0, 99))
def test_padding_and_other_sentences_change_no_real_position(
    options, sources, targets, seed
) -> None:
    torch.manual_seed(2)
    learner = build_learner(config(**options)).eval()
    size = min(len(sources), len(targets))
    source, wanted = sentences(sources[:size], seed), torch.tensor(targets[:size])
    padded = torch.nn.functional.pad(source, (0, 2), value=PAD)
    mask = length_mask(wanted, int(wanted.max()) + 3)
    together = learner(padded, mask)
    for row, (length, target) in enumerate(zip(sources, targets, strict=False)):
        alone = learner(source[row : row + 1, :length], mask[row : row + 1, :target])
        assert_close(together.logits[row, :target], alone.logits[0], atol=1e-5, rtol=1e-5)
        assert_close(together.length_logits[row], alone.length_logits[0], atol=1e-5, rtol=1e-5)
        if alone.log_pi.numel():
            found = together.log_pi[:, row, :target]
            assert_close(found, alone.log_pi[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [build_demonstrator, build_teacher])
def test_padding_changes_no_real_position_of_autoregressive_models(kind) -> None:
    torch.manual_seed(2)
    model = kind(config()).eval()
    source, target = sentences([3, 6]), shifted(sentences([2, 5], seed=1))
    together = model(torch.nn.functional.pad(source, (0, 3), value=PAD), target)
    assert_close(together[:1, :2], model(source[:1, :3], target[:1, :2]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_actions_are_distributions_and_mix_vectors_of_the_codebook(options) -> None:
    if options.get("num_actions") == 0:
        return
    torch.manual_seed(3)
    chosen = config(**options)
    demonstrator = build_demonstrator(chosen).eval()
    vectors: list[tuple[Tensor, Tensor]] = []
    for layer in demonstrator.decoder.layers:
        if isinstance(layer, ActionLayer):
            codebook = layer.action.codebook.A
            layer.action.register_forward_hook(
                lambda module, inputs, u, book=codebook: vectors.append((u, book))
            )
    source, target, trace = sentences([5, 3]), shifted(sentences([4, 6])), ActionTrace()
    demonstrator(source, target, trace)
    log_pi, taken = trace.log_pi, list(vectors)
    assert torch.equal(demonstrator.actions(source, target), log_pi)  # as in training
    assert log_pi.shape == (len(chosen.layers_with_actions), 2, 6, 5)
    assert_close(log_pi.exp().sum(dim=-1), torch.ones(log_pi.shape[:-1]))
    assert len(taken) == len(log_pi)
    for (u, book), layer_log_pi in zip(taken, log_pi, strict=True):
        if chosen.actions == "soft":
            assert_close(u, layer_log_pi.exp() @ book)  # in the convex hull of A, by its weights
        else:
            assert_close(u, book[layer_log_pi.argmax(dim=-1)])


class AfterConstant(nn.Module):
    """A residual wiring whose input is first moved by a constant and normalised."""

    def __init__(self, wiring: nn.Module, norm: nn.Module, constant: Tensor) -> None:
        super().__init__()
        self.wiring, self.norm, self.constant = wiring, norm, constant

    def forward(self, x: Tensor, sublayer: Any) -> Tensor:
        moved: Tensor = self.wiring(self.norm(x + self.constant), sublayer)
        return moved


def test_a_single_action_adds_the_same_vector_everywhere() -> None:
    torch.manual_seed(4)
    single = config(num_actions=1)
    demonstrator, teacher = build_demonstrator(single).eval(), build_teacher(single).eval()
    given = demonstrator.state_dict()
    teacher.load_state_dict({name: given[name] for name in teacher.state_dict()})
    for mine, plain in zip(demonstrator.decoder.layers, teacher.decoder.layers, strict=True):
        plain.feed_forward_residual = AfterConstant(
            plain.feed_forward_residual, mine.action_residual.norm, mine.action.codebook.A[0]
        )
    source, target = sentences([4, 5]), shifted(sentences([6, 3]))
    assert_close(demonstrator(source, target), teacher(source, target))


def test_a_shared_codebook_is_one_parameter() -> None:
    shared = build_learner(config(share_codebook=True))
    books = [layer.action.codebook for layer in shared.decoder.layers]
    assert books[0] is books[1]
    own = build_learner(config())
    assert own.decoder.layers[0].action.codebook is not own.decoder.layers[1].action.codebook


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_trained_parameter_of_the_learner_gets_a_gradient(options) -> None:
    torch.manual_seed(5)
    learner = build_learner(config(**options))
    output = learner(sentences([5, 3]), length_mask(torch.tensor([4, 6]), 6))
    loss = output.logits.square().sum() + output.length_logits.square().sum()
    if output.log_pi.numel():
        loss = loss + output.log_pi[..., 0].sum()
    if output.commitment is not None:
        loss = loss + output.commitment.sum()
    loss.backward()
    # A parameter without gradient would stop training in several processes.
    idle = [name for name, p in learner.named_parameters() if p.grad is None]
    assert idle == []


def test_a_detached_length_head_leaves_the_encoder_alone() -> None:
    for detach in (False, True):
        learner = build_learner(config(length_detach=detach))
        learner.predict_length(learner.encode(sentences([4]))).square().sum().backward()
        assert (learner.encoder.layers[0].feed_forward.fc1.weight.grad is None) == detach


@pytest.mark.parametrize("normalisation", ["post", "pre"])
def test_a_length_head_may_average_the_sum_of_all_layers(normalisation) -> None:
    torch.manual_seed(10)
    learner = build_learner(config(length_from="all", normalisation=normalisation)).eval()
    top = build_learner(config(normalisation=normalisation)).eval()
    top.load_state_dict(learner.state_dict())
    outputs: list[Tensor] = []
    for layer in learner.encoder.layers:
        layer.register_forward_hook(lambda module, inputs, x: outputs.append(x))
    source = sentences([3, 5])
    encoding, plain = learner.encode(source), top.encode(source)
    assert len(outputs) == 2
    real = encoding.mask[:, :, None]
    mean = (sum(outputs) * real).sum(dim=1) / real.sum(dim=1)
    expected = mean @ learner.length.projection.weight.t()
    assert_close(learner.predict_length(encoding), expected)
    assert not torch.isclose(top.predict_length(plain), expected).all()
    assert torch.equal(encoding.memory, plain.memory)  # all else is as it was
    assert torch.equal(encoding.copied, plain.copied)


def test_codebooks_move_in_training_towards_real_positions_only() -> None:
    torch.manual_seed(6)
    learner = build_learner(config(actions="hard"))
    source, mask = sentences([5, 3]), length_mask(torch.tensor([4, 6]), 6)
    book = learner.decoder.layers[0].action.codebook
    before = book.A.clone()
    learner.eval()(source, mask)
    assert torch.equal(book.A, before)
    learner.train()(source, mask)
    assert not torch.equal(book.A, before)
    # Counts fall by a tenth and rise by a tenth of the 10 real positions.
    assert_close(book.count.sum(), torch.tensor(0.9 * 5 + 0.1 * 10))


@pytest.mark.parametrize("kind", [build_teacher, build_demonstrator])
@properties
@given(sources=lengths, seed=st.integers(0, 99), beam=st.integers(1, 3))
def test_cached_search_gives_the_scores_of_the_uncached_model(kind, sources, seed, beam) -> None:
    torch.manual_seed(seed)
    model, source = kind(config()).eval(), sentences(sources, seed)
    first = source.new_full((len(source),), EOS)
    limits = {"max_lengths": [6] * len(source), "eos_index": EOS, "padding_index": PAD}
    results = beam_search(
        model.step,
        model.start(source),
        first,
        beam_size=beam,
        length_penalty=power_penalty(0.6),
        **limits,
    )
    with torch.no_grad():
        greedy = greedy_search(model.step, model.start(source), first, **limits)
    for row, (hypotheses, single) in enumerate(zip(results, greedy, strict=True)):
        for hypothesis in hypotheses:
            tokens = hypothesis.tokens[None]
            with torch.no_grad():
                logits = model(source[row : row + 1], shifted(tokens))
            steps = logits.log_softmax(dim=-1).gather(-1, tokens[..., None]).flatten()
            assert_close(hypothesis.positional_scores, steps, atol=1e-5, rtol=1e-5)
            score = float(steps.sum()) / len(steps) ** 0.6
            assert hypothesis.score == pytest.approx(score, abs=1e-5)
        if beam == 1:
            assert hypotheses[0].tokens.tolist() == single.tolist()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_learner_starts_from_a_demonstrator_or_a_teacher(options) -> None:
    torch.manual_seed(7)
    chosen = config(**options)
    learner, teacher = build_learner(chosen), build_teacher(chosen)
    fresh = initialise(learner, teacher)
    assert torch.equal(learner.encoder.layers[1].feed_forward.fc1.weight,
                       teacher.encoder.layers[1].feed_forward.fc1.weight)  # fmt: skip
    assert all("action" in n or n.startswith(("copy", "length")) or "combine" in n for n in fresh)
    demonstrator = build_demonstrator(config(**options | {"num_actions": 5}))
    fresh = initialise(learner, demonstrator)
    assert {name.split(".")[0] for name in fresh} <= {"copy", "length"}
    given = demonstrator.state_dict()
    for name, tensor in learner.state_dict().items():
        assert name in fresh or torch.equal(tensor, given[name])


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"hidden_width": 16}, r"feed_forward\.fc1"),
        ({"num_actions": 6}, r"action"),
        ({"encoder_layers": 1}, r"encoder\.layers\.1.*missing"),
        ({"normalisation": "pre"}, r"final_norm"),
    ],
)
def test_a_learner_of_another_build_is_not_initialised(changes, name) -> None:
    learner = build_learner(config(num_actions=5))
    if "normalisation" in changes:  # a donor that lacks the final norms
        learner = build_learner(config(**changes))
        changes = {}
    before = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    with pytest.raises(ValueError, match=name):
        initialise(learner, build_demonstrator(config(**changes)))
    assert all(torch.equal(t, before[n]) for n, t in learner.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_actions": -1}, "num_actions"),
        ({"action_layers": [2]}, "action_layers.*0 to 1"),
        ({"action_layers": [0, 0]}, "action_layers"),
        ({"action_layers": []}, "action_layers"),
        ({"balance_decay": 1.0}, "balance_decay"),
        ({"copy_start": 0.0}, "copy_start"),
        ({"copy_start": float("nan")}, "copy_start"),
    ],
)
def test_wrong_chosenare_named(changes, message) -> None:
    with pytest.raises(ValueError, match=rf"model\.{message}"):
        config(**changes)


def test_a_demonstrator_needs_actions() -> None:
    with pytest.raises(ValueError, match=r"model\.num_actions"):
        build_demonstrator(config(num_actions=0))


def test_a_mask_predictor_sees_both_ways_and_no_padding() -> None:
    torch.manual_seed(8)
    model = build_mask_predictor(config()).eval()
    encoding = model.encode(sentences([4]))
    tokens = torch.tensor([[5, 6, 7, EOS]])
    changed = torch.tensor([[5, 6, 8, EOS]])
    logits = model.decode(encoding, tokens)
    assert not torch.isclose(model.decode(encoding, changed)[:, 0], logits[:, 0]).all()
    padded = torch.nn.functional.pad(tokens, (0, 2), value=PAD)
    assert_close(model.decode(encoding, padded)[:, :4], logits)


def test_only_who_asks_gets_the_distributions() -> None:
    torch.manual_seed(9)
    learner: Learner = build_learner(config()).eval()
    encoding, mask = learner.encode(sentences([4])), torch.ones(1, 3, dtype=bool)
    trace = ActionTrace()
    assert torch.equal(learner.decode(encoding, mask, trace), learner.decode(encoding, mask))
    assert trace.log_pi.shape == (2, 1, 3, 5)
    plain = build_learner(replace(config(), num_actions=0))
    assert plain(sentences([4]), mask).log_pi.numel() == 0
