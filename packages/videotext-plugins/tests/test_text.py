"""Captions as word pieces, and their encoder."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from tiny_pairs import CAPTIONS

from bowerbird.errors import DataError, InputError
from bowerbird_videotext.text import TextTransformer, TransformersText
from bowerbird_videotext.tokenizer import WordPieceTokenizer


def tokenizer(**settings: int) -> WordPieceTokenizer:
    return WordPieceTokenizer.train(CAPTIONS, **settings)


# ------------------------------------------------------------------------------------------------ the tokenizer


def test_a_caption_is_its_words_between_class_and_separator_padded_to_the_longest() -> None:
    found = tokenizer()
    out = found(["A red boot moves LEFT", "a boot"])
    assert out["input_ids"].dtype == out["attention_mask"].dtype == torch.int64
    assert out["attention_mask"].tolist() == [[1] * 7, [1, 1, 1, 1, 0, 0, 0]]
    first, second = out["input_ids"].tolist()
    assert first[0] == second[0] == found.cls_id and first[-1] == second[3] == found.sep_id
    assert second[4:] == [found.pad_id] * 3
    assert found.decode(out["input_ids"][0]) == "a red boot moves left"
    assert max(first) < len(found) and found.unk_id not in first


def test_a_mask_inside_a_text_is_one_piece_and_an_unknown_letter_is_unknown() -> None:
    found = tokenizer()
    ids = found(["a [MASK] boot [MASK] ω"])["input_ids"][0].tolist()
    assert ids.count(found.mask_id) == 2 and found.unk_id in ids
    assert found.pieces("boot") == 1 and found.pieces("toobs") > 1
    assert found.special_ids == [found.pad_id, found.unk_id, found.cls_id, found.sep_id, found.mask_id]


def test_the_same_captions_in_another_order_give_the_same_vocabulary_and_others_do_not() -> None:
    assert tokenizer().digest() == WordPieceTokenizer.train(CAPTIONS[::-1]).digest()
    assert tokenizer().digest() != WordPieceTokenizer.train([*CAPTIONS, "zebra"]).digest()
    assert len(tokenizer(vocab_size=45)) == 45


def test_a_tokenizer_is_the_same_after_a_folder_and_after_a_worker_process(tmp_path: Path) -> None:
    found = tokenizer(max_length=9)
    found.save_pretrained(tmp_path)
    for again in (WordPieceTokenizer.from_folder(tmp_path), pickle.loads(pickle.dumps(found))):
        assert again.digest() == found.digest() and again.max_length == 9
        assert torch.equal(again(CAPTIONS)["input_ids"], found(CAPTIONS)["input_ids"])


def test_the_vocabulary_of_a_bert_folder_can_be_read(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "boot", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    found = WordPieceTokenizer.from_folder(tmp_path, max_length=8)
    assert found(["A red boots [MASK]"])["input_ids"].tolist() == [[2, 5, 6, 7, 8, 4, 3]]


def test_longer_captions_are_cut_before_the_separator_told_once_and_counted() -> None:
    found = tokenizer(max_length=5)
    with pytest.warns(UserWarning, match="a text of 7 pieces was cut to the text encoder's 5"):
        ids = found(["a red boot moves left", "a boot"])["input_ids"]
    assert ids.shape == (2, 5) and ids[0, -1] == found.sep_id
    found(["a red boot moves left"] * 3)  # in silence: warnings are errors here
    assert found.truncated == 4


@pytest.mark.parametrize("texts", [["a boot", ""], ["a boot", "  "], [], "a boot", [None]])
def test_empty_captions_and_other_things_than_captions_are_refused(texts: list[str]) -> None:
    with pytest.raises(InputError, match="text"):
        tokenizer()(texts)


def test_folders_that_hold_no_tokenizer_of_this_kind_say_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected tokenizer.json or vocab.txt"):
        WordPieceTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer.json"):
        WordPieceTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.txt").write_text("a\nboot\n")
    with pytest.raises(DataError, match=r"\[PAD\]|unk"):
        WordPieceTokenizer.from_folder(tmp_path)


def test_a_vocabulary_needs_captions_and_room_for_special_pieces() -> None:
    with pytest.raises(InputError, match="no captions"):
        WordPieceTokenizer.train(["", " "])
    with pytest.raises(InputError, match="vocab_size = 5"):
        tokenizer(vocab_size=5)
    with pytest.raises(InputError, match="max_length = 2"):
        tokenizer(max_length=2)


# ------------------------------------------------------------------------------------------------ the text encoder


def test_padding_has_no_influence_on_the_pieces_of_a_caption() -> None:
    words = tokenizer()
    encoder = TextTransformer(len(words), 8, 2, 2, max_length=12).double()
    short, both = words(["a boot"]), words(["a boot", "a red boot moves left"])
    alone = encoder(**short)
    together = encoder(**both)
    assert len(alone) == len(together) == 3
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one[0], other[0, : one.shape[1]])
    torch.testing.assert_close(encoder(short["input_ids"])[-1], alone[-1])


def test_the_last_state_is_normed_the_first_is_the_embedding_and_order_matters() -> None:
    encoder = TextTransformer(20, 8, 2, 2).double()
    states = encoder(torch.tensor([[2, 7, 9, 3]]))
    torch.testing.assert_close(states[-1].mean(-1), torch.zeros(1, 4, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(states[0][0], encoder.embeddings.weight[[2, 7, 9, 3]] + encoder.positions[0, :4])
    assert not torch.allclose(encoder(torch.tensor([[2, 9, 7, 3]]))[-1][:, 0], states[-1][:, 0])


def test_dropout_works_in_training_only() -> None:
    encoder = TextTransformer(20, 8, 1, 2, dropout=0.5)
    ids = torch.tensor([[2, 7, 3]])
    assert not torch.equal(encoder(ids)[-1], encoder(ids)[-1])
    encoder.eval()
    assert torch.equal(encoder(ids)[-1], encoder(ids)[-1])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(1, 13, dtype=torch.int64), "sequences of 13 pieces; this text encoder takes 1 to 12"),
        (torch.full((1, 3), 20), "input_ids holds 20; this text encoder knows pieces 0 to 19"),
        (torch.zeros(3, dtype=torch.int64), r"expected int64 \(B, L\)"),
        (torch.zeros(1, 3), r"expected int64 \(B, L\)"),
    ],
)
def test_pieces_that_do_not_fit_are_refused(ids: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextTransformer(20, 8, 1, 2, max_length=12)(ids)


def test_a_mask_of_another_shape_and_impossible_sizes_are_refused() -> None:
    with pytest.raises(InputError, match="attention_mask"):
        TextTransformer(20, 8, 1, 2)(torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 4))
    for sizes in ((20, 8, 1, 3), (0, 8, 1, 2), (20, 8, -1, 2)):
        with pytest.raises(InputError):
            TextTransformer(*sizes)


def test_a_distilbert_folder_gives_its_own_hidden_states_and_a_missing_one_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such folder"):
        TransformersText.from_folder(tmp_path / "none")
    transformers = pytest.importorskip("transformers")
    words = tokenizer(max_length=12)
    config = transformers.DistilBertConfig(
        vocab_size=len(words), dim=8, n_layers=2, n_heads=2, hidden_dim=16, max_position_embeddings=12
    )
    model = transformers.DistilBertModel(config).eval()
    model.save_pretrained(tmp_path)
    encoder = TransformersText.from_folder(tmp_path).eval()
    assert (encoder.vocab_size, encoder.embed_dim, encoder.depth, encoder.max_length) == (len(words), 8, 2, 12)
    pieces = words(CAPTIONS[:3])
    states = encoder(**pieces)
    assert len(states) == 3
    assert torch.equal(states[-1], model(**pieces).last_hidden_state)
    json.dumps(encoder.architecture())
    fresh = TransformersText.from_architecture(encoder.architecture())
    fresh.load_state_dict(encoder.state_dict())
    assert torch.equal(fresh.eval()(**pieces)[-1], states[-1])
    for wrong in ({"model_type": "distilbert", "dim": "wide"}, {"model_type": "none"}, {"model_type": "vit"}):
        with pytest.raises(InputError, match=r"could not build this text model|vit is no text model"):
            TransformersText.from_architecture(wrong)
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    with pytest.raises(InputError, match="cannot be loaded"):
        TransformersText.from_folder(tmp_path)
