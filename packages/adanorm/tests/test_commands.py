"""The translation commands as a user meets them."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from separata_adanorm.__main__ import PACKAGE, VERBS
from separata_shared.cli import main

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Run the program in the test's own directory; give exit status, output and messages."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin)))
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main(VERBS, package=PACKAGE, arguments=[str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return int(left.value.code or 0), printed.out, printed.err

    return run


def test_bare_translation_commands_work_on_tiny(command: Command) -> None:
    assert command("prepare")[0] == 0
    few = ("--train.steps", 3, "--train.save_every", 1)
    for run in ("ada", "layer"):
        assert command("train", *few, "--run", run, "--model.norm", f"{run}_norm")[0] == 0
    assert command("average-checkpoints", "--run", "ada", "--last", 2)[0] == 0
    status, output, _ = command("generate", "--run", "ada", stdin=b"s1 s2 s3\n\n")
    assert status == 0
    assert output.count("\n") == 2
    status, output, _ = command("evaluate", "--run", "layer", "--beam", 1)
    assert status == 0
    assert "bleu_detokenised" in output
    assert json.loads(Path("layer/scores.json").read_text())["sentences"] == 600
    for name in ("ada", "layer"):
        assert f"norm: {name}_norm" in Path(name, "config.yaml").read_text()


@pytest.mark.parametrize(
    ("override", "word"),
    [
        (("--model.norm", "batch_norm"), "norm"),
        (("--model.C", "-1"), "model.C"),
        (("--model.scope", "first"), "scope"),
        (("--model.scope", "final_only", "--model.normalisation", "post"), "model.scope"),
        (("--config", "iwslt99"), "iwslt14_de_en"),
    ],
)
def test_bad_settings_end_in_one_line(
    command: Command, override: tuple[str, ...], word: str
) -> None:
    status, output, errors = command("train", *override)
    assert status == 2
    assert output == ""
    assert word in errors.splitlines()[-1]
    assert not list(Path().iterdir())


def test_help_of_every_verb_explains_its_options(command: Command) -> None:
    for verb in VERBS:
        status, output, _ = command(verb, "--help")
        assert status == 0
        assert "--config" in output
    assert all(verb in command("--help")[1] for verb in VERBS)
