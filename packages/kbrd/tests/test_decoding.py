"""Searching answers: the batch does not matter, the rules hold."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from separata_kbrd.config import DialogConfig
from separata_kbrd.dialog import DialogModel
from separata_kbrd.search import (
    IMPOSSIBLE,
    batched_search,
    fill_slots,
    late_block,
    make_search,
    no_repeats,
    official_beam,
    official_greedy,
)
from separata_kbrd.words import END, NULL, START, UNK, Vocabulary
from torch import Tensor

V, d, SLOT = 15, 5, 4
UNWANTED = (NULL, START, UNK)
BASE = DialogConfig(width=8, num_heads=2, hidden_width=8, bias_width=7, max_length=20, max_reply=7)

seeds = st.integers(0, 100_000)


def make_model(seed: int) -> DialogModel:
    """A model with strong opinions, so that answers differ and end at different places."""
    torch.manual_seed(seed)
    model = DialogModel(BASE, num_tokens=V, user_width=d).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.6
    return model


def dialogs(seed: int, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    xs = torch.randint(UNK, V, (count, 6), generator=generator)
    for row, length in zip(xs, torch.randint(0, 7, (count,), generator=generator), strict=True):
        row[int(length) :] = NULL
    return xs, torch.randn(count, d, generator=generator, dtype=torch.float64) * 3


@settings(deadline=None, max_examples=20)
@given(
    seed=seeds,
    count=st.integers(1, 4),
    beam=st.integers(1, 4),
    block=st.integers(0, 3),
    min_length=st.integers(0, 4),
    rules=st.sampled_from(["batched", "official"]),
)
def test_any_batch_size_equals_batch_size_one(
    seed: int, count: int, beam: int, block: int, min_length: int, rules: str
) -> None:
    config = replace(BASE, beam=beam, block_ngram=block, min_length=min_length, search=rules)  # type: ignore[arg-type]
    vocabulary = Vocabulary([f"w{number}" for number in range(V - 5)])
    search, model, (xs, u) = make_search(config, vocabulary), make_model(seed), dialogs(seed, count)
    together = search(model, xs, u)
    for row in range(count):
        length = max(1, int(xs[row].ne(NULL).sum()))
        assert search(model, xs[row : row + 1, :length], u[row : row + 1]) == [together[row]]
    if rules == "batched":
        for tokens in together:
            check_rules(tokens, config)


def check_rules(tokens: list[int], config: DialogConfig) -> None:
    words = tokens[:-1]
    assert tokens[-1] == END
    assert END not in words
    assert config.min_length <= len(words) <= config.max_reply
    assert not set(words) & set(UNWANTED)
    if config.block_ngram:
        starts = range(len(words) - config.block_ngram + 1)
        grams = [tuple(words[start : start + config.block_ngram]) for start in starts]
        assert len(set(grams)) == len(grams)


@settings(deadline=None, max_examples=20)
@given(seed=seeds)
def test_one_beam_is_greedy(seed: int) -> None:
    model, (xs, u) = make_model(seed), dialogs(seed, 3)
    one = batched_search(replace(BASE, min_length=0), unwanted=())(model, xs, u)
    greedy = official_greedy(model, xs, u, limit=BASE.max_reply)
    for ours, theirs in zip(one, greedy, strict=True):
        assert ours[: len(theirs)] == theirs
        assert ours[len(theirs) :] == ([] if theirs[-1] == END else [END])


@settings(deadline=None, max_examples=20)
@given(seed=seeds, min_length=st.integers(0, 6), beam=st.integers(1, 4))
def test_official_beam_ends_no_earlier_than_asked_and_no_later_than_the_limit(
    seed: int, min_length: int, beam: int
) -> None:
    model, (xs, u) = make_model(seed), dialogs(seed, 2)
    for found in official_beam(model, xs, u, beam_size=beam, limit=6, min_length=min_length):
        tokens = found.tokens.tolist()
        assert tokens.index(END) == len(tokens) - 1
        # At the limit the last token is overwritten, wherever ends are forbidden.
        assert min(min_length, 5) <= len(tokens) - 1 <= 5


def test_what_has_not_ended_is_cut_with_the_score_of_the_token_that_stood_there() -> None:
    model, (xs, u) = make_model(1), dialogs(1, 1)
    (found,) = official_beam(model, xs, u, beam_size=1, limit=3, min_length=99)
    free = official_greedy(model, xs, u, limit=3)
    with torch.no_grad():
        model.bias.second.bias[END] = -torch.inf
        greedy = official_greedy(model, xs, u, limit=3)[0]
    assert found.tokens.tolist() == [*greedy[:2], END]
    assert len(free) == 1


def test_corrected_block_forbids_the_token_that_completes_an_n_gram() -> None:
    tokens = torch.tensor([[5, 6, 7, 5, 6], [5, 6, 5, 7, 8]])
    zeros = torch.zeros(2, V)
    blocked = {n: no_repeats(n)(zeros, tokens).isinf() for n in (1, 2, 3, 6)}
    words = {
        n: [set(row.nonzero().flatten().tolist()) - {NULL} for row in blocked[n]] for n in blocked
    }
    assert words[1] == [{5, 6, 7}, {5, 6, 7, 8}]
    assert words[2] == [{7}, set()]  # "6 7" stands there already
    assert words[3] == [{7}, set()]  # "5 6 7" too
    assert words[6] == [set(), set()]
    with pytest.raises(ValueError, match="block_ngram"):
        no_repeats(0)


def test_the_authors_block_ends_what_repeats_a_word_one_step_later() -> None:
    tokens = torch.tensor([[5, 6, 7], [5, 6, 5]])
    for n in (0, 1):
        assert not late_block(n)(torch.zeros(2, V), tokens).any()
    for n in (2, 3, 5):  # any n above 1 does the same
        dead = late_block(n)(torch.zeros(2, V), tokens) == IMPOSSIBLE
        assert dead.all(dim=1).tolist() == [False, True]


@given(
    slots=st.lists(st.booleans(), max_size=12),
    ranked=st.permutations(range(8)),
    mentioned=st.sets(st.integers(0, 7)),
)
def test_slots_get_no_item_twice_and_none_of_the_dialog(
    slots: list[bool], ranked: list[int], mentioned: set[int]
) -> None:
    words = ["<slot>" if slot else "word" for slot in slots]
    filled, items = fill_slots(words, slot="<slot>", ranked=ranked, mentioned=mentioned)
    assert len(set(items)) == len(items)
    assert not set(items) & mentioned
    expected = [item for item in ranked if item not in mentioned][: sum(slots)]
    assert items == expected  # from left to right, the best first
    assert [part if isinstance(part, str) else "<slot>" for part in filled] == words
    assert filled.count("<slot>") == sum(slots) - len(items)  # left open when items run out


@pytest.mark.parametrize(("slots", "slot"), [("separate", 4), ("shared", 3)])
def test_the_slot_is_written_and_the_unknown_word_only_where_they_are_one(
    slots: str, slot: int
) -> None:
    vocabulary = Vocabulary([f"w{number}" for number in range(10)], slots=slots)  # type: ignore[arg-type]
    model = DialogModel(BASE, num_tokens=len(vocabulary), user_width=d).eval()
    with torch.no_grad():
        model.bias.second.bias[UNK] += 90.0
        model.bias.second.bias[slot] += 60.0
    written = make_search(BASE, vocabulary)(
        model, torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, d)
    )
    assert written == [[slot] * BASE.max_reply + [END]]
