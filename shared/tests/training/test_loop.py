import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from separata_shared.training import (
    Interrupted,
    Loss,
    Run,
    TrainConfig,
    TrainResult,
    checkpoint,
    distributed,
    fit,
    load_weights,
    optim,
)
from separata_shared.training.distributed import World
from torch import Tensor, nn

COMMON: dict[str, Any] = {
    "device": "cpu",
    "lr": 3e-3,
    "steps": 6,
    "log_every": 1,
    "save_every": 3,
    "clip_norm": 1.0,
}
ADAMW = {"optimizer": "adamw", "weight_decay": 0.1}
SGD = {"optimizer": "sgd", "momentum": 0.9}
ADAGRAD = {"optimizer": "adagrad"}


def losses(run: Run) -> list[float]:
    return [record["loss"] for record in run.records() if record["kind"] == "train"]


def train(
    toy: ModuleType, path: Path, dropout: float = 0.3, impl: str | None = None, **settings: Any
) -> Run:
    toy.fit(run=path, train=TrainConfig(**{**COMMON, **settings}), dropout=dropout, impl=impl)
    return Run(path)


def contents(toy: ModuleType, run: Run) -> dict[str, Tensor]:
    """Everything in the newest checkpoint: weights, optimizer, position, seed."""
    model = toy.build()
    optimizer = optim.make_optimizer(model, TrainConfig())
    newest = checkpoint.latest(run.checkpoints)
    assert newest is not None
    progress = checkpoint.load(newest, model, optimizer, World(0, 1, torch.device("cpu")), seed=1)
    return checkpoint._tensors(model, optimizer, progress, 1)


def assert_same_run(toy: ModuleType, left: Run, right: Run) -> None:
    a, b = contents(toy, left), contents(toy, right)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert losses(left) == losses(right)


@pytest.mark.slow
def test_losses_do_not_depend_on_the_number_of_processes(
    toy: ModuleType, tmp_path: Path, run_jobs: Callable[..., None]
) -> None:
    reference = train(toy, tmp_path / "one", accumulate=4)
    half = train(toy, tmp_path / "half", accumulate=4, steps=3)
    settings = [
        {**COMMON, "run": tmp_path / "ddp", "accumulate": 2, "parallel": "ddp"},
        {**COMMON, "run": tmp_path / "fsdp", "accumulate": 2, "parallel": "fsdp"},
        # A run that one process began, and one that one process will end.
        {**COMMON, "run": half.path, "accumulate": 2, "parallel": "ddp"},
        {**COMMON, "run": tmp_path / "begun", "accumulate": 2, "parallel": "fsdp", "steps": 3},
    ]
    others = {"adamw": ADAMW, "sgd": SGD, "adagrad": ADAGRAD}
    for name, other in others.items():
        two = {**COMMON, **other, "accumulate": 2, "parallel": "fsdp"}
        settings.append({**two, "run": tmp_path / name})
    run_jobs(settings, processes=2)
    train(toy, tmp_path / "begun", accumulate=4)
    for name, other in others.items():
        alone = train(toy, tmp_path / f"one_{name}", accumulate=4, **other)
        np.testing.assert_allclose(losses(Run(tmp_path / name)), losses(alone), rtol=0, atol=1e-6)
    expected = losses(reference)
    assert len(expected) == 6
    assert max(expected) - min(expected) > 0.1, "nothing was learnt, so nothing was compared"
    for name in ("ddp", "fsdp", "half", "begun"):
        run = Run(tmp_path / name)
        # 1e-6 is the promise of the loop; the rest is the order of additions.
        np.testing.assert_allclose(losses(run), expected, rtol=0, atol=1e-6, err_msg=name)
        assert (
            contents(toy, run)["progress"].tolist() == contents(toy, reference)["progress"].tolist()
        )


@pytest.mark.slow
def test_operators_of_attention_train_under_fsdp(
    toy: ModuleType, tmp_path: Path, run_jobs: Callable[..., None]
) -> None:
    settings = [
        {"run": tmp_path / f"{parallel}-{impl}", "parallel": parallel, "impl": impl}
        for parallel in ("ddp", "fsdp")
        for impl in ("native", "blocked")
    ]
    run_jobs([{**COMMON, **each, "accumulate": 2} for each in settings], processes=2)
    expected = losses(train(toy, tmp_path / "one", accumulate=4, impl="reference"))
    assert max(expected) - min(expected) > 0.1, "nothing was learnt, so nothing was compared"
    for each in settings:
        found = losses(Run(each["run"]))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5, err_msg=str(each))


def test_accumulated_batches_equal_one_large_batch(toy: ModuleType, tmp_path: Path) -> None:
    def joined(epoch: int) -> list[Tensor]:
        small = list(toy.batches(epoch))
        rows = [[row for batch in small[i : i + 2] for row in batch] for i in range(0, 12, 2)]
        return [nn.utils.rnn.pad_sequence(each, batch_first=True) for each in rows]

    def small(epoch: int) -> list[Tensor]:
        return list(toy.batches(epoch))[:12]

    config = TrainConfig(**COMMON)
    large_run, small_run = Run(tmp_path / "large"), Run(tmp_path / "small")
    fit(toy.build(dropout=0.0).double(), joined, toy.step, config=config, run=large_run)
    accumulating = TrainConfig(**COMMON, accumulate=2)
    fit(toy.build(dropout=0.0).double(), small, toy.step, config=accumulating, run=small_run)
    np.testing.assert_allclose(losses(small_run), losses(large_run), rtol=0, atol=1e-9)


def test_same_seed_gives_the_same_run(toy: ModuleType, tmp_path: Path) -> None:
    first = train(toy, tmp_path / "a", deterministic=True)
    torch.manual_seed(123)  # the loop does not look at the caller's generator
    second = train(toy, tmp_path / "b", deterministic=True)
    other = train(toy, tmp_path / "c", seed=2)
    assert_same_run(toy, first, second)
    assert losses(other) != losses(first)
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_callers_random_state_is_given_back(toy: ModuleType, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    model = toy.build()
    torch.manual_seed(5)
    fit(model, toy.batches, toy.step, config=TrainConfig(**COMMON), run=Run(tmp_path))
    assert torch.equal(torch.rand(3), expected)


def lines_written(run: Run, process: subprocess.Popen[str], count: int) -> None:
    """Wait until the process has recorded so many steps."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if run.metrics.exists() and run.metrics.read_text().count("\n") >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    raise AssertionError("the run does not get on")


def long_run(path: Path) -> list[str]:
    arguments = {**COMMON, "steps": 30, "save_every": 4}
    options = [f"--train.{name}={value}" for name, value in arguments.items()]
    return ["fit", "--run", str(path), "--pause=0.01", *options]


@pytest.mark.slow
def test_killed_and_resumed_run_equals_the_uninterrupted_one(
    toy: ModuleType, tmp_path: Path, launch: Callable[..., Any]
) -> None:
    whole = train(toy, tmp_path / "whole", steps=30, save_every=4)
    run = Run(tmp_path / "killed")
    (process,) = launch(*long_run(run.path))
    lines_written(run, process, random.randint(1, 25))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (run.weights / "step_0000030.safetensors").exists()
    train(toy, run.path, steps=30, save_every=4)
    assert_same_run(toy, run, whole)
    assert contents(toy, run)["progress"][0] == 30


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_and_ends_cleanly(
    toy: ModuleType,
    tmp_path: Path,
    launch: Callable[..., Any],
    signum: signal.Signals,
    status: int,
) -> None:
    processes = 2 if signum == signal.SIGTERM else 1
    run = Run(tmp_path / "run")
    started = launch(*long_run(run.path), processes=processes)
    lines_written(run, started[0], 5)
    for process in started:
        process.send_signal(signum)
    messages = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [status] * processes
    assert "stopped at step" in messages[0]
    assert "Traceback" not in "".join(messages)
    assert 5 <= contents(toy, run)["progress"][0] < 30
    train(toy, run.path, steps=30, save_every=4, accumulate=processes)
    whole = train(toy, tmp_path / "whole", steps=30, save_every=4, accumulate=processes)
    np.testing.assert_allclose(losses(run), losses(whole), rtol=0, atol=1e-6)
    if processes == 1:
        assert_same_run(toy, run, whole)


def test_interrupt_in_this_process_is_an_exception_of_its_own(
    toy: ModuleType, tmp_path: Path
) -> None:
    def interrupt(step: int) -> None:
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    run = Run(tmp_path)
    with pytest.raises(Interrupted, match="step 3"):
        fit(
            toy.build(),
            toy.batches,
            toy.step,
            config=TrainConfig(**COMMON),
            run=run,
            before_step=interrupt,
        )
    assert signal.getsignal(signal.SIGINT) is handler
    assert checkpoint.latest(run.checkpoints) == run.checkpoints / "step_0000003"


def test_interrupt_in_the_last_evaluation_ends_what_would_follow(
    toy: ModuleType, tmp_path: Path
) -> None:
    def interrupted(model: nn.Module) -> dict[str, float]:
        signal.raise_signal(signal.SIGINT)
        return {"loss": 1.0}

    run, config = Run(tmp_path), TrainConfig(**{**COMMON, "steps": 3})
    with pytest.raises(Interrupted, match="step 3"):
        fit(toy.build(), toy.batches, toy.step, config=config, run=run, evaluate=interrupted)
    assert checkpoint.latest(run.checkpoints) == run.checkpoints / "step_0000003"
    result = fit(toy.build(), toy.batches, toy.step, config=config, run=run)
    assert result.step == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_loss_or_gradient_that_is_not_finite_stops_before_saving(
    toy: ModuleType, tmp_path: Path, value: float, where: str
) -> None:
    calls: Iterator[int] = iter(range(100))

    def poisoned(model: nn.Module, tokens: Tensor) -> Loss:
        loss = toy.step(model, tokens)
        if next(calls) == 3:  # the fourth step
            if where == "loss":
                loss.total = loss.total * value
            else:
                loss.total.register_hook(lambda gradient: gradient * value)
        return loss

    run = Run(tmp_path)
    config = TrainConfig(**{**COMMON, "log_every": 100, "save_every": 3, "steps": 9})
    with pytest.raises(ValueError, match=r"step 4: .*metrics\.jsonl"):
        fit(toy.build(), toy.batches, poisoned, config=config, run=run, evaluate=toy.evaluate)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step_0000003"]
    assert [path.name for path in run.weight_files()] == ["step_0000003.safetensors"]


def test_evaluation_must_give_the_monitored_number(toy: ModuleType, tmp_path: Path) -> None:
    for values, message in (
        ({"bleu": 3.0}, r"train\.monitor: 'loss' is not evaluated; there are bleu"),
        ({"loss": float("nan")}, "step 6: loss of the evaluation is not a number"),
    ):
        run = Run(tmp_path / next(iter(values)))
        with pytest.raises(ValueError, match=message):
            fit(
                toy.build(),
                toy.batches,
                toy.step,
                config=TrainConfig(**COMMON),
                run=run,
                evaluate=lambda model, values=values: values,
            )
        assert [path.name for path in run.checkpoints.iterdir()] == ["step_0000003"]


def test_epochs_follow_each_other_without_loss_or_repetition(
    toy: ModuleType, tmp_path: Path
) -> None:
    seen: list[list[Tensor]] = []

    def recording(model: nn.Module, tokens: Tensor) -> Loss:
        seen.append(list(tokens))
        return toy.step(model, tokens)

    count = len(toy.batches(0))
    config = TrainConfig(**{**COMMON, "steps": count, "accumulate": 2})
    fit(toy.build(), toy.batches, recording, config=config, run=Run(tmp_path))
    expected = [list(batch) for epoch in (0, 1) for batch in toy.batches(epoch)]
    assert len(seen) == len(expected) == 2 * count
    for left, right in zip(seen, expected, strict=True):
        assert torch.equal(torch.stack(left), torch.stack(right))


def test_a_finished_run_is_left_alone(toy: ModuleType, tmp_path: Path) -> None:
    run = train(toy, tmp_path)
    before = {path: path.read_bytes() for path in run.weight_files()}
    result = toy.fit(run=tmp_path, train=TrainConfig(**COMMON))
    assert isinstance(result, TrainResult)
    assert result.step == 6
    assert {path: path.read_bytes() for path in run.weight_files()} == before


def test_a_command_that_trains_nothing_leaves_the_records_of_a_run(
    toy: ModuleType, tmp_path: Path
) -> None:
    run = train(toy, tmp_path)
    records = (run.config, run.environment, run.metrics)
    before = [path.read_bytes() for path in records if path.exists()]
    time.sleep(1)  # the time of a run is written in seconds
    train(toy, tmp_path)
    for refused in ({"seed": 9}, {"optimizer": "sgd"}):
        with pytest.raises(ValueError, match="step_0000006"):
            train(toy, tmp_path, steps=9, **refused)
    assert [path.read_bytes() for path in records if path.exists()] == before
    train(toy, tmp_path, steps=7)
    assert [path.read_bytes() for path in records if path.exists()] != before


def test_other_folders_among_the_checkpoints_are_left_alone(
    toy: ModuleType, tmp_path: Path
) -> None:
    run = train(toy, tmp_path)
    (run.checkpoints / "step_old").mkdir()
    train(toy, tmp_path, steps=9, keep=1)
    assert {path.name for path in run.checkpoints.iterdir()} == {"step_0000009", "step_old"}


def test_two_processes_do_not_train_in_one_run(toy: ModuleType, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with run.alone(write=True):
        with pytest.raises(ValueError, match=r"run: another process is training in this run$"):
            train(toy, run.path)
        assert [path.name for path in run.path.iterdir()] == [".lock"]
        # Of several processes only the first one writes, so only that one needs it.
        with run.alone(write=False):
            pass
    train(toy, run.path)
    train(toy, run.path)


def test_best_weights_outlive_newer_ones(toy: ModuleType, tmp_path: Path) -> None:
    scores = iter([3.0, 1.0, 2.0, 2.5, 4.0])
    run = Run(tmp_path)
    config = TrainConfig(**{**COMMON, "steps": 5, "save_every": 1, "evaluate_every": 1, "keep": 2})
    model = toy.build()
    result = fit(
        model,
        toy.batches,
        toy.step,
        config=config,
        run=run,
        evaluate=lambda model: {"loss": next(scores)},
    )
    assert result.best_step == 2
    names = [path.stem for path in run.weight_files()]
    assert names == ["step_0000002", "step_0000004", "step_0000005"]
    assert run.best_weights().stem == "step_0000002"
    assert sorted(path.name for path in run.checkpoints.iterdir()) == names[1:]
    fresh = toy.build()
    load_weights(fresh, run.weight_files()[-1])
    for name, tensor in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor)


def test_bf16_trains_and_keeps_parameters_in_fp32(toy: ModuleType, tmp_path: Path) -> None:
    kinds = set()

    def looking(model: nn.Module, tokens: Tensor) -> Loss:
        kinds.add(model(tokens).dtype)
        return toy.step(model, tokens)

    model = toy.build()
    config = TrainConfig(**COMMON, precision="bf16")
    fit(model, toy.batches, looking, config=config, run=Run(tmp_path))
    assert kinds == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_objective_weighs_tokens_not_batches(tmp_path: Path) -> None:
    # Two micro-batches of 1 and 3 items with gradients 1 and 2 each: (1 + 3 * 2) / 4.
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    data = [torch.ones(1, 1), 2 * torch.ones(3, 1)]

    def step(model: nn.Module, x: Tensor) -> Loss:
        return Loss(model(x).sum(), torch.tensor(len(x)))

    config = TrainConfig(steps=1, accumulate=2, optimizer="sgd", lr=1.0, device="cpu")
    fit(model, lambda epoch: data, step, config=config, run=Run(tmp_path))
    assert model.weight.item() == pytest.approx(-7 / 4, abs=1e-7)


@pytest.mark.parametrize("name", ["cuda:99", "mps:99", "xpu:99", "hpu"])
def test_device_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"train.device: '{name}' is not available here"):
        distributed.start(name)
