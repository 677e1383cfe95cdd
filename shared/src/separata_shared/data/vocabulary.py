"""Vocabularies: from a line of text to token numbers and back.

A vocabulary is what its file holds: a sentencepiece model (sub-words) or a list of words. The
special tokens have the same numbers in both, fairseq's.
"""

import hashlib
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from separata_shared.files import atomic_write, read_bytes

BOS, PAD, EOS, UNK = 0, 1, 2, 3
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")

_WORD_LIST = b"words\n"  # first line of a word-list file; a sentencepiece model never begins so


class Vocabulary:
    """Tokens with numbers: ``bos`` 0, ``pad`` 1, ``eos`` 2, ``unk`` 3, then the pieces of text.

    Made by ``word_vocabulary``, ``train_subwords`` or ``Vocabulary.load``.

    Args:
        content: The bytes of the vocabulary's file; they decide its identity.
        pieces: The token of each number, special tokens included.
        segment: From a line to token numbers, without special tokens at its ends.
        join: From token numbers without special tokens to a line.
    """

    bos, pad, eos, unk = BOS, PAD, EOS, UNK

    def __init__(
        self,
        content: bytes,
        *,
        pieces: Sequence[str],
        segment: Callable[[str], list[int]],
        join: Callable[[list[int]], str],
    ) -> None:
        self.pieces = tuple(pieces)
        self._content = content
        self._segment = segment
        self._join = join

    def __len__(self) -> int:
        return len(self.pieces)

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} tokens, fingerprint {self.fingerprint[:12]})"

    def encode(self, line: str) -> NDArray[np.int32]:
        """Token numbers of a line, with ``eos`` at the end; an empty line is ``eos`` alone."""
        return np.array([*self._segment(line), EOS], dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token numbers up to the first ``eos``; ``bos`` and ``pad`` are left out.

        Raises:
            ValueError: A number lies outside the vocabulary.
        """
        kept: list[int] = []
        for token in map(int, ids):
            if token == EOS:
                break
            if not 0 <= token < len(self):
                raise ValueError(f"token {token} lies outside a vocabulary of {len(self)}")
            if token not in (BOS, PAD):
                kept.append(token)
        return self._join(kept)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the vocabulary's file: equal if and only if the vocabularies are equal."""
        return hashlib.sha256(self._content).hexdigest()

    def check(self, fingerprint: str, owner: Path | str) -> None:
        """Make sure that this is the vocabulary with which ``owner`` was made.

        Raises:
            ValueError: It is another one; the message names ``owner``.
        """
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"{owner}: was made with another vocabulary (fingerprint {fingerprint[:12]}, "
                f"the data have {self.fingerprint[:12]}); use the data it was made with"
            )

    def save(self, path: Path | str) -> None:
        """Write the vocabulary's file atomically."""
        with atomic_write(path) as temporary:
            temporary.write_bytes(self._content)

    @classmethod
    def load(cls, path: Path | str) -> "Vocabulary":
        """Read a vocabulary that ``save`` wrote, or a sentencepiece model with our special tokens.

        Raises:
            ValueError: The file is missing, damaged, or numbers its special tokens otherwise; the
                message names it.
        """
        content = read_bytes(path)
        try:
            if content.startswith(_WORD_LIST):
                return word_vocabulary(content.decode("utf-8").split("\n")[1:-1])
            return _subword_vocabulary(content)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: not a usable vocabulary ({error})") from None


def word_vocabulary(words: Iterable[str]) -> Vocabulary:
    """Vocabulary of whole words: a line is split at white space, other words become ``unk``.

    Raises:
        ValueError: No word, a word twice, with white space inside, or spelled as a special token.
    """
    words = list(words)
    if not words:
        raise ValueError("a vocabulary needs at least one word")
    pieces = (*SPECIALS, *words)
    for word, count in Counter(pieces).items():
        if count > 1 or word.split() != [word]:
            raise ValueError(f"{word!r} cannot be a word: it is double, reserved or has a space")
    number = {word: index for index, word in enumerate(pieces) if index >= len(SPECIALS)}
    return Vocabulary(
        _WORD_LIST + "".join(f"{word}\n" for word in words).encode("utf-8"),
        pieces=pieces,
        segment=lambda line: [number.get(word, UNK) for word in line.split()],
        join=lambda ids: " ".join(pieces[index] for index in ids),
    )


def frequent_words(lines: Iterable[str], size: int) -> Vocabulary:
    """Word vocabulary of at most ``size`` tokens: the most frequent words, ties in their order."""
    counts = Counter(word for line in lines for word in line.split())
    for special in SPECIALS:
        del counts[special]
    return word_vocabulary(word for word, _ in counts.most_common(max(size - len(SPECIALS), 0)))


def train_subwords(
    lines: Iterable[str],
    size: int,
    *,
    kind: Literal["bpe", "unigram"] = "bpe",
) -> Vocabulary:
    """Learn a vocabulary of sub-words with sentencepiece.

    Equal lines give equal bytes: one thread, no sampling. Every character of ``lines`` is covered
    and text is not normalised beyond white space, so decoding gives the line back.

    Args:
        lines: Training text, one sentence each.
        size: Number of tokens, special tokens included.
        kind: Byte-pair encoding or a unigram language model.

    Raises:
        ValueError: ``lines`` cannot give ``size`` tokens; the message says how many are possible.
    """
    model = io.BytesIO()
    try:
        _sentencepiece().SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=size,
            model_type=kind,
            character_coverage=1.0,
            normalization_rule_name="identity",
            max_sentence_length=1 << 20,
            num_threads=1,
            bos_id=BOS,
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNK,
            unk_surface="<unk>",
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_training_problem(str(error), size)) from None
    return _subword_vocabulary(model.getvalue())


def _training_problem(message: str, size: int) -> str:
    """One line that says what to do about sentencepiece's complaint."""
    most = re.search(r"value <= (\d+)", message)
    least = re.search(r"required_chars.*?(\d+) vs (\d+)", message)
    if most:
        return f"vocabulary size {size} is too large for this text: at most {most[1]}"
    if least or "smaller than required_chars" in message:
        return f"vocabulary size {size} is too small for the characters of this text"
    return f"vocabulary of size {size} cannot be learned: {message.splitlines()[-1]}"


def _subword_vocabulary(content: bytes) -> Vocabulary:
    model = _sentencepiece().SentencePieceProcessor(model_proto=content)
    special = (model.bos_id(), model.pad_id(), model.eos_id(), model.unk_id())
    if special != (BOS, PAD, EOS, UNK):
        raise ValueError(f"bos, pad, eos, unk are {special} where (0, 1, 2, 3) is needed")
    return Vocabulary(
        content,
        pieces=[model.id_to_piece(index) for index in range(len(model))],
        segment=model.encode,
        join=lambda ids: str(model.decode(ids)).strip(),
    )


def _sentencepiece() -> Any:
    try:
        import sentencepiece
    except ImportError:
        raise ValueError("sub-words need: pip install 'separata-shared[text]'") from None
    return sentencepiece
