"""Training of every stage: it repeats, it resumes, and the learner imitates a frozen expert."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from separata_imitation_nat.build import build_demonstrator, build_learner, build_mask_predictor
from separata_imitation_nat.config import ObjectiveConfig, StagesConfig
from separata_imitation_nat.data import load
from separata_imitation_nat.generate import load_demonstrator, load_learner, load_teacher
from separata_imitation_nat.objective import (
    demonstrator_step,
    learner_step,
    mask_predict_step,
    validation,
)
from separata_imitation_nat.train import train, train_demonstrator
from separata_shared.data.vocabulary import EOS, PAD, UNK, Vocabulary, frequent_words
from separata_shared.training import Run, read_weights
from separata_shared.translation import ParallelBatch, validation_loss
from separata_shared.translation.train import with_vocabulary
from torch import Tensor

Settings = dict[str, Any]


def weights_of(run: Path) -> dict[str, Tensor]:
    return read_weights(Run(run).weight_files()[-1])


def losses_of(run: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in Run(run).records()]


def learning(small: Settings, folder: Path, **changes: Any) -> Settings:
    """Arguments of ``train`` with the earlier stages of a folder."""
    places = {name: folder / name for name in ("teacher", "distilled", "demonstrator")}
    return {**small, **places, **changes}


def batch_of(small: Settings) -> ParallelBatch:
    return next(iter(load(small["data"]).train.in_order(160)))


@pytest.mark.slow
def test_fifty_steps_repeat_bit_by_bit_and_the_seed_matters(
    small: Settings, learner: Path, tmp_path: Path
) -> None:
    brief = replace(small["train"], log_every=1, save_every=50, evaluate_every=0)
    for name, seed, steps in (("first", 1, 50), ("second", 1, 50), ("other", 2, 1)):
        changed = replace(brief, seed=seed, steps=steps, deterministic=True)
        train(**learning(small, learner.parent, train=changed), run=tmp_path / name)
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    assert len(losses_of(first)) == 51  # and the evaluation at the end
    assert losses_of(first) == losses_of(second)
    assert losses_of(first)[0] != losses_of(other)[0]


def test_a_learner_that_goes_on_is_the_one_that_never_stopped(
    small: Settings, learner: Path, tmp_path: Path
) -> None:
    for steps in (8, 16):
        stopped = replace(small["train"], steps=steps)
        train(**learning(small, learner.parent, train=stopped), run=tmp_path / "stopped")
    assert losses_of(tmp_path / "stopped") == losses_of(learner)
    straight = weights_of(learner)
    assert all(torch.equal(w, straight[n]) for n, w in weights_of(tmp_path / "stopped").items())


def test_a_demonstrator_that_goes_on_keeps_its_running_means(
    small: Settings, distilled: Path, demonstrator: Path, tmp_path: Path
) -> None:
    settings = {name: value for name, value in small.items() if name != "parallel"}
    for steps in (8, 16):
        settings["train"] = replace(small["train"], steps=steps)
        train_demonstrator(**settings, distilled=distilled, run=tmp_path / "stopped")
    straight, stopped = weights_of(demonstrator), weights_of(tmp_path / "stopped")
    assert torch.equal(straight["balance.c"], stopped["balance.c"])
    assert not torch.allclose(straight["balance.c"], torch.full((2, 8), 1 / 8), atol=1e-4)
    assert all(torch.equal(weight, stopped[name]) for name, weight in straight.items())


def test_every_stage_lowers_its_loss(teacher: Path, demonstrator: Path, learner: Path) -> None:
    for run in (teacher, demonstrator, learner):
        losses = [row["loss"] for row in Run(run).records() if row["kind"] == "train"]
        assert losses[-1] < losses[0]


def test_the_learner_learns_from_the_teachers_translations(
    small: Settings, distilled: Path, learner: Path, tmp_path: Path
) -> None:
    raw = StagesConfig(targets="raw")
    train(**learning(small, learner.parent, stages=raw), run=tmp_path / "raw")
    assert losses_of(tmp_path / "raw") != losses_of(learner)
    assert "distilled" not in (tmp_path / "raw/inputs.json").read_text()
    assert "distilled" in (learner / "inputs.json").read_text()


@pytest.mark.parametrize("start", ["demonstrator", "teacher", "none"])
def test_the_learner_starts_from_the_model_that_is_asked_for(
    start: str, small: Settings, learner: Path, demonstrator: Path, teacher: Path, tmp_path: Path
) -> None:
    # A learning rate of zero leaves the parameters where they started.
    still = replace(small["train"], steps=1, lr=0.0)
    stages = StagesConfig(initialise=start)
    train(**learning(small, learner.parent, train=still, stages=stages), run=tmp_path / start)
    own = load_learner(tmp_path / start).network.state_dict()
    donors = {"demonstrator": load_demonstrator(demonstrator), "teacher": load_teacher(teacher)}
    for name, donor in donors.items():
        given = donor.network.state_dict()
        shared = [
            n for n in own.keys() & given.keys() if n.startswith("encoder.") and "weight" in n
        ]
        assert shared
        linear = [n for n in shared if own[n].dim() > 1]
        assert all(torch.equal(own[n], given[n]) for n in linear) == (name == start)


def test_the_expert_stays_frozen_in_evaluation_mode_and_gets_no_gradient(
    small: Settings, demonstrator: Path
) -> None:
    expert = load_demonstrator(demonstrator)
    network = build_learner(expert.model)
    expert.network.train()
    step = learner_step(network, ObjectiveConfig(imitation=1.0), 0.1, demonstrator=expert.network)
    before = {name: value.clone() for name, value in expert.network.state_dict().items()}
    loss = step(network.train(), batch_of(small))
    loss.total.backward()
    assert not expert.network.training
    assert all(parameter.grad is None for parameter in expert.network.parameters())
    assert all(torch.equal(v, before[n]) for n, v in expert.network.state_dict().items())
    used = {n for n, parameter in network.named_parameters() if parameter.grad is not None}
    assert used == {n for n, _ in network.named_parameters()}


def test_the_weights_of_the_objective_are_those_of_its_terms(
    small: Settings, demonstrator: Path
) -> None:
    expert, batch = load_demonstrator(demonstrator), batch_of(small)
    network = build_learner(expert.model).eval()
    real = batch.target.ne(PAD)
    for imitation, length in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.3), (2.0, 1.0)):
        objective = ObjectiveConfig(imitation=imitation, length=length)
        step = learner_step(network, objective, 0.0, demonstrator=expert.network)
        loss = step(network, batch)
        log = {name: value / loss.count for name, value in loss.log.items()}
        total = log["nll"] + imitation * log["imitation"] + length * log["length"]
        assert torch.isclose(loss.total / loss.count, total, rtol=1e-6)
        assert loss.count == real.sum()


def test_the_learner_imitates_what_the_demonstrator_does_on_the_words_before(
    small: Settings, demonstrator: Path
) -> None:
    # Each sentence alone: forced from the end mark, the demonstrator predicts y_t at step t, and
    # the learner at position t.
    expert, batch = load_demonstrator(demonstrator), batch_of(small)
    network = build_learner(expert.model).eval()
    step = learner_step(network, ObjectiveConfig(), 0.0, demonstrator=expert.network)
    loss = step(network, batch)
    terms = []
    for source, target in zip(batch.source, batch.target, strict=True):
        source, target = source[source != PAD][None], target[target != PAD][None]
        forced = torch.cat((torch.full((1, 1), EOS), target[:, :-1]), dim=1)
        with torch.no_grad():
            expected = expert.network.actions(source, forced)
            own = network(source, torch.ones_like(target, dtype=torch.bool)).log_pi
        terms.append(-(expected.exp() * own).sum(dim=-1).mean(dim=0).flatten())
    torch.testing.assert_close(loss.log["imitation"] / loss.count, torch.cat(terms).mean())


def test_without_balance_the_demonstrators_words_are_those_of_a_teachers_step(
    small: Settings, demonstrator: Path
) -> None:
    trained = load_demonstrator(demonstrator)
    step = demonstrator_step(trained.network, ObjectiveConfig(balance=0.0), 0.0)
    part = load(small["data"]).valid
    found = validation(step, part, 160)(trained.network)
    expected = validation_loss(trained.network, part, 160)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_running_means_move_in_training_only(small: Settings, demonstrator: Path) -> None:
    network = load_demonstrator(demonstrator).network
    step, batch = demonstrator_step(network, ObjectiveConfig(), 0.1), batch_of(small)
    before = network.balance.c.clone()
    step(network.eval(), batch)
    assert torch.equal(network.balance.c, before)
    step(network.train(), batch)
    assert not torch.equal(network.balance.c, before)


def test_mask_predict_counts_the_words_that_it_hid(small: Settings) -> None:
    model = with_vocabulary(small["model"], load(small["data"]))
    network, batch = build_mask_predictor(model), batch_of(small)
    step = mask_predict_step(network, ObjectiveConfig(length=0.0), 0.0)
    torch.manual_seed(0)
    loss = step(network, batch)
    words = batch.target.ne(PAD).sum() - len(batch.target)
    assert len(batch.target) <= loss.count <= words
    assert torch.isclose(loss.total, loss.log["nll"])


def test_a_loss_that_is_no_number_ends_the_run(
    small: Settings, learner: Path, tmp_path: Path
) -> None:
    wild = replace(small["train"], lr=1e30)
    with pytest.raises(ValueError, match="not finite"):
        train(**learning(small, learner.parent, train=wild), run=tmp_path / "run")
    assert not list((tmp_path / "run").glob("weights/*"))


def test_a_run_begun_with_other_stages_is_refused(small: Settings, learner: Path) -> None:
    for stages in (StagesConfig(initialise="teacher"), StagesConfig(targets="raw")):
        with pytest.raises(ValueError, match=r"config\.yaml: stages is not what this command asks"):
            train(**learning(small, learner.parent, stages=stages), run=learner)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_label_smoothing_outside_its_range_is_refused(
    small: Settings, learner: Path, tmp_path: Path, smoothing: float
) -> None:
    with pytest.raises(ValueError, match=r"^label_smoothing: must be in \[0, 1\)"):
        train(**learning(small, learner.parent, label_smoothing=smoothing), run=tmp_path / "run")
    assert not list(tmp_path.glob("run/weights"))


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("stage", ["demonstrator", "teacher"])
def test_an_earlier_model_of_another_vocabulary_is_refused(
    small: Settings, learner: Path, tmp_path: Path, side: str, stage: str
) -> None:
    # As many tokens, in another order: nothing but their numbers tells.
    folder = Path(shutil.copytree(learner.parent, tmp_path / "stages"))
    path = folder / stage / f"{side}.vocabulary"
    pieces = Vocabulary.load(path).pieces
    rising = [" ".join([word] * count) for count, word in enumerate(pieces[UNK + 1 :], start=1)]
    frequent_words(rising, len(pieces)).save(path)
    stages = StagesConfig(targets="raw", initialise=stage)
    options = {"stages": stages, "objective": ObjectiveConfig(imitation=0.0)}
    with pytest.raises(ValueError, match=f"{stage}: was made with another vocabulary"):
        train(**learning(small, folder, **options), run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_actions_of_other_layers_are_not_imitated(
    small: Settings, learner: Path, tmp_path: Path
) -> None:
    stages, folder = StagesConfig(targets="raw", initialise="none"), tmp_path / "stages"
    shutil.copytree(learner.parent, folder)
    shutil.rmtree(folder / "demonstrator")
    first, second = (replace(small["model"], action_layers=[layer]) for layer in (0, 1))
    brief = {"stages": stages, "train": replace(small["train"], steps=1)}
    shown = {name: value for name, value in small.items() if name != "parallel"}
    train_demonstrator(**shown | brief | {"model": first}, run=folder / "demonstrator")
    for model, found in ((second, "8 actions in layers [1]"), (replace(first, num_actions=0), "0")):
        message = rf"demonstrator: has 8 actions in layers \[0\], the learner {re.escape(found)}"
        with pytest.raises(ValueError, match=message):
            train(**learning(small, folder, model=model, **brief), run=tmp_path / "run")


def test_a_refused_learner_leaves_another_run_as_it_is(
    small: Settings, learner: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(learner.parent, tmp_path / "stages"))
    before = sorted((folder / "teacher").rglob("*"))
    with pytest.raises(ValueError, match=r"teacher/config\.yaml: \w+ is not what this command"):
        train(**learning(small, folder), run=folder / "teacher")
    assert sorted((folder / "teacher").rglob("*")) == before


def test_a_learner_does_not_go_on_with_another_demonstrator(
    small: Settings, learner: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(learner.parent, tmp_path / "stages"))
    best = load_demonstrator(folder / "demonstrator").weights
    other = next(path for path in best.parent.iterdir() if path != best)
    best.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match=r"inputs\.json: demonstrator is not what this run was"):
        train(**learning(small, folder), run=folder / "learner")


def test_mask_predict_hides_the_same_words_in_every_evaluation(small: Settings) -> None:
    model = with_vocabulary(small["model"], load(small["data"]))
    network = build_mask_predictor(model).eval()
    step = mask_predict_step(network, ObjectiveConfig(), 0.0)
    judge = validation(step, load(small["data"]).valid, 160)
    torch.manual_seed(1)
    first, after = judge(network), torch.rand(())
    torch.manual_seed(1)
    assert torch.rand(()) == after  # and nobody else's random numbers are touched
    torch.manual_seed(2)
    assert judge(network) == first


def test_a_demonstrator_without_actions_is_refused(small: Settings) -> None:
    with pytest.raises(ValueError, match=r"^model\.num_actions: a demonstrator needs at least 1"):
        build_demonstrator(replace(small["model"], num_actions=0))
