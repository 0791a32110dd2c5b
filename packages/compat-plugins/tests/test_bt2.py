"""``compat:bt2``: golden numbers, what must hold for any numbers, and a real run."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn
from torch.testing import assert_close

from bowerbird.batch import Batch
from bowerbird.data.images import Preprocessing
from bowerbird.encoders import load_encoder
from bowerbird.errors import InputError, RecipeError
from bowerbird.hookspecs import hookimpl
from bowerbird.protocols import BuildContext, Dataset, Encoder, Features, TrainedRun
from bowerbird.recipe import load_recipe
from bowerbird.records import DatasetRecord, EncoderRecord
from bowerbird.registry import get_registry
from bowerbird.testing import EncoderContract, ObjectiveContract, SimpleBuildContext, TinyEncoder
from bowerbird.train.loop import train
from bowerbird_compat.bt2 import BasisTransformHead, BT2Loss, BT2Output, FeatureCache, compare
from bowerbird_compat.bt2_objective import BasisTransformConfig, BasisTransformEncoder, BT2Config, BT2Objective

TIGHT = {"rtol": 1e-9, "atol": 1e-10}
SEEDS = st.integers(0, 2**31 - 1)
invariant = settings(max_examples=25, deadline=None)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_head(new: int, old: int, added: int, *, scale: float = 2.0, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.float64)  # not .double() afterwards: the matrices would be orthogonal to float32 only
    try:
        return BasisTransformHead(new + old, new, old, added, scale, **options)
    finally:
        torch.set_default_dtype(torch.float32)


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int, int]:
    """``(d, d_old, k)`` that fit together, k above 0."""
    new, added = draw(st.integers(1, 8)), draw(st.integers(1, 5))
    return new, draw(st.integers(added, new + added)), added


# --------------------------------------------------------------------------------------------------- golden numbers


@pytest.mark.parametrize("case", ["head_and_loss", "head_and_loss_rect"])
def test_head_loss_and_gradients_are_those_of_the_authors_code(golden, case):
    g = golden(f"bt2/{case}")
    new, old, added = (int(g[k]) for k in ("d_new", "d_old", "to_add"))
    head = make_head(new, old, added, scale=float(g["C"]), num_classes=len(g["fc_out_weight"]))
    with torch.no_grad():
        head.free.weight.copy_(g["fc3_weight"])
        head.free.bias.copy_(g["fc3_bias"])
        head.classifier.weight.copy_(g["fc_out_weight"])
    head.new_basis.weight, head.old_basis.weight = g["Q_new"], g["Q_old"]
    h = g["backbone_out"].requires_grad_()
    out = head(h)
    loss = BT2Loss(g["prototypes"], float(g["lambda_1"]), float(g["lambda_2"]), float(g["lambda_3"]))
    terms = loss(out, g["labels"], g["phi_old"], g["phi_new_target"])
    terms["total"].backward()

    for ours, name in ((out.logits, "logits"), (out.backward, "bct_feature"), (out.teacher, "feature")):
        assert_close(ours, g[name], **TIGHT)
    assert_close(out.embedding, g["new_feature"], **TIGHT)
    for ours, name in (("cls", "cls"), ("influence", "influence"), ("old", "cos_old"), ("teacher", "cos_new")):
        assert_close(terms[ours], g[f"loss_{name}"], **TIGHT)
    assert_close(terms["total"], g["loss_total"], **TIGHT)
    assert_close(h.grad, g["grad_backbone_out"], **TIGHT)
    assert_close(head.free.weight.grad, g["grad_fc3_weight"], **TIGHT)
    assert_close(head.free.bias.grad, g["grad_fc3_bias"], **TIGHT)
    assert_close(head.classifier.weight.grad, g["grad_fc_out_weight"], **TIGHT)
    assert_close(head.export()(h.detach()), g["new_feature"], **TIGHT)


@pytest.mark.parametrize("case", ["cross_distance", "cross_distance_rect"])
def test_distances_are_those_of_the_authors_code(golden, case):
    g = golden(f"bt2/{case}")
    assert_close(compare(g["query"], g["gallery_old"], gallery_version="old"), g["distance_new_old"], **TIGHT)
    assert_close(compare(g["query"], g["gallery_new"], gallery_version="new"), g["distance_new_new"], **TIGHT)


# ------------------------------------------------------------------------------------------------------- the head


@invariant
@given(sizes(), SEEDS, st.floats(0.1, 5), st.booleans())
def test_all_vectors_have_the_same_norm_and_old_entries_first(dims, seed, scale, rectify):
    new, old, added = dims
    head = make_head(new, old, added, scale=scale, seed=seed, rectify=rectify)
    out = head(random(4, new + old, seed=seed))
    assert out.embedding.shape == (4, new + added)
    assert torch.equal(out.backward, out.embedding[:, :old])
    assert out.backward.shape == (4, old)
    assert_close(out.embedding.square().sum(1), torch.full((4,), 1 + scale**2, dtype=torch.float64))


@invariant
@given(sizes(), SEEDS)
def test_inner_products_of_new_vectors_do_not_depend_on_the_orthogonal_matrices(dims, seed):
    new, old, added = dims
    head = make_head(new, old, added, seed=seed)
    h = random(5, new + old, seed=seed)
    before, out = head(h).embedding, head(h)
    for basis in (head.new_basis, head.old_basis):
        size = len(basis.weight)
        basis.weight = torch.linalg.qr(random(size, size, seed=seed + 1)).Q
    after = head(h).embedding
    assert_close(after @ after.T, before @ before.T)
    free = F.normalize(F.normalize(head.free(h.relu()))[:, :added])
    assert_close(before @ before.T, free @ free.T + 4 * out.teacher @ out.teacher.T)


@invariant
@given(sizes(), SEEDS)
def test_no_information_is_lost(dims, seed):
    new, old, added = dims
    head = make_head(new, old, added, seed=seed)
    h = random(5, new + old, seed=seed)
    out = head(h)
    mixed = torch.cat([out.backward @ head.old_basis.weight, out.embedding[:, old:]], dim=1)
    assert_close(mixed[:, added:] @ head.new_basis.weight / head.scale, F.normalize(h[:, :new]))
    assert_close(mixed[:, :added], F.normalize(head.free(h.relu())[:, :added]))


@invariant
@given(sizes(), SEEDS, st.booleans())
def test_the_folded_head_gives_the_same_vectors(dims, seed, rectify):
    new, old, added = dims
    head = make_head(new, old, added, seed=seed, rectify=rectify)
    h, folded = random(5, new + old, seed=seed), head.export()
    assert_close(folded(h), head(h).embedding)
    assert not any(p.requires_grad for p in folded.parameters())
    assert sum(p.numel() for p in folded.parameters()) == added * (new + old + 1)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("orthogonal_map", ["matrix_exp", "cayley", "householder"])
def test_the_matrices_stay_orthogonal_under_training(orthogonal_map, weight_decay):
    torch.manual_seed(0)
    head = BasisTransformHead(40, 24, 16, 8, orthogonal_map=orthogonal_map, num_classes=5)
    start = head.old_basis.weight.detach().clone()
    loss = BT2Loss(F.normalize(torch.randn(5, 16)))
    optimiser = torch.optim.AdamW(head.parameters(), lr=0.05, weight_decay=weight_decay)
    h, old, teacher = torch.randn(30, 40), torch.randn(30, 16), torch.randn(30, 24)
    for _ in range(50):
        optimiser.zero_grad()
        loss(head(h), torch.arange(30) % 5, old, teacher)["total"].backward()
        optimiser.step()
    for basis in (head.new_basis, head.old_basis):
        q = basis.weight
        assert_close(q @ q.T, torch.eye(len(q)), rtol=0, atol=3e-6)
    assert not torch.allclose(start, head.old_basis.weight, atol=0.1)
    assert_close(head(h).embedding.square().sum(1), torch.full((30,), 5.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("orthogonal_map", ["matrix_exp", "cayley", "householder"])
def test_matrices_can_be_assigned_saved_and_loaded_whatever_parametrises_them(orthogonal_map):
    torch.manual_seed(0)
    first, second = (BasisTransformHead(9, 5, 4, 2, orthogonal_map=orthogonal_map) for _ in range(2))
    turn = torch.linalg.qr(torch.randn(5, 5)).Q
    for matrix in (turn, turn * torch.tensor([-1.0, 1, 1, 1, 1])):
        first.new_basis.weight = matrix
        assert_close(first.new_basis.weight, matrix, rtol=0, atol=1e-6)
    second.load_state_dict(first.state_dict())
    h = torch.randn(3, 9)
    assert torch.equal(second(h).embedding, first(h).embedding)
    with pytest.raises(InputError, match="orthogonal_map is 'qr'; accepted: matrix_exp"):
        BasisTransformHead(9, 5, 4, 2, orthogonal_map="qr")


def test_half_precision_training_leaves_the_norm_exact():
    torch.manual_seed(0)
    head = BasisTransformHead(40, 24, 16, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = head(torch.randn(6, 40).bfloat16())
    assert out.embedding.dtype == torch.float32
    assert_close(out.embedding.square().sum(1), torch.full((6,), 5.0))


def test_without_added_entries_and_turns_it_is_bct_with_regression_to_a_teacher():
    head = make_head(6, 6, 0, scale=3.0)
    head.new_basis.weight = head.old_basis.weight = torch.eye(6, dtype=torch.float64)
    h, labels = random(8, 12), torch.arange(8) % 4
    out = head(h)
    unit = F.normalize(h[:, :6])
    assert_close(out.backward, 3 * unit)
    assert_close(out.embedding, 3 * unit)
    prototypes, old, teacher = random(4, 6, seed=1), random(8, 6, seed=2), random(8, 6, seed=3)
    total = BT2Loss(prototypes, 1, 10, 0)(out, labels, old, teacher)["total"]
    regression = (1 - (unit * F.normalize(teacher)).sum(1)).mean()
    assert_close(total, 10 * F.cross_entropy(unit @ prototypes.T, labels) + regression)
    assert head.free is None


def test_with_as_many_added_as_old_entries_the_two_spaces_decouple():
    head = make_head(7, 4, 4, scale=2.0)
    h = random(5, 11)
    out = head(h)
    assert_close(out.embedding[:, 4:], 2 * F.normalize(h[:, :7]) @ head.new_basis.weight.T)
    other = h.clone()
    other[:, :7] = other[:, :7] + random(5, 7, seed=1)
    with torch.no_grad():
        head.free.weight[:, :7] = 0  # the free part sees only the other entries of the trunk
    assert_close(head(other).backward, head(h).backward)


def test_with_a_constant_free_part_new_vectors_rank_as_the_teacher_does():
    head = make_head(6, 5, 3)
    with torch.no_grad():
        head.free.weight.zero_()
        head.free.bias.fill_(1.0)
    h = random(20, 11)
    teacher = F.normalize(h[:, :6])  # the teacher is met exactly
    out = head(h)
    assert_close(BT2Loss(random(2, 5))(out, torch.zeros(20).long(), out.backward, teacher)["teacher"] + 1, one())
    ranks = compare(out.embedding, out.embedding, gallery_version="new").argsort(dim=1)
    assert torch.equal(ranks, (1 - teacher @ teacher.T).argsort(dim=1))


def one() -> Tensor:
    return torch.ones((), dtype=torch.float64)


@invariant
@given(sizes(), SEEDS)
def test_the_terms_that_face_the_old_space_see_only_the_direction(dims, seed):
    new, old, added = dims
    out = make_head(new, old, added, seed=seed)(random(4, new + old, seed=seed))
    backward = out.backward.detach().requires_grad_()
    loss, labels = BT2Loss(random(3, old, seed=seed)), torch.tensor([0, 1, 2, 0])
    target = random(4, old, seed=seed + 1)
    terms = loss(BT2Output(None, backward, out.teacher, out.embedding), labels, target, random(4, new))
    for name in ("old", "influence"):
        (gradient,) = torch.autograd.grad(terms[name], backward, retain_graph=True)
        assert_close((gradient * backward).sum(1), torch.zeros(4, dtype=torch.float64))
    scaled = loss(BT2Output(None, 7 * backward, out.teacher, out.embedding), labels, target, random(4, new))
    assert_close((scaled["old"], scaled["influence"]), (terms["old"], terms["influence"]))
    gallery = F.normalize(random(9, old, seed=seed + 2))
    distances = [compare(f * backward.detach(), gallery, gallery_version="old") for f in (1, 7)]
    assert torch.equal(distances[0].argsort(dim=1), distances[1].argsort(dim=1))


def test_no_gradient_reaches_old_vectors_teacher_and_prototypes():
    head, prototypes = make_head(6, 5, 2), random(3, 5).requires_grad_()
    old, teacher = random(4, 5).requires_grad_(), random(4, 6).requires_grad_()
    loss = BT2Loss(prototypes)
    loss(head(random(4, 11)), torch.tensor([0, 1, 2, 0]), old, teacher)["total"].backward()
    assert all(t.grad is None for t in (prototypes, old, teacher))
    assert not list(loss.parameters())


def test_smoothing_and_scale_are_those_of_cross_entropy():
    head = make_head(6, 5, 2, num_classes=3)
    out, labels, prototypes = head(random(4, 11)), torch.tensor([0, 1, 2, 0]), random(3, 5)
    terms = BT2Loss(prototypes, influence_scale=16, label_smoothing=0.1)(out, labels, random(4, 5), random(4, 6))
    unit = F.normalize(out.backward)
    assert_close(terms["influence"], F.cross_entropy(16 * unit @ prototypes.T, labels, label_smoothing=0.1))
    assert_close(terms["cls"], F.cross_entropy(out.logits, labels, label_smoothing=0.1))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((12, 8, 4, 5), "added_dim is 5.*old_dim is 4"),
        ((12, 8, 4, -1), "added_dim is -1"),
        ((30, 8, 11, 2), "old_dim is 11, more than new_dim"),
        ((7, 8, 4, 2), "in_dim is 7"),
        ((12, 0, 4, 2), "at least 1"),
        ((12, 8, 4, 2, 0.0), "scale is 0"),
        ((12, 8, 4, 2, 2.0, 0), "num_classes is 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(args, message):
    with pytest.raises(InputError, match=message):
        BasisTransformHead(*args)


def test_vectors_that_do_not_fit_are_refused():
    head, labels = make_head(6, 5, 2), torch.zeros(4).long()
    out, loss = head(random(4, 11)), BT2Loss(random(2, 5))
    with pytest.raises(InputError, match=r"teacher vectors.*new_dim"):
        loss(out, labels, random(4, 5), random(4, 7))
    with pytest.raises(InputError, match=r"old vectors.*old_dim"):
        loss(out, labels, random(3, 5), random(4, 6))
    with pytest.raises(InputError, match=r"\(batch, 11\)"):
        head(random(4, 10))
    with pytest.raises(InputError, match=r"\(batch, 11\)"):
        head.export()(random(4, 10))
    with pytest.raises(InputError, match="old_weight is -1"):
        BT2Loss(random(2, 5), old_weight=-1)
    with pytest.raises(InputError, match="if it is old"):
        compare(random(2, 8), random(2, 5), gallery_version="new")
    with pytest.raises(InputError, match="has more: 9"):
        compare(random(2, 8), random(2, 9), gallery_version="old")
    with pytest.raises(InputError, match="accepted: old, new"):
        compare(random(2, 8), random(2, 8), gallery_version="v1")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ the cache


def test_the_cache_gives_unit_vectors_by_id_in_the_asked_order():
    layer = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)).train()
    x = torch.randn(5, 3)
    batches = [{"x": x[:3], "item_id": ["a", "b", "c"]}, {"x": x[3:], "item_id": ["d", "e"]}]
    cache = FeatureCache.build(lambda batch: layer.eval()(batch["x"]), batches)
    assert_close(cache.get(["e", "a"]), F.normalize(layer[0](x[[4, 0]])).detach())
    assert len(cache) == 5
    assert not cache.vectors.requires_grad
    raw = FeatureCache.build(lambda batch: layer.eval()(batch["x"]), batches, normalize=False)
    assert_close(raw.get(["b"]), layer[0](x[1:2]).detach())
    by_index = FeatureCache(x, [10, 11, 12, 13, 14])
    assert torch.equal(by_index.get(torch.tensor([14, 10])), x[[4, 0]])


def test_the_cache_says_what_is_missing():
    cache = FeatureCache(torch.eye(2), ["a", "b"])
    with pytest.raises(KeyError, match="nobody"):
        cache.get(["a", "nobody"])
    with pytest.raises(InputError, match="different"):
        FeatureCache(torch.eye(2), ["a", "a"])
    with pytest.raises(InputError, match="no batch"):
        FeatureCache.build(lambda batch: batch, [])
    with pytest.raises(InputError, match="no 'item_id'"):
        FeatureCache.build(lambda batch: batch["x"], [{"x": torch.eye(2)}])
    with pytest.raises(InputError, match="not finite"):
        FeatureCache.build(lambda batch: batch["x"], [{"x": torch.full((1, 2), torch.nan), "item_id": ["a"]}])


# ------------------------------------------------------------------------------------- encoder, objective, real run


class PatchEncoder(Encoder):
    """8 x 8 pixels through one layer."""

    preprocessing = Preprocessing(size=8, interpolation="bilinear")

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(192, embed_dim))

    @classmethod
    def build(cls, config: None) -> Self:
        return cls(8)

    def forward(self, batch: Batch) -> Features:
        return Features(pooled=self.layers(batch["image"]))


class Patterns(Dataset):
    """Four noisy patterns, 12 pictures of each; the split ``old`` has two of them."""

    def __init__(self, classes: int) -> None:
        self.classes = tuple("abcd"[:classes])
        rng = np.random.default_rng(7)
        patterns = rng.uniform(90, 160, (4, 8, 8, 3))
        self._labels = [i % classes for i in range(12 * classes)]
        chosen = patterns[self._labels]
        self._pixels = np.clip(chosen + rng.normal(0, 30, chosen.shape), 0, 255).astype(np.uint8)

    @classmethod
    def build(cls, config: Any, split: str | None) -> Self:
        return cls(2 if split == "old" else 4)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": Image.fromarray(self._pixels[index]), "label": self._labels[index], "item_id": str(index)}

    @property
    def item_ids(self) -> Sequence[str]:
        return [str(i) for i in range(len(self))]

    def labels(self) -> Sequence[int]:
        return self._labels


@hookimpl
def bowerbird_encoders() -> Iterator[EncoderRecord]:
    yield EncoderRecord(name="tiny:patch", target="tiny:PatchEncoder", summary="Small.")


@hookimpl
def bowerbird_datasets() -> Iterator[DatasetRecord]:
    yield DatasetRecord(
        name="tiny:patterns", target="tiny:Patterns", summary="Patterns.",
        provides=("image", "label", "item_id"), splits=("old", "new"),
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    module = types.ModuleType("tiny")
    vars(module).update({"BOWERBIRD_API": "1.0", "PatchEncoder": PatchEncoder, "Patterns": Patterns})
    vars(module).update({"bowerbird_encoders": bowerbird_encoders, "bowerbird_datasets": bowerbird_datasets})
    sys.modules["tiny"] = module
    get_registry().register_module("tiny", module)
    yield
    get_registry().unregister("tiny")
    del sys.modules["tiny"]


class TestEncoderContract(EncoderContract):
    name = "compat:basis-transform"
    config = {"base": {"use": "tiny:patch"}, "new_dim": 5, "old_dim": 6, "added_dim": 2}


class TestObjectiveContract(ObjectiveContract):
    name = "compat:bt2"
    config = {"old_run": "old", "teacher_run": "teacher", "measure": False}

    def make_encoder(self) -> Encoder:
        config = BasisTransformConfig(base={"use": "tiny:patch"}, new_dim=6, old_dim=5, added_dim=2, last_relu=False)
        return BasisTransformEncoder(PatchEncoder(8), config)

    def make_context(self) -> BuildContext:
        torch.manual_seed(1)
        runs = {
            name: TrainedRun(path=Path(name), encoder=TinyEncoder(dim), objective_state={}, classes=(), recipe={})
            for name, dim in (("old", 5), ("teacher", 6))
        }
        classes = [f"class-{i}" for i in range(self.num_classes)]
        return SimpleBuildContext(classes=classes, runs=runs, batches=[self.make_batch(seed=9)])


def run(folder: Path, name: str, *, encoder: str, objective: str, split: str = "new") -> Path:
    recipe = folder / f"{name}.toml"
    recipe.write_text(
        f'name = "{name}"\n[encoder]\n{encoder}\n[dataset]\nuse = "tiny:patterns"\nsplit = "{split}"\n'
        f"[objective]\n{objective}\n"
        '[train]\nepochs = 15\nbatch_size = 16\nlr = 0.01\nweight_decay = 0.1\nseed = 0\ndevice = "cpu"\n'
    )
    assert train(load_recipe(recipe), folder / name).finished
    return folder / name


def test_a_run_searches_the_old_gallery_and_its_export_says_so(tmp_path):
    old = run(tmp_path, "old", encoder='use = "tiny:patch"', objective='use = "core:softmax"', split="old")
    teacher = run(tmp_path, "teacher", encoder='use = "tiny:patch"', objective='use = "core:softmax"')
    made = run(
        tmp_path,
        "bt2",
        encoder='use = "compat:basis-transform"\nnew_dim = 8\nold_dim = 8\nadded_dim = 3\nlast_relu = false\n'
        'base = {use = "tiny:patch"}',
        objective=f'use = "compat:bt2"\nold_run = "{old}"\nteacher_run = "{teacher}"',
    )
    new, before = load_encoder(made, device="cpu"), load_encoder(old, device="cpu")
    assert new.dim == 11
    data = Patterns(4)
    images = [data[i]["image"] for i in range(len(data))]
    o, n = before.encode(images), F.normalize(torch.from_numpy(new.encode(images))[:, :8]).numpy()
    assert (n * o).sum(1).mean() > 0.8, "new vectors begin with what the old encoder gives"
    (relation,) = new.spec.relations
    assert (relation["kind"], relation["to"]) == ("compatible", before.fingerprint)
    assert relation["evidence"]["method"] == "compat:bt2"
    assert relation["evidence"]["items"] == len(data)
    scale = new.module.head.scale
    norms = new.module({"image": torch.randn(3, 3, 8, 8)}).pooled.square().sum(1)
    assert_close(norms, torch.full((3,), 1 + scale**2))


def test_orthogonal_matrices_get_no_weight_decay():
    objective = TestObjectiveContract().build()
    assert isinstance(objective, BT2Objective)
    decayed = {id(p) for g in objective.parameter_groups() if g.get("weight_decay") != 0 for p in g["params"]}
    names = {n for n, p in objective.named_parameters() if id(p) in decayed}
    assert "new_classifier.weight" in names
    assert not [n for n in names if "basis" in n]


def test_a_relu_on_the_trunk_is_the_default_and_a_teacher_that_it_cannot_meet_is_named():
    assert BasisTransformConfig(base={"use": "x:y"}, new_dim=4, old_dim=4, added_dim=1).last_relu
    contract = TestObjectiveContract()
    encoder = contract.make_encoder()
    encoder.last_relu = True
    with pytest.warns(UserWarning, match=r"teacher teacher have negative entries.*encoder\.last_relu = false"):
        BT2Objective.build(BT2Config(**contract.config), encoder, contract.make_context())


def test_what_cannot_be_trained_is_refused_with_the_way_out():
    contract = TestObjectiveContract()
    config = BT2Config(**contract.config)
    with pytest.raises(RecipeError, match='use = "compat:basis-transform"'):
        BT2Objective.build(config, TinyEncoder(), contract.make_context())
    swapped = BT2Config(old_run="teacher", teacher_run="old")
    with pytest.raises(RecipeError, match=r"set encoder\.old_dim = 6"):
        BT2Objective.build(swapped, contract.make_encoder(), contract.make_context())
    with pytest.raises(RecipeError, match="no classes"):
        BT2Objective.build(config, contract.make_encoder(), SimpleBuildContext(classes=()))
    with pytest.raises(ValidationError, match="teacher_run or teacher_encoder"):
        BT2Config(old_run="old")
    with pytest.raises(ValidationError, match="base needs use"):
        BasisTransformConfig(base={}, new_dim=4, old_dim=4, added_dim=1)
    with pytest.raises(ValidationError, match="added_dim is 9"):
        BasisTransformConfig(base={"use": "x:y"}, new_dim=4, old_dim=4, added_dim=9)
