"""Balance, imitation and word losses (specification, acceptance checks 5 to 7)."""

import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from separata_imitation_nat.losses import (
    BalanceRegulariser,
    imitation_loss,
    masked_mean,
    sharpened,
    word_loss,
)
from separata_shared.data.vocabulary import PAD
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

properties = settings(deadline=None, max_examples=25)


@st.composite
def actions(draw: st.DrawFn, count: int = 1) -> list[Tensor]:
    """Log-probabilities (L, B, T, K), float64, and a mask (B, T) with a real position."""
    sizes = [draw(st.integers(1, most)) for most in (3, 3, 4, 6)]
    random = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    spread = draw(st.sampled_from([0.1, 1.0, 30.0]))
    drawn = [
        (spread * torch.randn(sizes, generator=random, dtype=torch.float64)).log_softmax(dim=-1)
        for _ in range(count)
    ]
    mask = torch.rand(sizes[1:3], generator=random) < 0.6
    mask[0, 0] = True
    return [*drawn, mask]


@properties
@given(drawn=actions(2))
def test_imitation_is_at_least_the_entropy_and_equal_for_equal_actions(drawn) -> None:
    shown, own, mask = drawn
    entropy = masked_mean(-(shown.exp() * shown).sum(dim=-1), mask)
    assert imitation_loss(shown, own, mask) >= entropy - 1e-12
    assert_close(imitation_loss(shown, shown, mask), entropy)


@properties
@given(drawn=actions(2))
def test_the_gradient_of_imitation_is_the_difference_of_the_distributions(drawn) -> None:
    shown, own, mask = drawn
    shown = shown.clone().requires_grad_()
    scores = own.clone().requires_grad_()
    imitation_loss(shown, scores.log_softmax(dim=-1), mask).backward()
    assert shown.grad is None  # the demonstrator is never trained by it
    expected = (own.exp() - shown.detach().exp()) * mask[:, :, None]
    assert scores.grad is not None
    assert_close(scores.grad, expected / (len(shown) * mask.sum()))


def test_imitation_of_other_actions_is_refused() -> None:
    mask = torch.ones(1, 2, dtype=bool)
    with pytest.raises(ValueError, match=r"\(2, 1, 2, 4\).*\(1, 1, 2, 4\)"):
        imitation_loss(torch.zeros(1, 1, 2, 4), torch.zeros(2, 1, 2, 4), mask)


@properties
@given(drawn=actions())
def test_balance_is_never_negative_and_pushes_no_gradient_through_its_target(drawn) -> None:
    log_pi, mask = drawn
    scores = log_pi.clone().requires_grad_()
    balance = BalanceRegulariser(len(log_pi), log_pi.size(-1)).double()
    loss = balance(scores.log_softmax(dim=-1), mask)
    assert loss >= -1e-12
    loss.backward()
    # KL(p' || softmax(s)) with p' constant: the gradient in s is softmax(s) - p'.
    target = sharpened(log_pi, balance.c[:, None, None]).exp()
    expected = (log_pi.exp() - target) * mask[:, :, None] / (len(log_pi) * mask.sum())
    assert scores.grad is not None
    assert_close(scores.grad, expected)
    assert not balance.c.requires_grad


@properties
@given(sizes=st.tuples(st.integers(1, 3), st.integers(1, 9)))
def test_balance_is_zero_where_all_actions_are_used_alike(sizes) -> None:
    layers, num_actions = sizes
    log_pi = torch.zeros(layers, 2, 3, num_actions).log_softmax(dim=-1)
    balance = BalanceRegulariser(layers, num_actions)
    assert_close(balance(log_pi, torch.ones(2, 3, dtype=bool)), torch.tensor(0.0))
    assert_close(balance.c, torch.full((layers, num_actions), 1 / num_actions))


@properties
@given(drawn=actions(2))
def test_one_action_leaves_nothing_to_learn(drawn) -> None:
    one, mask = drawn[0][..., :1].log_softmax(dim=-1), drawn[-1]
    assert BalanceRegulariser(len(one), 1)(one.float(), mask) == 0
    assert imitation_loss(one, one, mask) == 0


@properties
@given(drawn=actions(4), decay=st.floats(0.0, 0.99))
def test_the_running_mean_equals_its_closed_form_and_rests_in_evaluation(drawn, decay) -> None:
    *updates, mask = drawn
    layers, *_, num_actions = updates[0].shape
    balance = BalanceRegulariser(layers, num_actions, decay=decay).double()
    for log_pi in updates:
        balance(log_pi, mask)
    n = len(updates)
    # c_n = alpha^n / K + sum_m (1 - alpha) alpha^(n - m) mean_m
    expected = decay**n * torch.full((layers, num_actions), 1 / num_actions, dtype=torch.float64)
    for m, log_pi in enumerate(updates, start=1):
        mean = log_pi.exp()[:, mask].mean(dim=1)
        expected += (1 - decay) * decay ** (n - m) * mean
    assert_close(balance.c, expected)
    assert_close(balance.c.sum(dim=-1), torch.ones(layers, dtype=torch.float64))
    balance.eval()(updates[0], mask)
    assert_close(balance.c, expected)
    assert "c" in balance.state_dict()


def test_unused_actions_stay_finite() -> None:
    log_pi = torch.tensor([[[[0.0, -torch.inf], [0.0, -200.0]]]])
    balance = BalanceRegulariser(1, 2, decay=0.0)  # c is the last mean: (1, 0)
    loss = balance(log_pi.clamp(min=-300), torch.ones(1, 2, dtype=bool))
    assert loss.isfinite()


def test_the_running_mean_is_that_of_all_processes(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(1)
    log_pi = torch.randn(2, 2, 3, 4, generator=random).log_softmax(dim=-1)
    mask = torch.tensor([[True, True, True], [True, False, False]])  # 3 positions and 1
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    started = [
        context.Process(target=one_process, args=(rank, tmp_path, log_pi, mask, answers))
        for rank in range(2)
    ]
    for process in started:
        process.start()
    found = [torch.tensor(answers.get()) for _ in started]
    for process in started:
        process.join(timeout=30)
    alone = BalanceRegulariser(2, 4)
    alone.update(log_pi, mask)
    assert torch.equal(found[0], found[1])
    assert_close(found[0], alone.c)


@properties
@given(drawn=actions())
def test_the_target_is_the_square_of_the_distribution_over_its_frequency(drawn) -> None:
    log_pi, _ = drawn
    frequency = log_pi.exp().mean(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    weights = log_pi.exp() ** 2 / frequency
    expected = weights / weights.sum(dim=-1, keepdim=True)
    assert_close(sharpened(log_pi, frequency).exp(), expected)


def one_process(rank: int, folder: Path, log_pi: Tensor, mask: Tensor, answers) -> None:
    """See one of the two sentences."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    balance = BalanceRegulariser(2, 4)
    balance.update(log_pi[:, rank : rank + 1], mask[rank : rank + 1])
    answers.put(balance.c.tolist())
    dist.barrier()
    dist.destroy_process_group()


@properties
@given(seed=st.integers(0, 999), smoothing=st.floats(0.0, 0.9), padded=st.integers(0, 3))
def test_word_loss_is_torchs_smoothed_cross_entropy_over_valid_targets(
    seed, smoothing, padded
) -> None:
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 4, 7, generator=random)
    target = torch.randint(4, 7, (2, 4), generator=random)
    target[1, 4 - padded :] = PAD
    loss, nll = word_loss(logits, target, smoothing)
    flat = logits.flatten(0, 1), target.flatten()
    assert_close(loss, F.cross_entropy(*flat, ignore_index=PAD, label_smoothing=smoothing))
    assert_close(nll, F.cross_entropy(*flat, ignore_index=PAD))


def test_nothing_to_average_is_zero() -> None:
    assert masked_mean(torch.full((3, 1, 2), torch.nan), torch.zeros(1, 2, dtype=bool)) == 0
