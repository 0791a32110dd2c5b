"""MILES: masks, the following copy, the regression, gradients, and that nothing of it is exported."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_encoder import golden_encoder
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_pairs import CAPTIONS, Captioned, tiny_batch, tiny_config, tiny_encoder
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bowerbird.batch import Batch
from bowerbird.encoders import load_encoder, save_encoder
from bowerbird.errors import InputError, RecipeError
from bowerbird.protocols import BuildContext, Encoder
from bowerbird.testing import ObjectiveContract, SimpleBuildContext
from bowerbird.testing.training import TinyEncoder
from bowerbird.train.data import collate
from bowerbird_videotext.contrastive import pair_similarities
from bowerbird_videotext.dual_encoder import DualEncoder
from bowerbird_videotext.frozen import FrozenObjective
from bowerbird_videotext.losses import symmetric_info_nce
from bowerbird_videotext.miles import (
    MILESConfig,
    MILESObjective,
    SnapshotEncoder,
    masked_feature_regression,
    tube_block_mask,
)
from bowerbird_videotext.text import TextTransformer
from bowerbird_videotext.video_masks import MASKS

Golden = Callable[[str], dict[str, Any]]
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
MASK = torch.zeros(6, 2, 4, dtype=torch.bool)
MASK[:, :, :2] = True


def made(**settings: Any) -> MILESObjective:
    return MILESObjective.build(MILESConfig(**settings), tiny_encoder(), SimpleBuildContext(dataset=Captioned()))


def masked_batch(objective: MILESObjective, *, seed: int = 0, mask: Tensor = MASK) -> Batch:
    return tiny_batch(objective.encoder, len(mask), seed=seed) | {"patch_mask": mask}


# ------------------------------------------------------------------------------------------------ masks


@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    frames=st.integers(1, 4),
    ratio=st.floats(0, 0.99),
    mode=st.sampled_from(sorted(MASKS)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_masks_hide_the_share_that_is_asked_for(
    grid: tuple[int, int], frames: int, ratio: float, mode: str, seed: int
) -> None:
    masks = MASKS[mode](3, grid, frames, ratio, np.random.default_rng(seed))
    cells = grid[0] * grid[1]
    assert masks.shape == (3, frames, cells) and masks.dtype == torch.bool
    counts, wanted = masks.sum(dim=2), round(ratio * cells)
    if mode != "random":
        assert torch.equal(masks, masks[:, :1].expand_as(masks)), "frames of a tube differ"
    if mode == "tube_block":
        assert (counts >= wanted).all()
    else:
        assert (counts == wanted).all()
    assert wanted or not masks.any()


def test_blocks_are_rectangles_and_hide_little_more_than_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = tube_block_mask(200, (14, 14), 1, 0.5, generator).reshape(200, 14, 14)
    share = masks.float().mean()
    assert 0.5 <= share < 0.6, share
    # Places beside a hidden one are far more often hidden than others: blocks, not single places.
    beside = masks[:, :, 1:][masks[:, :, :-1]].float().mean()
    assert beside > 0.75, beside


def test_masks_depend_on_their_generator_alone_and_differ_between_clips() -> None:
    for mode, function in MASKS.items():
        first = function(4, (6, 6), 3, 0.4, torch.Generator().manual_seed(7))
        torch.manual_seed(99)
        assert torch.equal(first, function(4, (6, 6), 3, 0.4, torch.Generator().manual_seed(7))), mode
        assert not torch.equal(first[0], first[1]), mode
        assert mode != "random" or not torch.equal(first[0, 0], first[0, 1])


@pytest.mark.parametrize(
    "arguments", [(1, (4, 4), 2, 1.0), (1, (4, 4), 2, -0.1), (0, (4, 4), 2, 0.5), (1, (0, 4), 2, 0.5),
                  (1, (4, 4), 0, 0.5), (1, (4, 4), 2, math.nan), (1, (4, 4), 2, 0.5, 3)],
)  # fmt: skip
def test_masks_outside_their_ranges_are_refused(arguments: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        tube_block_mask(*arguments)


# ------------------------------------------------------------------------------------------------ the snapshot


def test_a_snapshot_moves_by_its_momentum_every_so_many_steps() -> None:
    layer = nn.Linear(2, 2)
    snapshot = SnapshotEncoder(layer, momentum=0.75, update_every=3)
    start = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight += 1
    for step, moved in ((1, 0.0), (2, 0.0), (3, 0.25), (4, 0.25), (6, 0.4375)):
        snapshot.update(step)
        torch.testing.assert_close(snapshot.module.weight - start, torch.full((2, 2), moved))


def test_momentum_one_never_moves_zero_copies_and_equals_stay_equal() -> None:
    layer = nn.BatchNorm1d(300)
    nn.init.normal_(layer.weight)
    start = layer.weight.detach().clone()
    still, copied, middle = (SnapshotEncoder(layer, momentum) for momentum in (1.0, 0.0, 0.99))
    middle.update(1)
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(middle.module.parameters(), layer.parameters(), strict=True)
    )
    with torch.no_grad():
        layer.weight.add_(1)
        layer(torch.randn(4, 300))  # moves its buffers
    for snapshot in (still, copied):
        snapshot.update(1)
    assert torch.equal(still.module.weight, start)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(copied.module.state_dict()[name], tensor), name


def test_a_snapshot_holds_nothing_of_its_module_gets_no_gradient_and_stays_in_eval_mode() -> None:
    layer = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    snapshot = SnapshotEncoder(layer, 0.5).train()
    assert snapshot.training and not snapshot.module.training
    assert {id(p) for p in snapshot.parameters()}.isdisjoint(id(p) for p in layer.parameters())
    assert len(snapshot.state_dict()) == 2
    out = snapshot(torch.ones(1, 2, requires_grad=True))
    assert isinstance(out, Tensor) and not out.requires_grad
    assert not any(p.requires_grad for p in snapshot.parameters())
    moved = copy.deepcopy(snapshot)
    assert torch.equal(moved.module[0].weight, snapshot.module[0].weight)


def test_a_snapshot_follows_a_weight_that_was_parametrised_since() -> None:
    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    layer = nn.Linear(2, 2)
    snapshot, before = SnapshotEncoder(layer, 0.0), layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", Half())
    snapshot.update(1)
    assert torch.equal(snapshot.module.weight, before / 2)


@pytest.mark.parametrize(("momentum", "every"), [(-0.1, 1), (1.1, 1), (0.5, 0)])
def test_snapshots_outside_their_ranges_are_refused(momentum: float, every: int) -> None:
    with pytest.raises(InputError, match="expected a number"):
        SnapshotEncoder(nn.Linear(1, 1), momentum, every)


# ------------------------------------------------------------------------------------------------ the regression


@given(seed=st.integers(0, 100), scale=st.floats(0.01, 100))
@settings(max_examples=25, deadline=None)
def test_unit_features_differ_by_0_to_4_whatever_their_lengths(seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    pred, target = torch.randn(5, 3, dtype=torch.double), torch.randn(5, 3, dtype=torch.double)
    loss = masked_feature_regression(pred, target)
    assert 0 <= loss <= 4
    cosine = nn.functional.cosine_similarity(pred, target)
    torch.testing.assert_close(loss, (2 - 2 * cosine).mean())
    torch.testing.assert_close(masked_feature_regression(pred * scale, target / scale), loss)
    torch.testing.assert_close(
        masked_feature_regression(pred, target, normalize=False), nn.functional.mse_loss(pred, target)
    )


def test_no_masked_patch_is_a_loss_of_zero_and_targets_get_no_gradient() -> None:
    empty = torch.zeros(0, 3, requires_grad=True)
    for normalize in (True, False):
        loss = masked_feature_regression(empty, torch.zeros(0, 3), normalize)
        assert loss.item() == 0
        loss.backward()
    pred, target = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    masked_feature_regression(pred, target).backward()
    assert pred.grad is not None and target.grad is None
    with pytest.raises(ValueError, match=r"expected \(M, P\) for both"):
        masked_feature_regression(pred, target[:1])


def reference(values: dict[str, Any]) -> MILESObjective:
    """The objective of the reference: two video encoders with a projection each; captions are vectors already."""

    def state(prefix: str) -> dict[str, Tensor]:
        return {
            f"param.{name.removeprefix(prefix)}": tensor for name, tensor in values.items() if name.startswith(prefix)
        }

    sizes = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
    text_encoder = TextTransformer(6, 8, 1, 2)
    encoder = DualEncoder(golden_encoder(sizes | state("online.")), text_encoder, values["projection_dim"]).double()
    encoder.encode_text = lambda text, attention_mask=None: text
    objective = MILESObjective(
        encoder, temperature=values["temperature"], weight=values["mvm_weight"], momentum=values["momentum"]
    )
    tower: Any = objective.snapshot.module
    tower.encoder.load_state_dict(golden_encoder(sizes | state("snapshot.")).state_dict())
    with torch.no_grad():
        for layer, prefix in ((encoder.video_proj, "online_proj"), (tower.projection, "snapshot_proj")):
            layer.weight.copy_(values[f"{prefix}.weight"])
            layer.bias.copy_(values[f"{prefix}.bias"])
        assert encoder.video_encoder.mask_token is not None
        encoder.video_encoder.mask_token.copy_(values["mask_token"].reshape(-1))
    return objective


def test_parts_gradients_and_the_update_are_those_of_the_reference(golden: Golden) -> None:
    values = golden("miles/masked_visual_modeling_reference")
    objective, text = reference(values), values["text_embedding"].requires_grad_()
    encoder, mask = objective.encoder, values["mask"].reshape(2, 3, 9)
    whole, patches = encoder.encode_video(values["video"], mask=mask, return_tokens=True)
    targets: Any = objective.snapshot(values["video"], mask)
    torch.testing.assert_close(whole, values["online_cls_projected"], **CLOSE)
    torch.testing.assert_close(patches[mask], values["online_masked_projected"], **CLOSE)
    torch.testing.assert_close(targets, values["snapshot_masked_projected"], **CLOSE)
    raw = masked_feature_regression(patches[mask], targets, normalize=False)
    assert raw.item() == pytest.approx(values["mvm_loss_raw_mse"], rel=1e-12)

    output = objective({"video": values["video"], "text": text, "patch_mask": mask})
    assert output.parts["text_video"].item() == pytest.approx(values["contrastive_loss"], rel=1e-12)
    assert output.parts["masked_features"].item() == pytest.approx(values["mvm_loss_normalized"], rel=1e-12)
    assert output.total.item() == pytest.approx(values["total_loss"], rel=1e-12)
    output.total.backward()
    found = {
        "text_embedding": text.grad,
        "mask_token": encoder.video_encoder.get_parameter("mask_token").grad,
        "online_proj_weight": encoder.video_proj.weight.grad,
        "online_pos_embed": encoder.video_encoder.pos_embed.grad,
        "online_block0_timeattn_qkv": encoder.video_encoder.get_parameter("blocks.0.timeattn.qkv.weight").grad,
    }
    for name, gradient in found.items():
        assert gradient is not None
        torch.testing.assert_close(gradient.reshape(values[f"grad_{name}"].shape), values[f"grad_{name}"], **CLOSE)

    objective.after_step(0)
    moved = {name.partition(".")[2]: wanted for name, wanted in values.items() if name.startswith("snapshot_after_")}
    assert len(moved) == 3
    for name, wanted in moved.items():
        torch.testing.assert_close(objective.snapshot.module.get_parameter(f"encoder.{name}"), wanted, **CLOSE)


def test_features_of_all_patches_and_their_gradient_are_the_authors(golden: Golden) -> None:
    values = golden("miles/video_encoder_tokens")
    encoder, video = golden_encoder(values), values["video"].requires_grad_()
    whole, patches = encoder(video, return_tokens=True)
    torch.testing.assert_close(whole, values["cls_out"], **CLOSE)
    tokens = torch.cat([whole[:, None], patches.flatten(1, 2)], dim=1)
    torch.testing.assert_close(tokens, values["token_out"], **CLOSE)
    (tokens * values["cotangent_tokens"]).sum().backward()
    torch.testing.assert_close(video.grad, values["grad_video"], **CLOSE)


# ------------------------------------------------------------------------------------------------ the objective


class TestMILES(ObjectiveContract):
    name = "videotext:miles"
    encoder_inputs = ("video", "text")
    batch_size = 6

    def make_encoder(self) -> Encoder:
        return tiny_encoder()

    def make_context(self) -> BuildContext:
        return SimpleBuildContext(dataset=Captioned())

    def make_batch(self, *, seed: int = 0) -> Batch:
        return masked_batch(made(), seed=seed)

    def make_encoder_batch(self, encoder: Encoder) -> Batch:
        return {"video": self.make_batch()["video"]}


def test_without_masked_patches_the_loss_is_exactly_the_baselines() -> None:
    objective = made(mask_ratio=0.0)
    transform = objective.item_transform()
    assert transform is not None
    items = [transform(Captioned()[i], np.random.default_rng(i)) for i in range(4)]
    batch = collate(items, objective.encoder.tokenize)
    assert not batch["patch_mask"].any()
    output = objective(batch)
    assert output.parts["masked_features"].item() == 0
    assert torch.equal(output.total, FrozenObjective(objective.encoder)(batch).total)


def test_a_whole_clip_has_exactly_the_features_that_the_snapshot_of_the_first_step_has() -> None:
    objective = made()
    batch = masked_batch(objective)
    _, patches = objective.encoder.encode_video(batch["video"], return_tokens=True)
    targets = objective.snapshot(batch["video"], MASK)
    assert isinstance(targets, Tensor)
    cosines = nn.functional.cosine_similarity(patches[MASK], targets)
    torch.testing.assert_close(cosines, torch.ones_like(cosines))


def test_pixels_of_hidden_patches_get_no_gradient_and_neither_do_snapshot_and_captions() -> None:
    objective = made()
    batch = masked_batch(objective)
    batch["video"].requires_grad_()
    output = objective(batch)
    (of_video,) = torch.autograd.grad(output.total, batch["video"], retain_graph=True)
    hidden = of_video[..., :4, :]  # patches 0 and 1: the upper row of a grid of 2 x 2
    assert not hidden.any() and of_video[..., 4:, :].abs().sum() > 0
    output.parts["masked_features"].backward()
    assert all(p.grad is None for p in objective.snapshot.parameters())
    assert objective.encoder.text_encoder is not None
    assert all(
        p.grad is None
        for p in [*objective.encoder.text_encoder.parameters(), *objective.encoder.text_proj.parameters()]
    )


def test_the_contrast_may_be_on_the_whole_clip() -> None:
    full = made(contrast_on="full", weight=0.5)
    batch = masked_batch(full)
    output, encoder = full(batch), full.encoder
    bare = symmetric_info_nce(
        pair_similarities(encoder.encode_text(batch["text"]), encoder.encode_video(batch["video"]))
    )
    assert torch.equal(output.parts["text_video"], bare)
    torch.testing.assert_close(output.total, bare + 0.5 * output.parts["masked_features"])
    masked = made(contrast_on="masked")
    masked.load_state_dict(full.state_dict())
    assert not torch.isclose(masked(batch).parts["text_video"], bare)


def test_the_snapshot_moves_after_every_so_many_steps_of_training() -> None:
    objective = made(momentum=0.0, update_every=2)
    weight = objective.snapshot.module.get_parameter("projection.weight")
    with torch.no_grad():
        objective.encoder.video_proj.weight += 1
    before = weight.clone()
    objective.after_step(0)
    assert torch.equal(weight, before)
    objective.after_step(1)
    assert torch.equal(weight, objective.encoder.video_proj.weight)


def test_items_of_a_batch_carry_a_mask_of_the_clip() -> None:
    objective = made(mask_ratio=0.25, mask_mode="random")
    transform = objective.item_transform()
    assert transform is not None
    one, again = (transform(Captioned()[3], np.random.default_rng(5)) for _ in range(2))
    assert one["patch_mask"].shape == (2, 4) and one["patch_mask"].sum() == 2
    assert torch.equal(one["patch_mask"], again["patch_mask"])


def test_what_is_exported_is_the_dual_encoder_and_gives_the_same_numbers(tmp_path: Path) -> None:
    objective = made().train()
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        objective(masked_batch(objective, seed=step)).total.backward()
        optimizer.step()
        objective.after_step(step)
    batch = masked_batch(objective)
    objective.eval()
    wanted = objective.encoder.encode_video(batch["video"]), objective.encoder.encode_text(batch["text"])
    config = tiny_config().model_dump(mode="json")
    exported = objective.exported_encoder()
    save_encoder(exported, tmp_path / "encoder", use="videotext:dual-encoder", config=config)
    assert objective.encoder.video_encoder.mask_token is not None, "exporting must not end training"
    loaded = load_encoder(tmp_path / "encoder", device="cpu").module
    assert not any("mask" in name or "snapshot" in name for name in loaded.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded({"video": batch["video"]}).pooled, wanted[0])
        assert torch.equal(loaded({"text": batch["text"]}).pooled, wanted[1])


def test_other_encoders_and_values_outside_their_ranges_are_refused() -> None:
    with pytest.raises(RecipeError, match="videotext:miles trains videotext:dual-encoder, not a TinyEncoder"):
        MILESObjective.build(MILESConfig(), TinyEncoder(), SimpleBuildContext(dataset=Captioned()))
    encoder = tiny_encoder()
    encoder.open(CAPTIONS)
    wrong: list[dict[str, Any]] = [
        {"temperature": 0}, {"mask_ratio": 1.0}, {"weight": -1}, {"contrast_on": "both"}, {"mask_mode": "cube"},
    ]  # fmt: skip
    for values in wrong:
        with pytest.raises(InputError, match="expected"):
            MILESObjective(encoder, **values)
    objective = made()
    with pytest.raises(InputError, match="patch_mask"):
        objective(tiny_batch(objective.encoder))
    with pytest.raises(InputError, match="mask is"):
        objective(masked_batch(objective, mask=MASK[:, :, :3]))
