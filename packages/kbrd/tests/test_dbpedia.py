"""The graph out of DBpedia's dumps."""

import bz2
import gzip
import lzma

import numpy as np
import pytest
from separata_kbrd.dbpedia import film_of, read_dumps
from separata_kbrd.graph import SELF_LOOP

R = "http://dbpedia.org/resource"
O = "http://dbpedia.org/ontology"  # noqa: E741 - as DBpedia's prefix


def abstract(name, text):
    return f'<{R}/{name}> <http://www.w3.org/2000/01/rdf-schema#comment> "{text}"@en .\n'


def fact(head, relation, tail, place=O):
    return f"<{R}/{head}> <{place}/{relation}> <{R}/{tail}> .\n"


ABSTRACTS = "# started\n" + "".join(
    (
        abstract("Heat", "Heat is energy, says a book of 1995."),  # the same title and year
        abstract("Heat_(1995_film)", "Heat is a film."),
        abstract("Up_(2009_film)", "Up is a film."),
        abstract("Okja", "Okja is a film of 2017."),
        abstract("Old_Book", "A book of 1850."),  # no year that counts
        abstract("2001:_A_Space_Odyssey", "A film of 1968."),
        abstract("Lonely_(2000_film)", "Nothing is said about it."),
    )
)
FACTS = "# started\n" + "".join(
    (
        fact("Heat_(1995_film)", "starring", "Al_Pacino"),
        fact("Heat_(1995_film)", "starring", "Al_Pacino"),  # twice
        fact("Heat_(1995_film)", "wikiLink", "Paris", place="http://other.org/x"),
        fact("Al_Pacino", "birthPlace", "New_York"),
        fact("New_York", "country", "United_States"),  # a third step
        fact("Up_(2009_film)", "director", "Pete_Docter"),
        fact("Nobody", "starring", "Al_Pacino"),
    )
)
TABLE = (
    "movieId,movieName,nbMentions\n9,Heat  (1995),4\n10,Up (2009),3\n2,Okja (2017),2\n"
    "30,Heat (1995),1\n4,Lonely (2000),0\n5,Old Book,0\n6,2001: A Space Odyssey (2001),1\n"
)


@pytest.fixture
def raw(tmp_path):
    (tmp_path / "short_abstracts_en.ttl").write_text(ABSTRACTS)
    (tmp_path / "mappingbased_objects_en.ttl").write_text(FACTS)
    (tmp_path / "movies_with_mentions.csv").write_text(TABLE)
    return tmp_path


def names(triples):
    rows = triples.rows.tolist()
    return {
        tuple(
            name.rpartition("/")[2].strip(">")
            for name in (triples.nodes[h], triples.relations[r], triples.nodes[t])
        )
        for h, r, t in rows
    }


def test_two_steps_from_the_films_and_a_self_loop_for_each(raw):
    triples, items, files = read_dumps(raw)
    facts = {row for row in names(triples) if row[1] != SELF_LOOP}
    assert facts == {
        ("Heat_(1995_film)", "starring", "Al_Pacino"),
        ("Al_Pacino", "birthPlace", "New_York"),
        ("Up_(2009_film)", "director", "Pete_Docter"),
    }
    loops = {row[0] for row in names(triples) if row[1] == SELF_LOOP}
    assert loops == {"Heat_(1995_film)", "Up_(2009_film)", "2", "30", "4", "5", "6"}
    assert len(triples.rows) == 3 + 7
    assert [path.name for path in files][2] == "movies_with_mentions.csv"
    # Of two films of one resource the second stands alone; so do those without facts.
    keys = dict(zip(items.ids, (triples.nodes[node] for node in items.nodes), strict=True))
    assert keys["9"] == f"<{R}/Heat_(1995_film)>"
    assert keys["30"] == "30"
    assert keys["4"] == "4"


def test_numbers_come_from_sorted_names(raw):
    triples, _, _ = read_dumps(raw)
    uris = [key for key in triples.nodes if key.startswith("<")]
    assert list(triples.nodes) == [*sorted(uris), "2", "4", "5", "6", "30"]
    assert list(triples.relations) == [*sorted(triples.relations[:-1]), SELF_LOOP]
    lines = FACTS.splitlines(keepends=True)
    (raw / "mappingbased_objects_en.ttl").write_text("".join(reversed(lines)))
    again, _, _ = read_dumps(raw)
    assert again.nodes == triples.nodes
    assert np.array_equal(again.rows, triples.rows)


@pytest.mark.parametrize(("ending", "pack"), [("bz2", bz2), ("gz", gzip), ("xz", lzma)])
def test_dumps_may_be_compressed_and_damage_is_named(raw, ending, pack):
    expected, _, _ = read_dumps(raw)
    for name in ("short_abstracts_en.ttl", "mappingbased_objects_en.ttl"):
        content = (raw / name).read_bytes()
        (raw / name).unlink()
        (raw / f"{name}.{ending}").write_bytes(pack.compress(content))
    found, _, _ = read_dumps(raw)
    assert np.array_equal(found.rows, expected.rows)
    path = raw / f"mappingbased_objects_en.ttl.{ending}"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=rf"objects_en\.ttl\.{ending}: cannot be decompressed"):
        read_dumps(raw)


@pytest.mark.parametrize(
    ("uri", "text", "film", "flag"),
    [
        ("Heat_(1995_film)", "", ("Heat", 1995), True),
        ("It_(miniseries)", "It of 1990 and 1991.", ("It", 1990), False),
        ("Jaws_(film_series)", "From 1975.", ("Jaws", 1975), True),
        ("Old_Book", "In 1850.", ("Old Book", None), False),
        ("2012_(film)", "A film of 2009.", ("2012", 2012), True),
        ("AC/DC", "Since 1973.", ("DC", 1973), False),  # the last part of the address
    ],
)
def test_title_and_year_of_a_resource(uri, text, film, flag):
    assert film_of(f"<{R}/{uri}>", text) == (film, flag)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("short_abstracts_en.ttl", "no triple\n", "'no triple' is no URI with a text"),
        ("mappingbased_objects_en.ttl", "<a> <b> 3 .\n", "is not three URIs"),
        ("mappingbased_objects_en.ttl", "# nothing\n", "says nothing about a film"),
        ("movies_with_mentions.csv", "x\n", "does not begin with"),
    ],
)
def test_a_damaged_dump_is_named(raw, name, content, message):
    (raw / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_dumps(raw)
    assert name in str(caught.value)
    (raw / name).unlink()
    with pytest.raises(ValueError, match="no such file"):
        read_dumps(raw)
