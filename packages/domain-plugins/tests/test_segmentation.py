"""Segmentation of several data sets: networks, objectives, data, mIoU, and the three arms through the training loop."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bowerbird.batch import Batch
from bowerbird.encoders import load_encoder
from bowerbird.errors import DataError, InputError, RecipeError, UnknownNameError
from bowerbird.evaluate import Evaluation
from bowerbird.protocols import Encoder
from bowerbird.recipe import load_recipe, resolve_recipe
from bowerbird.testing import (
    DatasetContract,
    EncoderContract,
    EvaluatorContract,
    ObjectiveContract,
    SimpleBuildContext,
    SimpleEvalContext,
    TinyEncoder,
    override_contract_test,
)
from bowerbird.train.checkpoint import latest_checkpoint, load_checkpoint
from bowerbird.train.loop import train
from bowerbird_domain.canvases import Canvases, CanvasesConfig, CanvasSet
from bowerbird_domain.cdcl import DatasetBatchNorm2d, active_dataset
from bowerbird_domain.export_single import export_dataset
from bowerbird_domain.miou import MIoU
from bowerbird_domain.segmentation import FCN, PixelViews, PSPNet, SegmentationObjective, pixel_cross_entropy
from bowerbird_domain.segmentation_configs import (
    CDCLConfig,
    FCNConfig,
    MIoUConfig,
    PixelConfig,
    PSPNetConfig,
    SegmentationConfig,
)
from bowerbird_domain.segmentation_sets import FoldersConfig, SegmentationFolders, SegmentationSets

CLASSES = ("day/sky", "day/road", "day/car", "night/dark", "night/light")
SMALL = {"widths": (4, 6), "dilations": (1, 2)}


def network(**settings: Any) -> FCN:
    torch.manual_seed(0)
    return FCN.build(FCNConfig(**{**SMALL, **settings}))


def a_batch(domains: Sequence[int] = (0, 0, 0, 1, 1, 1), seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    domain = torch.tensor(domains)
    image = torch.randn(len(domain), 3, 8, 8, generator=generator) + domain[:, None, None, None]
    label_map = torch.randint(0, 2, (len(domain), 8, 8), generator=generator)
    label_map[:, 0] = 255
    return {"image": image, "label_map": label_map, "domain": domain}


def objective(config: PixelConfig, encoder: Encoder | None = None) -> SegmentationObjective:
    made = SegmentationObjective.build(config, encoder or network(), SimpleBuildContext(classes=CLASSES))
    return made.train()


# --------------------------------------------------------------------------------------------------------- contracts


class _Networks(EncoderContract):
    """Classifiers are trained by an objective on logits; an embedding does not go through them."""

    removed = {
        "test_gradients_reach_every_trainable_parameter_and_no_frozen_one": "an embedding is taken before the classes"
    }
    test_gradients_reach_every_trainable_parameter_and_no_frozen_one = None  # type: ignore[assignment]


class TestFCN(_Networks):
    name = "domain:fcn"
    config = {**SMALL, "image_size": 8, "datasets": {"day": 3, "night": 2}}

    @override_contract_test(reason="pictures are (batch, 3, height, width) of any size")
    def test_wrong_batches_are_refused(self) -> None:
        with pytest.raises(InputError, match=r"expected pictures \(batch, 3, height, width\), found \(2, 1, 8, 8\)"):
            self.build()({"image": torch.zeros(2, 1, 8, 8)})


class TestPSPNet(_Networks):
    name = "domain:pspnet"
    config = {"backbone": "resnet10t", "output_stride": 8, "bins": (1, 2), "width": 4, "image_size": 32}
    test_wrong_batches_are_refused = TestFCN.test_wrong_batches_are_refused


class _Objectives(ObjectiveContract):
    image_size = 8

    def make_encoder(self) -> Encoder:
        return network(image_size=8)

    def make_context(self) -> SimpleBuildContext:
        return SimpleBuildContext(classes=CLASSES)

    def make_batch(self, *, seed: int = 0) -> Batch:
        return a_batch((0, 1) * (self.batch_size // 2), seed)

    def make_encoder_batch(self, encoder: Encoder) -> Batch:
        return {"image": torch.randn(self.batch_size, 3, 8, 8)}

    def wrong_batches(self) -> Iterator[tuple[str, Batch]]:
        good = self.make_batch()
        for key in good:
            yield f"a batch without {key}", {other: value for other, value in good.items() if other != key}
        yield "a data set that does not exist", {**good, "domain": good["domain"] + 1}
        yield "a class of the other data set", {**good, "label_map": torch.full_like(good["label_map"], 2)}
        yield "label maps of another size", {**good, "label_map": good["label_map"][:, 1:]}


class TestSegmentation(_Objectives):
    name = "domain:segmentation"


class TestCDCL(_Objectives):
    name = "domain:cdcl"

    @override_contract_test(reason="whose branch to take must be said: the method needs the data set at inference")
    def test_the_exported_encoder_encodes(self) -> None:
        encoder = self.build().exported_encoder().eval()
        batch = self.make_encoder_batch(encoder)
        with pytest.raises(InputError, match="no data set is active"):
            encoder(batch)
        with active_dataset(encoder, "night"), torch.no_grad():
            assert encoder(batch).pooled.shape == (self.batch_size, encoder.embed_dim)


class TestCanvases(DatasetContract):
    name = "domain:canvases"
    config = {"count": 6}
    splits = ("train", "test")
    disjoint = (("train", "test"),)


class TestMIoU(EvaluatorContract):
    name = "domain:miou"
    config = {"dataset": "canvases"}

    def make_context(self) -> SimpleEvalContext:
        found = Canvases.build(CanvasesConfig(count=3), "test")
        sets = {name: len(classes) for name, classes in found.label_spaces.items()}
        return SimpleEvalContext(network(datasets=sets, statistics="private"), default=found)


# --------------------------------------------------------------------------------------------------------- objectives


def test_private_statistics_run_every_part_of_a_mixed_batch_through_its_own_branch() -> None:
    made, batch = objective(CDCLConfig(weights={"night": 0.5})), a_batch()
    reference = objective(CDCLConfig())
    expected = {}
    for position, name in enumerate(made.datasets):
        rows = batch["domain"] == position
        with active_dataset(reference.encoder, name):
            expected[name] = pixel_cross_entropy(
                reference.encoder.logits(batch["image"][rows]), batch["label_map"][rows]
            )
    output = made(batch)
    torch.testing.assert_close(output.parts["loss/day"], expected["day"])
    torch.testing.assert_close(output.parts["loss/night"], expected["night"])
    torch.testing.assert_close(output.total, expected["day"] + 0.5 * expected["night"])
    assert all(torch.equal(value, reference.state_dict()[name]) for name, value in made.state_dict().items())


def test_pure_batches_of_one_step_average_to_the_sum_over_data_sets() -> None:
    mixed, pure, batch = objective(CDCLConfig()), objective(CDCLConfig()), a_batch()
    mixed(batch).total.backward()
    for position in range(2):
        rows = batch["domain"] == position
        (pure({key: value[rows] for key, value in batch.items()}).total / 2).backward()
    for (name, ours), theirs in zip(pure.named_parameters(), mixed.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_shared_statistics_are_those_of_the_whole_batch() -> None:
    made, batch = objective(SegmentationConfig()), a_batch()
    made(batch)
    norm = made.encoder.network[1]
    assert type(norm) is nn.BatchNorm2d
    with torch.no_grad():
        maps = made.encoder.network[0](batch["image"])
    torch.testing.assert_close(norm.running_mean, 0.1 * maps.mean(dim=(0, 2, 3)))


def test_weight_decay_reaches_every_parameter_as_with_plain_sgd() -> None:
    (group,) = objective(CDCLConfig()).parameter_groups()
    assert "weight_decay" not in group


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda: objective(CDCLConfig(), TinyEncoder()),
            RecipeError,
            "trains domain:fcn and domain:pspnet, not",
        ),
        (lambda: objective(CDCLConfig(weights={"nigt": 1.0})), UnknownNameError, "Did you mean 'night'"),
        (lambda: objective(CDCLConfig(weights={"day": 0, "night": 0})), RecipeError, "nothing to train"),
        (lambda: objective(CDCLConfig(), network(datasets={"day": 3, "dusk": 2})), RecipeError, "leave out encoder"),
        (
            lambda: SegmentationObjective.build(CDCLConfig(), network(), SimpleBuildContext(classes=("a", "b"))),
            RecipeError,
            "classes called SET/CLASS; the training data has 'a'",
        ),
        (
            lambda: SegmentationObjective.build(CDCLConfig(), network(), SimpleBuildContext(classes=())),
            RecipeError,
            "has no classes",
        ),
        (lambda: network().logits(torch.zeros(1, 3, 8, 8), "day"), InputError, "has no classes yet"),
        (lambda: network(datasets={"day": 3}).single("night"), UnknownNameError, "no data set 'night'; there are day"),
        (lambda: FCNConfig(widths=(3, 4), dilations=(1,)), ValueError, "expected one for each of the 2 widths"),
        (lambda: FCNConfig(datasets={"day": 1}), ValueError, "at least two classes"),
        (lambda: FCNConfig(statistics="private"), ValueError, "needs the names of the data sets"),
        (lambda: CDCLConfig(scale=(0.5, 2.0)), ValueError, "set crop_size"),
        (lambda: PSPNet.build(PSPNetConfig(backbone="resnet999")), UnknownNameError, "no model 'resnet999'"),
        (lambda: PSPNet.build(PSPNetConfig(backbone="vit_tiny_patch16_224")), InputError, "could not build"),
    ],
)
def test_parts_that_do_not_fit_are_refused(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_a_pyramid_refuses_a_batch_of_one_in_training() -> None:
    torch.manual_seed(0)
    made = PSPNet.build(PSPNetConfig(backbone="resnet10t", bins=(1, 2), width=4, image_size=32))
    image = torch.randn(1, 3, 32, 32)
    with pytest.raises(InputError, match=r"layer 'pyramid', level 1 x 1.*batch_size of at least 2"):
        made.train()({"image": image})
    assert made.eval()({"image": image}).grid == (4, 4)
    assert made({"image": torch.randn(1, 3, 32, 48)}).grid == (4, 6)


def test_views_keep_picture_and_label_map_together() -> None:
    labels = np.arange(48, dtype=np.uint8).reshape(6, 8)
    item = {"image": Image.fromarray(np.repeat(labels[..., None], 3, axis=2)), "label_map": labels, "domain": 1}
    preprocessing = network().preprocessing
    assert preprocessing is not None
    plain = PixelViews(preprocessing, PixelConfig())(item, np.random.default_rng(0))
    assert plain["domain"] == 1 and plain["label_map"].dtype == np.int64
    np.testing.assert_array_equal(plain["label_map"], labels)
    flipped = set()
    for seed in range(10):
        views = PixelViews(preprocessing, PixelConfig(crop_size=7, flip=True, scale=(1.0, 1.5)))
        made = views(item, np.random.default_rng(seed))
        assert made["image"].shape == (3, 7, 7) and made["label_map"].shape == (7, 7)
        counted = made["label_map"] != 255
        grey = (made["image"][0] * 0.5 + 0.5) * 255
        assert np.abs(grey - made["label_map"])[counted].max() < 5  # nearest against bilinear
        flipped.add(bool((np.diff(made["label_map"], axis=1)[:, :5][counted[:, :5] & counted[:, 1:6]] < 0).any()))
    assert flipped == {True, False}
    with pytest.raises(DataError, match="8 x 6 pixels and a label map of"):
        PixelViews(preprocessing, PixelConfig())({**item, "label_map": labels[:, 1:]}, np.random.default_rng(0))


# ---------------------------------------------------------------------------------------------------------------- data


def test_canvases_have_the_classes_looks_and_order_of_their_sets() -> None:
    sets = Canvases.build(CanvasesConfig(count=10), "train")
    assert sets.domains == ("plain", "inverted") and len(sets) == 20
    assert sets.label_spaces["plain"] == ("background", *map(str, range(10)))
    assert sets.label_spaces["inverted"] == ("background", "0-1", "2-3", "4-5", "6-7", "8-9")
    assert sets.classes[10:13] == ("plain/9", "inverted/background", "inverted/0-1")
    assert sets.domain_indices() == [0] * 10 + [1] * 10
    for index in range(20):
        item = sets[index]
        pixels, labels = np.asarray(item["image"], int), item["label_map"]
        assert labels.shape == (16, 16) and 0 < (labels > 0).mean() < 0.5
        assert labels.max() < len(sets.label_spaces[sets.domains[item["domain"]]])
        ink, paper = pixels[labels > 0].mean(), pixels[labels == 0].mean()
        assert ink > paper if item["domain"] == 0 else ink < paper
    plain = np.asarray(sets[0]["image"])
    assert (plain[..., 0] == plain[..., 2]).all() and not plain[sets[0]["label_map"] == 0].any()


def test_a_set_alone_has_the_canvases_that_it_has_beside_others() -> None:
    both = Canvases.build(CanvasesConfig(count=4), "test")
    alone = Canvases.build(CanvasesConfig(count=4, only="inverted"), "test")
    assert alone.item_ids == both.item_ids[4:]
    for index in range(4):
        one, other = alone[index], both[index + 4]
        assert one["image"].tobytes() == other["image"].tobytes() and one["domain"] == 0
        np.testing.assert_array_equal(one["label_map"], other["label_map"])
    assert alone[0]["image"].tobytes() != Canvases.build(CanvasesConfig(count=4, only="inverted"))[0]["image"].tobytes()


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"sets": {"a": {"source": "core:digit"}}}, UnknownNameError, "Did you mean"),
        ({"sets": {"a": {"groups": 11}}}, DataError, "10 classes, which cannot make groups = 11"),
        ({"sets": {"a": {"class_key": "category"}}}, DataError, "no metadata 'category'.*they have label"),
        ({"sets": {}}, ValueError, "at least one"),
        ({"sets": {"a/b": {}}}, ValueError, "without a slash"),
        ({"only": "plane"}, ValueError, "there are the sets plain, inverted"),
        ({"item_size": (8, 20)}, ValueError, "does not fit on a canvas of 16 pixels"),
        ({"sets": {"a": {"tint": (1.0, 2.0, 0.0)}}}, ValueError, "three factors from 0 to 1"),
    ],
)
def test_canvases_that_cannot_be_made_are_refused(config: Mapping[str, Any], error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        Canvases.build(CanvasesConfig.model_validate(config), "train")


def test_classes_may_come_from_the_metadata_of_the_source() -> None:
    sets = Canvases.build(CanvasesConfig(count=2, sets={"a": CanvasSet(class_key="label", paper="light")}), "train")
    assert sets.label_spaces["a"] == ("background", *map(str, range(10)))


def write_set(root: Path, name: str, classes: Sequence[str], values: Sequence[int], sizes: Sequence[int]) -> None:
    folder = root / name
    for part in ("images/town", "labels/town"):
        (folder / "train" / part).mkdir(parents=True)
    (folder / "classes.txt").write_text("\n".join(classes) + "\n")
    for number, (value, size) in enumerate(zip(values, sizes, strict=True)):
        Image.new("RGB", (size, 8), (40 * number, 90, 10)).save(folder / f"train/images/town/{number}.png")
        Image.new("L", (size, 8), value).save(folder / f"train/labels/town/{number}.png")


def test_segmentation_sets_are_read_from_folders(tmp_path: Path) -> None:
    write_set(tmp_path, "night", ["dark", "light"], [1, 255], [8, 10])
    write_set(tmp_path, "day", ["sky", "road", "car"], [2], [8])
    sets = SegmentationFolders.build(FoldersConfig(root=tmp_path), None)
    assert sets.domains == ("day", "night")
    assert sets.classes == ("day/sky", "day/road", "day/car", "night/dark", "night/light")
    assert list(sets.item_ids) == ["day/train/0.png", "night/train/0.png", "night/train/1.png"]
    assert [int(item["label_map"][0, 0]) for item in sets] == [2, 1, 255]
    assert sets[2]["label_map"].shape == (8, 10) and sets[2]["domain"] == 1
    assert SegmentationFolders.build(FoldersConfig(root=tmp_path, sets=("night",)), "train").domains == ("night",)
    with pytest.raises(UnknownNameError, match=r"no segmentation set 'nite'.*Did you mean 'night'"):
        SegmentationFolders.build(FoldersConfig(root=tmp_path, sets=("nite",)), "train")
    with pytest.raises(UnknownNameError, match="no split 'val'; it has train"):
        SegmentationFolders.build(FoldersConfig(root=tmp_path), "val")


def test_damaged_segmentation_folders_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no segmentation set"):
        SegmentationFolders.build(FoldersConfig(root=tmp_path), None)
    write_set(tmp_path, "day", ["sky", "road"], [2, 0, 0], [8, 8, 8])
    labels = tmp_path / "day/train/labels/town"
    Image.new("RGB", (8, 8)).save(labels / "1.png")
    Image.new("L", (9, 8)).save(labels / "2.png")
    sets = SegmentationFolders.build(FoldersConfig(root=tmp_path), None)
    for index, words in enumerate(
        ("has the value 2.*expected 0 to 1, or 255", "mode 'RGB'", "9 x 8 pixels, its picture")
    ):
        with pytest.raises(DataError, match=words):
            sets[index]
    (labels / "0.png").unlink()
    with pytest.raises(DataError, match="1 of 3 pictures have no label map"):
        SegmentationFolders.build(FoldersConfig(root=tmp_path), None)
    (tmp_path / "day/classes.txt").write_text("sky\nsky\n")
    with pytest.raises(DataError, match="different names, one a line"):
        SegmentationFolders.build(FoldersConfig(root=tmp_path), None)


# ---------------------------------------------------------------------------------------------------------------- mIoU


class Ruled(SegmentationSets):
    """Pictures whose red says the class of every pixel; of two sizes."""

    def __init__(self, wrong: float) -> None:
        super().__init__({"day": ("a", "b", "c", "d")}, {"day": 5}, [f"{i}" for i in range(5)])
        self.wrong = wrong

    @classmethod
    def build(cls, config: Any, split: str | None) -> Ruled:
        return cls(0.0)

    def read(self, domain: int, position: int) -> tuple[Image.Image, np.ndarray]:
        generator = np.random.default_rng(position)
        labels = generator.integers(0, 3, (6, 5 + position % 2)).astype(np.uint8)
        shown = np.where(generator.random(labels.shape) < self.wrong, generator.integers(0, 3, labels.shape), labels)
        labels[0] = 255
        return Image.fromarray(np.repeat((shown * 85)[..., None], 3, axis=2).astype(np.uint8)), labels


def reader() -> FCN:
    """A network that reads the class off the red channel."""
    made = network(widths=(4,), dilations=(1,), datasets={"day": 4})
    made.network = nn.Identity()
    made.heads[0] = nn.Conv2d(3, 4, 1)
    with torch.no_grad():
        centres = torch.tensor([-1.0, -1 / 3, 1 / 3, 1.0])  # of the normalised values 0, 85, 170, 255
        made.heads[0].weight.zero_()
        made.heads[0].weight[:, 0, 0, 0] = 2 * centres
        made.heads[0].bias.copy_(-centres.square())
    return made


def miou(encoder: Encoder, sets: SegmentationSets, **settings: Any) -> Mapping[str, float]:
    evaluator = MIoU.build(MIoUConfig(dataset="sets", **settings))
    return evaluator.run(SimpleEvalContext(encoder, default=sets)).summary


def test_miou_is_the_mean_over_present_classes_of_intersection_over_union_of_all_pictures() -> None:
    assert miou(reader(), Ruled(0.0))["day/mIoU"] == 1.0
    sets = Ruled(0.4)
    found = miou(reader(), sets, batch_size=2)
    labels = np.concatenate([item["label_map"].ravel() for item in sets])
    shown = np.concatenate([np.asarray(item["image"])[..., 0].ravel() // 85 for item in sets])
    labels, shown = labels[labels != 255], shown[labels != 255]
    ious = [((labels == c) & (shown == c)).sum() / ((labels == c) | (shown == c)).sum() for c in range(3)]
    assert found["day/mIoU"] == found["mIoU"] == pytest.approx(np.mean(ious), abs=1e-6)  # class d is nowhere
    assert [found[f"day/iou/{name}"] for name in "abc"] == pytest.approx(ious, abs=1e-6)
    assert "day/iou/d" not in found
    assert found["day/accuracy"] == pytest.approx((labels == shown).mean())


def test_an_unknown_set_may_take_the_branch_with_the_nearest_statistics() -> None:
    sets = Canvases.build(CanvasesConfig(count=8), "test")
    made = network(datasets={name: len(classes) for name, classes in sets.label_spaces.items()}, statistics="private")
    images = [torch.stack([torch.from_numpy(PixelViews(made.preprocessing, PixelConfig())(sets[i + 8 * d],
              np.random.default_rng(0))["image"]) for i in range(8)]) for d in range(2)]  # fmt: skip
    for _ in range(40):
        for name, image in zip(sets.domains, images, strict=True):
            made.maps(image, name)
    assert miou(made, sets, branch="nearest") == miou(made, sets, branch="own")
    with pytest.raises(InputError, match="needs a network with statistics per data set"):
        miou(network(datasets=made.label_spaces), sets, branch="nearest")


def test_miou_refuses_what_does_not_fit() -> None:
    sets = Canvases.build(CanvasesConfig(count=2), "test")
    with pytest.raises(InputError, match="measures segmentation networks, not a TinyEncoder"):
        miou(TinyEncoder(), sets)
    with pytest.raises(InputError, match="'inverted' has 6 classes; the network was trained on plain"):
        miou(network(datasets={"plain": 11}), sets)
    with pytest.raises(InputError, match="'plain' has 11 classes; the network has 3 for it"):
        miou(network(datasets={"plain": 3, "inverted": 6}), sets)


# ------------------------------------------------------------------------------------------------------ the three arms

RECIPE: dict[str, Any] = {
    "name": "arms",
    "encoder": {"use": "domain:fcn", "widths": [6, 6], "dilations": [1, 2]},
    "objective": {"use": "domain:cdcl"},
    "dataset": {"use": "domain:canvases", "split": "train", "count": 24},
    "train": {
        "epochs": 4, "batch_size": 8, "alternate": True, "optimizer": "sgd", "lr": 0.1, "schedule": "poly",
        "log_every": 1, "device": "cpu",
    },
    "evaluate": [{"use": "domain:miou", "dataset": "domain:canvases", "split": "test", "settings": {"count": 8}}],
}  # fmt: skip


def test_cdcl_is_trained_exported_and_measured_by_a_recipe_and_one_data_set_can_be_kept(tmp_path: Path) -> None:
    result = train(resolve_recipe(RECIPE), tmp_path / "run")
    assert result.steps == 4 * 3
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["loss"] == pytest.approx(line["loss/plain"] + line["loss/inverted"], rel=1e-5)
    assert lines[-1]["loss"] < lines[0]["loss"]
    loaded = load_encoder(tmp_path / "run")
    encoder = loaded.module
    assert isinstance(encoder, FCN) and encoder.label_spaces == {"plain": 11, "inverted": 6}
    layers = [module for module in encoder.modules() if isinstance(module, DatasetBatchNorm2d)]
    assert len(layers) == 2
    for layer in layers:
        assert [int(norm.num_batches_tracked) for norm in layer.bns] == [12, 12]
        assert not torch.equal(layer.bns[0].running_mean, layer.bns[1].running_mean)

    export_dataset(tmp_path / "run", "inverted", tmp_path / "inverted")
    kept = load_encoder(tmp_path / "inverted")
    image = torch.randn(2, 3, 16, 16)
    assert isinstance(kept.module, FCN)
    assert torch.equal(kept.module.logits(image, "inverted"), encoder.logits(image, "inverted"))
    assert not any(isinstance(module, DatasetBatchNorm2d) for module in kept.module.modules())
    assert kept.spec.classes[0] == "inverted/background" and len(kept.spec.classes) == 6
    config = MIoUConfig(dataset="domain:canvases", split="test", settings={"count": 8, "only": "inverted"})
    alone = MIoU.build(config).run(Evaluation(kept)).summary
    assert alone["inverted/mIoU"] == pytest.approx(result.metrics["domain:miou/inverted/mIoU"])
    assert kept.encode([Image.new("RGB", (16, 16))]).shape == (1, 6)


@pytest.mark.parametrize("only", [None, "plain"])
def test_naive_joint_training_and_training_on_one_set_are_recipes_too(tmp_path: Path, only: str | None) -> None:
    values = {**RECIPE, "objective": {"use": "domain:segmentation"}}
    if only:
        values["dataset"] = {**values["dataset"], "only": only}
        values["evaluate"] = [{**values["evaluate"][0], "settings": {"count": 8, "only": only}}]
    result = train(resolve_recipe(values), tmp_path / "run")
    encoder = load_encoder(tmp_path / "run").module
    assert isinstance(encoder, FCN) and encoder.statistics == "shared"
    assert list(encoder.label_spaces) == ([only] if only else ["plain", "inverted"])
    assert "domain:miou/plain/mIoU" in result.metrics
    state = load_checkpoint(latest_checkpoint(tmp_path / "run/checkpoints")).objective  # type: ignore[arg-type]
    assert int(state["encoder.network.1.num_batches_tracked"]) == 12 * len(encoder.label_spaces)


def test_the_recipes_of_the_repository_are_sound() -> None:
    recipes = Path(__file__).parents[3] / "recipes"
    for name in ("digits-cdcl", "paper/cdcl"):
        recipe = load_recipe(recipes / f"{name}.toml")
        assert recipe.train.alternate and recipe.train.schedule == "poly"
