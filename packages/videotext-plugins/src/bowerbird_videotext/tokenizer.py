"""Captions as word pieces: a tokenizer trained on the captions themselves, or the one of a folder.

The algorithm and the files are those of BERT (Devlin et al. 2019; library ``tokenizers``): lower case, words and
punctuation apart, the longest known pieces first, ``[CLS]`` before and ``[SEP]`` after. ``[MASK]`` inside a text is
one piece. Folders of DistilBERT and BERT models can be read, and those written here can be read by transformers.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordPieceTrainer
from torch import Tensor

from bowerbird.errors import DataError, InputError
from bowerbird.files import write_atomically, write_json

PAD, UNK, CLS, SEP, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
FILE = "tokenizer.json"
_LETTERS = "Aa \u00c9\u00e9 \u4e2d"  # capitals, accents and Chinese, which tokenizers treat in different ways


class WordPieceTokenizer:
    """Texts to int64 tensors. Picklable.

    Attributes:
        max_length: Longest sequence in pieces, ``[CLS]`` and ``[SEP]`` counted. Longer texts are cut before ``[SEP]``.
        truncated: How many texts were cut so far; the first time warns.
        mask_id: Index of ``[MASK]``.
        special_ids: Indices of ``[PAD]``, ``[UNK]``, ``[CLS]``, ``[SEP]``, ``[MASK]``, in this order.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_length: int = 77) -> None:
        if max_length < 3:
            raise InputError(f"max_length = {max_length}: expected at least 3, for [CLS], one piece and [SEP]")
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        lacking = [token for token in SPECIAL if token not in vocabulary]
        if lacking:
            raise InputError(f"this tokenizer has no {', '.join(lacking)}; it is none of BERT's kind")
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._ids = vocabulary
        self.max_length = max_length
        self.truncated = 0
        self.special_ids = [vocabulary[token] for token in SPECIAL]
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = self.special_ids

    @classmethod
    def train(
        cls, captions: Iterable[str], vocab_size: int = 8192, *, max_length: int = 77, min_frequency: int = 1
    ) -> Self:
        """A vocabulary of ``vocab_size`` pieces of the captions, or as many as there are; never fewer than its letters.

        The same captions give the same vocabulary, in whatever order they come.

        Raises:
            InputError: There is no caption, or ``vocab_size`` has no room for the special pieces.
        """
        texts = sorted(set(captions))  # the order of a data set does not matter
        if not any(text.strip() for text in texts):
            raise InputError("no captions to make a vocabulary of")
        if vocab_size <= len(SPECIAL):
            raise InputError(f"vocab_size = {vocab_size}: expected more than the {len(SPECIAL)} special pieces")
        tokenizer = _of_captions(WordPiece(unk_token=UNK))
        # The trainer numbers letters inside words as it meets them, in random order, and numbers decide between equally
        # frequent pairs: named beforehand, in order, they always get the same ones.
        letters = {part for letter in set().union(*texts) for part in tokenizer.normalizer.normalize_str(letter)}
        inner = [f"##{letter}" for letter in sorted(letters) if not letter.isspace()]
        trainer = WordPieceTrainer(
            vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=[*SPECIAL, *inner], show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        trained = _of_captions(WordPiece(tokenizer.get_vocab(with_added_tokens=False), unk_token=UNK))
        trained.add_special_tokens(list(SPECIAL))
        tokenizer = trained
        return cls(_complete(tokenizer), max_length=max_length)

    @classmethod
    def from_folder(cls, folder: str | Path, *, max_length: int | None = None) -> Self:
        """Read ``tokenizer.json``, or ``vocab.txt`` of a BERT model. ``max_length``: by default what was stored, or 77.

        Raises:
            InputError: The folder has neither file.
            DataError: The file cannot be read, or is no tokenizer of BERT's kind.
        """
        folder = Path(folder)
        stored = 77
        try:
            settings = json.loads((folder / "tokenizer_config.json").read_text())
            stored = int(settings.get("model_max_length", stored))
        except FileNotFoundError:
            settings = {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{str(folder / 'tokenizer_config.json')!r} cannot be read: {error}") from error
        file = folder / FILE if (folder / FILE).is_file() else folder / "vocab.txt"
        if not file.is_file():
            raise InputError(f"no tokenizer in {str(folder)!r}: expected {FILE} or vocab.txt")
        try:
            if file.name == FILE:
                tokenizer = Tokenizer.from_file(str(file))
            else:
                tokenizer = Tokenizer(WordPiece.from_file(str(file), unk_token=UNK))
                tokenizer.normalizer = BertNormalizer(lowercase=bool(settings.get("do_lower_case", True)))
                tokenizer.pre_tokenizer = BertPreTokenizer()
                if all(tokenizer.token_to_id(token) is not None for token in SPECIAL):  # else refused below
                    tokenizer.add_special_tokens(list(SPECIAL))
                    tokenizer = _complete(tokenizer)
            return cls(tokenizer, max_length=max_length or min(stored, 512))
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"{str(file)!r} cannot be used as a tokenizer: {error}") from error

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, which transformers can read too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / FILE, self._tokenizer.to_str(pretty=True))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.max_length,
            **{
                f"{name}_token": token
                for name, token in zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True)
            },
        }
        write_json(folder / "tokenizer_config.json", settings)

    # ---------------------------------------------------------------------------------------------- use

    def __len__(self) -> int:
        """Number of pieces in the vocabulary: indices are below it."""
        return max(self._ids.values()) + 1

    def __call__(self, texts: Sequence[str], max_length: int | None = None) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, int64 ``(B, L)``, padded to the longest text of the batch.

        Raises:
            InputError: No text, an empty one, or something else than texts.
        """
        if isinstance(texts, str):
            raise InputError("texts is one string; give a list of strings")
        limit = self.max_length if max_length is None else max_length
        if limit < 3:
            raise InputError(f"max_length = {limit}: expected at least 3, for [CLS], one piece and [SEP]")
        if not texts:
            raise InputError("no texts to tokenize")
        for position, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"text {position} of {len(texts)} is {text!r}; expected a text that is not empty")
        # One by one: the threads of encode_batch do not survive the fork of the processes that read the data.
        rows = [self._tokenizer.encode(text).ids for text in texts]
        self._count_long([len(row) for row in rows], limit)
        rows = [row if len(row) <= limit else [*row[: limit - 1], self.sep_id] for row in rows]
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self.pad_id, dtype=torch.int64)
        mask = torch.zeros(len(rows), longest, dtype=torch.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
            mask[i, : len(row)] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def _count_long(self, lengths: list[int], limit: int) -> None:
        long = [length for length in lengths if length > limit]
        if long and self.truncated == 0:
            warnings.warn(
                f"a text of {long[0]} pieces was cut to the text encoder's {limit}; further ones are cut in silence "
                "and counted (tokenizer.truncated)",
                stacklevel=4,
            )
        self.truncated += len(long)

    def pieces(self, word: str) -> int:
        """How many pieces ``word`` has, without ``[CLS]`` and ``[SEP]``."""
        return len(self._tokenizer.encode(word, add_special_tokens=False).ids)

    def decode(self, ids: Tensor | Sequence[int], *, skip_special: bool = True) -> str:
        """The text of one sequence, in lower case."""
        row = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        return self._tokenizer.decode(row, skip_special_tokens=skip_special)

    def digest(self) -> bytes:
        """32 bytes that name the vocabulary and how letters are written: equal for tokenizers with equal indices.

        Made of what the tokenizer does, not of its file, whose form changes with the library's versions.
        """
        normalizer = self._tokenizer.normalizer
        spelled = normalizer.normalize_str(_LETTERS) if normalizer is not None else _LETTERS
        content = json.dumps([spelled, sorted(self._ids.items())], separators=(",", ":"))
        return hashlib.sha256(content.encode()).digest()

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self._tokenizer.to_str(), "max_length": self.max_length, "truncated": self.truncated}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(Tokenizer.from_str(state["tokenizer"]), max_length=state["max_length"])  # type: ignore[misc]
        self.truncated = state["truncated"]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # nothing in it changes but the count of long texts


def _of_captions(model: WordPiece) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    return tokenizer


def _complete(tokenizer: Tokenizer) -> Tokenizer:
    """``tokenizer`` with ``[CLS] text [SEP]`` around every text, and texts from pieces."""
    tokenizer.post_processor = TemplateProcessing(
        single=f"{CLS} $A {SEP}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (CLS, SEP)],
    )
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer
