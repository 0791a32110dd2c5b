"""Evaluators of videos and texts, on videos whose colours say everything."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from bowerbird.batch import Batch
from bowerbird.data import subset
from bowerbird.data.images import Preprocessing
from bowerbird.data.videos import write_video
from bowerbird.errors import InputError, PluginError, RecipeError, UnknownNameError
from bowerbird.hookspecs import hookimpl
from bowerbird.protocols import Dataset, Encoder, EvalContext, Features, Metrics
from bowerbird.records import RetrieverRecord
from bowerbird.registry import get_registry
from bowerbird.testing import EvaluatorContract, RerankerContract, SimpleEvalContext, SyntheticDataset
from bowerbird_videotext.evaluators import text_vectors, video_batches
from bowerbird_videotext.video_retrieval import dual_softmax, recall_summary, retrieval_ranks
from bowerbird_videotext.video_set import VideoTextSet

COLOURS = {"red": (220, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 220), "yellow": (220, 220, 20)}
WORDS = (*COLOURS, "a", "square", "not")


class ColourEncoder(Encoder):
    """The mean colour of a clip, and the sum of the colours that a text names. ``shift`` makes vectors alike."""

    embed_dim = 3
    frames: int | None = 2
    preprocessing = Preprocessing(size=8, mean=(0.25, 0.25, 0.25), std=(1.0, 1.0, 1.0))

    def __init__(self, shift: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(len(WORDS) + 1, 3)
        colours = [[v / 255 - 0.25 for v in COLOURS.get(word, (63.75,) * 3)] for word in ("", *WORDS)]
        self.table.weight = torch.nn.Parameter(torch.tensor(colours))
        self.register_buffer("shift", torch.tensor(shift))
        self.register_buffer("scale", torch.tensor(scale))

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        ids = [[1 + WORDS.index(word) for word in text.split() if word in WORDS] for text in texts]
        length = max(map(len, ids))
        padded = torch.tensor([row + [0] * (length - len(row)) for row in ids])
        return {"input_ids": padded, "attention_mask": (padded > 0).long()}

    def forward(self, batch: Batch) -> Features:
        if "text" in batch:
            pooled = (self.table(batch["text"]["input_ids"]) * batch["text"]["attention_mask"][..., None]).sum(dim=1)
        else:
            pooled = batch["video"].mean(dim=(1, 3, 4))
        return Features(self.scale * pooled + self.shift)


class PairEncoder(ColourEncoder):
    """Scores pairs by their cosine, and answers with the nearest colour."""

    def pair_scores(self, video: Batch, text: Batch) -> Tensor:
        return torch.cosine_similarity(self(text).pooled[:, None], self(video).pooled[None], dim=2)

    def answer(self, video: Batch, questions: Sequence[str]) -> list[str]:
        assert len(questions) == len(video["video"])
        names = list(COLOURS)
        scores = self.pair_scores(video, {"text": self.tokenize(names)})
        nearest = scores.argmax(dim=0).tolist()
        return [names[i] if text == "what colour" else "no" for i, text in zip(nearest, questions, strict=True)]


class ColourVideos(VideoTextSet):
    """One video of each of ``colours``; item by item the captions, options and questions that are given."""

    def __init__(
        self,
        folder: Path,
        colours: Sequence[str],
        captions: Sequence[list[str]],
        choices: Mapping[int, tuple[list[str], int]] | None = None,
        questions: Mapping[int, list[tuple[str, str, str]]] | None = None,
        *,
        labels: bool = False,
    ) -> None:
        self.folder, self.colours, self.texts = folder, colours, captions
        self.choices, self.questions = choices or {}, questions or {}
        self.classes = tuple(COLOURS) if labels else ()

    @classmethod
    def build(cls, config: Any, split: str | None) -> Self:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.colours)

    @property
    def item_ids(self) -> Sequence[str]:
        return [f"clip-{i}" for i in range(len(self))]

    def video(self, index: int) -> str:
        """Half of the frames are dark: where they are taken from counts."""
        path = self.folder / f"{self.colours[index]}.mp4"
        if not path.exists():
            light = np.array(COLOURS[self.colours[index]], np.uint8)
            frames = np.broadcast_to(light, (8, 8, 8, 3)).copy()
            frames[:4] //= 2
            write_video(path, frames)
        return str(path)

    def captions(self, index: int) -> list[str]:
        return list(self.texts[index])

    def multiple_choice(self, index: int) -> tuple[list[str], int] | None:
        return self.choices.get(index)

    def question(self, index: int) -> list[tuple[str, str, str]]:
        return self.questions.get(index, [])

    def labels(self) -> Sequence[int]:
        return [list(COLOURS).index(colour) for colour in self.colours]


class VideoContext(SimpleEvalContext):
    """Embeds videos as an evaluation does."""

    def embed(self, dataset: Dataset, encoder: Encoder | None = None) -> np.ndarray:
        encoder = encoder or self.encoder
        sources = [dataset[i]["video"] for i in range(len(dataset))]
        with torch.no_grad():
            rows = [encoder({"video": clips}).pooled for _, clips in video_batches(encoder, sources, 3)]
        return torch.nn.functional.normalize(torch.cat(rows), dim=1).numpy()


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clips")


def context_of(dataset: Dataset, encoder: Encoder | None = None) -> EvalContext:
    return VideoContext(encoder or ColourEncoder(), default=dataset)


def run(name: str, context: EvalContext, **settings: Any) -> Metrics:
    record = get_registry().get("evaluator", f"videotext:{name}")
    config = get_registry().load_config(record)
    assert config is not None
    values = {"dataset": "any", "samples": 20, "split": None, **settings}
    return get_registry().load(record).build(config(**values)).run(context)


def each(folder: Path, **more: Any) -> ColourVideos:
    return ColourVideos(folder, list(COLOURS), [[f"a {colour} square"] for colour in COLOURS], **more)


# --------------------------------------------------------------------------------------------------------- retrieval


def test_an_encoder_that_knows_colours_finds_every_video_and_every_text(clips: Path) -> None:
    metrics = run("retrieval", context_of(each(clips)))
    for direction in ("t2v", "v2t"):
        assert metrics.summary[f"{direction} R@1"] == metrics.summary[f"{direction} R@1.low"] == 100
        assert metrics.summary[f"{direction} MedR"] == metrics.summary[f"{direction} MeanR"] == 1
        assert metrics.summary[f"{direction} tied"] == 0
    assert metrics.summary["texts"] == metrics.summary["videos"] == 4
    assert metrics.per_query["t2v rank"][:4].tolist() == [1, 1, 1, 1]


def test_every_caption_is_a_query_and_a_video_without_one_is_only_searched(clips: Path) -> None:
    captions = [["red", "a red square", "blue"], [], ["blue"], ["yellow"]]
    dataset = ColourVideos(clips, list(COLOURS), captions)
    metrics = run("retrieval", context_of(dataset))
    assert metrics.summary["texts"] == 5 and metrics.summary["videos"] == 4
    ranks = metrics.per_query["t2v rank"]
    # "blue" is nearest to the blue video, and then to any of the others
    assert ranks[:2].tolist() == [1, 1] and ranks[2] > 1 and ranks[3:5].tolist() == [1, 1]
    assert np.isnan(ranks[5:]).all()
    assert metrics.summary["t2v R@1"] == 80
    found = metrics.per_query["v2t rank"]
    assert len(found) == 9 and np.isnan(found[:5]).all() and np.isnan(found[6])
    assert found[5] == 1.5  # "red" and "a red square" are equally near
    # a caption that says "blue" twice ties for the blue video: the middle of two places is no R@1
    assert found[7] == 1.5 and found[8] == 1 and metrics.summary["v2t R@1"] == pytest.approx(100 / 3)


def test_the_numbers_are_those_of_the_functions(clips: Path) -> None:
    colours = ["red", "green", "blue", "yellow", "red"]
    captions = [["red", "not red"], ["green"], ["green blue"], ["yellow", "red green", "a"], ["red blue"]]
    dataset = ColourVideos(clips, colours, captions)
    context = context_of(dataset, ColourEncoder(shift=0.3))
    metrics = run("retrieval", context, ties="average", ks=(1, 2))
    texts = [caption for own in captions for caption in own]
    owner = torch.tensor([0, 0, 1, 2, 3, 3, 3, 4])
    similarity = torch.from_numpy(text_vectors(context.encoder, texts) @ context.embed(dataset).T)
    for direction in ("t2v", "v2t"):
        expected = recall_summary(retrieval_ranks(similarity, owner, direction, "average"), (1, 2))
        for name, value in expected.items():
            assert metrics.summary[f"{direction} {name}"] == pytest.approx(value), (direction, name)


@pytest.mark.parametrize(("which", "texts"), [("each", 3), ("first", 2), ("joined", 2)])
def test_captions_of_one_video_are_queries_as_the_protocol_says(clips: Path, which: str, texts: int) -> None:
    dataset = ColourVideos(clips, ["red", "yellow"], [["red"], ["red", "green"]])
    metrics = run("retrieval", context_of(dataset), captions=which)
    assert metrics.summary["texts"] == texts
    # red alone is not yellow, red and green together are
    assert metrics.summary["t2v MeanR"] == {"each": pytest.approx(4 / 3), "first": 1.5, "joined": 1}[which]


def test_a_part_of_a_data_set_is_measured_as_the_whole(clips: Path) -> None:
    metrics = run("retrieval", context_of(subset(each(clips), [3, 1])))
    assert metrics.summary["texts"] == 2 and metrics.summary["t2v R@1"] == 100


def test_scores_of_pairs_take_the_place_of_cosines(clips: Path) -> None:
    colours, captions = list(COLOURS), [["red", "blue"], ["green"], [], ["yellow", "red green", "red blue"]]
    context = context_of(ColourVideos(clips, colours, captions), PairEncoder(shift=0.2))
    by_vectors = run("retrieval", context)
    by_pairs = run("retrieval", context, scores="pair", batch_size=3, text_batch_size=2)
    assert by_pairs.summary == pytest.approx(by_vectors.summary, abs=1e-4)


def test_views_take_other_frames_and_are_averaged_as_asked(clips: Path) -> None:
    dataset, encoder = each(clips), PairEncoder(shift=0.1)
    context, sources = context_of(dataset, encoder), [dataset.video(i) for i in range(4)]
    # two parts of four frames each: offsets 1 and 3 for two views
    raw = []
    for view in (0, 1):
        ((_, frames),) = video_batches(encoder, sources, 8, view=view, views=2)
        raw.append(encoder({"video": frames}).pooled.detach())
        light = frames.mean(dim=(2, 3, 4))
        assert (light[:, 1] > light[:, 0] + 0.02).all()
    texts = torch.from_numpy(text_vectors(encoder, [dataset.captions(i)[0] for i in range(4)]))
    unit = torch.nn.functional.normalize
    expected = {
        "similarity": texts @ (unit(raw[0]) + unit(raw[1])).T / 2,
        "embedding": texts @ unit(raw[0] + raw[1]).T,
    }
    for average, similarity in expected.items():
        metrics = run("retrieval", context, views=2, average=average)
        assert metrics.summary["t2v MeanR"] == recall_summary(retrieval_ranks(similarity))["MeanR"]
    assert run("retrieval", context, views=2, scores="pair").summary == pytest.approx(
        run("retrieval", context, views=2).summary
    )
    with pytest.raises(ValidationError, match="average = 'similarity'"):
        run("retrieval", context, views=2, scores="pair", average="embedding")


def test_collapse_is_reported_and_seen_in_ties(clips: Path) -> None:
    with pytest.warns(UserWarning, match="collapsed"):
        metrics = run("retrieval", context_of(each(clips), ColourEncoder(shift=1.0, scale=0.0)))
    assert metrics.summary["t2v R@1"] == 100 and metrics.summary["t2v tied"] == 100
    assert metrics.summary["v2t R@1"] == 0 and metrics.summary["v2t MeanR"] == 2.5


# -------------------------------------------------------------------------------------------------------- rerankers


class TestDualSoftmaxContract(RerankerContract):
    name = "videotext:dual-softmax"
    config = {"temperature": 0.1}


def test_every_number_is_given_with_the_reranker_and_without(clips: Path) -> None:
    captions = [["red", "not red"], ["green"], [], ["yellow", "red green"]]
    dataset = ColourVideos(clips, list(COLOURS), captions)
    context = context_of(dataset, ColourEncoder(shift=0.3))
    metrics = run("retrieval", context, reranker="dual-softmax", reranker_settings={"temperature": 0.02})
    plain = run("retrieval", context)
    assert {name: metrics.summary[name] for name in plain.summary} == plain.summary
    texts, owner = [text for own in captions for text in own], torch.tensor([0, 0, 1, 3, 3])
    similarity = torch.from_numpy(text_vectors(context.encoder, texts) @ context.embed(dataset).T)
    expected = recall_summary(retrieval_ranks(dual_softmax(similarity, 0.02), owner))
    assert metrics.summary["reranked t2v MeanR"] == pytest.approx(expected["MeanR"])
    searching = [0, 1, 3]  # a video without captions is no query of the softmax either
    columns = dual_softmax(similarity[:, searching], 0.02, "v2t")
    ranks = retrieval_ranks(columns, torch.tensor([0, 0, 1, 2, 2]), "v2t")
    assert metrics.per_query["reranked v2t rank"][[5, 6, 8]].tolist() == (ranks + 1).tolist()
    short = run("retrieval", context, rerank_temperature=0.02)
    assert short.summary == metrics.summary


def last_first(scores: np.ndarray, *, factor: float = 1.0) -> np.ndarray:
    return -factor * scores


def one_score(scores: np.ndarray) -> np.ndarray:
    return scores[:1]


@pytest.fixture
def other_rerankers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = ModuleType("acme_rerankers")
    module.last_first, module.one_score = last_first, one_score  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "acme_rerankers", module)

    class Acme:
        BOWERBIRD_API = "1.0"

        @hookimpl
        def bowerbird_retrievers(self) -> Iterable[RetrieverRecord]:
            for name in ("last-first", "one-score"):
                target = f"acme_rerankers:{name.replace('-', '_')}"
                yield RetrieverRecord(name=f"acme:{name}", target=target, summary="For a test.", role="reranker")

    get_registry().register_module("acme", Acme())
    yield
    get_registry().unregister("acme")


@pytest.mark.usefixtures("other_rerankers")
def test_any_plugin_s_reranker_can_be_named(clips: Path) -> None:
    context = context_of(each(clips))
    metrics = run("retrieval", context, reranker="acme:last-first")
    assert metrics.summary["t2v R@1"] == 100 and metrics.summary["reranked t2v R@1"] == 0
    with pytest.raises(PluginError, match="acme:one-score"):
        run("retrieval", context, reranker="acme:one-score")
    with pytest.raises(RecipeError, match="factor"):
        run("retrieval", context, reranker="acme:last-first", reranker_settings={"factor": 2})


def test_rerankers_are_named_and_set_rightly_or_refused(clips: Path) -> None:
    context = context_of(each(clips))
    with pytest.raises(UnknownNameError, match="dual-softmax"):
        run("retrieval", context, reranker="videotext:dual-softmx")
    with pytest.raises(RecipeError, match="temperature"):
        run("retrieval", context, reranker="dual-softmax", reranker_settings={"temperature": -1})
    with pytest.raises(ValidationError, match="short for"):
        run("retrieval", context, reranker="dual-softmax", rerank_temperature=0.1)
    with pytest.raises(ValidationError, match="name one"):
        run("retrieval", context, reranker_settings={"temperature": 0.1})


# ------------------------------------------------------------------------------------- choices, questions, classes


@pytest.mark.parametrize("scores", ["embedding", "pair"])
@pytest.mark.parametrize("views", [1, 2])
def test_the_right_one_of_several_captions_is_chosen(clips: Path, scores: str, views: int) -> None:
    choices = {0: (["green", "red", "blue"], 1), 2: (["yellow", "blue"], 0), 3: (["yellow", "not yellow"], 1)}
    context = context_of(each(clips, choices=choices), PairEncoder())
    metrics = run("multiple-choice", context, scores=scores, views=views, text_batch_size=2)
    # of two equally near options the first is taken
    assert metrics.summary["questions"] == 3 and metrics.summary["accuracy"] == pytest.approx(100 / 3)
    assert metrics.per_query["accuracy"].tolist() == [100, 0, 0]


def test_questions_are_answered_by_kind(clips: Path) -> None:
    asked = {
        1: [("what colour", "green", "colour"), ("does it move", "yes", "motion"), ("does it fade", "no", "motion")],
        3: [("what colour", "teal", "colour")],  # not in the vocabulary
        0: [("what colour", "red", "colour")],
    }
    context = context_of(each(clips, questions=asked), PairEncoder())
    metrics = run("qa", context, batch_size=2)
    assert metrics.summary["questions"] == 5 and metrics.summary["accuracy"] == pytest.approx(60)
    assert metrics.summary["accuracy colour"] == pytest.approx(200 / 3)
    assert metrics.summary["accuracy motion"] == 50
    assert metrics.per_query["accuracy"].tolist() == [100, 100, 0, 100, 0]


@pytest.mark.parametrize("scores", ["embedding", "pair"])
def test_videos_are_classified_by_prompts_of_their_classes(clips: Path, scores: str) -> None:
    dataset = ColourVideos(clips, ["blue", "red", "blue", "yellow"], [[]] * 4, labels=True)
    context = context_of(dataset, PairEncoder())
    metrics = run("zero-shot-actions", context, scores=scores, ks=(1, 3), templates=("{}", "a {} {square}"))
    assert metrics.summary["top1"] == metrics.summary["top3"] == 100
    wrong = PairEncoder(scale=-1.0)
    wrong.table.weight.data.neg_()  # texts point to their colours again, videos away from theirs
    found = run("zero-shot-actions", context_of(dataset, wrong), scores=scores, ks=(1, 3), templates=("{}",))
    assert found.summary["top1"] == 0


def test_classes_of_pictures_are_found_too() -> None:
    pictures = SyntheticDataset(12, 3)
    pictures.classes = ("red", "a green square", "a_blue_square")
    metrics = run("zero-shot-actions", SimpleEvalContext(ImageTextEncoder(), default=pictures))
    assert 0 <= metrics.summary["top1"] <= 100 and "top5" not in metrics.summary


class ImageTextEncoder(ColourEncoder):
    frames = None

    def forward(self, batch: Batch) -> Features:
        if "text" in batch:
            return super().forward(batch)
        return Features(batch["image"].mean(dim=(2, 3)))


# --------------------------------------------------------------------------------------------------- contracts, errors


class _OnColours(EvaluatorContract):
    @pytest.fixture(autouse=True)
    def _clips(self, clips: Path) -> None:
        choices = {i: (["red", "green", "blue"], i % 3) for i in range(4)}
        questions = {i: [("what colour", "red", "colour")] for i in range(3)}
        self.dataset = each(clips, choices=choices, questions=questions, labels=True)

    def make_context(self) -> EvalContext:
        return context_of(self.dataset, PairEncoder())


class TestRetrievalContract(_OnColours):
    name = "videotext:retrieval"
    config = {"dataset": "any", "samples": 20, "rerank_temperature": 0.1}


class TestMultipleChoiceContract(_OnColours):
    name = "videotext:multiple-choice"
    config = {"dataset": "any", "samples": 20}


class TestQuestionsContract(_OnColours):
    name = "videotext:qa"
    config = {"dataset": "any", "samples": 20}


class TestZeroShotContract(_OnColours):
    name = "videotext:zero-shot-actions"
    config = {"dataset": "any", "samples": 20}


class Silent(Encoder):
    """Takes videos, and no texts."""

    embed_dim, frames, preprocessing = 3, 2, ColourEncoder.preprocessing

    def forward(self, batch: Batch) -> Features:
        return Features(batch["video"].mean(dim=(1, 3, 4)))


class WrongWay(PairEncoder):
    def pair_scores(self, video: Batch, text: Batch) -> Tensor:
        return super().pair_scores(video, text).T


BAD: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "an encoder without texts": (
        lambda p: run("retrieval", context_of(each(p), Silent())), InputError, "Silent takes no texts"
    ),
    "an encoder without pairs": (
        lambda p: run("retrieval", context_of(each(p)), scores="pair"), InputError, "scores = 'embedding'"
    ),
    "scores the wrong way round": (
        lambda p: run("retrieval", context_of(ColourVideos(p, ["red"], [["red", "blue"]]), WrongWay()), scores="pair"),
        PluginError,
        r"\(1, 2\) for 2 texts and 1 videos",
    ),
    "an encoder without answers": (
        lambda p: run("qa", context_of(each(p, questions={0: [("what", "it", "is")]}))), InputError, "no questions"
    ),
    "videos without questions": (lambda p: run("qa", context_of(each(p), PairEncoder())), InputError, "has questions"),
    "videos without options": (lambda p: run("multiple-choice", context_of(each(p))), InputError, "choose from"),
    "videos without classes": (lambda p: run("zero-shot-actions", context_of(each(p))), InputError, "0 classes"),
    "videos without captions": (
        lambda p: run("retrieval", context_of(ColourVideos(p, ["red"], [[]]))), InputError, "none of the 1 videos"
    ),
    "an empty caption": (
        lambda p: run("retrieval", context_of(ColourVideos(p, ["red"], [["red", " "]]))), InputError, "'clip-0'.*empty"
    ),
    "pictures with labels": (
        lambda p: run("retrieval", SimpleEvalContext(ColourEncoder(), default=SyntheticDataset())),
        InputError,
        "videos with captions",
    ),
    "a broken encoder": (
        lambda p: text_vectors(ColourEncoder(shift=float("nan")), ["red"]), InputError, "1 of 1 texts"
    ),
    "an encoder of pictures": (
        lambda p: run("retrieval", context_of(each(p), ImageTextEncoder()), views=2), InputError, "takes no videos"
    ),
    "a prompt without a class": (
        lambda p: run("zero-shot-actions", context_of(each(p, labels=True)), templates=("a video",)),
        ValidationError,
        "needs one",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_by_name(clips: Path, case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call(clips)
