"""The encoder and the objective ``videotext:all-in-one``: tasks, what they train, answers, choices, folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_pairs import CAPTIONS, Captioned

from bowerbird.batch import Batch
from bowerbird.encoders import load_encoder, save_encoder
from bowerbird.errors import DataError, InputError, RecipeError
from bowerbird.protocols import BuildContext
from bowerbird.testing import (
    EncoderContract,
    ObjectiveContract,
    SimpleBuildContext,
    TinyEncoder,
    override_contract_test,
)
from bowerbird.testing.training import make_batch
from bowerbird.train.data import collate
from bowerbird_videotext.all_in_one_config import AllInOneConfig
from bowerbird_videotext.all_in_one_encoder import AllInOneEncoder
from bowerbird_videotext.all_in_one_objective import (
    AllInOneObjective,
    AllInOneObjectiveConfig,
    known_answers,
    mask_words,
    mismatched,
    word_padding,
)
from bowerbird_videotext.tokenizer import WordPieceTokenizer
from bowerbird_videotext.video_set import Choice, Question

TINY: dict[str, Any] = {
    "image_size": 8, "patch_size": 2, "embed_dim": 8, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "frames": 2,
    "projection_dim": 6, "max_tokens": 12, "dropout": 0.0, "drop_path": 0.0,
}  # fmt: skip
ALL = ("mlm", "vtm", "vtc", "qa", "choice")


class Asked(Captioned):
    """Captioned pictures with a question on the colour, and three captions to choose from; the last has neither."""

    def question(self, index: int) -> list[Question]:
        if index == len(self) - 1:
            return []
        colour = self.texts[index].split()[1]
        return [("which colour is it?", colour, "colour"), ("who made it?", f"nobody {index}", "who")]

    def multiple_choice(self, index: int) -> Choice | None:
        if index == len(self) - 1:
            return None
        return [CAPTIONS[-1], self.texts[index], CAPTIONS[-2]], 1


def tiny_encoder(**settings: Any) -> AllInOneEncoder:
    return AllInOneEncoder.build(AllInOneConfig(**{**TINY, **settings}))


def made(tasks: tuple[str, ...] = ALL, encoder: AllInOneEncoder | None = None, **settings: Any) -> AllInOneObjective:
    config = AllInOneObjectiveConfig(tasks=tasks, max_answers=2, **settings)
    return AllInOneObjective.build(config, encoder or tiny_encoder(), SimpleBuildContext(dataset=Asked()))


def batch_of(objective: AllInOneObjective, indices: range = range(6), *, seed: int = 0) -> Batch:
    """As the training loop makes it."""
    transform, data = objective.item_transform(), Asked()
    assert transform is not None
    items = [transform({**data[i], "index": i}, np.random.default_rng([seed, i])) for i in indices]
    batch = collate(items, objective.encoder.tokenize)
    return {key: value for key, value in batch.items() if key not in ("item_id", "where", "caption", "index")}


# ------------------------------------------------------------------------------------------------ contracts


class TestEncoder(EncoderContract):
    name = "videotext:all-in-one"
    config: ClassVar[dict[str, Any]] = {**TINY, "vocabulary": 60}

    def make_batch(self, encoder: Any, *, batch_size: int = 4, seed: int = 0) -> Batch:
        return make_batch(("video",), batch_size=batch_size, image_size=8, num_classes=2, seed=seed)

    @override_contract_test(reason="an embedding of videos uses neither words nor heads")
    def test_gradients_reach_every_trainable_parameter_and_no_frozen_one(self) -> None:
        """Videos, texts and pairs together use everything; the objective freezes what its tasks do not use."""
        encoder = self.build().train()
        batch = {**self.make_batch(encoder), **make_batch(("text",), batch_size=4, image_size=8, num_classes=2, seed=0)}
        outputs = [
            encoder({"video": batch["video"]}).tokens,
            encoder({"text": batch["text"]}).tokens,
            encoder.pair_scores(batch, batch),
        ]
        torch.stack([(out * torch.randn_like(out)).sum() for out in outputs]).sum().backward()
        lacking = [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]
        assert not lacking


class TestObjective(ObjectiveContract):
    name = "videotext:all-in-one"
    config: ClassVar[dict[str, Any]] = {"tasks": ALL, "max_answers": 2, "options": "captions", "num_options": 3}
    encoder_inputs: ClassVar[tuple[str, ...]] = ("video",)
    batch_size = 6

    def make_encoder(self) -> AllInOneEncoder:
        return tiny_encoder()

    def make_context(self) -> BuildContext:
        return SimpleBuildContext(dataset=Asked())

    def make_batch(self, *, seed: int = 0) -> Batch:
        with torch.random.fork_rng(devices=[]):
            return batch_of(self.build(), seed=seed)

    def wrong_batches(self) -> Any:
        good = self.make_batch()
        for key in good:
            yield f"a batch without {key!r}", {other: value for other, value in good.items() if other != key}
        yield "one pair", {key: self._first(value) for key, value in good.items()}

    def _first(self, value: Any) -> Any:
        return {key: part[:1] for key, part in value.items()} if isinstance(value, dict) else value[:1]


# ------------------------------------------------------------------------------------------------ tasks


@pytest.mark.parametrize("task", ALL)
def test_every_task_alone_trains_exactly_what_is_not_frozen(task: str) -> None:
    objective = made((task,)).train()
    output = objective(batch_of(objective))
    output.total.backward()
    assert task in output.parts
    for name, parameter in objective.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert reached == parameter.requires_grad, name


def test_the_loss_is_the_sum_of_the_tasks_and_wpa_belongs_to_matching() -> None:
    objective = made(("mlm", "vtm", "vtc"))
    output = objective(batch_of(objective))
    assert set(output.parts) == {"mlm", "vtm", "wpa", "vtc"}
    torch.testing.assert_close(output.total, sum(output.parts.values()))
    without = made(("vtm",), wpa_weight=0.0)
    assert set(without(batch_of(without)).parts) == {"vtm"}


def test_words_are_hidden_as_in_bert() -> None:
    ids = torch.randint(5, 1000, (400, 100))
    ids[:, 0], ids[:, 60] = 2, 3
    mask = torch.ones_like(ids)
    mask[:, 61:] = 0
    changed, labels = mask_words(ids, mask, special_ids=[0, 1, 2, 3, 4], mask_id=4, vocab_size=1000)
    chosen = labels != -100
    assert not chosen[:, 0].any() and not chosen[:, 60:].any()
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(changed[~chosen], ids[~chosen])

    def share(of: torch.Tensor) -> float:
        return float(of.float().mean())

    assert abs(share(chosen[:, 1:60]) - 0.15) < 0.01
    hidden, kept = changed[chosen] == 4, changed[chosen] == ids[chosen]
    assert abs(share(hidden) - 0.8) < 0.03
    assert abs(share(kept) - 0.1) < 0.02
    assert abs(share(~hidden & ~kept) - 0.1) < 0.02


def test_a_batch_without_hidden_words_costs_nothing_and_has_gradients() -> None:
    objective = made(("mlm",), mask_probability=1e-9)
    output = objective(batch_of(objective))
    output.total.backward()
    assert output.total == 0
    assert all(p.grad is not None for p in objective.mlm.parameters())


@pytest.mark.parametrize("count", [2, 5, 8])
def test_half_of_the_texts_keep_their_video_and_the_others_never_get_it(count: int) -> None:
    for _ in range(20):
        index, matched = mismatched(count)
        assert matched.sum() == count // 2
        assert torch.equal(index == torch.arange(count), matched)


def test_transport_leaves_class_token_separator_and_padding_out() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    t, f = True, False
    assert word_padding(mask).tolist() == [[t, f, f, t, t], [t, f, f, f, t], [t, t, t, t, t]]


def test_the_most_frequent_answers_are_known_and_others_are_not_asked_for() -> None:
    data = Asked()
    assert known_answers(data, range(len(data)), 2) == ["red", "blue"]
    assert known_answers(data, [6, 7, 0], 1) == ["blue"]
    objective = made(("qa",))
    assert objective.encoder.answers == ("red", "blue")
    transform = objective.item_transform()
    rows = [transform({**data[i], "index": i}, np.random.default_rng(i)) for i in (0, 6, 11)]
    assert [(row["question"], row["answer"]) for row in rows] == [
        ("which colour is it?", 0),
        ("which colour is it?", 1),
        ("", -100),
    ]


def test_rows_without_question_or_options_are_left_out() -> None:
    for task in ("qa", "choice"):
        objective = made((task,)).eval()
        whole, part = batch_of(objective, range(8, 12)), batch_of(objective, range(8, 11))
        torch.testing.assert_close(objective(whole).total, objective(part).total)
        torch.testing.assert_close(objective(part).stats[f"{task}_known"], torch.tensor(1.0))
        torch.testing.assert_close(objective(whole).stats[f"{task}_known"], torch.tensor(0.75))


def test_a_batch_in_which_nothing_is_asked_has_a_loss_of_0_and_gradients_of_zeros_everywhere() -> None:
    for task in ("qa", "choice"):
        objective = made((task,))
        output = objective(batch_of(objective, range(11, 12)))
        assert output.total == 0 == output.stats[f"{task}_known"] == output.stats[f"{task}_accuracy"]
        output.total.backward()
        asked = objective(batch_of(made((task,), objective.encoder), range(3)))
        for name, parameter in objective.named_parameters():
            # Processes of one run wait for each other's gradients: none may be missing.
            assert not parameter.requires_grad or (parameter.grad is not None and not parameter.grad.any()), name
        assert asked.total > 0


def test_a_choice_is_the_cross_entropy_of_the_scores_of_its_options() -> None:
    objective = made(("choice",)).eval()
    encoder, batch = objective.encoder, batch_of(objective, range(3))
    batch["options"][1] = batch["options"][1][:2]  # videos may have fewer options than others
    rows = [encoder.pair_scores({"video": batch["video"][i : i + 1]}, {"text": encoder.tokenize(batch["options"][i])})
            for i in range(3)]  # fmt: skip
    wanted = torch.stack([-row[:, 0].log_softmax(0)[1] for row in rows]).mean()
    torch.testing.assert_close(objective(batch).total, wanted)


def test_options_among_captions_are_different_and_hold_the_own_one_where_it_is_said() -> None:
    objective, data = made(("choice",), options="captions", num_options=4), Asked()
    places = set()
    for i in range(11):
        row = objective.item_transform()({**data[i], "index": i}, np.random.default_rng(i))
        assert len(row["options"]) == len(set(row["options"])) == 4
        assert row["options"][row["right_option"]] == row["caption"] == CAPTIONS[i]
        places.add(row["right_option"])
    assert len(places) > 1


def test_the_head_of_answers_learns_faster() -> None:
    objective = made(("vtm", "qa"))
    head = {id(p) for p in objective.encoder.qa.parameters()}
    groups = objective.parameter_groups()
    for group in groups:
        for parameter in group["params"]:
            assert group.get("lr_scale", 1.0) == (10.0 if id(parameter) in head else 1.0)
            assert (group.get("weight_decay") == 0) == (parameter.ndim <= 1)


# ------------------------------------------------------------------------------------------------ the encoder


def test_pairs_are_scored_one_by_one() -> None:
    objective = made(("vtm",))
    encoder, videos = objective.encoder.eval(), torch.randn(3, 2, 3, 8, 8)
    texts = encoder.tokenize(CAPTIONS)
    scores = encoder.pair_scores({"video": videos}, {"text": texts})
    assert scores.shape == (12, 3)
    one = {key: value[7:8] for key, value in texts.items()}
    torch.testing.assert_close(scores[7, 2], encoder.matching(encoder.run(videos[2:], one).pooled)[0, 1])


def test_answers_are_those_of_the_training_questions() -> None:
    encoder = made(("qa",)).encoder.eval()
    videos, questions = torch.randn(2, 2, 3, 8, 8), ["which colour is it?", "who made it?"]
    answers = encoder.answer({"video": videos}, questions)
    logits = encoder.answer_logits(videos, encoder.tokenize(questions))
    assert answers == [encoder.answers[i] for i in logits.argmax(dim=1)]
    with pytest.raises(InputError, match="1 questions about 2 videos"):
        encoder.answer({"video": videos}, questions[:1])
    with pytest.raises(InputError, match="answers no questions"):
        made(("vtm",)).encoder.answer({"video": videos}, questions)


def test_a_picture_is_a_video_of_one_frame() -> None:
    encoder = tiny_encoder().eval()
    picture = torch.randn(2, 3, 8, 8)
    assert torch.equal(encoder({"image": picture}).pooled, encoder({"video": picture[:, None]}).pooled)


def test_texts_are_searched_in_the_space_of_videos() -> None:
    encoder = made(("vtc",)).encoder.eval()
    features = encoder({"text": encoder.tokenize(CAPTIONS[:3])})
    assert (
        features.pooled.shape == (3, encoder.embed_dim) == encoder({"video": torch.randn(3, 2, 3, 8, 8)}).pooled.shape
    )
    assert features.mask.shape == features.tokens.shape[:2]


def test_an_exported_encoder_scores_and_answers_as_before(tmp_path: Path) -> None:
    encoder = made().encoder.eval()
    video, text = torch.randn(2, 2, 3, 8, 8), encoder.tokenize(CAPTIONS[:3])
    save_encoder(encoder, tmp_path / "encoder", use="videotext:all-in-one", config=TINY)
    again: Any = load_encoder(tmp_path / "encoder", device="cpu").module
    assert torch.equal(again.tokenize(CAPTIONS[:3])["input_ids"], text["input_ids"])
    for call in (
        lambda e: e({"video": video}).pooled,
        lambda e: e({"text": text}).pooled,
        lambda e: e.pair_scores({"video": video}, {"text": text}),
    ):
        assert torch.equal(call(again), call(encoder))
    assert again.answer({"video": video}, CAPTIONS[:2]) == encoder.answer({"video": video}, CAPTIONS[:2])


def test_training_goes_on_from_a_trained_encoder_with_more_frames_and_other_answers(tmp_path: Path) -> None:
    first = made(("vtm", "qa")).encoder
    with torch.no_grad():
        first.transformer.temporal_embed.normal_()
    save_encoder(first, tmp_path / "encoder", use="videotext:all-in-one", config=TINY)
    second = tiny_encoder(weights=str(tmp_path / "encoder"), frames=3)
    own, theirs = second.state_dict(), first.state_dict()
    places = "transformer.temporal_embed"
    assert torch.equal(own[places][:, :2], theirs[places]) and not own[places][:, 2].any()
    assert all(torch.equal(value, theirs[name]) for name, value in own.items() if name != places)
    assert second.qa is None
    made(("qa",), second)
    assert second.answers == ("red", "blue")
    stored = second.stored_config({**TINY, "frames": 3, "weights": "somewhere"})
    assert "weights" not in stored and stored["answers"] == ["red", "blue"]


def test_first_weights_come_from_a_vision_transformer_and_from_bert(tmp_path: Path) -> None:
    from timm.models.vision_transformer import VisionTransformer

    vit = VisionTransformer(img_size=8, patch_size=2, embed_dim=8, depth=2, num_heads=2, mlp_ratio=2.0, num_classes=5)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    tokenizer = WordPieceTokenizer.train(CAPTIONS)
    tokenizer.save_pretrained(tmp_path / "bert")
    tables = {"word_embeddings": len(tokenizer), "position_embeddings": 30, "token_type_embeddings": 2}
    bert = {f"bert.embeddings.{name}.weight": torch.randn(rows, 8) for name, rows in tables.items()}
    norm = {"bert.embeddings.LayerNorm.gamma": torch.randn(8), "bert.embeddings.LayerNorm.beta": torch.randn(8)}
    save_file({**bert, **norm, "cls.bias": torch.zeros(3)}, tmp_path / "bert" / "model.safetensors")
    encoder = tiny_encoder(weights=str(tmp_path / "vit.safetensors"), text_weights=str(tmp_path / "bert"))
    state = encoder.state_dict()
    assert torch.equal(state["transformer.blocks.1.mlp.fc2.weight"], vit.state_dict()["blocks.1.mlp.fc2.weight"])
    assert torch.equal(state["text_encoder.word_embeddings.weight"], bert["bert.embeddings.word_embeddings.weight"])
    places = bert["bert.embeddings.position_embeddings.weight"]
    assert torch.equal(state["text_encoder.position_embeddings.weight"], places[:12])
    assert torch.equal(state["text_encoder.LayerNorm.bias"], norm["bert.embeddings.LayerNorm.beta"])
    with pytest.raises(DataError, match=r"blocks\.2"):
        tiny_encoder(weights=str(tmp_path / "vit.safetensors"), depth=3)
    with pytest.raises(DataError, match="neither model"):
        (tmp_path / "bert" / "model.safetensors").unlink()
        tiny_encoder(text_weights=str(tmp_path / "bert"))


# ------------------------------------------------------------------------------------------------ refusals


def test_what_does_not_fit_is_refused() -> None:
    context = SimpleBuildContext(dataset=Captioned())

    def build(encoder: Any = None, data: BuildContext = context, **settings: Any) -> AllInOneObjective:
        return AllInOneObjective.build(AllInOneObjectiveConfig(**settings), encoder or tiny_encoder(), data)

    with pytest.raises(RecipeError, match="trains the encoder videotext:all-in-one, not a TinyEncoder"):
        build(TinyEncoder())
    with pytest.raises(RecipeError, match="no training data"):
        build(data=SimpleBuildContext())
    with pytest.raises(InputError, match="no video of this Captioned has questions"):
        build(tasks=["qa"])
    with pytest.raises(InputError, match='no video of this Captioned has options; set options = "captions"'):
        build(tasks=["choice"])
    with pytest.raises(InputError, match="no tokenizer yet"):
        tiny_encoder()({"text": {"input_ids": torch.ones(1, 3, dtype=torch.int64)}})
    with pytest.raises(InputError, match="has none of video, image and text"):
        tiny_encoder()({})
    encoder = tiny_encoder()
    encoder.open_answers(["red", "blue"])
    with pytest.raises(InputError, match="2 answers already"):
        encoder.open_answers(["green"])
    with pytest.raises(ValueError, match="is there twice"):
        AllInOneObjectiveConfig(tasks=["mlm", "mlm"])
    with pytest.raises(InputError, match="batches of 2 or more"):
        mismatched(1)
