"""Regions: their geometry, which are kept, what finds and describes them, and where they are kept."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from noise_clips import NoiseClips as Clips
from torch import Tensor
from torch.testing import assert_close

from bowerbird.batch import Batch
from bowerbird.data.images import Preprocessing
from bowerbird.errors import DataError, InputError
from bowerbird.protocols import Detector, Features, Objects
from bowerbird_videotext.demovlp_config import ExtractorConfig
from bowerbird_videotext.region_cache import RegionCache, cache_regions
from bowerbird_videotext.region_extractors import DetectorRegions, EncoderFeatures, TorchvisionRegions, build_extractor
from bowerbird_videotext.regions import (
    FrameRegions,
    GivenRegions,
    GridRegions,
    PixelFeatures,
    RegionFeatures,
    box_geometry,
    frame_regions,
    video_regions,
)

Golden = Callable[[str], dict[str, Any]]
WHOLE = Preprocessing(size=16, mean=(0.0,) * 3, std=(1.0,) * 3, resize="squash")


# -------------------------------------------------------------------------------------------- geometry and choice


def test_frames_are_assembled_as_in_the_released_loader(golden: Golden) -> None:
    numbers = golden("demovlp/region_feature_assembly")
    count = numbers["num_frames"]
    parts = [[numbers[f"{name}_{i}"] for i in range(count)] for name in ("boxes_xyxy", "confidence", "features")]
    found = frame_regions(*parts).best(numbers["regions_per_frame"])
    size = torch.tensor([numbers["image_height"], numbers["image_width"]])
    out = torch.cat([found.features, box_geometry(found.boxes, size)], dim=-1)
    assert_close(out, numbers["out_features"], rtol=1e-9, atol=1e-12)
    assert_close(found.valid.double(), numbers["out_valid"])
    assert found.valid.sum(1).tolist() == numbers["out_lengths"].tolist()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 9))
def test_the_surest_regions_are_kept_in_order(seed: int, found: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(found, generator=generator)
    places = torch.rand(found, 4, generator=generator)
    best = frame_regions([places], [scores], [places]).best(count)
    kept = min(found, count)
    assert best.valid[0].tolist() == [True] * kept + [False] * (count - kept)
    expected = scores.sort(descending=True).values
    assert_close(best.scores[0, :kept], expected[:kept])
    assert (best.features[0, kept:] == best.features[0, kept - 1]).all()  # the last one is repeated


def test_a_picture_without_regions_has_none() -> None:
    none, one = torch.zeros(0, 4), torch.tensor([[0.0, 0, 1, 1]])
    best = frame_regions([none, one], [torch.zeros(0), torch.ones(1)], [torch.zeros(0, 3), torch.ones(1, 3)]).best(2)
    assert best.valid.tolist() == [[False, False], [True, False]]
    empty = frame_regions([none], [torch.zeros(0)], [torch.zeros(0, 3)]).best(2)
    assert not empty.valid.any()
    assert empty.features.shape == (1, 2, 3)


def test_the_geometry_is_relative_to_the_picture() -> None:
    boxes = torch.tensor([[0.0, 0.0, 64.0, 24.0], [16.0, 12.0, 48.0, 48.0]])
    found = box_geometry(boxes, torch.tensor([48, 64]))
    assert_close(found, torch.tensor([[0, 0, 1, 0.5, 1, 0.5], [0.25, 0.25, 0.75, 1, 0.5, 0.75]]))
    many = torch.rand(2, 3, 5, 4, dtype=torch.float64)
    geometry = box_geometry(many, torch.tensor([[10, 20], [5, 8]]))
    assert geometry.shape == (2, 3, 5, 6)
    assert_close(geometry[..., 4:], geometry[..., 2:4] - geometry[..., :2])
    assert_close(geometry[1, ..., 1], many[1, ..., 1] / 5)


@pytest.mark.parametrize(
    ("boxes", "sizes"),
    [
        (torch.zeros(2, 3), torch.ones(2)),
        (torch.zeros(2, 3, 4), torch.ones(3, 2)),
        (torch.zeros(2, 4), torch.tensor([0, 5])),
    ],
)
def test_geometry_refuses_what_does_not_fit(boxes: Tensor, sizes: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected|height"):
        box_geometry(boxes, sizes)


def test_region_features_of_other_shapes_are_refused() -> None:
    features, valid = torch.zeros(2, 3, 4, 5), torch.ones(2, 3, 4, dtype=torch.bool)
    with pytest.raises(InputError, match="boxes of regions"):
        RegionFeatures(features, torch.zeros(2, 3, 5, 4), torch.ones(2, 2), valid)


# ------------------------------------------------------------------------------------------------------ extractors


def test_a_grid_covers_the_picture_row_by_row() -> None:
    found = GridRegions(2, 3, PixelFeatures(4))(torch.rand(2, 3, 12, 12))
    assert found.boxes[0].tolist()[:4] == [[0, 0, 4, 6], [4, 0, 8, 6], [8, 0, 12, 6], [0, 6, 4, 12]]
    assert found.features.shape == (2, 6, 48)
    assert found.valid.all()


def test_pixel_features_are_the_pixels_of_the_region() -> None:
    image = torch.rand(1, 3, 8, 8)
    box = torch.tensor([[2.0, 1.0, 6.0, 5.0]])
    (found,) = PixelFeatures(4)(image, [box])
    # Cells of one pixel, each the mean of 2 x 2 points bilinear in the pixels around: the same for both by symmetry.
    rows = torch.nn.functional.interpolate(image, scale_factor=2, mode="bilinear", align_corners=False)
    expected = torch.nn.functional.avg_pool2d(rows, 2)[0, :, 1:5, 2:6]
    assert_close(found.view(3, 4, 4), 2 * expected - 1)


def test_frames_of_zeros_behind_a_clip_have_no_regions_and_black_ones_within_it_have() -> None:
    video = torch.rand(2, 3, 3, 8, 8)
    video[0, 2] = 0
    video[1, 1] = 0
    found = video_regions(GridRegions(2, 2, PixelFeatures(2)), video, 5)
    assert found.valid[0, 2].any().item() is False
    assert found.valid[1].sum().item() == 3 * 4
    assert found.features.shape == (2, 3, 5, 12)


def test_given_boxes_are_taken_in_their_order() -> None:
    video = torch.rand(1, 2, 3, 8, 8)
    boxes = torch.tensor([[[0.0, 0, 4, 4], [4, 4, 8, 8]], [[0, 0, 2, 2], [2, 2, 4, 4]]])
    found = video_regions(GivenRegions(PixelFeatures(2)), video, 3, [boxes])
    assert_close(found.boxes[0, :, :2], boxes)
    assert found.valid[0].tolist() == [[True, True, False]] * 2
    with pytest.raises(InputError, match="come with the data"):
        video_regions(GivenRegions(PixelFeatures(2)), video, 3)


class Halves(Detector):
    """Finds the left half of a picture that is bright there, surely, and everything, not surely."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim, self.classes = 3, ("half",)
        self.preprocessing = Preprocessing(size=8, mean=(0.5,) * 3, std=(0.5,) * 3)

    def forward(self, batch: Batch) -> Features:
        maps = torch.nn.functional.avg_pool2d(batch["image"], 2)
        return Features(pooled=maps.mean((2, 3)), tokens=maps.flatten(2).transpose(1, 2), grid=(4, 4))

    def detect(self, images: Sequence[Tensor]) -> list[Objects]:
        found = []
        for image in images:
            height, width = image.shape[1:]
            bright = bool(image[:, :, : width // 2].mean() > 0.5)
            boxes = torch.tensor([[0, 0, width / 2, height], [0, 0, width, height]])[: 2 if bright else 0]
            found.append(
                Objects(boxes, torch.zeros(len(boxes), dtype=torch.int64), torch.tensor([0.9, 0.2])[: len(boxes)])
            )
        return found


def test_regions_of_a_detector_have_the_mean_of_its_map() -> None:
    image = torch.zeros(2, 3, 16, 16)
    image[0, :, :, :8] = 1
    extractor = DetectorRegions(Halves(), threshold=0.5)
    found = extractor(image)
    assert found.boxes[0].tolist() == [[0, 0, 8, 16]]
    assert found.scores.tolist() == [pytest.approx([0.9]), [0.0]]
    assert found.boxes[1].tolist() == [[0, 0, 16, 16]]  # where nothing is found: the whole picture
    assert_close(found.features[1, 0], torch.full((3,), -1.0))
    assert found.features[0, 0].min() > 0.5
    assert extractor(image).features.shape[2] == extractor.feature_dim == 3
    both = DetectorRegions(Halves(), threshold=0.1, most=2)(image[:1])
    assert both.valid.sum() == 2
    assert not any(parameter.requires_grad for parameter in extractor.parameters())


def test_an_encoder_without_tokens_is_refused_as_a_source_of_features() -> None:
    class Pooled(Halves):
        def forward(self, batch: Batch) -> Features:
            return Features(pooled=batch["image"].mean((2, 3)))

    with pytest.raises(InputError, match="no tokens with their places"):
        EncoderFeatures(Pooled())


def test_regions_of_torchvision_come_from_its_box_head(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    class Body(torch.nn.Conv2d):
        def forward(self, images: Tensor) -> Any:
            return OrderedDict([("0", super().forward(images))])

    body = Body(3, 4, 8, stride=8)
    body.out_channels = 4  # type: ignore[assignment]
    model = FasterRCNN(
        body,
        num_classes=3,
        min_size=32,
        max_size=64,
        rpn_anchor_generator=AnchorGenerator(((16,),), ((1.0,),)),
        rpn_post_nms_top_n_test=5,
        box_score_thresh=0.0,
    ).eval()
    images = torch.rand(2, 3, 16, 24)
    extractor = TorchvisionRegions(model, threshold=0.0, most=4)
    found = extractor(images)
    assert extractor.feature_dim == found.features.shape[2] == 1024
    assert found.valid.sum(1).max() <= 4
    (first, _) = model(list(images))
    rows = found.valid[0]
    assert_close(found.boxes[0][rows], first["boxes"][: int(rows.sum())])
    assert_close(found.scores[0][rows], first["scores"][: int(rows.sum())])
    save_file({"backbone.weight": torch.zeros(1)}, tmp_path / "no-detector.safetensors")
    with pytest.raises(InputError, match="no roi_heads"):
        settings = {"boxes": "detector", "torchvision": "fasterrcnn_resnet50_fpn"}
        build_extractor(ExtractorConfig(**settings, weights=str(tmp_path / "no-detector.safetensors")))
    with pytest.raises(InputError, match=r"needs extractor\.weights"):
        build_extractor(ExtractorConfig(**settings))
    with pytest.raises(InputError, match="There are fasterrcnn"):
        build_extractor(ExtractorConfig(boxes="detector", torchvision="faster-rcnn", num_classes=3))


def test_an_image_encoder_can_describe_the_cells_of_a_grid_and_is_stored_without_its_folder(tmp_path: Path) -> None:
    from bowerbird.encoders import load_encoder, save_encoder

    settings = {"model": "vit_tiny_patch16_224", "image_size": 32}
    loaded = load_encoder("core:timm?model=vit_tiny_patch16_224&image_size=32", device="cpu")
    save_encoder(loaded.module, tmp_path / "vit", use="core:timm", config=settings)
    extractor, stored = build_extractor(ExtractorConfig(encoder=str(tmp_path / "vit"), grid=(2, 2)))
    images = torch.rand(1, 3, 32, 32)
    found = extractor(images)
    assert found.features.shape == (1, 4, 192)
    again, _ = build_extractor(ExtractorConfig.model_validate(stored.model_dump(mode="json")))
    again.load_state_dict(extractor.state_dict())
    assert str(tmp_path) not in stored.model_dump_json()
    assert torch.equal(again(images).features, found.features)


@pytest.mark.parametrize(
    "settings",
    [
        {"boxes": "detector"},
        {"detector": "runs/x"},
        {"boxes": "detector", "detector": "a", "torchvision": "b"},
        {"weights": "a.pth"},
        {"grid": [0, 2]},
        {"boxes": "detector", "detector": "a", "encoder": "b"},
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"needs|is for|leave out|expected"):
        ExtractorConfig(**settings)


# ----------------------------------------------------------------------------------------------------------- cache


class Counting(GridRegions):
    """A grid that counts its pictures, and may stop."""

    def __init__(self, stop_after: int = 10_000) -> None:
        super().__init__(2, 2, PixelFeatures(2))
        self.seen, self.stop_after = 0, stop_after

    def forward(self, images: Tensor, boxes: Sequence[Tensor] | None = None) -> FrameRegions:
        if self.seen >= self.stop_after:
            raise KeyboardInterrupt
        self.seen += len(images)
        return super().forward(images, boxes)


def cached(clips: Clips, extractor: Any, folder: Path, **more: Any) -> RegionCache:
    settings = {"preprocessing": WHOLE, "frames": 3, "regions_per_frame": 4, **more}
    return cache_regions(clips, extractor, folder, **settings)


def test_stored_regions_are_those_that_the_extractor_finds(tmp_path: Path) -> None:
    from bowerbird.data.videos import prepare_clip, read_clip

    clips, extractor = Clips(tmp_path), Counting()
    cache = cached(clips, extractor, tmp_path / "cache")
    assert len(cache) == 3
    for i, length in enumerate([2, 3, 3]):
        pixels = torch.from_numpy(prepare_clip(read_clip(clips.video(i), 3), WHOLE, 3))
        direct = video_regions(extractor, pixels[None], 4)
        stored = pickle.loads(pickle.dumps(cache)).read(f"clip-{i}")
        assert_close(stored.features, direct.features, rtol=1e-3, atol=1e-3)
        assert torch.equal(stored.boxes, direct.boxes)
        assert torch.equal(stored.valid, direct.valid)
        assert stored.valid[0].any(1).sum() == length


def test_a_made_cache_is_used_again_and_grows_with_the_data(tmp_path: Path) -> None:
    cached(Clips(tmp_path), Counting(), tmp_path / "cache")
    again = Counting()
    assert len(cached(Clips(tmp_path), again, tmp_path / "cache")) == 3
    assert again.seen == 0
    assert len(cached(Clips(tmp_path, 5), again, tmp_path / "cache")) == 5
    assert again.seen == 2 * 3


def test_another_extractor_has_a_cache_of_its_own(tmp_path: Path) -> None:
    first = cached(Clips(tmp_path), Counting(), tmp_path / "cache", identity="2 x 2")
    other = Counting()
    second = cached(Clips(tmp_path), other, tmp_path / "cache", identity="3 x 3")
    assert other.seen > 0
    assert first.folder != second.folder
    weights = torch.nn.Linear(1, 1)
    other.add_module("weights", weights)
    assert cached(Clips(tmp_path), other, tmp_path / "cache", identity="3 x 3").folder != second.folder


def test_a_replaced_video_is_extracted_again_and_a_touched_one_is_not(tmp_path: Path) -> None:
    clips = Clips(tmp_path)
    before = cached(clips, Counting(), tmp_path / "cache").read("clip-1")
    clips.path(0).touch()
    clips.write(1, seed=77)
    again = Counting()
    after = cached(clips, again, tmp_path / "cache").read("clip-1")
    assert again.seen == 3
    assert (after.features - before.features).abs().max() > 0.1


def test_sets_with_equal_ids_can_share_a_cache(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first, second = Clips(tmp_path / "a"), Clips(tmp_path / "b")
    second.write(2, seed=5)
    caches = [cached(clips, Counting(), tmp_path / "cache") for clips in (first, second)]
    again = Counting()
    caches.append(cached(first, again, tmp_path / "cache"))
    assert again.seen == 0
    found = [cache.read("clip-2").features for cache in caches]
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_an_interrupted_extraction_goes_on_after_the_last_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bowerbird_videotext.region_cache.PER_FILE", 2)
    clips = Clips(tmp_path, 5)
    with pytest.raises(KeyboardInterrupt):
        cached(clips, Counting(stop_after=6), tmp_path / "cache")
    (place,) = (tmp_path / "cache").iterdir()
    assert len(list(place.glob("*.safetensors"))) == 1
    (place / ".000001.safetensors.half").write_bytes(b"cut")  # what a killed process leaves
    again = Counting()
    assert len(cached(clips, again, tmp_path / "cache")) == 5
    assert again.seen == 3 * 3
    assert not list(place.glob(".*.half"))


def test_a_damaged_file_of_a_cache_is_named(tmp_path: Path) -> None:
    cache = cached(Clips(tmp_path), Counting(), tmp_path / "cache")
    (file,) = cache.folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match=file.name):
        cached(Clips(tmp_path), Counting(), tmp_path / "cache")


def test_an_unreadable_video_is_an_error_or_is_left_out_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clips = Clips(tmp_path)
    clips.path(1).write_bytes(b"no video")
    with pytest.raises(DataError, match=r"clip-1.*1\.mp4"):
        cached(clips, Counting(), tmp_path / "cache")
    cache = cached(clips, Counting(), tmp_path / "cache", on_error="skip")
    assert "clip-1" in caplog.text
    assert len(cache) == 2
    with pytest.raises(DataError, match="clip-1"):
        cache.read("clip-1")


def test_given_boxes_are_scaled_to_the_prepared_frames(tmp_path: Path) -> None:
    cache = cached(Clips(tmp_path), GivenRegions(PixelFeatures(2)), tmp_path / "cache")
    assert cache.read("clip-0").boxes[0, 0, :2].tolist() == [[0, 0, 8, 8], [4, 4, 16, 16]]
