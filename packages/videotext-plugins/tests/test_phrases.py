"""Nouns and verbs of captions."""

from __future__ import annotations

import pickle
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bowerbird.errors import InputError, MissingExtraError
from bowerbird_videotext import phrases
from bowerbird_videotext.phrases import (
    ClosedVocabulary,
    HanTaTagger,
    SpacyTagger,
    TaggedPhrases,
    listed_phrases,
    verb_spans,
    words_of,
)


def test_words_lose_the_punctuation_around_them_and_keep_what_is_inside() -> None:
    assert words_of("  A cat's (red) t-shirt, “slowly” falls... ") == [
        "A",
        "cat's",
        "red",
        "t-shirt",
        "slowly",
        "falls",
    ]
    assert words_of(" , . ") == []
    assert words_of("a red,white boot") == ["a", "red", "white", "boot"]


def test_a_closed_vocabulary_takes_the_longest_phrase_and_gives_it_as_it_is_written() -> None:
    vocabulary = ClosedVocabulary(nouns=["boot", "red boot", "shirt"], verbs=["moves left", "stays"])
    caption = "A Red boot, a boot and a shirt: it moves left, stays."
    assert vocabulary.nouns(caption) == ["Red boot", "boot", "shirt"]
    assert vocabulary.verbs(caption) == ["moves left", "stays"]
    assert vocabulary.nouns("booted reds move") == []


def test_a_vocabulary_without_words_is_refused() -> None:
    empty: list[str] = []
    for nouns, verbs in ((empty, empty), (["boot", " ."], empty)):
        with pytest.raises(InputError, match=r"both lists are empty|has no word"):
            ClosedVocabulary(nouns, verbs)


@pytest.mark.parametrize(
    ("letters", "spans"),
    [
        ("N.AV", [(2, 4)]),  # is dancing
        ("ARV", [(1, 3)]),  # "is slowly dancing": the pattern has no adverb behind an auxiliary
        ("VRAV", [(0, 4)]),
        ("VVRV", [(0, 1), (1, 4)]),  # the longest claims its words first
        ("A.R", []),  # no verb
        ("", []),
    ],
)
def test_verb_phrases_are_the_longest_runs_of_the_authors_pattern(letters: str, spans: list[tuple[int, int]]) -> None:
    assert verb_spans(letters) == spans


@given(letters=st.text("NVAR.", max_size=12))
@settings(max_examples=50, deadline=None)
def test_every_verb_is_in_exactly_one_verb_phrase(letters: str) -> None:
    covered = [i for start, stop in verb_spans(letters) for i in range(start, stop)]
    assert len(covered) == len(set(covered))
    assert {i for i in covered if letters[i] == "V"} == {i for i, letter in enumerate(letters) if letter == "V"}
    assert {letters[i] for i in covered} <= set("VAR")


def test_phrases_by_a_tagger_are_single_nouns_and_joined_verbs() -> None:
    letters = {"girl": "N", "is": "A", "dancing": "V"}
    found = TaggedPhrases(lambda words: "".join(letters.get(word, ".") for word in words))
    assert found.nouns("A girl, is dancing.") == ["girl"]
    assert found.verbs("A girl, is dancing.") == ["is dancing"]


def test_hanta_finds_nouns_and_verbs_and_goes_to_other_processes() -> None:
    pytest.importorskip("HanTa")
    found: TaggedPhrases = pickle.loads(pickle.dumps(TaggedPhrases(HanTaTagger())))
    caption = "a red boot moves left while a white shirt rotates slowly"
    assert found.nouns(caption) == ["boot", "shirt"]
    assert found.verbs(caption) == ["moves", "rotates"]
    caption = "A girl in shorts, and a hat, is dancing on the green grass."
    assert found.nouns(caption) == ["girl", "shorts", "hat", "grass"]
    assert found.verbs(caption) == ["is dancing"]
    assert found.nouns("") == found.verbs("") == []


@pytest.mark.parametrize(
    ("module", "make", "message"),
    [
        ("HanTa", HanTaTagger, r"pip install 'bowerbird-videotext\[tagger\]'"),
        ("spacy", SpacyTagger, "python -m spacy download en_core_web_sm"),
    ],
)
def test_a_tagger_that_is_not_installed_says_what_to_install(
    module: str, make: type, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    phrases._hanta.cache_clear()
    phrases._spacy.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=message):
        make()


@pytest.mark.parametrize("column", [["red boot", "shirt"], ("red boot", "shirt"), "['red boot', 'shirt']",
                                    "[red boot, shirt]", "red boot,  shirt", '["red boot", "shirt", ""]'])  # fmt: skip
def test_columns_may_be_lists_or_lists_written_as_text(column: object) -> None:
    assert listed_phrases(column, "row 3") == ["red boot", "shirt"]


def test_empty_columns_have_no_phrases_and_others_are_refused_by_place() -> None:
    assert (
        listed_phrases(None, "") == listed_phrases("", "") == listed_phrases("[]", "") == listed_phrases([], "") == []
    )
    with pytest.raises(InputError, match=r"row 3, nouns: found 7; expected a list of phrases"):
        listed_phrases(7, "row 3, nouns")
