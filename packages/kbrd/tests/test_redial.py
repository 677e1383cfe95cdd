"""Reading ReDial, its turn pairs and the split."""

import gzip
import json
import lzma
import zipfile
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from separata_kbrd.redial import (
    SLOT,
    Dialog,
    Message,
    parse_dialog,
    read_dialogs,
    read_item_table,
    split_dialogs,
    turn_pairs,
)

ANSWER = {"suggested": 1, "seen": 0, "liked": 2}


def raw_dialog(*messages, **changes):
    """A dialog as ReDial writes it; worker 1 is the seeker, worker 2 the recommender."""
    value = {
        "conversationId": "5",
        "initiatorWorkerId": 1,
        "respondentWorkerId": 2,
        "messages": [
            {"messageId": n, "timeOffset": n, "senderWorkerId": sender, "text": text}
            for n, (sender, text) in enumerate(messages)
        ],
        "movieMentions": {"7": "Heat (1995)"},
        "initiatorQuestions": {"7": ANSWER},
        "respondentQuestions": [],
    }
    return {**value, **changes}


def pairs(*messages, nodes=None, link=lambda text: ()):
    node_of_item = {"7": 70, "8": 80} if nodes is None else nodes
    return list(turn_pairs(parse_dialog(raw_dialog(*messages)), node_of_item, link))


def test_messages_of_a_turn_are_joined_and_empty_ones_left_out():
    (pair,) = pairs((1, "hi"), (1, ""), (1, "a film?"), (2, ""), (2, "yes"), (2, "@7 !"))
    assert (pair.text, pair.label) == ("hi\na film?", f"yes\n{SLOT} !")
    assert (pair.opens, pair.turn, pair.targets) == (True, 1, (70,))


def test_a_dialog_that_the_recommender_opens_begins_with_an_empty_question():
    first, second = pairs((2, "hello"), (1, "hi"), (2, "what do you like?"))
    assert (first.text, first.label, first.opens) == ("", "hello", True)
    assert (second.text, second.turn, second.opens) == ("hi", 2, False)


def test_a_last_question_without_an_answer_is_left_out_but_an_inner_one_stays():
    found = pairs((1, "a"), (2, ""), (1, "b"), (2, "c"), (1, "bye"))
    assert [(pair.text, pair.label) for pair in found] == [("a", ""), ("b", "c")]
    assert pairs((1, "a"), (2, "")) == []
    assert pairs() == []


def test_context_holds_all_earlier_items_of_both_and_the_seekers_of_this_turn():
    links = {"@7 and ann": (1,), "see @8 or @7": (2, 2), "@8 again": (3,)}
    first, second = pairs(
        (1, "@7 and ann"),
        (2, "see @8 or @7"),
        (1, "@8 again"),
        (2, "@7 @7"),
        link=lambda text: links.get(text, ()),
    )
    assert first.context_items == (70,)
    assert first.targets == (80, 70)
    assert second.context_items == (70, 80, 70, 80)
    assert second.context_entities == (1, 2, 2, 3)
    assert (second.targets, second.distinct_targets) == ((70, 70), (70,))


@pytest.mark.parametrize(
    ("text", "expected", "items"),
    [
        ("@7", SLOT, (70,)),
        ("see @7, @8.", f"see {SLOT}, {SLOT}.", (70, 80)),
        ("@9 @ @x 7@", " @ @x 7@", ()),  # not in the table of films: it vanishes
        ("@07", SLOT, (70,)),  # the authors read a number
        ("@78", "", ()),
        ("@" + "7" * 9000, "", ()),  # too long for a number
        ("@@7x", f"@{SLOT}x", (70,)),
    ],
)
def test_items_in_a_text(text, expected, items):
    (pair,) = pairs((1, text), (2, "ok"))
    assert (pair.text, pair.items) == (expected, items)


@given(st.lists(st.tuples(st.sampled_from([1, 2]), st.sampled_from(["", "a", "@7", "@8 x"]))))
def test_each_context_continues_the_one_before(messages):
    found = pairs(*messages, link=lambda text: (len(text),))
    for before, after in pairwise(found):
        assert after.context_items == before.context_items + before.targets + after.items
        assert after.turn == before.turn + 1
        assert not after.opens


def test_a_field_that_was_not_filled_in_is_an_empty_list():
    dialog = parse_dialog(raw_dialog())
    assert dialog.recommender_answers == {}
    assert dialog.seeker_answers["7"].liked == 2
    assert dialog.names == {"7": "Heat (1995)"}
    assert parse_dialog(raw_dialog(movieMentions=[])).names == {}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "lacks 'initiatorWorkerId'"),
        (raw_dialog(messages="x"), "'messages' is str"),
        (raw_dialog((3, "x")), "message 1 is from 3"),
        (raw_dialog((1, None)), "'text' is NoneType"),
        (raw_dialog((1, "a"), initiatorQuestions=[1]), "is a list that is not empty"),
        (raw_dialog((1, "a"), respondentQuestions={"7": {"seen": 1}}), "lacks 'suggested'"),
        (raw_dialog((1, "a"), initiatorWorkerId=True), "'initiatorWorkerId' is bool"),
    ],
)
def test_a_value_that_is_no_dialog_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        parse_dialog(value)


def test_halves_of_characters_become_characters_that_a_file_can_hold():
    line = json.dumps(raw_dialog((1, "\U0001f600 @7"), (2, "ok"))).replace("\\ude00", "")
    dialog = parse_dialog(json.loads(line))
    assert dialog.messages[0].text == "\ufffd @7"
    dialog.messages[0].text.encode("utf-8")


LINES = "".join(
    json.dumps(raw_dialog((1, f"r\u00eave \u2028 {n}"), (2, "ok")), ensure_ascii=False) + "\n"
    for n in range(3)
).encode()


@pytest.mark.parametrize("ending", ["", ".gz", ".xz"])
def test_dialogs_are_read_plain_or_compressed(tmp_path, ending):
    pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[ending]
    (tmp_path / f"train_data.jsonl{ending}").write_bytes(pack(LINES))
    dialogs, path = read_dialogs(tmp_path, "train_data.jsonl")
    assert [dialog.messages[0].text for dialog in dialogs] == [
        f"r\u00eave \u2028 {n}" for n in range(3)
    ]
    assert path.name == f"train_data.jsonl{ending}"


def test_dialogs_are_read_from_inside_the_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "redial_dataset.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("redial/train_data.jsonl", LINES)
    dialogs, path = read_dialogs(tmp_path, "train_data.jsonl")
    assert len(dialogs) == 3
    assert path.name == "redial_dataset.zip"
    with pytest.raises(ValueError, match=r"redial_dataset\.zip: holds 0 files named test_data"):
        read_dialogs(tmp_path, "test_data.jsonl")
    content = path.read_bytes()
    for length in range(0, len(content), 11):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"redial_dataset\.zip: not a readable archive"):
            read_dialogs(tmp_path, "train_data.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1 is not a dialog"),
        (LINES + b"{", "line 4 is not a dialog"),
        (LINES[:-30], "line 3 is not a dialog"),
        (LINES + b"\xff\n", "line 4 is not a dialog"),
        (b"[" * 100_000, "line 1 is not a dialog"),
        (LINES + b"\n\n", "line 4 is not a dialog"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, content, message):
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"d\.jsonl: {message}") as caught:
        read_dialogs(tmp_path, "d.jsonl")
    assert "\n" not in str(caught.value)


def test_the_table_of_films_is_read_as_csv(tmp_path):
    path = tmp_path / "movies_with_mentions.csv"
    path.write_text(
        'movieId,movieName,nbMentions\r\n7,"Me, ""You"" (2001)",12\r\n8,It  (2017),0\r\n'
    )
    assert read_item_table(path) == {"7": ('Me, "You" (2001)', 12), "8": ("It  (2017)", 0)}
    for wrong, message in (
        ("7,Heat,3\n", "does not begin with"),
        ("movieId,movieName,nbMentions\n", "holds no film"),
        ("movieId,movieName,nbMentions\n7,Heat\n", "row 2 is not"),
        ("movieId,movieName,nbMentions\n7,A,1\n7,B,1\n", "row 3 repeats the film 7"),
        ('movieId,movieName,nbMentions\n7,"A,1\n', "not a table of films"),
    ):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=rf"mentions\.csv: {message}"):
            read_item_table(path)


def numbered(count):
    empty = {"names": {}, "seeker_answers": {}, "recommender_answers": {}}
    return [Dialog(id=str(n), messages=(Message("seeker", "a"),), **empty) for n in range(count)]


def test_the_official_sizes_of_the_split():
    # 10,006 training dialogs of ReDial; the authors' script keeps int(0.9 * 10,006) = 9,005.
    train, valid = split_dialogs(numbered(10_006), train_share=0.9, seed=1)
    assert (len(train), len(valid)) == (9_005, 1_001)


def test_equal_seeds_give_equal_splits_and_others_differ():
    dialogs = numbered(100)
    one, again, other = (split_dialogs(dialogs, train_share=0.9, seed=s) for s in (1, 1, 2))
    assert one == again
    assert one != other
    train, valid = one
    assert sorted(map(id, train + valid)) == sorted(map(id, dialogs))
    assert [int(dialog.id) for dialog in train] == sorted(int(dialog.id) for dialog in train)


def test_too_few_dialogs_cannot_be_split():
    with pytest.raises(ValueError, match="1 dialogs are too few"):
        split_dialogs(numbered(1), train_share=0.9, seed=1)
