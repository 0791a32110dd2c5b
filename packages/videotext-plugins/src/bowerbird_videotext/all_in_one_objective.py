"""``videotext:all-in-one``: trains the unified transformer on pairs of videos and texts, on questions, on choices.

Wang et al.: All in One: Exploring Unified Video-Language Pre-training, CVPR 2023 (arXiv 2203.07303). Every task makes
forward passes of its own; their losses are added.

B batch, T frames, L words, V vocabulary, A answers, K options, D width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import cross_entropy

from bowerbird.batch import Batch
from bowerbird.errors import InputError, RecipeError
from bowerbird.protocols import BuildContext, Encoder, ItemTransform, LossOutput, Objective
from bowerbird_videotext.all_in_one_encoder import AllInOneEncoder
from bowerbird_videotext.all_in_one_heads import MaskedLanguageHead
from bowerbird_videotext.contrastive import ContrastiveConfig, pair_accuracy, pair_entries, pair_similarities
from bowerbird_videotext.losses import symmetric_info_nce
from bowerbird_videotext.optimal_transport import word_patch_alignment_loss
from bowerbird_videotext.transforms import ClipTransform
from bowerbird_videotext.video_set import Choice, Question, VideoTextSet, captions_of, video_text_set

Task = Literal["mlm", "vtm", "vtc", "qa", "choice"]
OF_CAPTIONS: tuple[Task, ...] = ("mlm", "vtm", "vtc")
IGNORED = -100  # label of what a loss leaves out
NOTHING = "?"  # stands for a text where nothing is asked
Found = tuple[dict[str, Tensor], dict[str, Tensor]]  # losses of a task, and what else is logged


class AllInOneObjectiveConfig(ContrastiveConfig):
    """Settings of the objective ``videotext:all-in-one``."""

    tasks: Annotated[tuple[Task, ...], Field(strict=False, min_length=1)] = Field(
        default=OF_CAPTIONS,
        description="mlm: name hidden words; vtm: do video and text belong together; vtc: contrast videos and texts "
        "alone, which galleries need; qa: answer questions; choice: choose the right one of several texts.",
    )
    mask_probability: float = Field(default=0.15, gt=0, lt=1, description="mlm: share of the words to name.")
    wpa_weight: float = Field(
        default=0.1, ge=0, description="vtm: weight of the alignment of words and patches by transport; 0: without."
    )
    wpa_beta: float = Field(default=0.5, gt=0, description="Step of the transport's iterations.")
    wpa_iterations: int = Field(default=50, ge=1, description="Their number.")
    max_answers: int = Field(
        default=1500, ge=1, description="qa: how many answers, the most frequent ones of the training questions."
    )
    qa_dropout: float = Field(default=0.5, ge=0, lt=1, description="qa: dropout before the head.")
    head_lr_scale: float = Field(default=10.0, gt=0, description="qa: learning rate of the head, over train.lr.")
    options: Literal["data", "captions"] = Field(
        default="data",
        description="choice: the options that the data set has, or a caption among those of other videos.",
    )
    num_options: int = Field(default=16, ge=2, description="choice among captions: how many.")

    @model_validator(mode="after")
    def _tasks_are_named_once(self) -> Self:
        if len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"tasks = {list(self.tasks)}: one is there twice")
        return self


# ------------------------------------------------------------------------------------------------ parts of the losses


def mask_words(
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    special_ids: Sequence[int],
    mask_id: int,
    vocab_size: int,
    probability: float = 0.15,
) -> tuple[Tensor, Tensor]:
    """Texts with some words hidden, and what stood there, as in BERT.

    Every word is chosen with ``probability``. Of the chosen ones 80 % become ``mask_id``, 10 % a random word, and 10 %
    stay as they are. Uses torch's random numbers.

    Args:
        input_ids, attention_mask: ``(B, L)``.
        special_ids: Never chosen, like padding.
        mask_id: What a hidden word becomes.
        vocab_size: V; random words are drawn from all of it.
        probability: In 0..1.

    Returns:
        The changed ``input_ids``, and labels ``(B, L)``: the word that stood there, -100 where none was chosen.
    """
    words = attention_mask.bool()
    for special in special_ids:
        words = words & (input_ids != special)
    chosen = words & (torch.rand(input_ids.shape, device=input_ids.device) < probability)
    kind = torch.rand(input_ids.shape, device=input_ids.device)
    random_words = torch.randint(vocab_size, input_ids.shape, device=input_ids.device)
    changed = torch.where(chosen & (kind < 0.8), mask_id, input_ids)
    changed = torch.where(chosen & (kind >= 0.9), random_words, changed)
    return changed, input_ids.masked_fill(~chosen, IGNORED)


def mismatched(count: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Which video goes with every text of a batch: for half of them (rounded down) its own, else another one's.

    Returns:
        Positions of videos ``(count,)``, and bool ``(count,)``, true where it is the text's own.

    Raises:
        InputError: There are fewer than two.
    """
    if count < 2:
        raise InputError("matching needs batches of 2 or more: other videos of the batch are the wrong ones")
    own = torch.arange(count, device=device)
    others = (own + torch.randint(1, count, (count,), device=device)) % count
    matched = torch.zeros(count, dtype=torch.bool, device=device)
    matched[torch.randperm(count, device=device)[: count // 2]] = True
    return torch.where(matched, own, others), matched


def word_padding(attention_mask: Tensor) -> Tensor:
    """bool ``(B, L)``: true at padding, at the first piece ([CLS]) and at the last one of every text ([SEP])."""
    mask = attention_mask.bool()
    last = mask.cumsum(dim=1) == mask.sum(dim=1, keepdim=True)  # from the last piece on
    padding = ~mask | last
    padding[:, 0] = True
    return padding


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the rows of ``(M, C)``, at least in float32; 0 with a gradient of zeros where there is no row.

    A row whose label is -100 counts as one whose loss is 0.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED) / max(1, len(labels))


# ------------------------------------------------------------------------------------------------ data


@dataclass(frozen=True)
class TaskItems:
    """``ClipTransform``, and the question and the options of an item where tasks need them.

    ``question`` and ``answer`` (its position in ``answers``): one of the video's questions whose answer is known;
    ``options`` and ``right_option``. Where a video has none, the numbers are -100, the texts empty.

    Attributes:
        clip: Makes the clip and chooses the caption.
        videos: The whole set, and ``positions`` of the items in it; ``None`` where no task asks it.
        answers: Position of every known answer; empty without questions.
        options: How many captions to choose from, 0: the options that the set has; ``None``: no choice.
        captions: Of all videos, for options.
    """

    clip: ClipTransform
    videos: VideoTextSet | None = None
    positions: Sequence[int] = ()
    answers: dict[str, int] = field(default_factory=dict)
    options: int | None = None
    captions: Sequence[str] = ()

    def __call__(self, item: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        entries = self.clip(item, generator)
        if self.videos is None:
            return entries
        position = self.positions[item["index"]]
        if self.answers:
            entries |= self._question(self.videos.question(position), generator)
        if self.options == 0:
            entries |= self._choice(self.videos.multiple_choice(position))
        elif self.options is not None:
            entries |= self._choice(self._among_captions(entries["caption"], position, generator))
        return entries

    def _question(self, questions: Sequence[Question], generator: np.random.Generator) -> dict[str, Any]:
        known = [(text, self.answers[answer]) for text, answer, _ in questions if answer in self.answers]
        text, answer = known[int(generator.integers(len(known)))] if known else ("", IGNORED)
        return {"question": text, "answer": answer}

    def _choice(self, choice: Choice | None) -> dict[str, Any]:
        options, right = choice if choice is not None else ([], IGNORED)
        return {"options": list(options), "right_option": right}

    def _among_captions(self, caption: str, position: int, generator: np.random.Generator) -> Choice:
        assert self.videos is not None and self.options is not None
        own = set(self.videos.captions(position))
        drawn = (self.captions[i] for i in generator.integers(len(self.captions), size=20 * self.options))
        others = list(dict.fromkeys(text for text in drawn if text not in own))[: self.options - 1]
        place = int(generator.integers(len(others) + 1))
        return [*others[:place], caption, *others[place:]], place


def known_answers(videos: VideoTextSet, positions: Sequence[int], most: int) -> list[str]:
    """The ``most`` most frequent answers of the questions about these videos; of equal ones the alphabet decides.

    Raises ``InputError`` where there are no questions.
    """
    counts = Counter(answer for position in positions for _, answer, _ in videos.question(position))
    if not counts:
        raise InputError(f'tasks has "qa", and no video of this {type(videos).__name__} has questions')
    return sorted(sorted(counts), key=lambda answer: -counts[answer])[:most]


# ------------------------------------------------------------------------------------------------ objective


class AllInOneObjective(Objective):
    """The sum of the losses of ``tasks``.

    Args:
        encoder: With its tokenizer, and with the heads that the tasks need (``open_answers``, ``open_choice``). What no
            task trains is frozen.
        config: Tasks and their settings.
        views: What makes the entries of a batch; ``None`` where only tensors come.

    Raises:
        InputError: The encoder lacks a head.
    """

    encoder: AllInOneEncoder

    def __init__(
        self, encoder: AllInOneEncoder, config: AllInOneObjectiveConfig, *, views: ItemTransform | None = None
    ) -> None:
        super().__init__()
        self.encoder, self.config, self.views = encoder, config, views
        tokenizer, tasks = encoder.ready_tokenizer(), set(config.tasks)
        if "qa" in tasks and encoder.qa is None:
            raise InputError('tasks has "qa": call open_answers of the encoder first')
        if "choice" in tasks:
            encoder.open_choice()
        self.mlm = MaskedLanguageHead(encoder.config.embed_dim, len(tokenizer)) if "mlm" in tasks else None
        transformer = encoder.transformer
        trained_by = [
            (transformer.txt_proj, {"vtc"}), (transformer.vid_proj, {"vtc"}),
            (transformer.pooler, {"vtm", "qa", "choice"}), (encoder.matching, {"vtm"}), (encoder.scorer, {"choice"}),
            (encoder.qa, {"qa"}),
        ]  # fmt: skip
        for part, needed_by in trained_by:
            if part is not None and not needed_by & tasks:
                part.requires_grad_(False)

    @classmethod
    def build(cls, config: AllInOneObjectiveConfig, encoder: Encoder, context: BuildContext) -> Self:
        """Raises ``RecipeError`` for another encoder, and for data without what the tasks need."""
        if not isinstance(encoder, AllInOneEncoder):
            raise RecipeError(
                "encoder: the objective videotext:all-in-one trains the encoder videotext:all-in-one, not a "
                f"{type(encoder).__name__}"
            )
        asks = {"qa", "choice"} & set(config.tasks)
        needs_captions = bool(set(OF_CAPTIONS) & set(config.tasks)) or (
            "choice" in asks and config.options == "captions"
        )
        clip = ClipTransform(encoder.preprocessing, encoder.frames, config.clips, captions=needs_captions)
        if not asks and encoder.tokenizer is not None:
            return cls(encoder, config, views=TaskItems(clip))
        if context.dataset is None:
            raise RecipeError("videotext:all-in-one: there is no training data to take texts from")
        videos, positions = video_text_set(context.dataset, "videotext:all-in-one")
        captions = captions_of(context.dataset) if needs_captions else []
        answers: list[str] = []
        if "qa" in asks:
            answers = known_answers(videos, positions, config.max_answers)
            encoder.open_answers(answers, dropout=config.qa_dropout)
        if encoder.tokenizer is None:
            questions = [text for at in positions for text, _, _ in videos.question(at)] if "qa" in asks else []
            encoder.open([*captions, *questions, *_options(videos, positions, config)])
        options = None
        if "choice" in asks:
            options = 0 if config.options == "data" else config.num_options
        views = TaskItems(
            clip,
            videos=videos if asks else None,
            positions=positions if asks else (),
            answers={answer: i for i, answer in enumerate(answers)},
            options=options,
            captions=captions if options else (),
        )
        return cls(encoder, config, views=views)

    def item_transform(self) -> ItemTransform | None:
        return self.views

    def parameter_groups(self) -> list[dict[str, Any]]:
        """As every objective; the head of the answers in groups of its own, with ``head_lr_scale``."""
        if self.encoder.qa is None or "qa" not in self.config.tasks:
            return super().parameter_groups()
        head = {id(parameter) for parameter in self.encoder.qa.parameters()}
        groups: list[dict[str, Any]] = []
        for group in super().parameter_groups():
            for of_head in (False, True):
                members = [p for p in group["params"] if (id(p) in head) == of_head]
                if members:
                    more = {"lr_scale": self.config.head_lr_scale} if of_head else {}
                    groups.append({**group, "params": members, **more})
        return groups

    def forward(self, batch: Batch) -> LossOutput:
        """Reads ``video (B, T, 3, H, W)`` (or ``image``), ``text`` for tasks of captions, ``question`` and ``answer``
        for questions, ``options`` and ``right_option`` for choices. Raises ``InputError`` for another form."""
        parts: dict[str, Tensor] = {}
        stats: dict[str, Any] = {}
        losses = {"mlm": self._mlm, "vtm": self._vtm, "vtc": self._vtc, "qa": self._qa, "choice": self._choice}
        for task in self.config.tasks:
            found, seen = losses[task](batch)
            parts |= found
            stats |= seen
        total = torch.stack(list(parts.values())).sum()
        return LossOutput(total=total, parts=parts, stats=stats)

    # ---------------------------------------------------------------------------------------------- tasks

    def _mlm(self, batch: Batch) -> Found:
        assert self.mlm is not None
        video, text = pair_entries(batch)
        tokenizer = self.encoder.ready_tokenizer()
        ids, labels = mask_words(
            text["input_ids"],
            text["attention_mask"],
            special_ids=tokenizer.special_ids,
            mask_id=tokenizer.mask_id,
            vocab_size=len(tokenizer),
            probability=self.config.mask_probability,
        )
        words = self.encoder.run(video, {**text, "input_ids": ids}).text
        assert words is not None
        hidden = labels != IGNORED
        logits = self.mlm(words[hidden])
        loss = mean_cross_entropy(logits, labels[hidden])
        return {"mlm": loss}, {"mlm_accuracy": _accuracy(logits, labels[hidden])}

    def _vtm(self, batch: Batch) -> Found:
        video, text = pair_entries(batch)
        index, matched = mismatched(len(video), video.device)
        output = self.encoder.run(video[index], text)
        assert output.text is not None and output.video is not None
        logits = self.encoder.matching(output.pooled)
        losses = {"vtm": mean_cross_entropy(logits, matched.long())}
        if self.config.wpa_weight:
            patches = output.video[:, 1:]
            losses["wpa"] = self.config.wpa_weight * word_patch_alignment_loss(
                output.text,
                patches,
                word_padding(text["attention_mask"]),
                torch.zeros(patches.shape[:2], dtype=torch.bool, device=patches.device),
                matched,
                beta=self.config.wpa_beta,
                iterations=self.config.wpa_iterations,
            )
        return losses, {"vtm_accuracy": _accuracy(logits, matched.long())}

    def _vtc(self, batch: Batch) -> Found:
        video, text = pair_entries(batch)
        similarity = pair_similarities(self.encoder.encode_text(text), self.encoder.encode_video(video))
        loss = symmetric_info_nce(similarity, self.config.temperature)
        return {"vtc": loss}, {"vtc_accuracy": pair_accuracy(similarity)}

    def _qa(self, batch: Batch) -> Found:
        video = _video(batch, "qa", ("question", "answer"))
        answers = batch["answer"]
        rows, known = _rows_to_ask(answers)
        text = self._tokens([batch["question"][i] or NOTHING for i in rows.tolist()], video.device)
        logits = self.encoder.answer_logits(video[rows], text)
        accuracy = _accuracy(logits, answers[rows])
        return {"qa": mean_cross_entropy(logits, answers[rows])}, {"qa_accuracy": accuracy, "qa_known": known}

    def _choice(self, batch: Batch) -> Found:
        video = _video(batch, "choice", ("options", "right_option"))
        right = batch["right_option"]
        rows, known = _rows_to_ask(right)
        options = [batch["options"][i] or [NOTHING] for i in rows.tolist()]
        counts = torch.tensor([len(own) for own in options], device=video.device)
        text = self._tokens([option for own in options for option in own], video.device)
        assert self.encoder.scorer is not None
        scores = self.encoder.scorer(self.encoder.run(video[rows.repeat_interleave(counts)], text).pooled)
        # (B, K), with minus infinity where a video has fewer options than others
        there = torch.arange(int(counts.max()), device=video.device) < counts[:, None]
        logits = scores.new_full(there.shape, float("-inf")).masked_scatter(there, scores)
        accuracy = _accuracy(logits, right[rows])
        return {"choice": mean_cross_entropy(logits, right[rows])}, {"choice_accuracy": accuracy, "choice_known": known}

    def _tokens(self, texts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        return {key: value.to(device) for key, value in self.encoder.tokenize(texts).items()}


def _options(videos: VideoTextSet, positions: Sequence[int], config: AllInOneObjectiveConfig) -> list[str]:
    """The options of the data set, where they are chosen from: their words belong to the vocabulary."""
    if "choice" not in config.tasks or config.options != "data":
        return []
    choices = [videos.multiple_choice(at) for at in positions]
    texts = [text for choice in choices if choice is not None for text in choice[0]]
    if not texts:
        raise InputError(
            f'tasks has "choice", and no video of this {type(videos).__name__} has options; set options = "captions"'
        )
    return texts


def _rows_to_ask(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that have a label, and their share of the batch.

    Where none has, the first row all the same: its loss is 0 (``mean_cross_entropy``), and the gradients of zeros are
    what other processes of a distributed run wait for.
    """
    known = labels != IGNORED
    rows = known.nonzero()[:, 0]
    return (rows if len(rows) else rows.new_zeros(1)), known.float().mean()


def _video(batch: Batch, task: str, needs: Sequence[str]) -> Tensor:
    lacking = [key for key in needs if key not in batch]
    if lacking or ("video" not in batch and "image" not in batch):
        raise InputError(f"{task} needs video (or image), {', '.join(needs)}; the batch has {', '.join(batch)}")
    return batch["video"] if "video" in batch else batch["image"][:, None]


@torch.no_grad()
def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of rows whose largest logit is the right one; 0 without rows."""
    return (logits.argmax(dim=1) == labels).float().sum() / max(1, len(labels))
