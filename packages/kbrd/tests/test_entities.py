"""Links from messages to nodes."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import parse_qs

import pytest
from separata_kbrd.conversation import Conversation
from separata_kbrd.entities import (
    NameLinker,
    nodes_of,
    read_link_table,
    spotlight_linker,
    table_linker,
)
from separata_kbrd.system import load_system

KEYS = [
    "Tom_Hanks", "Horror_film", "Horror_fiction", "Thriller_(genre)", "Science_fiction_film",
    "Paris", "The_Thing_(film)", "New_York_City", "New_York", "Short_film", "2012_in_film",
    "The_One", "Michael_Mann_(director)", "Michael_Mann_(singer)",
]  # fmt: skip
URIS = [f"<http://dbpedia.org/resource/{key}>" for key in KEYS]


@pytest.fixture
def linker():
    degrees = [2, 9, 50, 1, 1, 1, 1, 1, 1, 1, 1, 1, 3, 8]
    return NameLinker(URIS, degrees=degrees, items=[6])


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("a movie with tom hanks", ["Tom_Hanks"]),
        ("i like horror movies, Horror!", ["Horror_film"] * 2),  # that of films, if both have edges
        ("a thriller or sci-fi", ["Thriller_(genre)", "Science_fiction_film"]),
        ("science fiction film", ["Science_fiction_film"]),
        ("in New York City, new york", ["New_York_City", "New_York"]),
        ("in paris", []),  # one word that is no genre
        ("the thing", []),  # items are found by their titles
        ("a short film", ["Short_film"]),
        ("a short movie, 2012 film", []),  # no genres
        ("the one in film", []),
        ("michael mann", ["Michael_Mann_(singer)"]),  # the one with most edges
        ("", []),
    ],
)
def test_nodes_by_name(linker, text, keys):
    assert [KEYS[node] for node in linker(text)] == keys


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("something by Acme, of Kind1", ["Acme", "Kind1"]),
        ("ACME or acme", []),  # one word only as the table writes it
        ("an espresso machine from Acme", ["espresso machine", "Acme"]),
        ("espresso is all I drink", ["espresso"]),
        ("the best @Acme 2012", []),  # an ordinary word, an identifier and a number
        ("Zoom", []),  # an item
    ],
)
def test_one_word_that_is_the_key_itself_is_found_as_it_is_written(text, keys):
    nodes = ["Acme", "Kind1", "espresso", "espresso machine", "the", "best", "2012", "Zoom"]
    linker = NameLinker(nodes, degrees=[1] * len(nodes), items=[7])
    assert [nodes[node] for node in linker(text)] == keys


def test_a_table_gives_links_in_order_with_repeats_and_only_nodes():
    table = {"hi": ["<b>", "<x>", "<a>", "<b>"]}
    link = nodes_of(table_linker(table), {"<a>": 0, "<b>": 1})
    assert list(link("hi")) == [1, 0, 1]
    assert list(link("a new message")) == []


@pytest.mark.parametrize("value", [[], {"a": "b"}, {"a": [1]}, 3])
def test_a_table_of_another_kind_is_named(tmp_path, value):
    (tmp_path / "t.json").write_text(json.dumps(value))
    with pytest.raises(ValueError, match=r"t\.json"):
        read_link_table(tmp_path / "t.json")


@pytest.fixture
def service():
    """A service on this machine that answers what the test puts into ``answers``."""
    answers: list[bytes] = []
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            asked.append((self.headers["Accept"], parse_qs(body)))
            self.send_response(200 if answers[0] else 500)
            self.end_headers()
            self.wfile.write(answers[0])

        def log_message(self, *arguments):
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/rest/annotate", answers, asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_spotlight_is_asked_as_the_authors_do(service):
    url, answers, asked = service
    answers.append(
        json.dumps({"Resources": [{"@URI": "http://u/A"}, {"@URI": "http://u/B"}]}).encode()
    )
    link = spotlight_linker(url)
    assert link("R\u00eave & @12?") == ["<http://u/A>", "<http://u/B>"]
    assert asked == [("application/json", {"text": ["R\u00eave & @12?"], "confidence": ["0.1"]})]
    answers[0] = b"{}"
    assert link("nothing") == []
    assert link("  ") == []
    assert len(asked) == 2  # an empty message is not sent


@pytest.mark.parametrize("answer", [b"", b"<html>", b"[]", b'{"Resources": [{}]}', b"\xff"])
def test_another_answer_ends_in_one_line(service, answer):
    url, answers, _ = service
    answers.append(answer)
    with pytest.raises(ValueError, match="Spotlight") as caught:
        spotlight_linker(url)("hello")
    assert "\n" not in str(caught.value)


def test_no_service_ends_in_one_line():
    with pytest.raises(ValueError, match="Spotlight does not answer"):
        spotlight_linker("http://127.0.0.1:9/", seconds=1)("hello")


@pytest.mark.parametrize("url", ["file:///etc/hostname", "localhost", "ftp://x/y"])
def test_only_addresses_of_the_web_are_asked(url):
    with pytest.raises(ValueError, match="begins with http"):
        spotlight_linker(url)


def test_chat_asks_spotlight_only_where_it_is_named(service, talking_run, system):
    url, answers, asked = service
    key = next(one for one in system.recommender.corpus.graph.nodes if one.startswith("<http"))
    answers.append(json.dumps({"Resources": [{"@URI": key[1:-1]}]}).encode())
    plain, linked = Conversation(system), Conversation(load_system(talking_run, spotlight=url))
    plain.say("any horror movies?")
    assert asked == []
    linked.say("any horror movies?")
    assert [form["text"] for _, form in asked] == [["any horror movies?"]]
    node = system.recommender.corpus.graph.nodes.index(key)
    assert linked.context.entities == [node] != plain.context.entities


def test_a_chat_without_its_spotlight_ends_in_one_line(command, talking_run):
    flags = ("--run", talking_run, "--spotlight", "http://127.0.0.1:9/")
    command("chat", *flags, stdin="hello\n").refused("http://127.0.0.1:9/", "does not answer")
    flags = ("--run", talking_run, "--spotlight", "localhost")
    command("chat", *flags, stdin="hello\n").refused("begins with http")
