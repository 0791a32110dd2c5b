"""MCQ: questions, the loss of the authors, gradients, and that nothing of it is exported."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_pairs import CAPTIONS, Captioned, tiny_batch, tiny_config, tiny_encoder

from bowerbird.batch import Batch
from bowerbird.data.views import Subset
from bowerbird.encoders import load_encoder, save_encoder
from bowerbird.errors import DataError, InputError, RecipeError
from bowerbird.protocols import BuildContext, Encoder, TrainedRun
from bowerbird.testing import ObjectiveContract, SimpleBuildContext
from bowerbird.train.data import collate
from bowerbird_videotext.contrastive import pair_similarities
from bowerbird_videotext.data_configs import MovingConfig
from bowerbird_videotext.losses import symmetric_info_nce
from bowerbird_videotext.mcq import (
    BridgeFormer,
    MCQConfig,
    MCQObjective,
    answer_accuracy,
    build_multiple_choice_question,
    draw_phrase,
    phrase_extractor,
    same_answers,
)
from bowerbird_videotext.moving import Moving

WORDS = {"nouns": ["red boot", "blue boot", "red shirt", "blue shirt"], "verbs": ["moves left", "stays", "moves up"]}
SPACE_ONLY = {"temporal_attention": False, "temporal_embedding": False}


def made(captions: Captioned | None = None, *, encoder: Encoder | None = None, **settings: Any) -> MCQObjective:
    config = MCQConfig(**{**WORDS, **settings})
    context = SimpleBuildContext(dataset=captions or Captioned())
    return MCQObjective.build(config, encoder or tiny_encoder(**SPACE_ONLY), context)


def asking_batch(objective: MCQObjective, count: int = 6, *, seed: int = 0) -> Batch:
    batch = tiny_batch(objective.encoder, count, seed=seed)
    pieces = objective.encoder.ready_tokenizer().pieces
    asked = [
        build_multiple_choice_question(CAPTIONS[i % 12], " ".join(CAPTIONS[i % 12].split()[1:3]), pieces)
        for i in range(count)
    ]
    return batch | {"question": [question for question, _ in asked], "answer": [answer for _, answer in asked]}


# ------------------------------------------------------------------------------------------------ questions


def test_questions_and_answers_are_the_authors(golden: Callable[[str], dict[str, Any]]) -> None:
    values = golden("mcq/question_builder")
    length = values["toy_piece_length"]
    rows = [[str(text) for text in values[key]] for key in ("captions", "phrases", "questions", "answers")]
    for caption, phrase, question, answer in zip(*rows, strict=True):
        found = build_multiple_choice_question(caption, phrase, lambda word: math.ceil(len(word) / length))
        assert found == (question, answer)


@given(
    words=st.lists(st.text("abAB',", min_size=1, max_size=4), min_size=1, max_size=6),
    phrase=st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=2),
)
@settings(max_examples=50, deadline=None)
def test_a_question_has_a_mask_per_piece_of_every_erased_word_and_the_rest_of_the_caption(
    words: list[str], phrase: list[str]
) -> None:
    question, answer = build_multiple_choice_question(" ".join(words), " ".join(phrase), len, "<m>")
    erased = [
        word.replace(",", "") for word in words if word.replace(",", "") in {*phrase, *(w.capitalize() for w in phrase)}
    ]
    assert question.split().count("<m>") == sum(map(len, erased))
    assert answer == " ".join(["<m>"] * 3 + phrase)
    if not erased:
        assert question == " ".join(words).replace("'", "")


def test_a_phrase_without_a_word_is_refused() -> None:
    with pytest.raises(ValueError, match="no word to ask for"):
        build_multiple_choice_question("a boot", " ", len)


@pytest.mark.parametrize(
    ("nouns", "verbs", "question", "expected"),
    [
        (["red boot", "shirt"], ["moves"], "noun", {"red boot", "shirt"}),
        (["red boot"], ["moves"], "verb", {"moves"}),
        (["red boot"], [], "verb", {"red boot"}),
        ([], ["moves"], "noun", {"moves"}),
        (["red boot"], ["moves"], "alternate", {"red boot", "moves"}),
        ([], [], "noun", {"A", "red", "boot", "moves", "shirt"}),
        (["hat"], ["Moves"], "noun", {"moves"}),  # a hat is in another caption of the same video
        (["a RED Boot"], [], "noun", {"A red boot"}),
    ],
)
def test_a_phrase_is_drawn_of_the_wanted_kind_else_of_the_other_else_any_word(
    nouns: list[str], verbs: list[str], question: Any, expected: set[str]
) -> None:
    generator = np.random.default_rng(0)
    words = ["A", "red", "boot", "moves", "shirt"]
    drawn = Counter(draw_phrase(words, nouns, verbs, question, generator) for _ in range(100))
    assert set(drawn) == expected
    assert min(drawn.values()) > 100 / len(expected) / 3


def test_items_of_a_batch_carry_a_question_and_its_answer_and_depend_on_their_generator_alone() -> None:
    dataset = Captioned(["A red boot (of mine), moves left.", "a blue shirt stays"])
    objective = made(dataset, question="noun")
    transform = objective.item_transform()
    assert transform is not None
    items = [transform({**dataset[i], "index": i}, np.random.default_rng(i)) for i in range(2)]
    again = [transform({**dataset[i], "index": i}, np.random.default_rng(i)) for i in range(2)]
    tokenizer = objective.encoder.ready_tokenizer()
    masks = " ".join(["[MASK]"] * (tokenizer.pieces("red") + tokenizer.pieces("boot")))
    assert items[0]["question"] == f"A {masks} of mine moves left"
    assert items[0]["answer"] == "[MASK] [MASK] [MASK] red boot"
    assert items[0]["caption"] == "A red boot (of mine), moves left."
    assert [item["question"] for item in items] == [item["question"] for item in again]
    output = objective(collate(items, objective.encoder.tokenize))
    assert output.total.isfinite()
    assert tokenizer.mask_id in tokenizer([items[0]["question"]])["input_ids"]


def test_phrases_may_come_with_the_items() -> None:
    captions = ["a cat sleeps", "a dog runs"]
    dataset = Captioned(captions, nouns=[["cat"], "[dog]"], verbs=["sleeps", ["runs"]])
    transform = made(dataset, phrases="columns", question="verb").item_transform()
    assert transform is not None
    items = [transform(dataset[i], np.random.default_rng(0)) for i in range(2)]
    assert [item["answer"].split("] ")[-1] for item in items] == ["sleeps", "runs"]
    assert "nouns" not in items[0], "lists of phrases go on into the batch"
    with pytest.raises(InputError, match=r"item 'clip-0': no nouns, which phrases = 'columns' reads .* Add the column"):
        transform(Captioned(captions)[0], np.random.default_rng(0))


def test_a_caption_of_punctuation_alone_is_refused_by_name() -> None:
    dataset = Captioned(["a boot", "..."])
    transform = made(dataset).item_transform()
    assert transform is not None
    with pytest.raises(InputError, match=r"item 'clip-1': the caption '\.\.\.' has no word to ask for"):
        transform(dataset[1], np.random.default_rng(0))


def test_a_vocabulary_must_be_given_for_captions_that_no_program_wrote() -> None:
    with pytest.raises(
        RecipeError, match=r"needs the lists nouns and verbs .*pip install 'bowerbird-videotext\[tagger"
    ):
        phrase_extractor(MCQConfig(), Captioned())
    with pytest.raises(RecipeError, match="needs the lists nouns and verbs"):
        phrase_extractor(MCQConfig(), None)


@pytest.mark.parametrize(
    ("words", "nouns", "verbs"),
    [({}, ["red boot", "white shirt"], ["moves left", "stays still"]), ({"colours": ()}, ["boot", "shirt"], None),
     ({"verbs": ()}, ["red boot", "white shirt"], [])],
)  # fmt: skip
def test_moving_pictures_bring_their_vocabulary(words: Any, nouns: list[str], verbs: list[str] | None) -> None:
    dataset = Moving(MovingConfig(**words), "train", ["boot", "shirt"])
    extractor = phrase_extractor(MCQConfig(), Subset(dataset, [0, 1]))
    assert extractor is not None
    caption = "a red boot moves left while a white shirt stays still"
    assert extractor.nouns(caption) == nouns
    assert extractor.verbs(caption) == (["moves left", "stays still"] if verbs is None else verbs)
    for i in range(20):
        said = dataset.captions(i)[0]
        assert len(extractor.nouns(said)) == 2, said
        assert len(extractor.verbs(said)) == (2 if dataset.verbs else 0), said


# ------------------------------------------------------------------------------------------------ loss and gradients


def test_the_loss_and_its_gradients_are_the_authors(golden: Callable[[str], dict[str, Any]]) -> None:
    values = golden("mcq/mcq_loss")
    names = ("text", "video", "answer", "bridge")
    text, video, answer, bridge = (values[name].requires_grad_() for name in names)
    parts = [
        symmetric_info_nce(pair_similarities(*pair), values["temperature"])
        for pair in ((text, video), (answer, bridge))
    ]
    assert parts[0].item() == pytest.approx(values["loss_video_text"], rel=1e-12)
    assert parts[1].item() == pytest.approx(values["loss_mcq"], rel=1e-12)
    (parts[0] + parts[1]).backward()
    for name, tensor in zip(names, (text, video, answer, bridge), strict=True):
        torch.testing.assert_close(tensor.grad, values[f"grad_{name}"], rtol=1e-9, atol=1e-12)


def test_the_parts_are_both_losses_and_without_any_difference_they_are_4_ln_b() -> None:
    objective = made().double()
    batch = asking_batch(objective)
    batch["video"] = batch["video"].double()
    output = objective(batch)
    assert output.total.item() == pytest.approx(sum(part.item() for part in output.parts.values()))
    with torch.no_grad():  # vectors of zeros: every similarity is 0
        for layer in (objective.encoder.text_proj, objective.encoder.video_proj, objective.bridge_proj):
            layer.weight.zero_()
            layer.bias.zero_()
    assert objective(batch).total.item() == pytest.approx(4 * math.log(6))


def test_the_question_reaches_the_pixels_and_leaves_the_embedding_of_the_clip_alone() -> None:
    objective = made(question="verb")
    batch = asking_batch(objective)
    batch["video"].requires_grad_()
    objective(batch).parts["answer"].backward()
    assert batch["video"].grad.abs().sum() > 0
    assert objective.encoder.video_proj.weight.grad is None, "answers are compared with the bridge, not with the clip"

    # The first term knows nothing of the bridge: it is that of the bare encoder.
    vectors = objective.encoder.encode_text(batch["text"]), objective.encoder.encode_video(batch["video"])
    bare = symmetric_info_nce(pair_similarities(*vectors))
    assert torch.equal(objective(batch).parts["text_video"], bare)


def test_the_question_uses_the_states_up_to_half_the_depth_and_never_the_last_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objective = made(encoder=tiny_encoder(**SPACE_ONLY, text_depth=3))  # a video encoder of 3 blocks reads states 0, 1
    calls: list[list[torch.Tensor]] = []
    states_of = objective.encoder.text_states

    def recorded(text: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        calls.append(states_of(text))
        for state in calls[-1]:
            state.retain_grad()
        return calls[-1]

    monkeypatch.setattr(objective.encoder, "text_states", recorded)
    objective(asking_batch(objective)).total.backward()
    of_caption, of_question, of_answer = ([bool(state.grad is not None and state.grad.any()) for state in states]
                                          for states in calls)  # fmt: skip
    assert of_caption == of_answer == [True, True, True, True]
    assert of_question == [True, True, False, False]


def test_equal_answers_are_no_negatives_of_each_other_where_that_is_wished() -> None:
    plain, careful = made(), made(ignore_duplicate_answers=True)
    careful.load_state_dict(plain.state_dict())
    batch = asking_batch(plain)  # three pairs of six ask for the red boot, three for the red shirt
    assert sorted(Counter(batch["answer"]).values()) == [3, 3]
    assert careful(batch).parts["answer"] < plain(batch).parts["answer"]
    assert torch.equal(careful(batch).parts["text_video"], plain(batch).parts["text_video"])
    different = {key: value[::3] if isinstance(value, list | torch.Tensor) else value for key, value in batch.items()}
    different["text"] = {key: value[::3] for key, value in batch["text"].items()}
    assert torch.equal(careful(different).total, plain(different).total), "no answer comes twice"


def test_an_answer_that_says_the_same_is_right() -> None:
    answers = ["boot", "hat", "Boot"]
    same = same_answers(answers, torch.device("cpu"))
    assert same.tolist() == [[False, False, True], [False, False, False], [True, False, False]]
    choices = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])  # rows: answers; columns: bridges
    # Bridge 0 finds its own, 1 the third (wrong), 2 the first, which says the same.
    assert answer_accuracy(choices, same).item() == pytest.approx(2 / 3)


# ------------------------------------------------------------------------------------------------ encoders and export


class TestMCQ(ObjectiveContract):
    name = "videotext:mcq"
    config: ClassVar[dict[str, Any]] = WORDS
    encoder_inputs = ("video", "text")
    batch_size = 6

    def make_encoder(self) -> Encoder:
        return tiny_encoder(**SPACE_ONLY)

    def make_context(self) -> BuildContext:
        return SimpleBuildContext(dataset=Captioned())

    def make_batch(self, *, seed: int = 0) -> Batch:
        return asking_batch(made(), self.batch_size, seed=seed)

    def make_encoder_batch(self, encoder: Encoder) -> Batch:
        return {"video": self.make_batch()["video"]}


def test_what_is_exported_is_the_dual_encoder_and_gives_the_same_numbers(tmp_path: Path) -> None:
    objective = made().train()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        objective(asking_batch(objective, seed=step)).total.backward()
        optimizer.step()
    batch = asking_batch(objective)
    objective.eval()
    wanted = objective.encoder.encode_video(batch["video"]), objective.encoder.encode_text(batch["text"])
    save_encoder(
        objective.exported_encoder(),
        tmp_path / "encoder",
        use="videotext:dual-encoder",
        config=tiny_config(**SPACE_ONLY).model_dump(mode="json"),
    )
    loaded = load_encoder(tmp_path / "encoder", device="cpu").module
    assert {name.split(".")[0] for name in loaded.state_dict()} == {
        "video_encoder", "video_proj", "text_encoder", "text_proj", "vocabulary",
    }  # fmt: skip
    with torch.no_grad():
        assert torch.equal(loaded({"video": batch["video"]}).pooled, wanted[0])
        assert torch.equal(loaded({"text": batch["text"]}).pooled, wanted[1])


def test_the_bridge_of_the_stage_before_goes_on() -> None:
    first = made()
    state = {key: value for key, value in first.state_dict().items() if not key.startswith("encoder.")}
    run = TrainedRun(Path("first"), first.encoder, state, (), {})
    none = TrainedRun(Path("plain"), first.encoder, {}, (), {})
    context = SimpleBuildContext(dataset=Captioned(), runs={"first": run, "plain": none})

    def second(**settings: Any) -> MCQObjective:
        config = MCQConfig(**{**WORDS, **settings})
        return MCQObjective.build(config, tiny_encoder(**SPACE_ONLY), context)

    found = second(bridge_run="first", question="verb").state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items()) and len(state) > 20
    with pytest.raises(RecipeError, match="bridge_run 'plain' holds no bridge"):
        second(bridge_run="plain")
    with pytest.raises(DataError, match=r"weights 'first' do not fit .* of another shape"):
        second(bridge_run="first", bridge_mlp_ratio=2.0)


def test_attention_over_time_is_allowed() -> None:
    objective = made(encoder=tiny_encoder())
    assert objective(asking_batch(objective)).total.isfinite()


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ({"text_dim": 12}, r"set text_dim = 8 \(or embed_dim = 12\)"),
        ({"text_depth": 0}, "set text_depth = 1 or more"),
        ({"depth": 0}, "set depth = 1 or more"),
    ],
)
def test_encoders_whose_sizes_do_not_fit_are_refused_with_the_setting_to_change(
    encoder: dict[str, int], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        made(encoder=tiny_encoder(**encoder))


def test_values_outside_their_ranges_are_refused() -> None:
    encoder = tiny_encoder()
    encoder.open(CAPTIONS)
    wrongs: list[dict[str, Any]] = [{"temperature": 0.0}, {"question": "adverb"}]
    for wrong in wrongs:
        with pytest.raises(InputError, match="expected"):
            MCQObjective(encoder, BridgeFormer(8, 3, 2), **wrong)
    with pytest.raises(InputError, match="does not fit a video encoder of width 8 and 3 blocks"):
        MCQObjective(encoder, BridgeFormer(8, 2, 2))
    objective = made()
    batch = asking_batch(objective)
    for wrong_list in (batch["question"][:-1], "a boot"):
        with pytest.raises(InputError, match="needs a list of 6 texts 'question'"):
            objective(batch | {"question": wrong_list})
