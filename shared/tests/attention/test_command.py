from pathlib import Path

import pytest
from separata_shared import native
from separata_shared.attention.__main__ import main
from separata_shared.attention.topk import native as topk


def test_build_says_where_the_library_lies_and_which_instructions_it_uses(
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        topk.library()
    except native.UnavailableError as error:
        pytest.skip(str(error))
    main(["build"])
    library, instructions = capsys.readouterr().out.splitlines()
    assert Path(library.split()[1]).is_file()
    assert instructions.split()[1]


def test_build_without_a_compiler_is_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def library() -> None:
        raise native.UnavailableError("no compiler")

    monkeypatch.setattr(topk, "library", library)
    with pytest.raises(SystemExit) as ended:
        main(["build"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "separata_shared.attention: error: no compiler\n"


@pytest.mark.parametrize("arguments", [["--help"], ["build", "--help"]])
def test_help_explains_the_command(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    assert "Compile the CPU kernels" in capsys.readouterr().out
