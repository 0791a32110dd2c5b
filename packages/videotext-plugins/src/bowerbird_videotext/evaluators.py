"""How well an encoder finds videos by texts and texts by videos, and how well it answers.

``videotext:retrieval``, ``videotext:multiple-choice``, ``videotext:qa`` and ``videotext:zero-shot-actions``. Recall and
accuracy are in percent, as the papers of this family have them, with bootstrap intervals over queries.

v videos, q texts, T frames, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from bowerbird.data.videos import decode_clips, prepare_clip, read_clip, video_info
from bowerbird.errors import InputError, PluginError
from bowerbird.protocols import Dataset, Encoder, EvalContext, Evaluator, Metrics
from bowerbird.recipe import build_config
from bowerbird.registry import get_registry
from bowerbird.retrieval.evaluators import summarise
from bowerbird.retrieval.metrics import PerQuery
from bowerbird_videotext.evaluator_configs import (
    MultipleChoiceConfig,
    QuestionsConfig,
    ScoredConfig,
    VideoRetrievalConfig,
    ZeroShotConfig,
)
from bowerbird_videotext.video_retrieval import (
    classes_found,
    found_at,
    open_ended_accuracy,
    recall_summary,
    retrieval_ranks,
    zero_shot_classify,
)
from bowerbird_videotext.video_set import video_text_set

Scores = NDArray[np.floating[Any]]


class VideoRetrieval(Evaluator):
    """Recall and ranks of videos searched by texts (t2v) and of texts searched by videos (v2t).

    ``t2v R@k``, ``t2v MedR``, ``t2v MeanR``, ``t2v GMeanR``, ``t2v tied`` (percent of the texts whose video scores no
    higher than another), the same of v2t, and all of them after re-ranking as ``reranked t2v R@k`` and so on; ``texts``
    and ``videos`` count. Per query ``t2v rank`` (from 1) and ``t2v R@k``: one value for every text, then one for every
    video, NaN where a query is of the other direction. Videos without captions are found by no text, but searched.
    """

    def __init__(self, config: VideoRetrievalConfig) -> None:
        self.config = config

    @classmethod
    def build(cls, config: VideoRetrievalConfig) -> Self:
        return cls(config)

    def run(self, context: EvalContext) -> Metrics:
        """Raises ``InputError`` for encoders and data sets that do not fit, and for empty captions."""
        c = self.config
        dataset = context.dataset(c.dataset, split=c.split, **c.settings)
        texts, owner = captions(dataset, c.captions, "videotext:retrieval")
        rerank = reranker(c)
        similarity = similarities(context, dataset, texts, c)
        summary: dict[str, float] = {"texts": len(texts), "videos": len(dataset)}
        per_query: dict[str, NDArray[np.float64]] = {}
        for direction in dict.fromkeys(c.directions):
            matrices = {"": similarity}
            if rerank is not None:
                matrices["reranked "] = _reranked(rerank, similarity, owner, direction)
            for before, matrix in matrices.items():
                metrics = self._measure(matrix, owner, direction)
                summary |= {f"{before}{direction} {name}": value for name, value in metrics.summary.items()}
                for name, values in metrics.per_query.items():
                    row = np.full(len(texts) + len(dataset), np.nan)
                    row[np.arange(len(texts)) if direction == "t2v" else len(texts) + np.unique(owner)] = values
                    per_query[f"{before}{direction} {name}"] = row
        return Metrics(summary, per_query)

    def _measure(self, similarity: Scores, owner: NDArray[np.int64], direction: str) -> Metrics:
        scores, owners = torch.as_tensor(similarity), torch.as_tensor(owner)
        ranks = retrieval_ranks(scores, owners, direction, self.config.ties)
        ends = [retrieval_ranks(scores, owners, direction, ties) for ties in ("average", "pessimistic")]
        queries = {f"R@{k}": 100 * found_at(ranks, k).double() for k in self.config.ks} | {"MeanR": ranks + 1}
        means = summarise({name: _all(values) for name, values in queries.items()}, self.config)
        others = recall_summary(ranks, self.config.ks)
        summary = {
            **means.summary,
            "MedR": others["MedR"],
            "GMeanR": others["GMeanR"],
            "tied": 100 * float((ends[0] != ends[1]).double().mean()),
        }
        values = dict(means.per_query)
        return Metrics(summary, {"rank": values.pop("MeanR"), **values})


class MultipleChoice(Evaluator):
    """``accuracy``: percent of the videos whose right caption scores best among its options.

    Of equal scores the first option is taken. Videos without options are left out; ``questions`` counts the others.
    """

    def __init__(self, config: MultipleChoiceConfig) -> None:
        self.config = config

    @classmethod
    def build(cls, config: MultipleChoiceConfig) -> Self:
        return cls(config)

    def run(self, context: EvalContext) -> Metrics:
        """Raises ``InputError`` for encoders and data sets that do not fit, and where no video has options."""
        c = self.config
        dataset = context.dataset(c.dataset, split=c.split, **c.settings)
        videos, positions = video_text_set(dataset, "videotext:multiple-choice")
        tasks = {row: task for row, at in enumerate(positions) if (task := videos.multiple_choice(at)) is not None}
        if not tasks:
            raise InputError(
                f"videotext:multiple-choice: no video of {c.dataset!r} (split {c.split!r}) has captions to choose from"
            )
        options = [task[0] for task in tasks.values()]
        chosen = [int(np.argmax(scores)) for scores in option_scores(context, dataset, list(tasks), options, c)]
        right = np.array([choice == task[1] for choice, task in zip(chosen, tasks.values(), strict=True)])
        return summarise({"accuracy": _all(100.0 * right)}, c, {"questions": len(tasks)})


class QuestionAnswering(Evaluator):
    """``accuracy`` of open questions about videos, in percent, and ``accuracy KIND`` of each kind of question.

    The encoder chooses from its own vocabulary of answers; a true answer that is not in it is wrong.
    """

    def __init__(self, config: QuestionsConfig) -> None:
        self.config = config

    @classmethod
    def build(cls, config: QuestionsConfig) -> Self:
        return cls(config)

    def run(self, context: EvalContext) -> Metrics:
        """Raises ``InputError`` where the encoder answers no questions, or no video has one."""
        c = self.config
        dataset = context.dataset(c.dataset, split=c.split, **c.settings)
        videos, positions = video_text_set(dataset, "videotext:qa")
        asked = {row: questions for row, at in enumerate(positions) if (questions := videos.question(at))}
        if not asked:
            raise InputError(f"videotext:qa: no video of {c.dataset!r} (split {c.split!r}) has questions")
        predicted = self._answers(context.encoder, _Sources(dataset, list(asked)), list(asked.values()))
        flat = [question for questions in asked.values() for question in questions]
        truth, kinds = [answer for _, answer, _ in flat], [kind for _, _, kind in flat]
        shares = open_ended_accuracy(predicted, truth, kinds)
        right = 100.0 * np.array([a == b for a, b in zip(predicted, truth, strict=True)])
        of_kind = {f"accuracy {name[4:]}": 100 * share for name, share in shares.items() if name != "overall_acc"}
        return summarise({"accuracy": _all(right)}, c, {**of_kind, "questions": len(flat)})

    def _answers(
        self, encoder: Encoder, sources: Sequence[Any], asked: Sequence[Sequence[tuple[str, str, str]]]
    ) -> list[str]:
        answer: Callable[..., Sequence[str]] = _ability(encoder, "answer", "videotext:qa", "answers no questions")
        size, answers = self.config.batch_size, list[str]()
        for positions, clips in video_batches(encoder, sources, size):
            rows = [(row, text) for row, at in enumerate(positions) for text, _, _ in asked[at]]
            for some in (rows[start : start + size] for start in range(0, len(rows), size)):
                with torch.inference_mode():
                    found = answer({"video": clips[[row for row, _ in some]]}, [text for _, text in some])
                answers += [str(one) for one in found]
        return answers


class ZeroShotActions(Evaluator):
    """``top1``, ``top5``: percent of the videos whose class is among the k whose prompts are nearest.

    No class is trained on: its prompts are ``templates`` with its name. Works on every data set of videos (or pictures)
    with labels.
    """

    def __init__(self, config: ZeroShotConfig) -> None:
        self.config = config

    @classmethod
    def build(cls, config: ZeroShotConfig) -> Self:
        return cls(config)

    def run(self, context: EvalContext) -> Metrics:
        """Raises ``InputError`` for encoders that take no texts and data sets without classes."""
        c = self.config
        dataset = context.dataset(c.dataset, split=c.split, **c.settings)
        if not len(dataset.classes) or not len(dataset):
            raise InputError(
                f"videotext:zero-shot-actions needs videos with classes; {c.dataset!r} (split {c.split!r}) has "
                f"{len(dataset)} items and {len(dataset.classes)} classes"
            )
        labels = torch.as_tensor(np.asarray(dataset.labels(), np.int64))
        names = [str(name).replace("_", " ") for name in dataset.classes]
        prompts = [template.replace("{}", name) for name in names for template in c.templates]
        if c.scores == "pair":
            pairs = torch.as_tensor(similarities(context, dataset, prompts, c))
            scores = pairs.reshape(len(names), len(c.templates), -1).mean(dim=1).T
        else:
            texts = torch.as_tensor(text_vectors(context.encoder, prompts, c.text_batch_size))
            videos = torch.as_tensor(video_vectors(context, dataset, c))
            scores = zero_shot_classify(videos, texts.reshape(len(names), len(c.templates), -1))
        ks = [k for k in c.ks if k == 1 or k < len(names)]
        found = 100.0 * classes_found(scores, labels, ks)
        return summarise({f"top{k}": _all(found[:, column]) for column, k in enumerate(ks)}, c)


# ------------------------------------------------------------------------------------------------------------ texts


def captions(dataset: Dataset, which: str, asked_by: str) -> tuple[list[str], NDArray[np.int64]]:
    """The texts that search, video by video, and ``(q,)`` position of the video of each.

    Args:
        dataset: Videos with captions; some may have none.
        which: ``each`` caption, the ``first`` of a video, or all of it ``joined`` to one text.
        asked_by: Who needs them, for messages.

    Raises:
        InputError: It is no data set of videos with captions, none of them has one, or one is empty.
    """
    videos, positions = video_text_set(dataset, asked_by)
    texts, owner = list[str](), list[int]()
    for row, position in enumerate(positions):
        found = videos.captions(position)
        if any(not text.strip() for text in found):
            raise InputError(f"{videos.where(position)}: a caption is empty")
        chosen = {"each": found, "first": found[:1], "joined": [" ".join(found)] if found else []}[which]
        texts += chosen
        owner += [row] * len(chosen)
    if not texts:
        raise InputError(f"{asked_by}: none of the {len(positions)} videos has a caption to search by")
    return texts, np.array(owner, np.int64)


def text_vectors(encoder: Encoder, texts: Sequence[str], batch_size: int = 256) -> NDArray[np.float32]:
    """Unit vectors ``(q, D)``. Equal texts have equal vectors, to the last bit.

    Raises ``InputError`` where the encoder takes no texts, or a vector of it is zero or not finite.
    """
    distinct = list(dict.fromkeys(texts))
    with torch.inference_mode():
        rows = [encoder({"text": tokens}).pooled.float().cpu() for tokens in _tokens(encoder, distinct, batch_size)]
    place = {text: i for i, text in enumerate(distinct)}
    return _unit(torch.cat(rows), "texts")[[place[text] for text in texts]]


def _tokens(encoder: Encoder, texts: Sequence[str], batch_size: int) -> Iterator[dict[str, Tensor]]:
    tokenize = _ability(encoder, "tokenize", "an evaluation by texts", "takes no texts")
    for start in range(0, len(texts), batch_size):
        yield {key: value.to(_device(encoder)) for key, value in tokenize(texts[start : start + batch_size]).items()}


# ----------------------------------------------------------------------------------------------------------- videos


class _Sources(Sequence[Any]):
    """The videos (or pictures) at ``positions`` of a data set, opened when they are asked for."""

    def __init__(self, dataset: Dataset, positions: Sequence[int] | None = None) -> None:
        self.dataset = dataset
        self.positions = range(len(dataset)) if positions is None else positions

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        item = self.dataset[self.positions[index]]
        if "video" not in item and "image" not in item:
            raise InputError(f"items have no video; they have {', '.join(sorted(item))}: choose a data set of videos")
        return item["video"] if "video" in item else item["image"]


def video_batches(
    encoder: Encoder, sources: Sequence[Any], batch_size: int, *, view: int = 0, views: int = 1
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Positions and clips ``(B, T, 3, H, W)`` on the encoder's device, in order.

    With one view the frames are the middle ones of T equal parts of a video. With several, view w takes the frame at
    (w + 1/2) / views of every part.

    Raises ``InputError`` where the encoder takes no videos; ``DataError`` for one that cannot be read.
    """
    preprocessing, frames = encoder.preprocessing, encoder.frames
    if preprocessing is None or frames is None:
        raise InputError(f"a {type(encoder).__name__} takes no videos: choose an encoder of videos")
    if views == 1:
        for positions, clips in decode_clips(sources, preprocessing, frames, batch_size=batch_size):
            yield positions, torch.from_numpy(clips).to(_device(encoder))
        return
    for start in range(0, len(sources), batch_size):
        batch = []
        for source in sources[start : start + batch_size]:
            length = video_info(source).frames
            part = length // min(frames, length)
            images = read_clip(source, frames, offset=(2 * view + 1) * part // (2 * views))
            batch.append(prepare_clip(images, preprocessing, frames))
        yield np.arange(start, start + len(batch)), torch.from_numpy(np.stack(batch)).to(_device(encoder))


def video_vectors(context: EvalContext, dataset: Dataset, c: ScoredConfig) -> NDArray[np.float32]:
    """``(v, D)`` whose products with unit vectors of texts are the similarities: unit vectors where there is one view.

    Several views are averaged as embeddings, and brought to length 1 then, or as unit vectors, which averages cosines.
    """
    if c.views == 1:
        return np.asarray(context.embed(dataset), np.float32)
    total: Any = 0
    for view in range(c.views):
        batches = video_batches(context.encoder, _Sources(dataset), c.batch_size, view=view, views=c.views)
        with torch.inference_mode():
            raw = torch.cat([context.encoder({"video": clips}).pooled.float().cpu() for _, clips in batches])
        total = total + (raw.numpy() if c.average == "embedding" else _unit(raw, "videos"))
    return _unit(torch.as_tensor(total), "videos") if c.average == "embedding" else (total / c.views).astype(np.float32)


# ----------------------------------------------------------------------------------------------------- similarities


def similarities(context: EvalContext, dataset: Dataset, texts: Sequence[str], c: ScoredConfig) -> NDArray[np.float32]:
    """``(q, v)`` scores of every text and every video, by embeddings or pair by pair."""
    distinct = list(dict.fromkeys(texts))
    place = {text: i for i, text in enumerate(distinct)}
    rows = [place[text] for text in texts]
    if c.scores == "embedding":
        vectors = text_vectors(context.encoder, distinct, c.text_batch_size)
        return (vectors @ video_vectors(context, dataset, c).T)[rows]
    pair_scores = _pair_scores(context.encoder)
    tokens = list(_tokens(context.encoder, distinct, c.text_batch_size))
    scores = np.zeros((len(distinct), len(dataset)), np.float32)
    for view in range(c.views):
        batches = video_batches(context.encoder, _Sources(dataset), c.batch_size, view=view, views=c.views)
        for positions, clips in batches:
            scores[:, positions] += np.concatenate([pair_scores(clips, some) for some in tokens]) / c.views
    return scores[rows]


def option_scores(
    context: EvalContext,
    dataset: Dataset,
    positions: Sequence[int],
    options: Sequence[Sequence[str]],
    c: ScoredConfig,
) -> list[NDArray[np.float32]]:
    """For the videos at ``positions`` the scores of their own options."""
    if c.scores == "embedding":
        texts = text_vectors(context.encoder, [text for own in options for text in own], c.text_batch_size)
        vectors = video_vectors(context, dataset, c)[list(positions)]
        ends = np.cumsum([len(own) for own in options])
        return [own @ vector for own, vector in zip(np.split(texts, ends[:-1]), vectors, strict=True)]
    pair_scores = _pair_scores(context.encoder)
    scores = [np.zeros(len(own), np.float32) for own in options]
    for view in range(c.views):
        sources = _Sources(dataset, positions)
        for rows, clips in video_batches(context.encoder, sources, c.batch_size, view=view, views=c.views):
            for row, clip in zip(rows, clips, strict=True):
                tokens = _tokens(context.encoder, options[row], c.text_batch_size)
                scores[row] += np.concatenate([pair_scores(clip[None], some)[:, 0] for some in tokens]) / c.views
    return scores


def _pair_scores(encoder: Encoder) -> Callable[[Tensor, Mapping[str, Tensor]], NDArray[np.float32]]:
    score = _ability(encoder, "pair_scores", "scores = 'pair'", "scores no pairs; set scores = 'embedding'")

    @torch.inference_mode()
    def scored(clips: Tensor, tokens: Mapping[str, Tensor]) -> NDArray[np.float32]:
        found = score({"video": clips}, {"text": tokens}).float().cpu().numpy()
        if found.shape != (len(tokens["input_ids"]), len(clips)):
            raise PluginError(
                f"{type(encoder).__name__}.pair_scores gives {found.shape} for {len(tokens['input_ids'])} texts and "
                f"{len(clips)} videos; expected (texts, videos)"
            )
        return np.asarray(found, np.float32)

    return scored


# ------------------------------------------------------------------------------------------------------- re-ranking


def reranker(c: VideoRetrievalConfig) -> Callable[[Scores], Scores] | None:
    """The reranker of the settings: ``(queries, gallery)`` scores in and out. ``None`` where there is none.

    Raises ``UnknownNameError`` for a name that no plugin has, ``RecipeError`` for settings that it does not accept.
    """
    name, values = c.reranker, c.reranker_settings
    if c.rerank_temperature is not None:
        name, values = "videotext:dual-softmax", {"temperature": c.rerank_temperature}
    if name is None:
        return None
    record = get_registry().get("retriever", name, role="reranker")
    config = build_config(record, values, where=f"reranker {record.name!r}")
    target, keywords = get_registry().load(record), {} if config is None else config.model_dump()

    def rerank(scores: Scores) -> Scores:
        found = np.asarray(target(scores, **keywords))
        if found.shape != scores.shape or np.isnan(found).any():
            raise PluginError(
                f"reranker {record.name!r} gives scores of shape {found.shape} with {int(np.isnan(found).sum())} NaN "
                f"for {scores.shape}; expected as many scores, and no NaN"
            )
        return found

    return rerank


def _reranked(
    rerank: Callable[[Scores], Scores], similarity: Scores, owner: NDArray[np.int64], direction: str
) -> Scores:
    if direction == "t2v":
        return rerank(similarity)
    searching = np.unique(owner)  # a video without captions is no query
    scores = similarity.copy()
    scores[:, searching] = rerank(np.ascontiguousarray(similarity[:, searching].T)).T
    return scores


# --------------------------------------------------------------------------------------------------------- together


def _ability(encoder: Encoder, name: str, asked_by: str, lacking: str) -> Callable[..., Any]:
    found = getattr(encoder, name, None)
    if found is None:
        raise InputError(f"{asked_by}: a {type(encoder).__name__} {lacking}")
    return found


def _device(encoder: Encoder) -> torch.device:
    return next((p.device for p in encoder.parameters()), torch.device("cpu"))


def _unit(vectors: Tensor, what: str) -> NDArray[np.float32]:
    broken = ~vectors.isfinite().all(dim=1) | ~vectors.any(dim=1)
    if bool(broken.any()):
        raise InputError(
            f"the encoder gives no usable vector (NaN, infinite or zero) for {int(broken.sum())} of {len(vectors)} "
            f"{what}; its weights may be damaged"
        )
    return np.asarray(normalize(vectors, dim=1).numpy(), np.float32)


def _all(values: Any) -> PerQuery:
    """Values of queries that all count."""
    array = np.asarray(values, np.float64)
    return PerQuery(array, np.ones(len(array), bool))
