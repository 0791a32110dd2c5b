"""Nouns and verbs of captions, for questions that erase one of them.

What counts follows the authors' recipe for MCQ (Ge et al., CVPR 2022, arXiv 2201.04850): nouns are single words; a verb
phrase is a longest run of words of the form VERB? ADVERB* AUXILIARY* VERB+, such as "is slowly dancing".
"""

from __future__ import annotations

import ast
import functools
import re
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bowerbird.errors import InputError, MissingExtraError

_VERB_PHRASE = re.compile("V?R*A*V+")
_OUTER = string.punctuation + "\u2018\u2019\u201c\u201d\u2026"  # curly quotes and the ellipsis


class PhraseExtractor(Protocol):
    """Finds phrases in a caption. Each is one or several of its words, without the punctuation around them."""

    def nouns(self, caption: str) -> list[str]: ...

    def verbs(self, caption: str) -> list[str]: ...


def words_of(caption: str) -> list[str]:
    """The words between spaces or commas, without punctuation around them: A, cat's, toy of ``"A cat's (toy)."``."""
    return [word for word in (part.strip(_OUTER) for part in caption.replace(",", " ").split()) if word]


# ------------------------------------------------------------------------------------------------ a closed vocabulary


class ClosedVocabulary:
    """Phrases that are known beforehand, for captions that a program wrote or that speak of few things.

    Of phrases that begin at the same word the longest is found, and none overlaps another of its kind. Capitals do not
    matter; a phrase is given back as the caption writes it.

    Args:
        nouns, verbs: Phrases of one or several words, such as ``red boot`` or ``moves left``.

    Raises:
        InputError: There is no phrase, or one without a word.
    """

    def __init__(self, nouns: Sequence[str], verbs: Sequence[str]) -> None:
        if not nouns and not verbs:
            raise InputError("a closed vocabulary needs nouns or verbs; both lists are empty")
        self._nouns, self._verbs = _known(nouns, "nouns"), _known(verbs, "verbs")

    def nouns(self, caption: str) -> list[str]:
        return _found(words_of(caption), self._nouns)

    def verbs(self, caption: str) -> list[str]:
        return _found(words_of(caption), self._verbs)


_Known = dict[str, list[tuple[str, ...]]]  # first word -> phrases that begin with it, the longest first


def _known(phrases: Sequence[str], kind: str) -> _Known:
    known: _Known = {}
    for phrase in dict.fromkeys(phrases):
        words = tuple(words_of(phrase.lower()))
        if not words:
            raise InputError(f"{kind}: {phrase!r} has no word")
        known.setdefault(words[0], []).append(words)
    for same in known.values():
        same.sort(key=len, reverse=True)
    return known


def _found(words: list[str], known: _Known) -> list[str]:
    lower = [word.lower() for word in words]
    phrases, start = [], 0
    while start < len(words):
        lengths = (len(p) for p in known.get(lower[start], ()) if tuple(lower[start : start + len(p)]) == p)
        length = next(lengths, 0)
        if length:
            phrases.append(" ".join(words[start : start + length]))
        start += max(length, 1)
    return phrases


# ------------------------------------------------------------------------------------------------ taggers

# Words -> one letter each: N noun, V verb, A auxiliary, R adverb, "." another word.
Tagger = Callable[[list[str]], str]


class TaggedPhrases:
    """Phrases of any caption by the parts of speech of its words.

    Args:
        tagger: ``HanTaTagger()``, ``SpacyTagger(model)`` or a function of your own.
    """

    def __init__(self, tagger: Tagger) -> None:
        self.tagger = tagger
        self._last: tuple[str, list[str], str] = ("", [], "")  # nouns and verbs of a caption are asked for together

    def nouns(self, caption: str) -> list[str]:
        words, letters = self._tagged(caption)
        return [word for word, letter in zip(words, letters, strict=True) if letter == "N"]

    def verbs(self, caption: str) -> list[str]:
        words, letters = self._tagged(caption)
        return [" ".join(words[start:stop]) for start, stop in verb_spans(letters)]

    def _tagged(self, caption: str) -> tuple[list[str], str]:
        if self._last[0] != caption:
            words = words_of(caption)
            self._last = (caption, words, self.tagger(words))
        return self._last[1:]


def verb_spans(letters: str) -> list[tuple[int, int]]:
    """``(start, stop)`` of the verb phrases in the letters of a ``Tagger``: the longest first claims its words."""
    found: list[tuple[int, int]] = []
    spans = (
        (run.start() + start, run.start() + stop)
        for run in re.finditer("[VAR]+", letters)
        for start in range(len(run.group()))
        for stop in range(start + 1, len(run.group()) + 1)
        if _VERB_PHRASE.fullmatch(run.group(), start, stop)
    )
    for start, stop in sorted(spans, key=lambda span: (span[0] - span[1], span[0])):
        if all(stop <= other_start or start >= other_stop for other_start, other_stop in found):
            found.append((start, stop))
    return sorted(found)


@dataclass(frozen=True)
class HanTaTagger:
    """English words by HanTa, which ships its model (extra ``tagger``). About a millisecond per caption.

    Raises:
        MissingExtraError: HanTa is not installed.
    """

    def __post_init__(self) -> None:
        _hanta()

    def __call__(self, words: list[str]) -> str:
        return "".join(_letter_of_c5(tag) for tag in _hanta().tag_sent(words, taglevel=0))


@functools.cache
def _hanta() -> Any:
    try:
        from HanTa import HanoverTagger
    except ImportError as error:
        raise MissingExtraError(
            "phrases = 'hanta' needs HanTa. Install it: pip install 'bowerbird-videotext[tagger]'"
        ) from error
    # With a bare name HanTa would take a file of that name in the working directory first, and unpickle it.
    return HanoverTagger.HanoverTagger(str(Path(HanoverTagger.__file__).with_name("morphmodel_en.pgz")))


def _letter_of_c5(tag: str) -> str:
    """Of a tag of the British National Corpus (CLAWS 5)."""
    if tag.startswith(("NN", "NP")):
        return "N"
    if tag.startswith("VV"):
        return "V"
    if tag.startswith(("VB", "VD", "VH", "VM")):
        return "A"
    return "R" if tag == "AV0" else "."


@dataclass(frozen=True)
class SpacyTagger:
    """Words by a spaCy model that is installed, or in a folder: the authors' choice for verbs.

    Raises:
        MissingExtraError: spaCy or the model is not there.
    """

    model: str = "en_core_web_sm"

    def __post_init__(self) -> None:
        _spacy(self.model)

    def __call__(self, words: list[str]) -> str:
        from spacy.tokens import Doc

        nlp = _spacy(self.model)
        letters = {"NOUN": "N", "PROPN": "N", "VERB": "V", "AUX": "A", "ADV": "R"}
        return "".join(letters.get(token.pos_, ".") for token in nlp(Doc(nlp.vocab, words=words)))


@functools.cache
def _spacy(model: str) -> Any:
    try:
        import spacy
    except ImportError as error:
        raise MissingExtraError(
            "phrases = 'spacy' needs spaCy and a model. Install them: pip install spacy, then "
            f"python -m spacy download {model}; or take phrases = 'hanta', which brings its model"
        ) from error
    try:
        nlp = spacy.load(model)
    except OSError as error:
        raise MissingExtraError(
            f"spaCy finds no model {model!r}. Install it: python -m spacy download {model}, or give the folder of one "
            "(spacy_model); or take phrases = 'hanta', which brings its model"
        ) from error
    if not set(nlp.pipe_names) & {"tagger", "morphologizer"}:
        raise InputError(f"the spaCy model {model!r} tags no parts of speech; it has {', '.join(nlp.pipe_names)}")
    return nlp


# ------------------------------------------------------------------------------------------------ phrases made before


def listed_phrases(value: object, where: str) -> list[str]:
    """The phrases in a column of a table: a list of strings, or a text like ``['a', 'b']``, ``[a, b]`` or ``a, b``.

    Raises:
        InputError: Something else; ``where`` names the place.
    """
    if value is None:
        return []
    if isinstance(value, str):
        return _parsed(value)
    if isinstance(value, list | tuple) and all(isinstance(phrase, str) for phrase in value):
        return [phrase for phrase in value if words_of(phrase)]
    raise InputError(f"{where}: found {value!r}; expected a list of phrases, such as ['red boot', 'shirt']")


def _parsed(text: str) -> list[str]:
    try:
        found = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        found = None
    parts: Iterator[str]
    if isinstance(found, list | tuple) and all(isinstance(phrase, str) for phrase in found):
        parts = iter(found)
    else:
        parts = (part.strip().strip("'\"") for part in text.strip().removeprefix("[").removesuffix("]").split(","))
    return [phrase for phrase in parts if words_of(phrase)]
