"""Retrieval of videos by texts and of texts by videos, dual-softmax re-ranking, classification and question answering.

A similarity S has one row per text and one column per video: q texts, v videos, C classes, K options, D width. A text
belongs to one video, its owner; a video may have several texts, or none. Ranks count from 0. The definitions are those
of the evaluation code of Frozen in Time (Bain et al., ICCV 2021, arXiv:2104.00650), BridgeFormer, All-in-one and CAMoE
(Cheng et al., arXiv:2109.04290); see docs/methods/video-retrieval-evaluation.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bowerbird.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

DIRECTIONS = ("t2v", "v2t")
TIES = ("official", "optimistic", "average", "pessimistic")


# ---------------------------------------------------------------------------------------------------------- ranks


def retrieval_ranks(
    similarity: Tensor,
    query_owner: Tensor | None = None,
    direction: str = "t2v",
    ties: str = "official",
    present: Tensor | None = None,
) -> Tensor:
    """The rank from 0 of what every query looks for.

    Text to video: the rank of a text's video among all videos. Video to text: the rank of the video's best text among
    the texts of all videos. Where scores are equal, the right one takes the first place of their block
    (``optimistic``), the last (``pessimistic``) or the middle (``average``).

    Args:
        similarity: ``(q, v)``, higher is nearer.
        query_owner: int ``(q,)``, column of the video that a text belongs to. ``None``: texts are stored video by
            video, q / v of each.
        direction: ``t2v`` or ``v2t``.
        ties: ``optimistic``, ``average``, ``pessimistic``, or ``official``: optimistic for t2v, average for v2t.
        present: bool, q entries (``(q,)`` or ``(v, q / v)``): texts that exist. Others neither search nor are found.

    Returns:
        float64 ``(n,)``: of the present texts, or of the videos that have a present text, in order.

    Raises:
        InputError: S is not a matrix, is empty or has NaN; owners are missing or out of range; no text is present; an
            unknown direction or rule for ties.

    Warns:
        UserWarning: All similarities are equal and the ties are optimistic: every query then counts as right.
    """
    scores, owner, there = _checked(similarity, query_owner, present)
    if direction not in DIRECTIONS:
        raise InputError(f"direction = {direction!r}: expected t2v (texts search videos) or v2t (videos search texts)")
    if ties not in TIES:
        raise InputError(f"ties = {ties!r}: expected one of {', '.join(TIES)}")
    scores, owner = scores[there], owner[there]
    if ties == "official":
        ties = "optimistic" if direction == "t2v" else "average"
    if direction == "t2v":
        own = scores.gather(1, owner[:, None])
        above, equal = (scores > own).sum(dim=1), (scores == own).sum(dim=1)
    else:
        # A text's rank falls with its score alone, so that the best text of a video is its nearest one.
        searching = owner.unique()
        best = scores.new_zeros(scores.shape[1]).scatter_reduce(
            0, owner, scores.gather(1, owner[:, None])[:, 0], "amax", include_self=False
        )[searching]
        columns = scores[:, searching]
        above, equal = (columns > best).sum(dim=0), (columns == best).sum(dim=0)
    if ties == "optimistic" and scores.shape[int(direction == "t2v")] > 1 and constant_similarity(scores):
        warnings.warn(
            "all similarities are equal, and with optimistic ties every query counts as right: the embeddings have "
            "collapsed. Measure with ties = 'average'",
            stacklevel=2,
        )
    others = (equal - 1).double()
    return above.double() + {"optimistic": 0.0, "average": 0.5, "pessimistic": 1.0}[ties] * others


def constant_similarity(similarity: Tensor) -> bool:
    """Whether all scores are the same: nothing can be ranked by them."""
    return bool((similarity == similarity.flatten()[0]).all())


def found_at(ranks: Tensor, k: int) -> Tensor:
    """bool, as ``ranks``: which queries R@k counts as right."""
    return ranks == 0 if k == 1 else ranks < k


def recall_summary(ranks: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """``R@k`` in percent, ``MedR`` and ``MeanR`` counted from 1, ``GMeanR`` = geometric mean of R@1, R@5 and R@10.

    R@k is the share of ranks below k; R@1 that of ranks equal to 0, as in the official code: a right item that shares
    the first place (rank 0.5 where ties are averaged) does not count.

    Raises ``InputError`` for no ranks, NaN among them, and k below 1.
    """
    values = torch.as_tensor(ranks).double().flatten().cpu()
    if not len(values) or bool(values.isnan().any()):
        raise InputError(f"ranks of shape {tuple(values.shape)}: expected at least one, and no NaN")
    if any(k < 1 for k in ks):
        raise InputError(f"ks = {tuple(ks)}: expected ranks of at least 1")

    def recall(k: int) -> float:
        return 100 * float(found_at(values, k).double().mean())

    return {
        **{f"R@{k}": recall(k) for k in ks},
        "MedR": float(np.median(values.numpy())) + 1,
        "MeanR": float(values.mean()) + 1,
        "GMeanR": float(np.prod([recall(k) for k in (1, 5, 10)]) ** (1 / 3)),
    }


def recall_by_id(
    similarity: Tensor, text_video_ids: Tensor, video_ids: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """``t2v R@k`` and ``v2t R@k`` as shares in [0, 1], texts and videos matched by id (All-in-one, ViLT).

    A query is right where a match is among the k best; of equal scores the one that is stored first comes first. A
    text whose video is not there, or a video without texts, is wrong.

    Args:
        similarity: ``(q, v)``, rows are texts.
        text_video_ids: ``(q,)`` id of the video of every text.
        video_ids: ``(v,)``.
        ks: Numbers of results.

    Raises:
        InputError: Shapes that do not fit, NaN, an empty gallery, or k below 1.
    """
    scores = _matrix(similarity)
    texts, videos = (torch.as_tensor(ids, device=scores.device) for ids in (text_video_ids, video_ids))
    if texts.shape != scores.shape[:1] or videos.shape != scores.shape[1:]:
        raise InputError(
            f"similarity {tuple(scores.shape)} (texts, videos) with ids of shape {tuple(texts.shape)} of texts and "
            f"{tuple(videos.shape)} of videos"
        )
    if any(k < 1 for k in ks):
        raise InputError(f"ks = {tuple(ks)}: expected numbers of at least 1")
    match = texts[:, None] == videos
    recalls: dict[str, float] = {}
    for direction, rows, right in (("t2v", scores, match), ("v2t", scores.T, match.T)):
        ordered = right.gather(1, rows.argsort(dim=1, descending=True, stable=True))
        recalls |= {f"{direction} R@{k}": float(ordered[:, :k].any(dim=1).double().mean()) for k in ks}
    return recalls


# ----------------------------------------------------------------------------------------------------- dual softmax


def dual_softmax(similarity: Tensor, temperature: float, direction: str = "t2v") -> Tensor:
    """S * softmax(S / temperature over the queries) * number of queries (CAMoE, arXiv:2109.04290), shape as S.

    A video that is near to every text loses its advantage. The softmax is over the texts for ``t2v`` and over the
    videos for ``v2t``: it needs all queries at once, so that a query's results depend on the others.

    Args:
        similarity: ``(q, v)``.
        temperature: 0.01 to 0.1 for cosines. Large ones leave the order as it is.
        direction: ``t2v`` or ``v2t``.

    Raises:
        InputError: ``temperature`` is not positive, S is not a matrix, is empty or not finite.
    """
    if not temperature > 0:
        raise InputError(f"temperature = {temperature!r}: expected a number above 0")
    if direction not in DIRECTIONS:
        raise InputError(f"direction = {direction!r}: expected t2v (texts search videos) or v2t (videos search texts)")
    scores = _matrix(similarity)
    if not bool(scores.isfinite().all()):
        raise InputError("the similarity has infinite values: a softmax over them is not defined")
    queries = DIRECTIONS.index(direction)
    return scores * (scores / temperature).softmax(dim=queries) * scores.shape[queries]


def dual_softmax_loss(similarity: Tensor, temperature: float) -> Tensor:
    """``(n,)``: -log softmax over each row of ``dual_softmax(S)``, at the diagonal. No mean is taken.

    Raises ``InputError`` where S is not square, and as ``dual_softmax``.
    """
    reranked = dual_softmax(similarity, temperature)
    if reranked.shape[0] != reranked.shape[1]:
        raise InputError(f"similarity of shape {tuple(reranked.shape)}: expected as many texts as videos")
    return -reranked.log_softmax(dim=1).diagonal()


def dual_softmax_reranker(similarity: NDArray[Any], *, temperature: float) -> NDArray[Any]:
    """``videotext:dual-softmax``: ``dual_softmax`` of ``(queries, gallery)`` scores."""
    return dual_softmax(torch.as_tensor(similarity), temperature).numpy()


# --------------------------------------------------------------------------------------------------- classification


def zero_shot_classify(video_emb: Tensor, class_prompt_embs: Tensor) -> Tensor:
    """Cosine ``(v, C)`` of every video and every class.

    A class is the mean of the unit embeddings of its prompts.

    Args:
        video_emb: ``(v, D)``.
        class_prompt_embs: ``(C, P, D)``, P prompts of each class, or ``(C, D)``.

    Raises:
        InputError: Shapes that do not fit, no class or no prompt, or NaN.
    """
    prompts = class_prompt_embs[:, None] if class_prompt_embs.ndim == 2 else class_prompt_embs
    if video_emb.ndim != 2 or prompts.ndim != 3 or prompts.shape[2:] != video_emb.shape[1:] or not prompts.numel():
        raise InputError(
            f"videos {tuple(video_emb.shape)} and prompts {tuple(class_prompt_embs.shape)}: expected (videos, D) and "
            "(classes, prompts, D) or (classes, D), with at least one class and prompt"
        )
    if bool(video_emb.isnan().any() or prompts.isnan().any()):
        raise InputError("the embeddings have NaN")
    classes = functional.normalize(functional.normalize(prompts, dim=2).mean(dim=1), dim=1)
    return functional.normalize(video_emb, dim=1) @ classes.T


def topk_accuracy(scores: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """``top1``, ``top5``, ...: percent of items with a true class among the k best. Of equal scores the first is best.

    Args:
        scores: ``(n, C)``.
        labels: int ``(n,)``, or ``(n, C)`` with non-zeros at the true classes.
        ks: Numbers of classes.

    Raises:
        InputError: Shapes that do not fit, labels out of range, NaN, or k below 1.
    """
    found = classes_found(scores, labels, ks)
    return {f"top{k}": 100 * float(found[:, column].mean()) for column, k in enumerate(ks)}


def classes_found(scores: Tensor, labels: Tensor, ks: Sequence[int]) -> NDArray[np.bool_]:
    """bool ``(n, len(ks))``: whether a true class of an item is among the k best; arguments as ``topk_accuracy``."""
    if any(k < 1 for k in ks):
        raise InputError(f"ks = {tuple(ks)}: expected numbers of at least 1")
    rows = _matrix(scores, "scores (items, classes)")
    right = _label_matrix(rows, labels).gather(1, rows.argsort(dim=1, descending=True, stable=True))
    return np.stack([right[:, :k].any(dim=1).cpu().numpy() for k in ks], axis=1)


def class_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """The rank from 0 of every true class of every item, less the number of its true classes of lower index.

    Ties take the middle of their block. Frozen in Time measures classification with several labels by them.

    Args:
        scores: ``(n, C)``.
        labels: int ``(n,)``, or ``(n, C)`` with non-zeros at the true classes.

    Returns:
        float64, one value per pair of item and true class, item by item; below 0 where an earlier class ranks lower.

    Raises:
        InputError: As ``topk_accuracy``.
    """
    rows = _matrix(scores, "scores (items, classes)")
    truth = _label_matrix(rows, labels)
    items, classes = truth.nonzero(as_tuple=True)
    own = rows[items, classes][:, None]
    rank = (rows[items] > own).sum(dim=1) + ((rows[items] == own).sum(dim=1) - 1) / 2
    return rank.double() - (truth.cumsum(dim=1)[items, classes] - 1)


# ------------------------------------------------------------------------------------------------------- questions


def multiple_choice_accuracy(scores: Tensor, answer: Tensor) -> float:
    """Percent of questions whose right option has the best score; of equal scores the first option is taken.

    Args:
        scores: ``(n, K)``.
        answer: int ``(n,)``, in 0..K-1.

    Raises:
        InputError: Shapes that do not fit, answers out of range, or NaN.
    """
    return topk_accuracy(scores, answer, ks=(1,))["top1"]


def open_ended_accuracy(
    predicted: Sequence[str], truth: Sequence[str], types: Sequence[str] | None = None
) -> dict[str, float]:
    """``overall_acc`` and, with ``types`` of the questions, ``acc_TYPE``: shares in [0, 1] of exactly right answers.

    An answer that is not in the vocabulary of a model is never predicted, and its questions are wrong.

    Raises ``InputError`` for no questions and for lists of different lengths.
    """
    lengths = [len(predicted), len(truth)] + ([] if types is None else [len(types)])
    if len(set(lengths)) > 1 or not lengths[0]:
        raise InputError(f"answers, truths (and types) of lengths {lengths}: expected equal ones, at least 1")
    right = np.array([str(a) == str(b) for a, b in zip(predicted, truth, strict=True)])
    values = {"overall_acc": float(right.mean())}
    for kind in dict.fromkeys(map(str, types if types is not None else ())):
        values[f"acc_{kind}"] = float(right[[str(other) == kind for other in types or ()]].mean())
    return values


# -------------------------------------------------------------------------------------------------------- checking


def _matrix(values: Tensor, what: str = "similarity (texts, videos)") -> Tensor:
    matrix = torch.as_tensor(values)
    if matrix.ndim != 2 or not matrix.numel():
        raise InputError(f"{what} of shape {tuple(matrix.shape)}: expected a matrix with at least one row and column")
    matrix = matrix if matrix.is_floating_point() else matrix.double()
    if bool(matrix.isnan().any()):
        raise InputError(f"{what} has {int(matrix.isnan().sum())} NaN: nothing can be ranked by it")
    return matrix


def _checked(similarity: Tensor, owner: Tensor | None, present: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """S, int ``(q,)`` owners and bool ``(q,)`` presence. What absent texts hold is neither read nor refused."""
    scores = torch.as_tensor(similarity)
    if scores.ndim != 2 or not scores.numel():
        return _matrix(scores), scores, scores  # raises
    texts, videos = scores.shape
    there = torch.ones(texts, dtype=torch.bool) if present is None else torch.as_tensor(present).flatten().bool()
    there = there.to(scores.device)
    if len(there) != texts:
        raise InputError(f"present has {len(there)} entries for {texts} texts")
    if not bool(there.any()):
        raise InputError("no text is present: nothing can be searched or found")
    scores = scores.masked_fill(~there[:, None], 0)
    if owner is None:
        if texts % videos:
            raise InputError(f"{texts} texts of {videos} videos are not equally many of each: give query_owner")
        return _matrix(scores), torch.arange(texts, device=scores.device) // (texts // videos), there
    owner = torch.as_tensor(owner, device=scores.device).long()
    if owner.shape != (texts,):
        raise InputError(f"query_owner of shape {tuple(owner.shape)} for {texts} texts")
    outside = ((owner < 0) | (owner >= videos)) & there
    if bool(outside.any()):
        text = int(outside.nonzero()[0])
        raise InputError(f"query_owner[{text}] = {int(owner[text])}: expected a column in 0..{videos - 1}")
    return _matrix(scores), owner.masked_fill(~there, 0), there


def _label_matrix(scores: Tensor, labels: Tensor) -> Tensor:
    """bool ``(n, C)``, True at the true classes."""
    labels = torch.as_tensor(labels, device=scores.device)
    count = scores.shape[1]
    if labels.shape == scores.shape:
        return labels != 0
    if labels.shape != scores.shape[:1] or labels.is_floating_point():
        raise InputError(
            f"labels of shape {tuple(labels.shape)} and {labels.dtype} for scores {tuple(scores.shape)}: expected "
            "integers, one per row, or a matrix of the shape of the scores"
        )
    if bool(((labels < 0) | (labels >= count)).any()):
        raise InputError(f"labels from {int(labels.min())} to {int(labels.max())}: expected 0..{count - 1}")
    return functional.one_hot(labels.long(), count).bool()
