"""``videotext:mcq``: a dual encoder that also answers questions about its clips while it is trained.

Ge, Ge, Liu, Li, Shan, Qie, Luo: *Bridging Video-text Retrieval with Multiple Choice Questions*, CVPR 2022 (arXiv
2201.04850). A noun or a verb is erased from the caption; the bridge looks at the clip and says what is missing, as a
vector that must be nearest to that of the erased phrase. The bridge is dropped afterwards.

B pairs, T frames.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self, get_args

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from bowerbird import dist
from bowerbird.batch import Batch
from bowerbird.data.dataset import Dataset
from bowerbird.encoders.weights import load_strictly
from bowerbird.errors import InputError, RecipeError
from bowerbird.protocols import BuildContext, Encoder, ItemTransform, LossOutput, Objective
from bowerbird_videotext.bridge import BridgeFormer
from bowerbird_videotext.contrastive import (
    ContrastiveConfig,
    opened,
    pair_accuracy,
    pair_entries,
    pair_similarities,
)
from bowerbird_videotext.dual_encoder import DualEncoder
from bowerbird_videotext.losses import symmetric_info_nce
from bowerbird_videotext.moving import Moving
from bowerbird_videotext.phrases import (
    ClosedVocabulary,
    HanTaTagger,
    PhraseExtractor,
    SpacyTagger,
    TaggedPhrases,
    listed_phrases,
    words_of,
)
from bowerbird_videotext.transforms import ClipTransform
from bowerbird_videotext.video_set import video_text_set

__all__ = [
    "BridgeFormer", "MCQConfig", "MCQObjective", "PhraseExtractor", "QuestionedClips", "build_multiple_choice_question",
    "draw_phrase",
]  # fmt: skip

QuestionKind = Literal["noun", "verb", "alternate"]
PREFIX = 3  # masks before the phrase in the text of an answer


# ------------------------------------------------------------------------------------------------ questions


def build_multiple_choice_question(
    caption: str, phrase: str, count_pieces: Callable[[str], int], mask_token: str = "[MASK]"
) -> tuple[str, str]:
    """The caption with the words of a phrase erased, and the text of the right answer.

    A word is erased wherever it stands, if it is a word of the phrase or that word capitalised; a comma beside it does
    not matter and goes with it. It leaves as many mask tokens as it has word pieces. Apostrophes are removed.

    Args:
        caption: Words between single spaces.
        phrase: One or several of its words.
        count_pieces: How many pieces the tokenizer makes of a word.
        mask_token: What stands for an erased piece.

    Returns:
        Question and answer: ``a [MASK] [MASK] moves left`` and ``[MASK] [MASK] [MASK] red boot``.

    Raises:
        InputError: The phrase has no word.
    """
    erased = {form for word in phrase.split() for form in (word, word.capitalize())}
    if not erased:
        raise InputError(f"phrase = {phrase!r} has no word to ask for")
    words = []
    for word in caption.split(" "):
        bare = word.replace(",", "")
        words.append(" ".join([mask_token] * count_pieces(bare)) if bare in erased else word)
    return " ".join(words).replace("'", ""), " ".join([mask_token] * PREFIX + [phrase])


def draw_phrase(
    words: Sequence[str],
    nouns: Sequence[str],
    verbs: Sequence[str],
    question: QuestionKind,
    generator: np.random.Generator,
) -> str:
    """A phrase to ask for: of the wanted kind, else of the other, else any word.

    Phrases without a word of the caption (those of another of the video's captions) are left out, and the others are
    spelled as the caption spells them, so that the question finds them. ``alternate`` wants nouns half of the time.

    Args:
        words: Of the caption, at least one.
        nouns, verbs: Its phrases.
        question: What is wanted.
        generator: Of the item.
    """
    spelled = {word.lower(): word for word in sorted(words)}  # of several spellings that in small letters, the last
    kinds = [[phrase for phrase in found if spelled.keys() & set(phrase.lower().split())] for found in (nouns, verbs)]
    wants_verb = question == "verb" or (question == "alternate" and generator.random() < 0.5)
    first, second = reversed(kinds) if wants_verb else kinds
    candidates = first or second or list(words)
    drawn = candidates[int(generator.integers(len(candidates)))]
    return " ".join(spelled.get(word.lower(), word) for word in drawn.split())


class QuestionedClips:
    """Clips with a question about the caption: adds ``question`` and ``answer``, texts, to the entries of ``clips``.

    Punctuation around the words of the caption is left out of the question, so that a phrase is found beside it.

    Args:
        clips: Makes ``video``, ``text`` and ``caption``.
        question: Kind of the phrase that is erased.
        count_pieces: Of the encoder's tokenizer.
        phrases: Finds phrases; ``None``: items have them, as ``nouns`` and ``verbs``.
    """

    def __init__(
        self,
        clips: ItemTransform,
        question: QuestionKind,
        count_pieces: Callable[[str], int],
        phrases: PhraseExtractor | None,
    ) -> None:
        self.clips, self.question, self.count_pieces, self.phrases = clips, question, count_pieces, phrases

    def __call__(self, item: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        """Raises ``InputError`` for captions without words and for items without phrases, and what ``clips`` raises."""
        entries = self.clips(item, generator)
        caption, where = entries["caption"], item.get("where", "an item")
        words = words_of(caption)
        if not words:
            raise InputError(f"{where}: the caption {caption!r} has no word to ask for")
        if self.phrases is None:
            nouns, verbs = (self._listed(entries, kind, where) for kind in ("nouns", "verbs"))
        else:
            nouns, verbs = self.phrases.nouns(caption), self.phrases.verbs(caption)
        phrase = draw_phrase(words, nouns, verbs, self.question, generator)
        question, answer = build_multiple_choice_question(" ".join(words), phrase, self.count_pieces)
        return entries | {"question": question, "answer": answer}

    def _listed(self, entries: dict[str, Any], kind: str, where: str) -> list[str]:
        if kind not in entries:
            raise InputError(
                f"{where}: no {kind}, which phrases = 'columns' reads from the items; it has "
                f"{', '.join(sorted(entries))}. Add the column, or set phrases to vocabulary, hanta or spacy"
            )
        return listed_phrases(entries.pop(kind), f"{where}, {kind}")


# ------------------------------------------------------------------------------------------------ the objective


class MCQConfig(ContrastiveConfig):
    """Settings of ``videotext:mcq``."""

    question: QuestionKind = Field(
        default="noun",
        description="What is erased: nouns, then (in a second run) verbs, as in the paper; alternate: both in turn.",
    )
    phrases: Literal["vocabulary", "hanta", "spacy", "columns"] = Field(
        default="vocabulary",
        description="Where nouns and verbs come from: the lists nouns and verbs (videotext:moving has its own), a "
        "tagger, or the entries nouns and verbs of the items.",
    )
    nouns: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(), description="Of phrases = 'vocabulary': nouns and noun phrases."
    )
    verbs: Annotated[tuple[str, ...], Field(strict=False)] = Field(default=(), description="And verb phrases.")
    spacy_model: str = Field(
        default="en_core_web_sm", description="Of phrases = 'spacy': a model that is installed, or its folder."
    )
    bridge_run: str | None = Field(
        default=None,
        description="Finished run of videotext:mcq whose bridge goes on: the stage before this one. Its encoder is for "
        "encoder.weights.",
    )
    bridge_mlp_ratio: float = Field(
        default=4.0, gt=0, description="Hidden width of the bridge's perceptrons, over the width of the video encoder."
    )
    ignore_duplicate_answers: bool = Field(
        default=False,
        description="Pairs of a batch with the same answer are no negatives of each other. The authors have none of "
        "this; choose it where the captions have few words.",
    )


class MCQObjective(Objective):
    """NCE(text, video) + NCE(answer, bridge), each over the pairs of all processes.

    Args:
        encoder: A dual encoder with its tokenizer, the same width D for clips and texts.
        bridge: Of that width, with a block per block of the video encoder.
        temperature: Of both terms.
        question: What is erased: a noun, a verb, or either (``alternate``).
        phrases: Finds phrases in captions; ``None``: the items have them.
        ignore_duplicate_answers: Whether pairs with the same answer are left out of each other's negatives.
        clips: What makes clips in the processes that read the data; ``None`` where only tensors come.

    Raises:
        InputError: The bridge does not fit the encoder, or a value is outside its range.
    """

    encoder: DualEncoder

    def __init__(
        self,
        encoder: DualEncoder,
        bridge: BridgeFormer,
        *,
        temperature: float = 0.05,
        question: QuestionKind = "noun",
        phrases: PhraseExtractor | None = None,
        ignore_duplicate_answers: bool = False,
        clips: ItemTransform | None = None,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise InputError(f"temperature = {temperature}: expected above 0")
        if question not in get_args(QuestionKind):
            raise InputError(f"question = {question!r}: expected one of {', '.join(get_args(QuestionKind))}")
        video = encoder.video_encoder
        if (bridge.embed_dim, bridge.depth) != (video.embed_dim, video.depth):
            raise InputError(
                f"a bridge of width {bridge.embed_dim} and {bridge.depth} blocks does not fit a video encoder of width "
                f"{video.embed_dim} and {video.depth} blocks"
            )
        self.encoder, self.bridge = encoder, bridge
        self.bridge_proj = nn.Linear(bridge.embed_dim, encoder.embed_dim)
        self.temperature, self.question, self.phrases = temperature, question, phrases
        self.ignore_duplicate_answers, self.clips = ignore_duplicate_answers, clips

    @classmethod
    def build(cls, config: MCQConfig, encoder: Encoder, context: BuildContext) -> Self:
        """Raises ``RecipeError`` for an encoder that does not fit, and where there are no phrases or no captions; for
        ``bridge_run`` what ``load_bridge`` raises."""
        dual = opened(encoder, context, "videotext:mcq")
        _check_sizes(dual)
        video = dual.video_encoder
        objective = cls(
            dual,
            BridgeFormer(video.embed_dim, video.depth, video.num_heads, config.bridge_mlp_ratio),
            temperature=config.temperature,
            question=config.question,
            phrases=phrase_extractor(config, context.dataset),
            ignore_duplicate_answers=config.ignore_duplicate_answers,
            clips=ClipTransform(dual.preprocessing, dual.frames, config.clips),
        )
        if config.bridge_run is not None:
            objective.load_bridge(context.load_run(config.bridge_run).objective_state, source=config.bridge_run)
        return objective

    def load_bridge(self, state: Mapping[str, Tensor], *, source: str) -> None:
        """Take the bridge of another run from the state of its objective.

        Raises:
            RecipeError: The run has none.
            DataError: It has other sizes.
        """
        parts = nn.ModuleDict({"bridge": self.bridge, "bridge_proj": self.bridge_proj})
        found = {key: value for key, value in state.items() if key.startswith(("bridge.", "bridge_proj."))}
        if not found:
            raise RecipeError(f"bridge_run {source!r} holds no bridge: expected the folder of a run of videotext:mcq")
        load_strictly(parts, found, source=source)

    def item_transform(self) -> ItemTransform | None:
        if self.clips is None:
            return None
        return QuestionedClips(self.clips, self.question, self.encoder.ready_tokenizer().pieces, self.phrases)

    def forward(self, batch: Batch) -> LossOutput:
        """Reads ``video (B, T, 3, H, W)`` (or ``image``), ``text``, and the texts ``question`` and ``answer``."""
        video, text = pair_entries(batch)
        questions, answers = self._texts(batch, "question", len(video)), self._texts(batch, "answer", len(video))
        encoder, device = self.encoder, video.device

        states = encoder.video_encoder.hidden_states(video)
        clip = encoder.video_proj(encoder.video_encoder.norm(states[-1][:, 0]))
        matches = pair_similarities(encoder.encode_text(text), clip)
        choices = self.choices(states, video.shape[1], questions, answers)
        same = same_answers(answers, device)
        compared = choices.masked_fill(same, -torch.inf) if self.ignore_duplicate_answers else choices
        parts = {
            "text_video": symmetric_info_nce(matches, self.temperature),
            "answer": symmetric_info_nce(compared, self.temperature),
        }
        stats = {"batch_accuracy": pair_accuracy(matches), "answer_accuracy": answer_accuracy(choices, same)}
        return LossOutput(total=parts["text_video"] + parts["answer"], parts=parts, stats=stats)

    def choices(
        self, states: Sequence[Tensor], frames: int, questions: Sequence[str], answers: Sequence[str]
    ) -> Tensor:
        """Cosines of the answers (rows) and of what the bridge says to the questions (columns), of all processes.

        Args:
            states: ``hidden_states`` of the video encoder, of one clip per question.
            frames: T.
            questions, answers: Texts.
        """
        encoder, device = self.encoder, states[0].device
        asked, offered = (
            {key: value.to(device) for key, value in encoder.tokenize(texts).items()} for texts in (questions, answers)
        )
        said = self.bridge(states, encoder.text_states(asked), asked["attention_mask"], frames)
        return pair_similarities(encoder.encode_text(offered), self.bridge_proj(said))

    def _texts(self, batch: Batch, key: str, count: int) -> list[str]:
        texts = batch.get(key)
        if not isinstance(texts, list) or len(texts) != count:
            found = f"{len(texts)} of them" if isinstance(texts, list) else f"found {type(texts).__name__}"
            raise InputError(f"the batch needs a list of {count} texts {key!r}; {found}")
        return texts


def same_answers(answers: Sequence[str], device: torch.device) -> Tensor:
    """bool ``(W B, W B)`` over the pairs of all W processes: whether two different pairs have the same answer."""
    digests = [hashlib.blake2b(answer.lower().encode(), digest_size=8).digest() for answer in answers]
    keys = dist.gathered(
        torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests], device=device)
    )
    return (keys[:, None] == keys[None, :]).fill_diagonal_(False)


@torch.no_grad()
def answer_accuracy(choices: Tensor, same: Tensor) -> Tensor:
    """Share of bridges whose nearest answer of the batch says the same as their own. Rows are answers."""
    nearest = choices.argmax(dim=0)
    own = torch.arange(len(choices), device=choices.device)
    return (same[nearest, own] | (nearest == own)).float().mean()


def phrase_extractor(config: MCQConfig, dataset: Dataset | None) -> PhraseExtractor | None:
    """What finds the phrases of ``dataset``; ``None`` where its items have them.

    Raises:
        RecipeError: A vocabulary is asked for, and there are no words for it.
        MissingExtraError: A tagger is not installed.
    """
    if config.phrases == "columns":
        return None
    if config.phrases == "hanta":
        return TaggedPhrases(HanTaTagger())
    if config.phrases == "spacy":
        return TaggedPhrases(SpacyTagger(config.spacy_model))
    if config.nouns or config.verbs:
        return ClosedVocabulary(config.nouns, config.verbs)
    whole = None if dataset is None else video_text_set(dataset, "videotext:mcq")[0]
    if not isinstance(whole, Moving):
        raise RecipeError(
            "videotext:mcq: phrases = 'vocabulary' needs the lists nouns and verbs for these captions; or set phrases "
            "to 'hanta' (pip install 'bowerbird-videotext[tagger]'), to 'spacy', or to 'columns' where the items have "
            "nouns and verbs"
        )
    return moving_vocabulary(whole)


def moving_vocabulary(videos: Moving) -> ClosedVocabulary:
    """The phrases of ``videotext:moving``: every colour with every noun, and the verbs."""
    colours = [f"{colour} " for colour in videos.colours] or [""]
    return ClosedVocabulary([colour + noun for colour in colours for noun in videos.nouns], videos.verbs)


def _check_sizes(encoder: DualEncoder) -> None:
    video, text = encoder.video_encoder, encoder.text_encoder
    assert text is not None  # opened
    width, states = int(text.embed_dim), int(text.depth) + 1  # type: ignore[arg-type]
    if width != video.embed_dim:
        raise RecipeError(
            f"encoder: videotext:mcq needs one width for clips and texts; embed_dim = {video.embed_dim} and the text "
            f"encoder's is {width}: set text_dim = {video.embed_dim} (or embed_dim = {width})"
        )
    if video.depth < 1:
        raise RecipeError("encoder: videotext:mcq asks inside the blocks of the video encoder: set depth = 1 or more")
    needed = (video.depth + 1) // 2
    if states < needed:
        raise RecipeError(
            f"encoder: with depth = {video.depth} videotext:mcq reads {needed} states of the text encoder, and it has "
            f"{states}: set text_depth = {needed - 1} or more"
        )
