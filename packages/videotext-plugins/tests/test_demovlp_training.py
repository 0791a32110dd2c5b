"""The encoder and the objective ``videotext:demovlp``: regions from videos and caches, pairs, answers, folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from noise_clips import NoiseClips
from safetensors.torch import save_file
from tiny_pairs import CAPTIONS, Captioned

from bowerbird.batch import Batch
from bowerbird.data.videos import frame_indices, prepare_clip, read_clip
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
from bowerbird_videotext.demovlp import region_word_alignment_loss, region_word_scores
from bowerbird_videotext.demovlp_config import DemoVLPConfig, DemoVLPObjectiveConfig
from bowerbird_videotext.demovlp_encoder import DemoVLPEncoder, load_vit_blocks
from bowerbird_videotext.demovlp_objective import DemoVLPObjective
from bowerbird_videotext.losses import cosine_similarity_matrix, symmetric_info_nce
from bowerbird_videotext.regions import REGION_KEYS, video_regions
from bowerbird_videotext.video_set import Question

TINY: dict[str, Any] = {
    "image_size": 8, "frames": 2, "regions_per_frame": 4, "extractor": {"grid": [2, 2], "cell": 2}, "embed_dim": 8,
    "depth": 2, "num_heads": 2, "projection_dim": 6, "text_dim": 8, "text_depth": 2, "text_heads": 2, "max_tokens": 16,
    "qa_hidden": 8,
}  # fmt: skip


def tiny_encoder(**settings: Any) -> DemoVLPEncoder:
    return DemoVLPEncoder.build(DemoVLPConfig(**{**TINY, **settings}))


def opened(**settings: Any) -> DemoVLPEncoder:
    encoder = tiny_encoder(**settings)
    encoder.open(CAPTIONS)
    return encoder


def made(dataset: Any = None, encoder: DemoVLPEncoder | None = None, **settings: Any) -> DemoVLPObjective:
    context = SimpleBuildContext(dataset=dataset or Captioned())
    return DemoVLPObjective.build(DemoVLPObjectiveConfig(**settings), encoder or tiny_encoder(), context)


def rows_of(objective: DemoVLPObjective, dataset: Any, indices: range, seed: int = 0) -> list[dict[str, Any]]:
    transform = objective.item_transform()
    assert transform is not None
    return [transform({**dataset[i], "index": i}, np.random.default_rng([seed, i])) for i in indices]


def batch_of(objective: DemoVLPObjective, dataset: Any, indices: range, seed: int = 0) -> Batch:
    """As the training loop makes it, but for what only messages need."""
    batch = collate(rows_of(objective, dataset, indices, seed), objective.encoder.tokenize)
    return {key: value for key, value in batch.items() if key not in ("item_id", "where", "caption", "index", "source")}


# ------------------------------------------------------------------------------------------------------ contracts


class TestEncoder(EncoderContract):
    name = "videotext:demovlp"
    config: ClassVar[dict[str, Any]] = {**TINY, "vocabulary": 60}

    def make_batch(self, encoder: Any, *, batch_size: int = 4, seed: int = 0) -> Batch:
        batch = make_batch(("video",), batch_size=batch_size, image_size=8, num_classes=2, seed=seed)
        return {"video": batch["video"][:, :2]}

    @override_contract_test(reason="an embedding of videos uses no words")
    def test_gradients_reach_every_trainable_parameter_and_no_frozen_one(self) -> None:
        encoder = self.build().train()
        text = make_batch(("text",), batch_size=4, image_size=8, num_classes=2, seed=0)
        videos = encoder(self.make_batch(encoder))
        texts = encoder(text)
        outputs = [videos.pooled, videos.tokens, texts.pooled, texts.tokens]
        torch.stack([(out * torch.randn_like(out)).sum() for out in outputs]).sum().backward()
        assert not [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]


class TestObjective(ObjectiveContract):
    name = "videotext:demovlp"
    encoder_inputs: ClassVar[tuple[str, ...]] = ("video",)
    batch_size = 6
    learning_rate = 0.003  # what attention drops changes from step to step: larger steps overshoot

    def make_encoder(self) -> DemoVLPEncoder:
        return tiny_encoder(frames=5)

    def make_context(self) -> BuildContext:
        return SimpleBuildContext(dataset=Captioned())

    def make_batch(self, *, seed: int = 0) -> Batch:
        with torch.random.fork_rng(devices=[]):
            return batch_of(self.build(), Captioned(), range(self.batch_size), seed=seed)


# -------------------------------------------------------------------------------------------------------- videos


def test_videos_are_read_by_the_regions_that_the_extractor_finds() -> None:
    encoder = opened().eval()
    video = torch.rand(3, 2, 3, 8, 8)
    video[1, 1] = 0  # a short one
    regions = video_regions(encoder.extractor, video, 4)
    features = encoder({"video": video})
    torch.testing.assert_close(encoder(regions.batch()).pooled, features.pooled)
    assert features.tokens is not None and features.mask is not None
    assert features.tokens.shape == (3, 8, 6)
    assert torch.equal(features.mask, regions.valid.flatten(1))
    picture = encoder({"image": video[:, 0]}).pooled
    torch.testing.assert_close(picture[1], features.pooled[1])  # a picture is a video of one frame


def test_of_more_stored_frames_one_of_every_part_is_read() -> None:
    encoder = opened().eval()
    regions = video_regions(encoder.extractor, torch.rand(2, 7, 3, 8, 8), 4).batch()
    chosen = {key: value[:, frame_indices(7, 2)] for key, value in regions.items()}
    assert torch.equal(encoder(regions).pooled, encoder(chosen).pooled)
    with pytest.raises(InputError, match="up to 2"):
        encoder({"video": torch.rand(1, 3, 3, 8, 8)})


def test_a_batch_without_what_is_needed_is_refused() -> None:
    encoder = opened()
    with pytest.raises(InputError, match="none of regions, video, image and text"):
        encoder({"item_id": ["a"]})
    with pytest.raises(InputError, match="no region_geometry, region_valid"):
        encoder({"regions": torch.rand(1, 2, 4, 12)})


# --------------------------------------------------------------------------------------------------------- pairs


def test_scores_of_pairs_are_cosine_plus_region_word_score_whatever_the_chunk() -> None:
    encoder = opened().eval()
    video = {"video": torch.rand(5, 2, 3, 8, 8)}
    text = {"text": encoder.tokenize(CAPTIONS[:7])}
    videos, texts = encoder.video_parts(video), encoder.text_parts(text["text"])
    parts = region_word_scores(videos.parts, texts.parts, videos.valid, texts.valid, ignore_padding=True)
    expected = cosine_similarity_matrix(texts.whole, videos.whole) + parts.T
    for chunk in (1, 2, 8):
        torch.testing.assert_close(encoder.pair_scores(video, text, chunk=chunk), expected)
    assert expected.shape == (7, 5)


def test_a_score_does_not_depend_on_the_longest_text_of_the_batch() -> None:
    video = {"video": torch.rand(2, 2, 3, 8, 8)}
    for ignore in (True, False):
        encoder = opened(ignore_padding=ignore).eval()
        alone = encoder.pair_scores(video, {"text": encoder.tokenize(["a red boot"])})
        beside = encoder.pair_scores(video, {"text": encoder.tokenize(["a red boot", CAPTIONS[0]])})[:1]
        assert torch.allclose(alone, beside, atol=1e-6) == ignore


def test_the_loss_is_that_of_wholes_plus_that_of_parts() -> None:
    objective = made(alignment_weight=0.5, temperature=0.1).eval()
    batch = batch_of(objective, Captioned(), range(6))
    output = objective(batch)
    videos, texts = objective.encoder.video_parts(batch), objective.encoder.text_parts(batch["text"])
    contrast = symmetric_info_nce(cosine_similarity_matrix(texts.whole, videos.whole), 0.1)
    aligned = region_word_alignment_loss(objective.encoder.region_word_scores(videos, texts))
    torch.testing.assert_close(output.total, contrast + 0.5 * aligned)
    assert set(output.parts) == {"global", "alignment"}
    without = made(encoder=objective.encoder, alignment_weight=0.0, temperature=0.1)(batch)
    torch.testing.assert_close(without.total, contrast)
    assert set(without.parts) == {"global"}


def test_alignment_teaches_which_region_a_word_means() -> None:
    """Two colours of two squares: with the loss of parts, scores of pairs find the own caption."""
    torch.manual_seed(0)
    colours = {"red": (1.0, 0, 0), "blue": (0, 0, 1.0), "green": (0, 1.0, 0), "white": (1.0, 1, 1)}
    texts = [f"{a} and {b}" for a in colours for b in colours if a != b]
    video = torch.full((len(texts), 1, 3, 8, 8), 0.05)
    for row, text in zip(video, texts, strict=True):
        first, second = text.split(" and ")
        row[0, :, :, :4] = torch.tensor(colours[first])[:, None, None]
        row[0, :, :, 4:] = torch.tensor(colours[second])[:, None, None]
    encoder = tiny_encoder(frames=1, extractor={"grid": [1, 2], "cell": 2}, regions_per_frame=2)
    encoder.open(texts)
    objective = DemoVLPObjective(encoder)
    batch = {"video": video, "text": encoder.tokenize(texts)}
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        output = objective(batch)
        optimizer.zero_grad()
        output.total.backward()
        optimizer.step()
        losses.append(float(output.parts["alignment"].detach()))
    assert losses[-1] < 0.4 * losses[0]
    scores = encoder.eval().pair_scores(batch, batch)
    assert (scores.argmax(1) == torch.arange(len(texts))).float().mean() > 0.7


# ------------------------------------------------------------------------------------------------- cached regions


def cache_settings(folder: Path, **settings: Any) -> dict[str, Any]:
    return {"region_cache": str(folder / "cache"), "stored_frames": 3, **settings}


def test_training_from_a_cache_decodes_no_video(tmp_path: Path) -> None:
    clips = NoiseClips(tmp_path)
    objective = made(clips, **cache_settings(tmp_path))
    paths = [clips.path(i) for i in range(3)]
    pixels = [read_clip(path, 3) for path in paths]
    for path in paths:
        path.unlink()
    batch = batch_of(objective, clips, range(3))
    assert objective(batch).total.isfinite()
    assert batch["regions"].shape == (3, 2, 4, 12)
    assert "video" not in batch
    # The regions are those of two of the frames, in order.
    prepared = torch.from_numpy(prepare_clip(pixels[2], objective.encoder.preprocessing, 3))
    stored = video_regions(objective.encoder.extractor, prepared[None], 4).features[0]
    for frame in batch["regions"][2]:
        assert min((frame - one).abs().max() for one in stored) < 2e-3


def test_a_cache_gives_other_frames_in_every_epoch_and_the_same_ones_with_uniform_sampling(tmp_path: Path) -> None:
    clips = NoiseClips(tmp_path, 4)
    objective = made(clips, **cache_settings(tmp_path, stored_frames=5))
    drawn = {rows_of(objective, clips, range(3, 4), seed)[0]["regions"].numpy().tobytes() for seed in range(12)}
    assert len(drawn) > 2
    objective = made(clips, **cache_settings(tmp_path, stored_frames=5, clips={"sampling": "uniform"}))
    drawn = {rows_of(objective, clips, range(3, 4), seed)[0]["regions"].numpy().tobytes() for seed in range(4)}
    assert len(drawn) == 1


def test_boxes_of_the_data_need_a_cache(tmp_path: Path) -> None:
    clips, given = NoiseClips(tmp_path), {"extractor": {"boxes": "given", "cell": 2}}
    with pytest.raises(RecipeError, match=r"set objective\.region_cache"):
        made(clips, tiny_encoder(**given))
    objective = made(clips, tiny_encoder(**given), **cache_settings(tmp_path))
    batch = batch_of(objective, clips, range(3))
    assert batch["region_valid"].sum(dim=(1, 2)).tolist() == [4, 4, 4]
    whole = torch.tensor([0.25, 0.25, 1, 1, 0.75, 0.75])
    torch.testing.assert_close(batch["region_geometry"][0, 0, 1], whole)
    with pytest.raises(InputError, match="none came"):
        objective.encoder({"video": torch.rand(1, 2, 3, 8, 8)})


def test_what_a_cache_cannot_do_is_refused(tmp_path: Path) -> None:
    clips = NoiseClips(tmp_path, 1)
    with pytest.raises(RecipeError, match="cannot be cropped"):
        made(clips, **cache_settings(tmp_path, clips={"flip": 0.5}))
    with pytest.raises(RecipeError, match=r"stored_frames = 1 is less than encoder\.frames = 2"):
        made(clips, **cache_settings(tmp_path, stored_frames=1))


# ------------------------------------------------------------------------------------------------------ questions


def test_questions_are_learned_and_answered_from_the_most_frequent_answers(tmp_path: Path) -> None:
    clips = NoiseClips(tmp_path)
    objective = made(clips, tiny_encoder(qa_hidden=32, projection_dim=16), task="qa", max_answers=2)
    assert objective.encoder.answers == ("number 0", "yes")
    rows = rows_of(objective, clips, range(3)) + rows_of(objective, clips, range(3), seed=4)
    for row in rows:
        if row["text"] == "is it noise?":
            assert row["answer"] == 1
        else:
            assert row["answer"] == (0 if row["item_id"] == "clip-0" else -100)
    batch = batch_of(objective, clips, range(3))
    optimizer = torch.optim.AdamW(objective.parameters(), lr=0.003)
    batch["text"] = objective.encoder.tokenize(["which number is it?", "is it noise?", "is it noise?"])
    batch["answer"] = torch.tensor([0, 1, -100])
    for _ in range(80):
        total = objective(batch).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    answers = objective.encoder.eval().answer(batch, ["which number is it?", "is it noise?", "is it noise?"])
    assert answers == ["number 0", "yes", "yes"]


def test_videos_without_a_question_cost_nothing_and_are_counted(tmp_path: Path) -> None:
    class Silent(NoiseClips):
        def question(self, index: int) -> list[Question]:
            return [] if index == 1 else super().question(index)

    clips = Silent(tmp_path)
    objective = made(clips, task="qa", max_answers=2).eval()
    batch = batch_of(objective, clips, range(2))
    batch["answer"][0] = 1
    assert batch["answer"].tolist() == [1, -100]
    output = objective(batch)
    torch.testing.assert_close(output.stats["known_answers"], torch.tensor(0.5))
    logits = objective.encoder.answer_logits(batch, batch["text"])
    torch.testing.assert_close(output.total, -logits[0].log_softmax(0)[1])


@pytest.mark.parametrize("task", ["retrieval", "qa"])
def test_every_task_trains_exactly_what_is_not_frozen(tmp_path: Path, task: str) -> None:
    clips = NoiseClips(tmp_path, 2)
    objective = made(clips, tiny_encoder(answers=["number 0", "yes"]), task=task, max_answers=2)
    objective(batch_of(objective, clips, range(2))).total.backward()
    for name, parameter in objective.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert any(p.requires_grad for p in objective.encoder.answer_head.parameters()) == (task == "qa")


def test_a_batch_without_known_answers_costs_nothing(tmp_path: Path) -> None:
    clips = NoiseClips(tmp_path, 2)
    objective = made(clips, task="qa", max_answers=2)
    batch = {**batch_of(objective, clips, range(2)), "answer": torch.tensor([-100, -100])}
    output = objective(batch)
    output.total.backward()
    assert float(output.total.detach()) == 0.0
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)


def test_questions_without_an_answer_head_or_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="answers no questions"):
        opened().answer({"video": torch.rand(1, 2, 3, 8, 8)}, ["what?"])
    with pytest.raises(RecipeError, match="no questions about its videos"):
        made(Captioned(), task="qa")
    with pytest.raises(RecipeError, match="others than"):
        made(NoiseClips(tmp_path), tiny_encoder(answers=["no"]), task="qa")


# -------------------------------------------------------------------------------------------------------- folders


def test_an_exported_encoder_has_tokenizer_and_answers_and_the_same_numbers(tmp_path: Path) -> None:
    clips = NoiseClips(tmp_path)
    encoder = made(clips, task="qa").encoder.eval()
    save_encoder(encoder, tmp_path / "out", use="videotext:demovlp", config=TINY)
    loaded = load_encoder(tmp_path / "out", device="cpu").module
    assert isinstance(loaded, DemoVLPEncoder)
    video = {"video": torch.rand(2, 2, 3, 8, 8)}
    assert torch.equal(loaded(video).pooled, encoder(video).pooled)
    questions = ["which number is it?", "is it noise?"]
    assert loaded.answer(video, questions) == encoder.answer(video, questions)
    text = {"text": loaded.tokenize(questions)}
    assert torch.equal(loaded(text).pooled, encoder({"text": encoder.tokenize(questions)}).pooled)


def test_more_frames_can_start_from_fewer(tmp_path: Path) -> None:
    first = opened(frames=1).eval()
    torch.nn.init.normal_(first.region_encoder.temporal_embed)
    save_encoder(first, tmp_path / "one", use="videotext:demovlp", config={**TINY, "frames": 1})
    more = tiny_encoder(frames=4, weights=str(tmp_path / "one")).eval()
    assert torch.equal(more.region_encoder.temporal_embed[:, :1], first.region_encoder.temporal_embed)
    assert not more.region_encoder.temporal_embed[:, 1:].any()
    video = {"video": torch.rand(2, 1, 3, 8, 8)}
    torch.testing.assert_close(more(video).pooled, first(video).pooled)
    answering = made(NoiseClips(tmp_path), tiny_encoder(weights=str(tmp_path / "one")), task="qa")
    assert answering.encoder.answer_head is not None
    assert "weights" not in more.stored_config({**TINY, "weights": "x"})


def test_blocks_can_start_from_a_vit(tmp_path: Path) -> None:
    import timm

    vit = timm.create_model("vit_tiny_patch16_224", embed_dim=8, num_heads=2, depth=2, img_size=32, num_classes=0)
    torch.nn.init.normal_(vit.pos_embed)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    encoder = tiny_encoder(weights=str(tmp_path / "vit.safetensors"), temporal_attention=True).region_encoder
    assert torch.equal(encoder.blocks[1].attn.qkv.weight, vit.blocks[1].attn.qkv.weight)
    assert torch.equal(encoder.cls_position, vit.pos_embed[:, :1])
    with pytest.raises(DataError, match=r"vit\.safetensors"):
        load_vit_blocks(tiny_encoder(depth=3).region_encoder, tmp_path / "vit.safetensors")


def test_other_encoders_and_missing_data_are_refused() -> None:
    with pytest.raises(RecipeError, match="not a TinyEncoder"):
        DemoVLPObjective.build(DemoVLPObjectiveConfig(), TinyEncoder(), SimpleBuildContext(dataset=Captioned()))
    with pytest.raises(RecipeError, match="no data set"):
        DemoVLPObjective.build(DemoVLPObjectiveConfig(), tiny_encoder(), SimpleBuildContext())


def test_the_region_keys_of_a_batch_are_those_of_the_docs() -> None:
    assert REGION_KEYS == ("regions", "region_geometry", "region_valid")
