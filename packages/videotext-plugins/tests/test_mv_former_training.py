"""``videotext:mv-former`` and ``videotext:dense`` from a data set to an export: views, cache, training, measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from bowerbird.data.videos import write_video
from bowerbird.encoders.bundle import load_encoder, save_encoder
from bowerbird.errors import DataError, InputError, RecipeError, UnknownNameError
from bowerbird.evaluate import Evaluation
from bowerbird.recipe import resolve_recipe
from bowerbird.train.loop import train
from bowerbird_videotext.dense_evaluation import linear_classifier
from bowerbird_videotext.dense_evaluator import DenseEvaluation, embed_frames
from bowerbird_videotext.frozen_frames import FrozenFrames
from bowerbird_videotext.mv_former_config import (
    DenseConfig,
    MVFormerConfig,
    MVFormerObjectiveConfig,
    PhasesConfig,
    ViewsConfig,
)
from bowerbird_videotext.mv_former_encoder import MVFormerEncoder
from bowerbird_videotext.mv_former_objective import MVFormerObjective
from bowerbird_videotext.mv_former_views import CachedViews, TwoViews, augmented, cache_frames, two_view_steps
from bowerbird_videotext.phases import Phases
from bowerbird_videotext.sampling import real_frames

SMALL: dict[str, Any] = {
    "backbone": "test_resnet", "image_size": 32, "blocks": [2], "frames": 6, "pool_channels": 8, "mlp_width": 12,
    "hidden": 16, "layers": 1, "heads": 2, "ffn": 16, "embed_dim": 8,
}  # fmt: skip
DIGITS: dict[str, Any] = {
    "sprites": {"source": "core:digits", "names": {}}, "pairs": [["1", "7"], ["3", "0"]], "size": 32,
    "sprite_size": [8, 12], "frames": 16, "counts": {"train": 8, "val": 4, "test": 6},
}  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "videos")


@pytest.fixture
def phases(root: str) -> Phases:
    return Phases.build(PhasesConfig(root=Path(root), **DIGITS), "train")


@pytest.fixture
def encoder() -> MVFormerEncoder:
    return MVFormerEncoder.build(MVFormerConfig(**SMALL)).eval()


# ------------------------------------------------------------------------------------------------ the data set


def test_phases_say_where_the_middles_of_the_sprites_are(phases: Phases) -> None:
    for index in range(len(phases)):
        labels, centres = phases.frame_labels(index), phases._centres(index)
        assert len(labels) == 16 and set(labels.tolist()) == {0, 1, 2, 3}
        right = centres[:, :, 0] >= 16
        assert np.array_equal(labels // 2, right[0]) and np.array_equal(labels % 2, right[1])
        lengths = np.array([sprite.size for sprite in phases._shown(index)])[:, None]
        assert (centres - lengths / 2 >= -1e-9).all() and (centres + lengths / 2 <= 32 + 1e-9).all()
    orders = {tuple(dict.fromkeys(phases.frame_labels(i).tolist())) for i in range(len(phases))}
    assert len(orders) > 1  # the order of the states is not the same in all
    assert phases.labels() == [0, 1] * 4 and phases.classes == ("1 and 7", "3 and 0")


def test_the_video_of_a_position_is_read_back_as_it_was_made(phases: Phases) -> None:
    from bowerbird.data.videos import read_frames, video_info

    item = phases[1]
    assert video_info(item["video"]).frames == 16
    read = read_frames(item["video"], np.arange(16)).astype(int)
    assert np.abs(read - phases.pixels(1)).mean() < 4
    assert item["text"] == "a 3 and a 0 change places" and item["label"] == 1


def test_other_splits_and_seeds_make_other_videos_and_the_same_settings_the_same(root: str) -> None:
    def pixels(split: str, **more: Any) -> Any:
        return Phases.build(PhasesConfig(root=Path(root), **{**DIGITS, **more}), split).pixels(0)

    assert np.array_equal(pixels("train"), pixels("train", counts={"train": 2}))
    assert not np.array_equal(pixels("train"), pixels("test"))
    assert not np.array_equal(pixels("train"), pixels("train", seed=1))


def test_phases_refuse_unknown_splits_and_nouns(root: str) -> None:
    with pytest.raises(UnknownNameError, match=r"no split 'tset'.*test"):
        Phases.build(PhasesConfig(root=Path(root), **DIGITS), "tset")
    with pytest.raises(UnknownNameError, match="no sprite is called 'bag'"):
        Phases.build(PhasesConfig(root=Path(root), **{**DIGITS, "pairs": [["1", "bag"]]}))
    with pytest.raises(ValueError, match="different pairs"):
        PhasesConfig(pairs=(("bag", "bag"),))
    with pytest.raises(ValueError, match="half of the frame"):
        PhasesConfig(sprite_size=(16, 30))


# ------------------------------------------------------------------------------------------------ views


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 60), frames=st.integers(1, 20), seed=st.integers(0, 999),
    region_of=st.sampled_from(["video", "frames"]), region=st.floats(1, 2), offset=st.floats(0, 1),
)  # fmt: skip
def test_views_are_different_frames_in_order_and_near_each_other(
    length: int, frames: int, seed: int, region_of: Any, region: float, offset: float
) -> None:
    config = ViewsConfig(region=region, region_of=region_of, consistent_offset=offset)
    times, valid = two_view_steps(length, frames, np.random.default_rng(seed), config)
    n = min(length, frames)
    assert times.shape == valid.shape == (2, frames)
    assert (times >= 0).all() and (times < length).all() and (times[~valid] == length - 1).all()
    assert not valid[:, n:].any()
    for view in range(2):
        shown = times[view][valid[view]]
        assert (np.diff(shown) > 0).all()
    if region_of == "frames" and length >= 2 * frames:
        whole = int(np.ceil(region * n))
        assert valid.all() and (times[:, -1] - times[:, 0] < whole).all()
        # The second region starts within the reach of the first one's first frame, and is `whole` frames at most.
        assert abs(times[1, 0] - times[0, 0]) <= np.floor((1 - offset) * n) + whole
    if region == 1 and length <= frames:
        assert np.array_equal(times[0, :n], np.arange(length)) and valid[:, :n].all()


def test_a_view_is_changed_as_one(phases: Phases) -> None:
    config = ViewsConfig(jitter_prob=1.0, blur=1.0, grey=0.5, flip=0.5)
    encoder = MVFormerEncoder.build(MVFormerConfig(**SMALL))
    assert encoder.preprocessing is not None
    still = torch.randint(0, 256, (1, 3, 40, 48), dtype=torch.uint8).expand(4, -1, -1, -1)
    for seed in range(4):
        out = augmented(still, encoder.preprocessing, config, np.random.default_rng(seed))
        assert out.shape == (4, 3, 32, 32)
        assert_close(out, out[:1].expand_as(out))
    transform = TwoViews(encoder.preprocessing, 6, config)
    first, again = (transform(phases[0], np.random.default_rng(3)) for _ in range(2))
    assert torch.equal(first["views"], again["views"]) and first["views"].shape == (2, 6, 3, 32, 32)
    assert first["lengths"].tolist() == [16, 16]
    plain = TwoViews(encoder.preprocessing, 6, ViewsConfig(augment=False))(phases[0], np.random.default_rng(3))
    assert not torch.equal(plain["views"], first["views"])


def test_the_cache_gives_what_the_backbone_gives(phases: Phases, encoder: MVFormerEncoder, tmp_path: Path) -> None:
    encoder.needs_global = True
    cache = cache_frames(encoder, phases, tmp_path / "cache")
    config = ViewsConfig(augment=False)
    kept = CachedViews(cache, 6, config)(phases[2], np.random.default_rng(0))
    read = TwoViews(encoder.preprocessing, 6, config)(phases[2], np.random.default_rng(0))  # type: ignore[arg-type]
    assert np.array_equal(kept["times"], read["times"]) and np.array_equal(kept["valid"], read["valid"])
    patches, vectors = encoder.frozen_features(read["views"])
    assert_close(torch.from_numpy(np.array(kept["patches"])), patches, rtol=1e-4, atol=1e-5)
    assert_close(torch.from_numpy(np.array(kept["global_features"])), vectors, rtol=1e-4, atol=1e-5)
    written = (cache.folder / "patches.npy").stat().st_mtime_ns
    assert cache_frames(encoder, phases, tmp_path / "cache").folder == cache.folder
    assert (cache.folder / "patches.npy").stat().st_mtime_ns == written  # not computed again
    other = MVFormerEncoder.build(MVFormerConfig(**{**SMALL, "blocks": [3]})).eval()
    assert cache_frames(other, phases, tmp_path / "cache").folder != cache.folder


# ------------------------------------------------------------------------------------------------ the encoder


@pytest.mark.parametrize(("backbone", "blocks"), [("test_resnet", [2]), ("test_vit", [1, 3, 5])])
def test_features_are_the_raw_outputs_of_blocks(backbone: str, blocks: list[int]) -> None:
    frozen, _ = FrozenFrames.of(backbone, blocks, image_size=32, chunk=3)
    frames = torch.randn(4, 3, 32, 32)
    found: list[torch.Tensor] = []
    parts: Any = frozen.model
    modules = [parts.blocks[i] for i in blocks] if hasattr(parts, "blocks") else [parts.layer2]
    hooks = [one.register_forward_hook(lambda _m, _i, out: found.append(out)) for one in modules]
    parts(frames)
    for hook in hooks:
        hook.remove()
    maps = [out[:, parts.num_prefix_tokens :] if out.ndim == 3 else out.flatten(2).transpose(1, 2) for out in found]
    patches, none = frozen(frames)
    assert_close(patches, torch.cat(maps, dim=2), rtol=1e-4, atol=1e-5)
    assert none is None and not patches.requires_grad
    _, vectors = frozen(frames, with_global=True)
    assert_close(vectors, parts(frames), rtol=1e-4, atol=1e-5)
    assert frozen.channels == patches.shape[2] and frozen.patches == patches.shape[1]


def test_a_backbone_from_an_export_is_that_encoder_and_the_export_needs_it_no_more(tmp_path: Path) -> None:
    loaded = load_encoder("core:timm?model=test_resnet&image_size=32&embed_dim=5")
    save_encoder(loaded.module, tmp_path / "image", use="core:timm", config=loaded.spec.config)
    settings_: dict[str, Any] = {**SMALL, "backbone": str(tmp_path / "image")}
    del settings_["image_size"]
    made = MVFormerEncoder.build(MVFormerConfig(**settings_)).eval()
    assert_close(made.backbone.model.state_dict(), loaded.module.trunk.model.state_dict())  # type: ignore[union-attr]
    save_encoder(made, tmp_path / "video", use="videotext:mv-former", config=settings_)
    for file in (tmp_path / "image").iterdir():
        file.unlink()
    again = load_encoder(tmp_path / "video").module
    video = torch.randn(1, 6, 3, 32, 32)
    assert_close(again({"video": video}).pooled, made({"video": video}).pooled)
    assert again.preprocessing == made.preprocessing


def test_pooled_is_the_mean_of_real_frames_of_norm_1(encoder: MVFormerEncoder) -> None:
    video = torch.randn(2, 6, 3, 32, 32)
    video[0, 4:] = 0
    video[1, 2] = 0  # a frame of zeros that is not at the end is one
    assert real_frames(video).tolist() == [[True] * 4 + [False] * 2, [True] * 6]
    features = encoder({"video": video})
    assert_close(features.tokens.norm(dim=-1), torch.ones(2, 6))
    assert_close(features.pooled[0], features.tokens[0, :4].mean(dim=0))
    assert features.mask.tolist() == real_frames(video).tolist()
    assert encoder({"image": video[:, 0]}).pooled.shape == (2, 8)
    with pytest.raises(InputError, match=r"\(B, T, 3, H, W\); found nothing"):
        encoder({})


@pytest.mark.parametrize("pool", ["max", "avg", "cls", "fixed-width"])
def test_every_baseline_is_built_and_embeds(pool: str) -> None:
    made = MVFormerEncoder.build(MVFormerConfig(**{**SMALL, "blocks": [2], "pool": pool})).eval()
    assert made({"video": torch.randn(1, 6, 3, 32, 32)}).tokens.shape == (1, 6, 8)


def test_backbones_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no block 9"):
        FrozenFrames.of("test_resnet", [9])
    with pytest.raises(InputError, match="only maps of one size"):
        FrozenFrames.of("test_resnet", [1, 2], image_size=32)
    with pytest.raises(UnknownNameError, match="test_resnet"):
        FrozenFrames.of("test_resnot")
    with pytest.raises(InputError, match="weights and a size of its own"):
        FrozenFrames.of("core:timm?model=test_resnet", image_size=32)
    with pytest.raises(InputError, match="not of a"):
        FrozenFrames.of("core:perceptron?image_size=8")


# ------------------------------------------------------------------------------------------------ training, measures


def recipe(root: str, **objective: Any) -> dict[str, Any]:
    return {
        "name": "phases",
        "encoder": {"use": "videotext:mv-former", **SMALL},
        "objective": {"use": "videotext:mv-former", **objective},
        "dataset": {"use": "videotext:phases", "root": root, **DIGITS},
        "train": {"epochs": 1, "batch_size": 4, "lr": 1e-3, "clip_norm": 10.0, "device": "cpu"},
    }


@pytest.mark.parametrize(
    "objective", [{}, {"negatives": "batch_noself"}, {"loss": "cycle"}, {"cache": True, "views": {"augment": False}}]
)
def test_a_run_trains_the_head_leaves_the_backbone_and_embeds_videos(
    root: str, tmp_path: Path, objective: dict[str, Any]
) -> None:
    if "cache" in objective:
        objective = {**objective, "cache_root": str(tmp_path / "cache")}
    torch.manual_seed(0)
    result = train(resolve_recipe(recipe(root, **objective)), tmp_path / "run")
    assert result.finished
    trained = load_encoder(tmp_path / "run").module
    torch.manual_seed(0)
    fresh = MVFormerEncoder.build(MVFormerConfig(**SMALL))
    assert_close(trained.backbone.state_dict(), fresh.backbone.state_dict())  # type: ignore[union-attr, operator]
    assert not torch.equal(trained.head.to_embedding.weight, fresh.head.to_embedding.weight)  # type: ignore[union-attr]


def test_the_loss_falls_on_one_batch(phases: Phases) -> None:
    encoder = MVFormerEncoder.build(MVFormerConfig(**{**SMALL, "blocks": [2], "dropout": 0.0}))
    objective = MVFormerObjective(encoder, MVFormerObjectiveConfig()).train()
    transform = objective.item_transform()
    items = [transform(phases[i], np.random.default_rng(i)) for i in range(2)]
    batch = {
        key: torch.stack([torch.as_tensor(item[key]) for item in items])
        for key in ("views", "times", "lengths", "valid")
    }
    optimizer = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = objective(batch).total
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
    with pytest.raises(InputError, match="needs views or patches"):
        objective({"valid": batch["valid"]})


def test_the_objective_refuses_other_encoders_and_a_cache_of_changed_pictures(root: str, tmp_path: Path) -> None:
    image_encoder = load_encoder("core:timm?model=test_resnet&image_size=32").module
    with pytest.raises(RecipeError, match="trains the encoder videotext:mv-former"):
        MVFormerObjective.build(MVFormerObjectiveConfig(), image_encoder, None)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="augment = false"):
        train(resolve_recipe(recipe(root, cache=True)), tmp_path / "run")


def test_frames_are_measured_by_action_with_any_encoder(root: str, tmp_path: Path) -> None:
    settings_ = {"root": root, **DIGITS}
    ref = "core:timm?model=test_resnet&image_size=32"
    config = DenseConfig(dataset="videotext:phases", settings=settings_, ks=(1, 5), stride=2)
    metrics = DenseEvaluation.build(config).run(Evaluation(load_encoder(ref, device="cpu")))
    assert set(metrics.summary) == {
        "accuracy", "progression", "tau", "AP@1", "AP@5", "actions", "videos", "without_progression",
    }  # fmt: skip
    assert metrics.summary["actions"] == 2 and metrics.summary["videos"] == 6
    assert 25 < metrics.summary["accuracy"] <= 100 and -1 <= metrics.summary["tau"] <= 1
    assert metrics.per_query["AP@5"].shape == (6,)
    rows = np.arange(6) % 2
    by_action = [np.mean(metrics.per_query["AP@5"][rows == action]) for action in (0, 1)]
    assert metrics.summary["AP@5"] == pytest.approx(np.mean(by_action))


def test_frames_are_classified_by_a_layer_trained_as_on_finegym_and_those_without_a_phase_left_out(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = Phases.frame_labels

    def some(self: Phases, index: int) -> Any:
        found = labels(self, index).copy()
        found[:: index + 2] = -1
        return found

    monkeypatch.setattr(Phases, "frame_labels", some)
    more: dict[str, Any] = {"classifier": "sgd", "epochs": 3, "lr": 0.5, "batch_videos": 2, "seed": 1}
    config = DenseConfig(
        dataset="videotext:phases", settings={"root": root, **DIGITS}, measures=("classification",), **more
    )
    encoder = load_encoder("core:timm?model=test_resnet&image_size=32", device="cpu")
    metrics = DenseEvaluation.build(config).run(Evaluation(encoder))
    sets = {split: Phases.build(PhasesConfig(root=Path(root), **DIGITS), split) for split in ("train", "test")}
    by_hand = []
    for action in (0, 1):
        parts: list[Any] = []
        for phases in sets.values():
            rows = range(action, len(phases), 2)
            parts += [[embed_frames(encoder.module, phases.video(i)) for i in rows]]
            parts += [[phases.frame_labels(i) for i in rows]]
        classify = linear_classifier(*parts[:2], epochs=3, lr=0.5, batch_videos=2, seed=1)
        pairs = zip(*parts[2:], strict=True)
        by_hand.append([100 * (classify(video[known >= 0]) == known[known >= 0]).mean() for video, known in pairs])
    assert metrics.summary["accuracy"] == pytest.approx(np.mean(by_hand))
    assert metrics.per_query["accuracy"].tolist() == pytest.approx(np.array(by_hand).T.ravel().tolist())


def test_an_encoder_of_videos_embeds_the_frames_of_a_video_together(phases: Phases, encoder: MVFormerEncoder) -> None:
    source = phases.video(0)
    together = embed_frames(encoder, source)
    assert together.shape == (16, 8)
    assert_close(torch.from_numpy(embed_frames(encoder, source, chunk=5)), torch.from_numpy(together))
    from bowerbird.data.videos import read_frames
    from bowerbird_videotext.mv_former_views import prepared

    frames = prepared(read_frames(source, np.arange(16)), encoder.preprocessing)  # type: ignore[arg-type]
    whole = encoder({"video": torch.from_numpy(frames)[None]}).tokens[0]
    assert_close(torch.from_numpy(together), whole.detach(), rtol=1e-4, atol=1e-5)


def test_the_evaluator_refuses_sets_without_phases_and_counts_that_differ(root: str, tmp_path: Path) -> None:
    context = Evaluation(load_encoder("core:timm?model=test_resnet&image_size=32", device="cpu"))
    moving = DenseConfig(
        dataset="videotext:moving",
        settings={"root": root, "sprites": {"source": "core:digits", "names": {}}, "counts": {"test": 1}},
        measures=("tau",),
    )
    with pytest.raises(InputError, match="needs videos whose frames have phases"):
        DenseEvaluation.build(moving).run(context)
    config = DenseConfig(dataset="videotext:phases", settings={"root": root, **DIGITS}, measures=("tau",))
    data = context.dataset("videotext:phases", split="test", root=root, **DIGITS)
    write_video(data.video(0), data.pixels(0)[:-3])  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="13 frames, and phases of 16"):
        DenseEvaluation.build(config).run(context)
    Path(data.video(1)).write_bytes(b"no video")  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"000001\.mp4"):
        embed_frames(context.encoder, data.video(1))  # type: ignore[attr-defined]


def test_frames_larger_than_needed_are_shrunk_before_a_view_is_changed(tmp_path: Path) -> None:
    file = tmp_path / "wide.mp4"
    write_video(file, np.random.default_rng(0).integers(0, 256, (4, 80, 160, 3), dtype=np.uint8))
    transform = TwoViews(MVFormerEncoder.build(MVFormerConfig(**SMALL)).preprocessing, 4, ViewsConfig())
    assert transform._read(str(file), np.arange(4)).shape == (4, 3, 64, 128)
    item = {"video": str(file), "item_id": "wide", "where": "row 7"}
    assert transform(item, np.random.default_rng(0))["views"].shape == (2, 4, 3, 32, 32)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match=r"row 7: .*wide\.mp4"):
        transform(item, np.random.default_rng(0))
    with pytest.raises(InputError, match="choose a data set of videos"):
        transform({"image": None, "item_id": "a"}, np.random.default_rng(0))
