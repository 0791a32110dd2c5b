"""MAC: masks of patches and pieces, and the objective on what is left."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_pairs import Captioned, tiny_batch, tiny_encoder

from bowerbird.batch import Batch
from bowerbird.errors import InputError
from bowerbird.protocols import BuildContext, Encoder
from bowerbird.testing import ObjectiveContract, SimpleBuildContext
from bowerbird.train.data import collate
from bowerbird_videotext.frozen import FrozenObjective
from bowerbird_videotext.mac import (
    MACConfig,
    MACObjective,
    kept_count,
    kept_patches,
    mask_tokens,
    masked_pieces,
    patch_ranks,
    random_patch_mask,
    special_pieces,
)
from bowerbird_videotext.space_time import SpaceTimeTransformer


def made(*, total_steps: int = 10, **settings: Any) -> MACObjective:
    context = SimpleBuildContext(dataset=Captioned(), total_steps=total_steps)
    return MACObjective.build(MACConfig(**settings), tiny_encoder(image_size=16), context)


def clips(objective: MACObjective, count: int = 6, *, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    batch = tiny_batch(objective.encoder, count)
    return {
        **batch,
        "video": torch.randn(count, 2, 3, 16, 16, generator=generator),
        "patch_noise": torch.rand(count, 2, 16, generator=generator),
        "piece_noise": torch.rand(count, 16, generator=generator),
    }


class TestMAC(ObjectiveContract):
    name = "videotext:mac"
    config: ClassVar[dict[str, Any]] = {"text_ratio": 0.3}
    encoder_inputs = ("video", "text")
    batch_size = 6

    def make_encoder(self) -> Encoder:
        return tiny_encoder(image_size=16)

    def make_context(self) -> BuildContext:
        return SimpleBuildContext(dataset=Captioned())

    def make_batch(self, *, seed: int = 0) -> Batch:
        batch = clips(made(), self.batch_size, seed=seed)
        return {"video": batch["video"], "text": batch["text"]}

    def make_encoder_batch(self, encoder: Encoder) -> Batch:
        return {"video": self.make_batch()["video"]}


# ------------------------------------------------------------------------------------------------ patches


def test_kept_patches_and_ranks_are_those_of_the_released_masked_autoencoder(golden: Any) -> None:
    values = golden("mac/random_masking")
    noise, tokens, ratio = values["noise"], values["tokens"], values["mask_ratio"]
    assert torch.equal(patch_ranks(noise), values["ids_restore"])
    keep = kept_patches(noise[None], ratio)[0]
    masked = torch.ones_like(noise).scatter(1, keep, 0)
    assert torch.equal(masked.to(values["mask"].dtype), values["mask"])
    in_noise_order = keep.gather(1, noise.gather(1, keep).argsort(1))
    visible = tokens.gather(1, in_noise_order[..., None].expand(-1, -1, tokens.shape[2]))
    assert torch.equal(visible, values["visible_tokens"])
    dropped = noise.argsort(1)[:, keep.shape[1] :]
    both = torch.cat([visible, tokens.gather(1, dropped[..., None].expand(-1, -1, tokens.shape[2]))], dim=1)
    restored = both.gather(1, values["ids_restore"][..., None].expand(-1, -1, tokens.shape[2]))
    assert torch.equal(restored, tokens)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    frames=st.integers(1, 3),
    patches=st.integers(1, 20),
    percent=st.integers(0, 99),
    mode=st.sampled_from(["frame", "tube"]),
    seed=st.integers(0, 999),
)
def test_as_many_patches_as_the_ratio_says_are_kept_in_rising_order(
    batch: int, frames: int, patches: int, percent: int, mode: Any, seed: int
) -> None:
    keep = random_patch_mask(batch, frames, patches, percent / 100, mode, torch.Generator().manual_seed(seed))
    count = max(1, patches * (100 - percent) // 100)
    assert keep.shape == (batch, frames, count) and keep.dtype == torch.int64
    assert (keep.diff(dim=-1) > 0).all() and (keep >= 0).all() and (keep < patches).all()
    if mode == "tube":
        assert (keep == keep[:, :1]).all()
    again = random_patch_mask(batch, frames, patches, percent / 100, mode, torch.Generator().manual_seed(seed))
    assert torch.equal(keep, again)


def test_every_patch_is_kept_as_often_as_any_other_and_frames_are_drawn_by_themselves() -> None:
    keep = random_patch_mask(2000, 2, 10, 0.6, "frame", torch.Generator().manual_seed(0))
    kept = torch.zeros(2000, 2, 10).scatter(2, keep, 1)
    assert (kept.mean(0) - 0.4).abs().max() < 0.05
    together = (kept[:, 0] * kept[:, 1]).mean(0)
    assert (together - 0.16).abs().max() < 0.04
    tube = random_patch_mask(2000, 2, 10, 0.6, "tube", torch.Generator().manual_seed(0))
    assert (torch.zeros(2000, 2, 10).scatter(2, tube, 1).mean(0) - 0.4).abs().max() < 0.05


def test_products_that_rounding_puts_below_a_whole_number_count_as_it() -> None:
    assert [kept_count(10, ratio) for ratio in (0.6, 0.9, 0.7, 0.0)] == [4, 1, 3, 10]
    assert kept_count(10, 0.999) == 1 and kept_count(196, 0.6) == 78 and kept_count(7, 0.5) == 3


# ------------------------------------------------------------------------------------------------ pieces


@settings(max_examples=25, deadline=None)
@given(ratio=st.floats(0, 1), seed=st.integers(0, 999))
def test_special_pieces_stay_and_others_become_the_mask_or_stay(ratio: float, seed: int) -> None:
    ids = torch.tensor([[2, 9, 8, 3, 0], [2, 9, 8, 7, 3]])
    special = special_pieces(ids, [0, 2, 3])
    assert special.tolist() == [[True, False, False, True, True], [True, False, False, False, True]]
    found = mask_tokens(ids, special, 4, ratio, torch.Generator().manual_seed(seed))
    assert torch.equal(found[special], ids[special])
    assert ((found == ids) | (found == 4)).all()
    assert torch.equal(mask_tokens(ids, special, 4, 0.0), ids)
    assert (mask_tokens(ids, special, 4, 1.0)[~special] == 4).all()


def test_the_share_of_hidden_pieces_is_the_ratio() -> None:
    ids = torch.full((200, 100), 9)
    found = mask_tokens(ids, torch.zeros_like(ids, dtype=torch.bool), 4, 0.15, torch.Generator().manual_seed(0))
    assert (found == 4).float().mean().item() == pytest.approx(0.15, abs=0.01)


# ------------------------------------------------------------------------------------------------ the objective


def test_without_masks_the_loss_and_gradients_are_those_of_frozen() -> None:
    objective = made(video_ratio=0.0, text_ratio=0.0)
    frozen = FrozenObjective(objective.encoder)
    batch = clips(objective)
    output = objective(batch)
    gradients = torch.autograd.grad(output.total, list(objective.parameters()))
    assert torch.equal(output.total, frozen(batch).total)
    for one, other in zip(gradients, torch.autograd.grad(frozen(batch).total, list(frozen.parameters())), strict=True):
        assert torch.equal(one, other)


def test_the_loss_is_between_kept_patches_and_hidden_words() -> None:
    objective = made(video_ratio=0.5, text_ratio=0.5).eval()
    batch = clips(objective)
    encoder, words = objective.encoder, objective.encoder.ready_tokenizer()
    ids = batch["text"]["input_ids"]
    hidden = (batch["piece_noise"][:, : ids.shape[1]] < 0.5) & ~special_pieces(
        ids, [words.pad_id, words.cls_id, words.sep_id]
    )
    assert 0 < hidden.sum() < hidden.numel()
    text = {**batch["text"], "input_ids": torch.where(hidden, words.mask_id, ids)}
    keep = batch["patch_noise"].argsort(-1)[..., :8].sort(-1).values
    loss = FrozenObjective(encoder)
    texts, videos = encoder.encode_text(text), encoder.encode_video(batch["video"], keep=keep)
    logits = encoder.similarity(texts, videos) / loss.temperature
    cross, own = torch.nn.functional.cross_entropy, torch.arange(6)
    torch.testing.assert_close(objective(batch).total, cross(logits, own) + cross(logits.T, own))


def test_pixels_of_dropped_patches_do_not_matter_and_masks_are_fresh_without_noise() -> None:
    objective = made(video_ratio=0.5, text_ratio=0.0).eval()
    batch = clips(objective)
    keep = batch["patch_noise"].argsort(-1)[..., :8]
    dropped = torch.ones(6, 2, 16, dtype=torch.bool).scatter(2, keep, False)
    cells = dropped.reshape(6, 2, 1, 4, 4).repeat_interleave(4, -1).repeat_interleave(4, -2)
    other = {**batch, "video": torch.where(cells, torch.tensor(9.0), batch["video"])}
    assert torch.equal(objective(batch).total, objective(other).total)
    drawn = {key: batch[key] for key in ("video", "text")}
    assert not torch.equal(objective(drawn).total, objective(drawn).total)


def test_items_carry_the_noise_of_their_masks_the_same_for_all_frames_of_a_tube() -> None:
    for mode in ("frame", "tube"):
        objective = made(mode=mode)
        transform = objective.item_transform()
        assert transform is not None
        items = [transform({**Captioned()[i], "index": i}, np.random.default_rng(i)) for i in range(3)]
        batch = collate(items, objective.encoder.tokenize)
        assert batch["patch_noise"].shape == (3, 2, 16) and batch["piece_noise"].shape == (3, 16)
        assert torch.equal(batch["patch_noise"][:, 0], batch["patch_noise"][:, 1]) == (mode == "tube")
        assert objective(batch).total == objective(batch).total


def test_the_last_steps_are_unmasked_where_asked_for_also_after_a_resume() -> None:
    objective = made(unmasked_end=0.3, total_steps=10).eval()
    batch = clips(objective)
    plain = FrozenObjective(objective.encoder)(batch).total
    for step, masked in ((0, True), (6, True), (7, False), (9, False)):
        objective.before_step(step)
        assert torch.equal(objective(batch).total, plain) != masked
    assert made().unmasked_from is None


def test_dropping_most_patches_saves_most_of_the_time_of_the_video_encoder() -> None:
    torch.manual_seed(0)
    encoder = SpaceTimeTransformer(32, 4, 64, 2, 4, max_frames=4)
    video = torch.randn(8, 4, 3, 32, 32)
    keep = random_patch_mask(8, 4, 64, 0.6)

    def seconds(**chosen: Any) -> float:
        start = time.process_time()
        encoder(video, **chosen).sum().backward()
        return time.process_time() - start

    seconds(), seconds(keep=keep)
    whole, part = [], []
    for _ in range(5):
        whole.append(seconds())
        part.append(seconds(keep=keep))
    assert min(part) < 0.55 * min(whole)


def test_impossible_values_are_refused() -> None:
    for ratio in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="ratio"):
            random_patch_mask(1, 1, 4, ratio)
        with pytest.raises(ValueError):
            MACObjective(made().encoder, video_ratio=ratio)
    with pytest.raises(ValueError, match="mode = 'cube'"):
        random_patch_mask(1, 1, 4, 0.5, "cube")
    with pytest.raises(ValueError, match=r"ratio = 1\.5"):
        mask_tokens(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.bool), 4, 1.5)
    with pytest.raises(ValueError, match="expected the same"):
        mask_tokens(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.bool), 4, 0.5)
    with pytest.raises(ValueError, match=r"the noise \(1, 1\)"):
        masked_pieces(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2).bool(), 4, 0.5, torch.zeros(1, 1))
    objective = made()
    batch = clips(objective)
    with pytest.raises(InputError, match=r"patch_noise has shape \(6, 2, 15\)"):
        objective({**batch, "patch_noise": batch["patch_noise"][..., :15]})
