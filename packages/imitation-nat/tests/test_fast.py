"""Models for inference compute what the models compute."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from separata_imitation_nat.actions import ActionTrace
from separata_imitation_nat.build import build_demonstrator, build_learner, build_teacher
from separata_imitation_nat.config import ModelConfig
from separata_imitation_nat.decode import (
    parallel_decode,
    teacher_scorer,
    teacher_scores,
    window,
)
from separata_imitation_nat.fast import (
    PackedLinear,
    QuantisedLinear,
    accelerate,
    attend,
    compile_learner,
)
from separata_imitation_nat.length import length_mask
from separata_shared.attention import dense_attention
from separata_shared.data.vocabulary import EOS, PAD
from separata_shared.decoding import beam_search, greedy_search
from separata_shared.nn import Transformer
from torch import Tensor

VOCABULARY = 40
VARIANTS: list[dict[str, Any]] = [
    {},
    {"normalisation": "pre", "activation": "gelu", "positions": "learned"},
    {"embeddings": "separate", "actions": "hard", "combine": "gate"},
    {"combine": "concat", "action_layers": "last", "copy": "uniform", "length_from": "all"},
    {"num_actions": 0, "copy": "zero"},
]


def config(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {"width": 32, "num_heads": 4, "hidden_width": 48, "max_length": 64}
    sizes |= {"encoder_layers": 2, "decoder_layers": 2, "num_actions": 16}
    sizes |= {"source_vocabulary_size": VOCABULARY, "target_vocabulary_size": VOCABULARY}
    return ModelConfig(**(sizes | changes))


def sentences(*lengths: int) -> Tensor:
    """Sources of these lengths, ending in EOS and padded."""
    random = torch.Generator().manual_seed(sum(lengths))
    rows = torch.full((len(lengths), max(lengths)), PAD)
    for row, length in zip(rows, lengths, strict=True):
        row[: length - 1] = torch.randint(4, VOCABULARY, (length - 1,), generator=random)
        row[length - 1] = EOS
    return rows


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(7)


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_fast_teacher_searches_and_scores_as_the_teacher(changes: dict[str, Any]) -> None:
    teacher = build_teacher(config(**changes)).eval()
    fast = accelerate(teacher)
    source = sentences(7, 4, 9)
    options: dict[str, Any] = {"max_lengths": [9, 8, 12], "eos_index": EOS, "padding_index": PAD}
    first = torch.full((3,), EOS)
    greedy = [greedy_search(m.step, m.start(source), first, **options) for m in (teacher, fast)]
    assert [row.tolist() for row in greedy[0]] == [row.tolist() for row in greedy[1]]
    single = [m.step(first[:1], m.start(source[:1, :7])) for m in (teacher, fast)]
    torch.testing.assert_close(single[0], single[1], atol=1e-5, rtol=1e-5)
    plain, quick = (
        beam_search(m.step, m.start(source), first, beam_size=3, **options) for m in (teacher, fast)
    )
    for expected, found in zip(plain, quick, strict=True):
        assert [h.tokens.tolist() for h in expected] == [h.tokens.tolist() for h in found]
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(
                one.positional_scores, other.positional_scores, atol=1e-5, rtol=0
            )
    candidates = sentences(5, 6, 3, 8, 2, 4)  # two of each sentence
    torch.testing.assert_close(
        teacher_scores(fast, source, candidates),
        teacher_scores(teacher, source, candidates),
        atol=1e-5,
        rtol=0,
    )


@pytest.mark.parametrize("changes", VARIANTS[:4])
def test_a_fast_demonstrator_shows_the_same_actions(changes: dict[str, Any]) -> None:
    demonstrator = build_demonstrator(config(**changes)).eval()
    source, target = sentences(6, 9), sentences(8, 5)
    fast = accelerate(demonstrator)
    for one, other in (
        (demonstrator(source, target), fast(source, target)),
        (demonstrator.actions(source, target), fast.actions(source, target)),
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_fast_learner_predicts_the_same_words_and_lengths(changes: dict[str, Any]) -> None:
    learner = build_learner(config(**changes)).eval()
    fast = accelerate(learner)
    source = sentences(7, 3)
    mask = length_mask(torch.tensor([5, 9, 1, 4]), 9)  # two candidates of each sentence
    found = []
    for model in (learner, fast):
        encoding, trace = model.encode(source), ActionTrace()
        logits = model.decode(encoding, mask, trace)[mask]
        found.append((logits, model.predict_length(encoding), trace.log_pi))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    teacher = build_teacher(config()).eval()
    options: dict[str, Any] = {"lengths": window(2), "scorer": teacher_scorer(teacher)}
    plain, quick = (parallel_decode(model, source, **options) for model in (learner, fast))
    assert torch.equal(plain.candidates, quick.candidates)
    assert torch.equal(plain.tokens, quick.tokens)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_the_model_itself_stays_as_it_is(precision: Any) -> None:
    learner = build_learner(config())
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    accelerate(learner, precision)
    assert learner.training
    for name, value in learner.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dtype == before[name].dtype


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.05), ("int8", 0.05)])
def test_rounded_models_stay_near(precision: Any, tolerance: float) -> None:
    """A product of 8-bit numbers is off by about 1/127 of its size, and here are ten in a row."""
    source = sentences(12, 9)
    mask = length_mask(torch.tensor([10, 13]), 13)
    target = sentences(10, 13)
    for build in (build_teacher, build_learner):
        model = build(config(width=64, hidden_width=128)).eval()
        fast = accelerate(model, precision)
        logits = []
        for each in (model, fast):
            if isinstance(each, Transformer):
                logits.append(each(source, target)[mask].float())
            else:
                logits.append(each.decode(each.encode(source), mask)[mask].float())
        error = (logits[0] - logits[1]).norm() / logits[0].norm()
        assert 0 < error < tolerance


@pytest.mark.parametrize("sizes", [(24, 40), (40, 24)])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    ("make", "dtype", "tolerance"),
    [
        (PackedLinear, torch.float32, 1e-6),
        (PackedLinear, torch.bfloat16, 0.02),
        (QuantisedLinear, torch.float32, 0.05),
    ],
)
def test_a_product_rectifies_its_result(
    sizes: tuple[int, int],
    rows: int,
    has_bias: bool,
    make: Any,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    weight = torch.randn(sizes).to(dtype)
    bias = torch.randn(sizes[0]).to(dtype) if has_bias else None
    x = torch.randn(1, rows, sizes[1]).to(dtype)
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    for then, expected in (("none", exact), ("relu", exact.relu())):
        found = make(weight, bias, then)(x)
        assert found.dtype == dtype
        assert (found.double() - expected).norm() <= tolerance * exact.norm()
        assert then == "none" or found.min() >= 0


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.booleans(), st.integers(0, 10**6)
)
def test_lean_attention_equals_dense_attention(
    batch: int, heads: int, length: int, causal: bool, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, batch, heads, length, 8, generator=random)
    mask = length_mask(torch.randint(1, length + 1, (batch,), generator=random), length)
    expected = dense_attention(
        query, key, value, mask=mask[:, None, None], causal=causal, impl="reference"
    )
    scaled = query / 8**0.5
    found = attend(scaled, key, value, mask=mask[:, None, None], causal=causal)
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_other_attention_keeps_its_module() -> None:
    teacher = build_teacher(config()).eval()
    for layer in teacher.encoder.layers:
        layer.self_attention.replace_attend(lambda q, k, v, **options: v)
    source, target = sentences(6, 9), sentences(8, 5)
    torch.testing.assert_close(
        accelerate(teacher)(source, target), teacher(source, target), atol=1e-5, rtol=1e-5
    )


def test_a_model_elsewhere_is_refused() -> None:
    with pytest.raises(ValueError, match="on a CPU"):
        accelerate(build_teacher(config()).to("meta"))


def test_compiled_buckets_decode_as_the_learner() -> None:
    """The graphs are run as they are: translating them to machine code takes a minute."""
    learner = build_learner(config(num_actions=8, encoder_layers=1, decoder_layers=1)).eval()
    decode = compile_learner(learner, multiple=8, backend="eager")
    for lengths in ((7, 3), (5, 9)):
        source = sentences(*lengths)
        expected = parallel_decode(learner, source, lengths=window(1))
        found = decode(source, lengths=window(1))
        width = expected.candidates.size(2)
        assert torch.equal(found.candidates[:, :, :width], expected.candidates)
        assert found.candidates[:, :, width:].eq(PAD).all()
        assert found.candidates.size(2) % 8 == 0


def test_buckets_need_a_length() -> None:
    with pytest.raises(ValueError, match=r"^multiple: must be at least 1"):
        compile_learner(build_learner(config()), multiple=0)
