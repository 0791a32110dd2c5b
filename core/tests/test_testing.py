"""``bowerbird.testing``: the contracts hold for core's own methods and catch those that break them."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from bowerbird.errors import DataError, UnknownNameError  # noqa: E402
from bowerbird.hookspecs import hookimpl  # noqa: E402
from bowerbird.protocols import Dataset, Features, LossOutput, Objective  # noqa: E402
from bowerbird.records import DatasetRecord, EncoderRecord, ObjectiveRecord, RetrieverRecord  # noqa: E402
from bowerbird.registry import get_registry  # noqa: E402
from bowerbird.testing import (  # noqa: E402
    DatasetContract,
    EncoderContract,
    IndexContract,
    MergerContract,
    ObjectiveContract,
    OrderContract,
    PluginTester,
    SyntheticDataset,
    TinyEncoder,
    UpgradeContract,
    assert_close,
    load_golden,
    override_contract_test,
    run_two_ranks,
)

# ------------------------------------------------------------------------------ core's own methods keep them


class TestExactIndex(IndexContract):
    name = "core:exact"


class TestRandomOrder(OrderContract):
    name = "core:random"


class TestUncertaintyOrder(OrderContract):
    name = "core:uncertainty"


class TestClassDistanceOrder(OrderContract):
    name = "core:class-distance"


class TestDistanceMerger(MergerContract):
    name = "core:distance"


class TestZScoreMerger(MergerContract):
    name = "core:zscore"


class TestProportionalMerger(MergerContract):
    name = "core:proportional"


class TestCompatible(UpgradeContract):
    name = "core:compatible"


class TestSoftmax(ObjectiveContract):
    name = "core:softmax"


# -------------------------------------------------------------------- a plugin that breaks them where we say


class LibEncoder(TinyEncoder):
    """Right, unless ``fault`` names what is wrong with it."""

    fault = ""

    @classmethod
    def build(cls, config: Any) -> Any:
        encoder = cls()
        if cls.fault == "unused parameter":
            encoder.unused = nn.Parameter(torch.zeros(3))
        if cls.fault == "numpy seed":
            encoder.head.weight.data += float(np.random.default_rng().random())
        if cls.fault == "hidden state":
            encoder.hidden = torch.rand(()).item()
        return encoder

    def forward(self, batch: Any) -> Features:
        if self.fault != "accepts anything" and batch["image"].ndim != 4:
            raise ValueError("image must be (B, 3, H, W)")
        image = (
            batch["image"] if self.fault != "accepts anything" else batch.get("image", torch.zeros(4, 3, 8, 8))[:, :3]
        )
        if self.fault == "in place":
            image.mul_(2)
        features = super().forward({"image": image})
        if self.fault == "batch statistics":
            return Features(pooled=features.pooled - features.pooled.mean(dim=0), tokens=features.tokens)
        if self.fault == "hidden state":
            return Features(pooled=features.pooled * self.hidden, tokens=features.tokens)
        if self.fault == "wrong width":
            return Features(pooled=features.pooled[:, 1:], tokens=features.tokens)
        if self.fault == "no tokens":
            return Features(pooled=features.pooled)
        return features


class LibObjective(Objective):
    fault = ""

    def __init__(self, encoder: Any, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.embed_dim, classes)
        self.teacher = nn.Linear(encoder.embed_dim, classes).requires_grad_(self.fault == "trained teacher")
        self.steps = 0
        self.register_buffer("mean", torch.zeros(()), persistent=self.fault != "lost buffer")

    @classmethod
    def build(cls, config: Any, encoder: Any, context: Any) -> Any:
        return cls(encoder, len(context.classes))

    def parameter_groups(self) -> Any:
        groups = super().parameter_groups()
        if self.fault == "forgotten group":
            return [{"params": list(self.head.parameters())}]
        if self.fault == "frozen in group":
            return [*groups, {"params": list(self.teacher.parameters())}]
        return groups

    def forward(self, batch: Any) -> LossOutput:
        logits = self.head(self.encoder(batch).pooled) + self.mean
        reduction = "sum" if self.fault == "sum" else "mean"
        loss = nn.functional.cross_entropy(logits, batch["label"], reduction=reduction)
        if self.fault == "wrong sign":
            loss = -loss
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.1 * logits.mean())
        if self.fault == "vector":
            return LossOutput(total=loss[None])
        if self.fault == "global randomness":
            loss = loss * (1 + float(np.random.default_rng().random()))
        return LossOutput(total=loss, parts={"ce": loss.detach()}, stats={"n": len(logits)})


class LibAdditive(LibObjective):
    def forward(self, batch: Any) -> LossOutput:
        reduction = "sum" if self.fault == "sum" else "mean"
        logits = self.head(self.encoder(batch).pooled)
        return LossOutput(total=nn.functional.cross_entropy(logits, batch["label"], reduction=reduction))


class LibDataset(SyntheticDataset):
    fault = ""

    @classmethod
    def build(cls, config: Any, split: str | None) -> Any:
        if split not in ("train", "test") and cls.fault != "any split":
            raise UnknownNameError(f"no split {split!r}")
        return cls(num_items=9, seed=0 if split == "train" or cls.fault == "leak" else 1)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        if self.fault == "grey":
            item["image"] = item["image"].convert("L")
        if self.fault == "augmented":
            item["image"] = item["image"].rotate(float(np.random.default_rng().uniform(0, 360)))
        if self.fault == "wrong id":
            item["item_id"] = self.item_ids[0]
        if self.fault == "wrong label":
            item["label"] = (item["label"] + 1) % 3
        return item

    @property
    def item_ids(self) -> Any:
        ids = list(super().item_ids)
        return [ids[0]] * len(ids) if self.fault == "same ids" else ids

    def domain_indices(self) -> Any:
        return [(index + (self.fault == "wrong domain")) % 2 for index in range(len(self))]


@pytest.fixture(autouse=True, scope="module")
def lib() -> Iterator[None]:
    """Registers the classes above as the methods of a plugin ``lib``."""
    library: Any = types.ModuleType("lib_of_test_testing")
    for item in (LibEncoder, LibObjective, LibAdditive, LibDataset):
        setattr(library, item.__name__, item)
    sys.modules[library.__name__] = library
    module: Any = types.ModuleType("lib_plugin")
    module.BOWERBIRD_API = "1.0"
    at = f"{library.__name__}:"

    @hookimpl
    def bowerbird_encoders() -> Any:
        yield EncoderRecord(name="lib:tiny", target=at + "LibEncoder", summary="A.", outputs=("pooled", "tokens"))

    @hookimpl
    def bowerbird_objectives() -> Any:
        needs = ("image", "label")
        yield ObjectiveRecord(name="lib:ce", target=at + "LibObjective", summary="B.", needs=needs)
        yield ObjectiveRecord(name="lib:add", target=at + "LibAdditive", summary="C.", needs=needs, batch_additive=True)

    @hookimpl
    def bowerbird_datasets() -> Any:
        provides = ("image", "label", "item_id", "domain")
        yield DatasetRecord(
            name="lib:data", target=at + "LibDataset", summary="D.", provides=provides, splits=("train", "test")
        )

    module.bowerbird_encoders = bowerbird_encoders
    module.bowerbird_objectives = bowerbird_objectives
    module.bowerbird_datasets = bowerbird_datasets
    get_registry().register_module("lib", module)
    yield
    get_registry().unregister("lib")
    del sys.modules[library.__name__]


class TestLibEncoder(EncoderContract):
    name = "lib:tiny"
    image_size = 8


class TestLibObjective(ObjectiveContract):
    name = "lib:ce"
    removed = {"test_gradients_reach_every_trainable_parameter_and_no_frozen_one": "checked with TestLibAdditive"}
    test_gradients_reach_every_trainable_parameter_and_no_frozen_one = None


class TestLibDataset(DatasetContract):
    name = "lib:data"
    disjoint = (("train", "test"),)


@pytest.mark.parametrize(
    ("fault", "test"),
    [
        ("unused parameter", "test_gradients_reach_every_trainable_parameter_and_no_frozen_one"),
        ("numpy seed", "test_the_same_seed_builds_the_same_encoder"),
        ("hidden state", "test_a_saved_state_gives_bit_equal_embeddings"),
        ("in place", "test_the_batch_is_left_as_it_was"),
        ("batch statistics", "test_an_embedding_does_not_depend_on_the_rest_of_the_batch"),
        ("wrong width", "test_it_is_an_encoder_with_the_outputs_of_its_record"),
        ("no tokens", "test_it_is_an_encoder_with_the_outputs_of_its_record"),
        ("accepts anything", "test_wrong_batches_are_refused"),
    ],
)
def test_a_faulty_encoder_is_caught(fault: str, test: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LibEncoder, "fault", fault)
    with pytest.raises(AssertionError):
        getattr(TestLibEncoder(), test)()


@pytest.mark.parametrize(
    ("fault", "test"),
    [
        ("trained teacher", "test_gradients_reach_every_trainable_parameter_and_no_frozen_one"),
        ("forgotten group", "test_parameter_groups_hold_every_trainable_parameter_once_and_nothing_frozen"),
        ("frozen in group", "test_parameter_groups_hold_every_trainable_parameter_once_and_nothing_frozen"),
        ("global randomness", "test_the_same_seed_gives_the_same_losses"),
        ("lost buffer", "test_a_resumed_run_is_bit_equal_to_an_undisturbed_one"),
        ("wrong sign", "test_training_on_one_batch_lowers_the_loss"),
        ("vector", "test_the_loss_is_a_finite_scalar_with_named_parts"),
    ],
)
def test_a_faulty_objective_is_caught(fault: str, test: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Same(ObjectiveContract):
        name = "lib:ce"

    monkeypatch.setattr(LibObjective, "fault", fault)
    if fault == "wrong sign":  # the loss falls, towards minus infinity: what is learnt is wrong, and accuracy shows it
        monkeypatch.setattr(
            LibObjective, "parameter_groups", lambda self: [{"params": self.parameters(), "maximize": True}]
        )
    with pytest.raises(AssertionError):
        getattr(Same(), test)()


def test_a_loss_that_is_a_sum_is_not_batch_additive(monkeypatch: pytest.MonkeyPatch) -> None:
    class Additive(ObjectiveContract):
        name = "lib:add"

    Additive().test_a_joined_batch_gives_the_mean_of_its_halves_where_the_record_says_so()
    monkeypatch.setattr(LibObjective, "fault", "sum")
    with pytest.raises(AssertionError):
        Additive().test_a_joined_batch_gives_the_mean_of_its_halves_where_the_record_says_so()


@pytest.mark.parametrize(
    ("fault", "test"),
    [
        ("grey", "test_items_have_the_keys_and_types_of_the_record"),
        ("wrong id", "test_items_have_the_keys_and_types_of_the_record"),
        ("augmented", "test_an_item_is_the_same_whenever_it_is_read"),
        ("wrong label", "test_labels_agree_with_the_items"),
        ("wrong domain", "test_domains_agree_with_the_items"),
        ("same ids", "test_item_ids_are_unique_text_and_the_same_in_every_build"),
        ("any split", "test_a_split_that_does_not_exist_is_refused_by_name"),
        ("leak", "test_disjoint_splits_share_no_item"),
    ],
)
def test_a_faulty_data_set_is_caught(fault: str, test: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LibDataset, "fault", fault)
    with pytest.raises(AssertionError):
        getattr(TestLibDataset(), test)()


# ------------------------------------------------------------------------------------ overriding needs a reason


def test_replacing_or_removing_a_contract_test_without_a_reason_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"test_wrong_batches_are_refused replaces a test .* without a reason"):

        class Replaced(EncoderContract):
            def test_wrong_batches_are_refused(self) -> None: ...

    with pytest.raises(TypeError, match="without a reason"):

        class Removed(EncoderContract):
            test_wrong_batches_are_refused = None  # type: ignore[assignment]

    with pytest.raises(TypeError, match="without a reason"):

        class Grandchild(TestLibEncoder):
            def test_settings_survive_a_round_trip(self) -> None: ...


def test_an_override_with_a_reason_is_accepted_and_an_empty_reason_is_not() -> None:
    class Replaced(EncoderContract):
        @override_contract_test(reason="It takes images of any number of channels.")
        def test_wrong_batches_are_refused(self) -> None: ...

    with pytest.raises(TypeError, match="needs a reason"):
        override_contract_test(reason=" ")


def test_an_override_that_overrides_nothing_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(TypeError, match="Did you mean 'test_wrong_batches_are_refused'"):

        class Typo(EncoderContract):
            @override_contract_test(reason="because")
            def test_wrong_batch_is_refused(self) -> None: ...

    with pytest.raises(TypeError, match="is not set to None"):

        class StillThere(EncoderContract):
            removed = {"test_wrong_batches_are_refused": "because"}


def test_pytest_reports_it_while_it_collects(tmp_path: Path) -> None:
    path = tmp_path / "test_mine.py"
    path.write_text(
        "from bowerbird.testing import OrderContract\n"
        "class TestMine(OrderContract):\n"
        "    name = 'core:random'\n"
        "    def test_it_is_a_permutation_of_all_positions(self): pass\n"
    )
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert "error" in result.stdout and "@override_contract_test(reason='...')" in result.stdout


# ---------------------------------------------------------------------------------------------- whole plugins


def acme(**fields: Any) -> Any:
    module: Any = types.ModuleType("acme_plugin")
    module.BOWERBIRD_API = "1.0"
    record = {"name": "acme:x", "target": "json:JSONDecoder", "summary": "X.", "role": "index", **fields}

    @hookimpl
    def bowerbird_retrievers() -> Any:
        yield RetrieverRecord(**record)

    module.bowerbird_retrievers = bowerbird_retrievers
    return module


def test_core_is_a_sound_plugin() -> None:
    problems = PluginTester("core").problems()
    assert not [problem for problem in problems if "not installed" not in problem]


def test_a_sound_module_passes_and_is_forgotten_afterwards() -> None:
    PluginTester(acme(), name="acme").assert_sound()
    assert "acme" not in [status.name for status in get_registry().plugins]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target": "json:NoSuchThing"}, "cannot import 'json:NoSuchThing'"),
        ({"config": "collections:Counter"}, "is no pydantic model"),
        ({"config": "test_testing_configs:Loose"}, "is not frozen"),
        ({"config": "test_testing_configs:Loose"}, "accepts unknown keys"),
        ({"config": "test_testing_configs:Loose"}, "setting 'x' has no description"),
        ({"config": "test_testing_configs:Good", "presets": {"p": "builtins:dict"}}, "preset 'p'"),
        ({"role": "indx"}, "Did you mean 'index'"),
    ],
)
def test_the_plugin_tester_names_each_problem(
    fields: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pydantic import BaseModel, ConfigDict, Field

    class Loose(BaseModel):
        x: int = 1

    class Good(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")
        y: int = Field(description="Needed.")

    configs: Any = types.ModuleType("test_testing_configs")
    configs.Loose, configs.Good = Loose, Good
    monkeypatch.setitem(sys.modules, configs.__name__, configs)
    monkeypatch.setattr(get_registry(), "_targets", {})  # strings are remembered for the life of a process
    with pytest.raises(AssertionError, match=words):
        PluginTester(acme(**fields), name="acme").assert_sound()


# ------------------------------------------------------------------------------------------------------ goldens


def test_goldens_are_read_from_npz_and_json(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(3.0), n=np.int64(4), flag=np.bool_(True), mode=np.str_("cosine"))
    golden = load_golden(tmp_path / "a.npz")
    assert (
        golden["x"].tolist() == [0, 1, 2] and golden["n"] == 4 and golden["flag"] is True and golden["mode"] == "cosine"
    )
    (tmp_path / "b.json").write_text('{"x": [0, 1.5]}')
    assert load_golden(tmp_path / "b.json") == {"x": [0, 1.5]}


def test_a_golden_that_would_execute_code_or_is_missing_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "evil.npz", x=np.array([{"an": "object"}], dtype=object))
    for name in ("evil.npz", "missing.npz", "other.pickle"):
        with pytest.raises(DataError, match=name):
            load_golden(tmp_path / name)


def test_golden_arrays_come_as_tensors_where_they_are_asked_for(tmp_path: Path) -> None:
    np.savez(tmp_path / "few.npz", x=np.arange(3.0), names=np.array(["a", "b"]), scale=0.5)
    values = load_golden(tmp_path / "few.npz", tensors=True)
    assert torch.equal(values["x"], torch.arange(3.0, dtype=torch.float64))
    assert values["names"] == ["a", "b"] and values["scale"] == 0.5


@pytest.mark.parametrize(
    ("actual", "golden", "words"),
    [
        (torch.tensor([1.0, 2.0], dtype=torch.float64), [1.0, 2.0 + 1e-8], r"1 of 2 differ.*\(1,\)"),
        ([1, 2], [1, 3], "1 of 2 differ"),
        ([[1.0, 2.0]], [1.0, 2.0], r"shape \(1, 2\), golden \(2,\)"),
        ({"a": 1.0}, {"a": 1.0, "b": 2.0}, r"missing \['b'\]"),
        ({"a": {"b": [1.0]}}, {"a": {"b": [2.0]}}, r"value\['a'\]\['b'\]"),
        (float("nan"), 1.0, "1 of 1 differ"),
        ("cosine", "dot", "1 of 1 differ"),
    ],
)
def test_a_difference_is_named(actual: Any, golden: Any, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        assert_close(actual, golden)


def test_equal_values_of_different_types_are_close() -> None:
    assert_close(torch.tensor([1.0, float("nan")]), np.array([1.0, float("nan")]))
    assert_close({"a": torch.tensor(3), "b": [1.0, 2.0]}, {"a": 3, "b": np.array([1.0, 2.0 + 1e-12])})
    assert_close(torch.tensor([1.0], dtype=torch.bfloat16), [1.0])
    assert_close([1.0], [1.001], rtol=1e-2)


# ---------------------------------------------------------------------------------------------------- two ranks


def summed(rank: int, values: Any, scale: float) -> dict[str, Any]:
    import torch.distributed as dist

    mine = values[rank] * scale
    dist.all_reduce(mine)
    return {"rank": rank, "sum": mine}


def fails_on_rank_one(rank: int) -> None:
    import torch.distributed as dist

    if rank == 1:
        raise ValueError("only here")
    dist.barrier()


def test_two_ranks_exchange_tensors_over_gloo() -> None:
    values = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
    results = run_two_ranks(summed, values, 2.0)
    assert [result["rank"] for result in results] == [0, 1]
    for result in results:
        assert result["sum"].tolist() == [22.0, 44.0]


def test_a_rank_that_fails_ends_both_with_its_traceback() -> None:
    with pytest.raises(AssertionError, match="ValueError: only here"):
        run_two_ranks(fails_on_rank_one)


def test_only_functions_at_the_top_level_can_be_run() -> None:
    with pytest.raises(TypeError, match="top level"):
        run_two_ranks(lambda rank: rank)


def test_every_public_name_exists() -> None:
    import bowerbird.testing

    for name in bowerbird.testing.__all__:
        assert getattr(bowerbird.testing, name) is not None
    assert issubclass(LibDataset, Dataset) and isinstance(summed, Callable)  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        bowerbird.testing.Nothing  # noqa: B018
