import errno
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from separata_shared import cli
from separata_shared.training.signals import Interrupted

TINY = """
model:
  width: 8  # ours
  top_k: null
train:
  lr: 1e-4
"""


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model."""

    width: int = 4
    """Width of the model."""

    top_k: int | None = 3
    """Keys of each query."""

    ratios: tuple[float, ...] = (1e-7, 2.0)
    """Ratios."""

    def __post_init__(self) -> None:
        """Check."""
        if self.width < 1:
            raise ValueError(f"model.width: must be at least 1, got {self.width}")


@dataclass(frozen=True, kw_only=True)
class Train:
    """The training."""

    lr: float = 1e-3
    """Learning rate."""

    schedule: Literal["constant", "linear"] = "constant"
    """Schedule."""


calls: list[dict[str, Any]] = []


def train(*, model: Model, train: Train, run: Path = Path("runs/tiny")) -> None:
    """Train a model.

    Longer text.

    Args:
        model: What to train.
        train: How.
        run: Run directory.
    """
    calls.append({"model": model, "train": train, "run": run})


def generate(*, model: Model, source: Path, beam: int = 5) -> None:
    """Write translations.

    Args:
        model: Which model.
        source: What to translate.
        beam: Hypotheses kept.
    """
    calls.append({"model": model, "source": source, "beam": beam})


Command = Callable[..., int]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command of a package that ships ``tiny`` and ``large``; give its exit status."""
    configs = tmp_path / "paper_package" / "configs"
    configs.mkdir(parents=True)
    (configs.parent / "__init__.py").touch()
    (configs / "tiny.yaml").write_text(TINY)
    (configs / "large.yaml").write_text("model: {width: 100}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "paper_package", raising=False)
    monkeypatch.chdir(tmp_path)
    calls.clear()

    def run(*arguments: str, **verbs: cli.Verb) -> int:
        every = {"train": train, "generate": generate, **verbs}
        try:
            cli.main(every, package="paper_package", arguments=arguments)
        except SystemExit as end:
            return int(str(end.code))

    return run


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("paper-package: error: ")
    assert errors.count("\n") == 1
    return errors


def test_verb_without_arguments_takes_tiny(command: Command) -> None:
    assert command("train") == 0
    assert calls == [
        {"model": Model(width=8, top_k=None), "train": Train(lr=1e-4), "run": Path("runs/tiny")}
    ]


def test_command_line_beats_configuration_beats_defaults(command: Command) -> None:
    assert command("train", "--train.lr", "7e-4", "--config=large", "--run", "here") == 0
    assert calls == [{"model": Model(width=100), "train": Train(lr=7e-4), "run": Path("here")}]


def test_verb_takes_the_groups_it_knows(command: Command) -> None:
    assert command("generate", "--source", "a.txt", "--config", "tiny") == 0
    assert calls == [{"model": Model(width=8, top_k=None), "source": Path("a.txt"), "beam": 5}]


def test_resolved_configuration_repeats_the_run(command: Command, tmp_path: Path) -> None:
    values = {"model": Model(ratios=(1e-9,), top_k=None), "train": Train(schedule="linear")}
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "config.yaml").write_text(cli.to_yaml(values))
    assert command("train", "--config", str(tmp_path / "first" / "config.yaml")) == 0
    assert calls == [{**values, "run": Path("runs/first")}]


def test_printed_configuration_repeats_the_run(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("train", "--model.ratios", "[3.0]", "--print_config") == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert calls == []
    assert command("train", "--config", "printed.yaml") == 0
    assert calls[0]["model"] == Model(width=8, top_k=None, ratios=(3.0,))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: {widht: 3}", "own.yaml: .*'model'.*'widht'"),
        ("modle: {width: 3}", "own.yaml: unknown key 'modle'"),
        ("model: {width: wide}", "own.yaml: .*model.width.*int.*wide"),
        ("train: {schedule: never}", "own.yaml: .*train.schedule.*never"),
        ("model: {width: 0}", "own.yaml: model.width: must be at least 1"),
        ("model: 3", "own.yaml: model: must hold settings, not 3"),
        ("model: [", "own.yaml: not valid YAML"),
        ("- model", "own.yaml: not a configuration"),
        ("", "own.yaml: not a configuration"),
        ("model: !!python/object/apply:os.system [ls]", "own.yaml: not valid YAML"),
        (b"\xff", "own.yaml: line 1 is not valid UTF-8"),
    ],
)
def test_wrong_configuration_is_one_line_that_names_key_and_file(
    command: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str | bytes,
    message: str,
) -> None:
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "own.yaml").write_bytes(data)
    assert command("train", "--config", "own.yaml") == 2
    assert_matches(message, complaint(capsys))
    assert calls == []


def test_a_configuration_of_another_verb_is_refused(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Defaults in place of what it lacks would be another experiment in its name."""
    (tmp_path / "own.yaml").write_text("train: {lr: 1e-4}")
    assert command("generate", "--config", "own.yaml", "--source", "s") == 2
    assert_matches(
        "own.yaml: lacks the group 'model', so it is not for this verb", complaint(capsys)
    )
    assert command("train", "--config", "own.yaml") == 0
    assert calls[0]["model"] == Model()


def assert_matches(pattern: str, text: str) -> None:
    assert re.search(pattern, text), text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--config", "huge"], "'huge' is neither .*shipped are large, tiny"),
        (["train", "--config"], "argument --config: expected one argument"),
        (["train", "--model.widht", "3"], "model.widht"),
        (["train", "--train.lr", "fast"], "error: .*train.lr.*float.*fast"),
        (["train", "--model.width", "0"], "error: model.width: must be at least 1"),
        (["generate"], "error: .*required.* source"),
        (["trian"], "invalid choice: 'trian'"),
        (["--nothing"], "nothing|required|VERB"),
    ],
)
def test_wrong_command_line_is_one_line_that_names_the_key(
    command: Command, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert command(*arguments) == 2
    assert_matches(message, complaint(capsys))
    assert calls == []


def test_errors_of_a_verb_are_one_line(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong() -> None:
        raise ValueError("data.txt: line 3\nis bad")

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl")

    def stopped() -> None:
        raise Interrupted("stopped at step 3", 15)

    def broken() -> None:
        raise KeyError("a bug, not a wrong use")

    assert command("wrong", wrong=wrong) == 2
    assert complaint(capsys) == "paper-package: error: data.txt: line 3 is bad\n"
    assert command("full", full=full) == 2
    assert "runs/x/metrics.jsonl: No space left on device" in complaint(capsys)
    assert command("stopped", stopped=stopped) == 143
    assert capsys.readouterr().err == "paper-package: stopped at step 3\n"
    with pytest.raises(KeyError):
        command("broken", broken=broken)


def test_ctrl_c_ends_with_130(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    def slow() -> None:
        raise KeyboardInterrupt

    assert command("slow", slow=slow) == 130
    assert capsys.readouterr().err == "paper-package: interrupted\n"


def test_help_tells_what_the_docstrings_tell(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ((), ("--help",), ("-h",)):
        assert command(*arguments) == 0
        text = capsys.readouterr().out
        assert "Train a model." in text
        assert "Write translations." in text
    assert command("train", "--help") == 0
    text = capsys.readouterr().out
    for words in ("Longer text.", "Width of the model.", "Run directory.", "Learning rate."):
        assert words in text
    assert calls == []


def test_other_processes_print_nothing(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def speak() -> None:
        print("hello")

    assert command("speak", speak=speak) == 0
    assert capsys.readouterr().out == "hello\n"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # put back at the end
    assert command("speak", speak=speak) == 0
    assert capsys.readouterr().out == ""


NAMED = '''
import torch

def shout():
    """Say it loud.

    And clearly.
    """
    print(torch.tensor(3))
'''


def test_verbs_given_by_name_are_imported_when_used(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "paper_package" / "shout.py").write_text(NAMED)
    assert command("shout", shout="paper_package.shout:shout") == 0
    assert capsys.readouterr().out == "tensor(3)\n"


PARTIAL = '''
from functools import partial

def call(name, *, times: int = 1) -> None:
    """Call somebody.

    Args:
        name: Whom.
        times: How often.
    """
    print(name * times)

call_ann = partial(call, "Ann")
"""Call Ann."""
'''


def test_a_verb_may_be_a_function_with_its_first_arguments_given(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "paper_package" / "calling.py").write_text(PARTIAL)
    verb = "paper_package.calling:call_ann"
    assert command("call", "--times", "2", call=verb) == 0
    assert capsys.readouterr().out == "AnnAnn\n"
    assert command("call", "--help", call=verb) == 0
    described = capsys.readouterr().out
    assert "Call somebody." in described
    assert "How often." in described
    assert "Whom." not in described
    assert command("--help", call=verb) == 0
    assert "Call Ann." in capsys.readouterr().out


def test_help_imports_neither_the_verbs_nor_torch(tmp_path: Path) -> None:
    (tmp_path / "named_package").mkdir()
    (tmp_path / "named_package" / "shout.py").write_text(NAMED)
    code = (
        "import sys\nfrom separata_shared.cli import main\ntry:\n"
        "    main({'shout': 'named_package.shout:shout'}, package='named_package')\n"
        "finally:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Say it loud." in done.stdout
    assert done.stdout.endswith("False\n")


def test_default_paths_are_named_after_the_configuration(command: Command) -> None:
    assert command("train", "--config", "large") == 0
    assert command("train", "--config", "large", "--run", "here") == 0
    assert [call["run"] for call in calls] == [Path("runs/large"), Path("here")]


def test_the_configuration_of_a_run_stands_for_its_directory_from_everywhere(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs/mine"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("{}")
    assert command("train", "--config", str(run / "config.yaml")) == 0
    monkeypatch.chdir(run)
    assert command("train", "--config", "config.yaml") == 0
    assert [call["run"] for call in calls] == [Path("runs/mine")] * 2
