"""Talking: whatever a person types gets an answer, and nothing is recommended twice."""

import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from separata_kbrd.chat import NOT_TEXT, lines_of, read_line, talk
from separata_kbrd.conversation import Conversation
from separata_kbrd.generate import respond_to_lines
from separata_kbrd.graph import Catalogue
from separata_kbrd.linking import TitleLinker
from separata_kbrd.system import Context, System, spell

STRANGE = [
    "😀🎬🍿",
    "x" * 10_000,
    "movie " * 5_000,
    "我喜欢科幻电影",
    "مرحبا، أريد فيلماً",
    "I loved The Unheard Of Film of Nowhere (1931)",
    "'; DROP TABLE films; -- $(touch hacked) `touch hacked`",
    "\x1b[31mred\x1b[0m \x00 \u202e \ud7ff",
    "__unk__ __item__ __null__ __start__ __end__",
    "@99999999 @ @@ @-1",
    "(((((((((((((((((((((",
    "no",
]


def names_of(system: System) -> tuple[str, ...]:
    return system.recommender.corpus.graph.catalogue.names


def renamed(system: System, names: dict[int, str]) -> System:
    """The same system with other names of some items."""
    recommender = system.recommender
    corpus, graph = recommender.corpus, recommender.corpus.graph
    old = graph.catalogue
    every = tuple(names.get(number, name) for number, name in enumerate(old.names))
    catalogue = Catalogue(ids=old.ids, nodes=old.nodes, names=every, mentions=old.mentions)
    corpus = replace(corpus, graph=replace(graph, catalogue=catalogue))
    return replace(system, recommender=replace(recommender, corpus=corpus))


@pytest.mark.parametrize("text", STRANGE, ids=lambda text: repr(text[:12]))
def test_strange_messages_get_an_answer(
    system: System, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*arguments: object, **options: object) -> None:
        raise AssertionError("a message must not reach the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(os, "system", no_network)
    monkeypatch.setattr(subprocess, "Popen", no_network)
    monkeypatch.chdir(tmp_path)
    turn = Conversation(system).say(text)
    assert turn.reply is not None
    assert turn.text
    assert not list(tmp_path.iterdir())
    # What was typed is never echoed, so no control sequence reaches the terminal.
    assert not any(
        ord(letter) < 32 for line in lines_of(turn, system.item_names) for letter in line
    )


@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(texts=st.lists(st.text(max_size=200), min_size=1, max_size=4))
def test_any_messages_get_answers(system: System, texts: list[str]) -> None:
    conversation = Conversation(system)
    for text in texts:
        assert conversation.say(text).text


def test_an_empty_line_is_asked_for_more_and_changes_nothing(system: System) -> None:
    conversation = Conversation(system)
    for text in ("", "   ", "\t\u3000"):
        turn = conversation.say(text)
        assert turn.reply is None
        assert "say something" in turn.text
    assert conversation.context == Context()


def test_no_item_is_recommended_twice_nor_one_that_the_person_named(system: System) -> None:
    conversation, seen = Conversation(system), []
    named = names_of(system)[0]
    for number in range(6):
        reply = conversation.say(f"I liked {named}. Anything else?" if number < 2 else "more").reply
        assert reply is not None
        assert not set(reply.items) & {0, *seen} - {0}
        assert int(system.recommender.corpus.graph.catalogue.nodes[0]) not in reply.items
        assert not set(reply.items) & set(reply.suggestions[:0])
        seen += reply.items
    assert len(set(seen)) == len(seen)


def test_a_name_of_several_items_is_asked_back(system: System) -> None:
    films = renamed(system, {0: "Heat (1986)", 1: "Heat (1995)", 2: "Up (2009)"})
    nodes = films.recommender.corpus.graph.catalogue.nodes
    for answer, expected in (("2", 1), ("the 1986 one", 0), ("(1995)", 1)):
        conversation = Conversation(films)
        question = conversation.say("I love Heat")
        assert set(question.choices) == {"Heat (1986)", "Heat (1995)"}
        assert question.reply is None
        if answer == "2":
            expected = 1 if question.choices[1] == "Heat (1995)" else 0
        turn = conversation.say(answer)
        assert turn.reply is not None
        assert turn.heard == (names_of(films)[expected],)
        assert conversation.context.items[0] == nodes[expected]


def test_a_year_answers_the_question_before_it_is_asked(system: System) -> None:
    films = renamed(system, {0: "Heat (1986)", 1: "Heat (1995)"})
    turn = Conversation(films).say("I love Heat (1995)")
    assert turn.choices == ()
    assert turn.heard == ("Heat (1995)",)


def test_another_answer_than_a_choice_takes_the_most_mentioned_and_is_heard_too(
    system: System,
) -> None:
    films = renamed(system, {0: "Heat (1986)", 1: "Heat (1995)", 2: "Solaris (1972)"})
    conversation = Conversation(films)
    first = conversation.say("I love Heat").choices[0]
    turn = conversation.say("whatever, and Solaris")
    assert turn.heard == ("Solaris (1972)",)
    items = conversation.context.items[:2]
    catalogue = films.recommender.corpus.graph.catalogue
    assert items == [int(catalogue.nodes[names_of(films).index(first)]), int(catalogue.nodes[2])]


def test_a_film_of_another_year_is_said_to_be_unknown(system: System) -> None:
    films = renamed(system, {0: "Heat (1986)"})
    turn = Conversation(films).say("I love Heat (2031)")
    assert turn.notes == ("I know no 'Heat (2031)' of 2031.",)
    assert turn.heard == ()


@settings(
    deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_answers_do_not_depend_on_the_other_dialogs(system: System, data: st.DataObject) -> None:
    pairs = system.recommender.corpus.test
    chosen = data.draw(st.lists(st.integers(0, len(pairs) - 1), min_size=1, max_size=5))
    lines = [pairs[number].text.replace("\n", " ") for number in chosen]
    assert respond_to_lines(system, lines) == [
        respond_to_lines(system, [line])[0] for line in lines
    ]


def test_names_stand_in_the_text_as_they_are() -> None:
    names = {3: 'What\'s "Up", Doc? (1972)'}
    assert spell(["i", "like", 3, "!"], names) == 'i like What\'s "Up", Doc? (1972)!'


def test_ctrl_d_and_ctrl_c_end_the_conversation(system: System) -> None:
    def ended() -> Iterator[str | None]:
        yield "hello"
        yield None

    def interrupted() -> Iterator[str | None]:
        yield "hello"
        raise KeyboardInterrupt

    for lines in (ended(), interrupted()):
        shown: list[str] = []
        talk(
            Conversation(system),
            system.item_names,
            read=lambda lines=lines: next(lines),  # type: ignore[misc]
            write=shown.append,
        )
        assert shown[-1] == "\nBye."
        assert any(line.startswith("bot: ") for line in shown)


def test_a_line_that_is_no_text_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(b"r\xeave\nr\xc3\xaave\r\n\xff"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stream)
    assert read_line() == "r\u00eave"
    assert capsys.readouterr().out == f"you: {NOT_TEXT}\nyou: "
    assert read_line() is None
    assert NOT_TEXT in capsys.readouterr().out


def test_the_program_survives_bytes_that_are_no_text_and_ctrl_c(talking_run: Path) -> None:
    command = [sys.executable, "-m", "separata_kbrd", "chat", "--run", str(talking_run)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"\xff\xfe\n\nhello\n")
    process.stdin.flush()
    answers = 0
    while answers < 3:  # it is listening again after the third
        line = process.stdout.readline()
        assert line
        answers += b"bot: " in line
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert output.endswith(b"Bye.\n")
    assert errors == b""


def test_titles_are_found_by_the_linker_of_the_catalogue(system: System) -> None:
    assert isinstance(system.titles, TitleLinker)
    heard = Context()
    name = names_of(system)[3]
    (mention,) = system.titles.find(f"have you seen {name}?")
    system.hear(heard, f"have you seen {name}?", [(mention, mention.candidates[0])])
    assert heard.items == [int(system.recommender.corpus.graph.catalogue.nodes[3])]
    assert [system.vocabulary.pieces[token] for token in heard.tokens].count("__item__") == 1
