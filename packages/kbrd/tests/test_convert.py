"""Checkpoints of the authors' code: the verb ``convert``."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from separata_kbrd.config import DataConfig, DialogConfig, RecommenderConfig
from separata_kbrd.convert import from_authors
from separata_kbrd.convert_dialog import dialog_names
from separata_kbrd.data import load
from separata_kbrd.runs import load_recommender
from separata_kbrd.system import Context, System, load_system
from separata_kbrd.train import train
from separata_shared.training import TrainConfig, read_weights

DATA = DataConfig(threshold=10, tiny_dialogs=64, tiny_items=24, slots="shared")
FLAGS = (
    *("--data.threshold", 10, "--data.tiny_dialogs", 64, "--data.tiny_items", 24),
    *("--data.slots", "shared"),
)
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "made"
    train(
        data=DATA,
        recommender=RecommenderConfig(width=16, num_bases=2, batch_pairs=64),
        dialog=DialogConfig(
            width=20,
            hidden_width=12,
            encoder_layers=2,
            decoder_layers=1,
            bias_width=24,
            max_length=200,
            batch_pairs=32,
            max_reply=16,
        ),
        train=TrainConfig(steps=8, lr=0.02),
        train_dialog=TrainConfig(steps=20, lr=0.01),
        run=path,
    )
    return path


@pytest.fixture(scope="module")
def system(run: Path) -> System:
    return load_system(run)


def authors_recommender(run: Path, *, extra_nodes: int = 0) -> State:
    """A trained recommender in the names and layout of the authors' code."""
    state = read_weights(load_recommender(run).weights)

    def padded(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, torch.ones(extra_nodes, *tensor.shape[1:])])

    return {
        "rgcn.basis": padded(state["graph.basis"]).transpose(0, 1).contiguous(),
        "rgcn.att": state["graph.att"],
        "rgcn.root": padded(state["graph.root"]),
        "rgcn.bias": state["graph.bias"],
        "self_attn.a": state["user.a"],
        "self_attn.b": state["user.b"],
        "output.bias": padded(state["output_bias"]),
        "entity_emb.weight": torch.zeros(3, 2),
        "relation_emb.weight": torch.zeros(214, 2),
        "output.weight": torch.zeros(3, 2),
    }


def authors_dialog(run: Path, system: System) -> State:
    """A trained system in the names and layout of the authors' code."""
    own, config = system.network.state_dict(), system.config
    names = dialog_names(config.encoder_layers, config.decoder_layers)
    state = {theirs: own[ours] for theirs, ours in names.items()}
    for side, place in (("encoder", "source"), ("decoder", "target")):
        positions = getattr(system.network.transformer, place).positions
        state[f"{side}.embeddings.weight"] = state["embeddings.weight"]
        state[f"{side}.position_embeddings.weight"] = positions.table
    recommender = authors_recommender(run, extra_nodes=6)
    return {
        "START": torch.tensor([1]),
        **state,
        **{f"kbrd.{name}": tensor for name, tensor in recommender.items()},
    }


def write_dictionary(path: Path, system: System) -> Path:
    counts = range(len(system.vocabulary) + 7, 7, -1)
    lines = zip(system.vocabulary.pieces, counts, strict=True)
    path.write_text("".join(f"{word}\t{count}\n" for word, count in lines), encoding="utf-8")
    return path


class TestRecommender:
    @pytest.mark.parametrize("prefix", ["", "kbrd."], ids=["recommender", "dialog"])
    def test_a_checkpoint_recommends_as_before(
        self, prefix: str, command: Callable[..., Any], run: Path, tmp_path: Path
    ) -> None:
        state = authors_recommender(run, extra_nodes=6)
        state = {f"{prefix}{name}": tensor for name, tensor in state.items()}
        if prefix:
            state["embeddings.weight"] = torch.zeros(4, 2)  # of the Transformer
        torch.save({"model": state, "optimizer": {"lr": 1.0}}, tmp_path / "model")
        done = command("convert", "--checkpoint", tmp_path / "model", *FLAGS, "--run", "converted")
        assert done.status == 0, done
        assert ("was left out" in done.output) == bool(prefix)
        wanted, found = load_recommender(run), load_recommender(Path("converted"))
        assert torch.equal(found.model.H, wanted.model.H)
        assert torch.equal(found.model.output_bias, wanted.model.output_bias)
        command(
            "convert", "--checkpoint", tmp_path / "model", *FLAGS, "--run", "converted"
        ).refused("holds a run already")

    def test_names_of_the_library_of_today(self, run: Path) -> None:
        state = authors_recommender(run)
        nodes = load(DATA).graph.num_nodes
        today = {"rgcn.basis": "rgcn.weight", "rgcn.att": "rgcn.comp"}
        new = {today.get(name, name): tensor for name, tensor in state.items()}
        old = from_authors(state, num_nodes=nodes, source="old")
        for name, tensor in from_authors(new, num_nodes=nodes, source="new").items():
            assert torch.equal(tensor, old[name])

    def test_wrong_files_end_in_one_line(
        self, command: Callable[..., Any], run: Path, tmp_path: Path
    ) -> None:
        def refused(content: Any, *words: str) -> None:
            file = tmp_path / "model"
            if isinstance(content, bytes):
                file.write_bytes(content)
            else:
                torch.save(content, file)
            command("convert", "--checkpoint", file, *FLAGS, "--run", "x").refused("model", *words)
            assert not Path("x").exists()

        good = authors_recommender(run)
        command("convert", "--checkpoint", "none").refused("none", "no such file")
        refused(b"", "not a readable checkpoint")
        refused(b"hello", "not a readable checkpoint", "torch did not write it")
        refused([1, 2], "holds no model")
        refused({"model": {"x": torch.zeros(1)}}, "unknown tensor x")
        refused({"model": {n: t for n, t in good.items() if n != "rgcn.att"}}, "lacks graph.att")
        nan = good | {"rgcn.bias": torch.full((16,), torch.nan)}
        refused({"model": nan}, "rgcn.bias holds NaN")
        refused({"model": good | {"self_attn.b": torch.zeros(4, 1)}}, "user.b has shape (4, 1)")

    def test_a_hostile_checkpoint_runs_nothing(
        self, command: Callable[..., Any], tmp_path: Path
    ) -> None:
        (tmp_path / "model").write_bytes(pickle.dumps({"model": _Bomb()}))
        command("convert", "--checkpoint", tmp_path / "model").refused("model")
        torch.save({"model": _Bomb()}, tmp_path / "model")
        command("convert", "--checkpoint", tmp_path / "model").refused("could run code")
        assert not Path("boom").exists()


class TestDialog:
    def test_a_checkpoint_answers_as_before(
        self, command: Callable[..., Any], run: Path, system: System, tmp_path: Path
    ) -> None:
        torch.save({"model": authors_dialog(run, system)}, tmp_path / "model")
        (tmp_path / "model.opt").write_text(json.dumps({"n_heads": 2, "embeddings_scale": True}))
        words = write_dictionary(tmp_path / "model.dict", system)
        flags = (*FLAGS, "--data.dictionary", words, "--dialog.max_reply", 16)
        done = command("convert", "--checkpoint", tmp_path / "model", *flags, "--run", "new")
        assert done.status == 0, done
        found = load_system(Path("new"))
        assert found.vocabulary.fingerprint == system.vocabulary.fingerprint
        for name in ("width", "hidden_width", "encoder_layers", "decoder_layers", "bias_width"):
            assert getattr(found.config, name) == getattr(system.config, name), name
        assert found.config.max_length == 200
        for name, tensor in system.network.state_dict().items():
            assert torch.equal(found.network.state_dict()[name], tensor), name
        answers = []
        for one in (system, found):
            context = Context()
            one.hear(context, "Hi! Do you know a good mystery movie?", [])
            answers.append(one.respond([context]))
        assert answers[0] == answers[1]
        assert command("generate", "--run", "new", stdin="any horror\n").status == 0
        scored = command("evaluate", "--run", "new")
        assert scored.status == 0, scored
        assert "perplexity" in scored.output

    def test_wrong_checkpoints_end_in_one_line(
        self, command: Callable[..., Any], run: Path, system: System, tmp_path: Path
    ) -> None:
        good, file = authors_dialog(run, system), tmp_path / "model"
        words = write_dictionary(tmp_path / "model.dict", system)

        def refused(change: dict[str, torch.Tensor | None], *said: str, flags: Any = ()) -> None:
            state = {name: tensor for name, tensor in (good | change).items() if tensor is not None}
            torch.save({"model": state}, file)
            flags = (*FLAGS, "--data.dictionary", words, "--dialog.max_reply", 16, *flags)
            command("convert", "--checkpoint", file, *flags, "--run", "x").refused("model", *said)
            assert not Path("x").exists()

        norm, table = "encoder.layers.1.norm2.weight", "decoder.position_embeddings.weight"
        refused({norm: None}, "lacks encoder.layers.1.norm2.weight")
        refused({"decoder.layers.0.norm4.bias": torch.ones(20)}, "unknown tensor decoder.layers.0")
        refused({"encoder.layers.7.norm1.bias": torch.ones(20)}, "encoder.layers.7.norm1.bias")
        refused({norm: torch.full((20,), torch.inf)}, f"{norm} holds NaN or infinite")
        refused({norm: torch.ones(19)}, f"{norm} has shape (19,)")
        refused({"embeddings.weight": torch.ones(20)}, "embeddings.weight has shape (20,)")
        refused({"decoder.embeddings.weight": torch.ones(3, 20)}, "one table")
        refused({table: good[table] + 1e-3}, f"{table} is not the table of sines")
        refused({table: None}, f"lacks {table}")
        refused({"START": torch.tensor([2])}, "START")
        bias = {f"user_representation_to_bias_1.{n}": torch.ones(s) for n, s in _OTHER_USER.items()}
        refused(bias, "user_representation_to_bias_1.weight has shape (24, 15)")
        refused(
            {},
            "heads do not divide width 20",
            flags=("--dialog.num_heads", 3, "--dialog.width", 30),
        )
        refused({}, "data.slots shared", flags=("--data.slots", "separate"))
        words.write_text(words.read_text(encoding="utf-8") + "zzz\t1\n", encoding="utf-8")
        refused({}, "rows", "tokens")

    def test_options_beside_it_must_agree(
        self, command: Callable[..., Any], run: Path, system: System, tmp_path: Path
    ) -> None:
        torch.save({"model": authors_dialog(run, system)}, tmp_path / "model")
        words = write_dictionary(tmp_path / "model.dict", system)
        flags = (*FLAGS, "--data.dictionary", words, "--run", "x")
        for text, said in (
            ('{"n_heads": 4}', "has 4 heads, but dialog.num_heads is 2"),
            ('{"embeddings_scale": false}', "not scaled"),
            ("[]", "not the options"),
            ("{", "not valid JSON"),
        ):
            (tmp_path / "model.opt").write_text(text)
            done = command("convert", "--checkpoint", tmp_path / "model", *flags)
            done.refused("model.opt", said)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "is empty"),
            ("hello\n", "line 1 is not a token, a tab and its count"),
            ("hello\tmany\n", "line 1 is not"),
            ("\t3\n", "line 1 is not"),
            ("the\t3\n", "__null__, __start__, __end__, __unk__"),
            ("{marks}", "at least one word"),
            ("{marks}a\t2\na\t1\n", "'a' cannot be a word"),
            ("{marks}a b\t2\n", "'a b' cannot be a word"),
        ],
    )
    def test_wrong_dictionaries_end_in_one_line(
        self, text: str, said: str, command: Callable[..., Any], tmp_path: Path
    ) -> None:
        marks = "__null__\t9\n__start__\t8\n__end__\t7\n__unk__\t6\n"
        (tmp_path / "words.dict").write_text(text.format(marks=marks))
        flags = (*FLAGS, "--data.dictionary", tmp_path / "words.dict")
        command("convert", "--checkpoint", "any", *flags).refused("words.dict", said)

    def test_the_dictionary_must_be_there(self, command: Callable[..., Any]) -> None:
        done = command("convert", "--checkpoint", "any", *FLAGS, "--data.dictionary", "none.dict")
        done.refused("none.dict", "no such file")


_OTHER_USER = {"weight": (24, 15), "bias": (24,)}


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("boom"),))
