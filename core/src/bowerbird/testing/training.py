"""Contracts of what is trained: encoders and objectives, and small stand-ins to build them with.

B batch, D embedding width, N tokens, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from bowerbird.batch import BATCH_KEYS, Batch
from bowerbird.data.dataset import Dataset
from bowerbird.errors import RecipeError
from bowerbird.protocols import BuildContext, Encoder, Features, ItemTransform, LossOutput, Objective, TrainedRun
from bowerbird.records import EncoderRecord, ObjectiveRecord
from bowerbird.testing.contract import Contract, first_difference, must_raise
from bowerbird.train.data import collate


class TinyEncoder(Encoder):
    """A real encoder that costs microseconds: 4 x 4 patches of mean colours, one layer, mean pooling."""

    def __init__(self, embed_dim: int = 8) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.patch = nn.Linear(3, embed_dim)
        self.head = nn.Linear(embed_dim, embed_dim)

    def forward(self, batch: Batch) -> Features:
        colours = nn.functional.adaptive_avg_pool2d(batch["image"], 4)
        tokens = torch.tanh(self.patch(colours.flatten(2).transpose(1, 2)))  # (B, 16, D)
        return Features(pooled=self.head(tokens.mean(dim=1)), tokens=tokens, grid=(4, 4))


class SimpleBuildContext(BuildContext):
    """A context without files: classes, steps, a seed, a data set, what ``load_run`` and ``eval_batches`` return."""

    def __init__(
        self,
        *,
        classes: Sequence[str] = ("a", "b", "c"),
        total_steps: int = 10,
        seed: int = 0,
        runs: Mapping[str, TrainedRun] | None = None,
        batches: Sequence[Batch] = (),
        dataset: Dataset | None = None,
    ) -> None:
        self.classes, self.dataset = classes, dataset
        self.total_steps = total_steps
        self.seed = seed
        self._runs = runs or {}
        self._batches = batches

    def load_run(self, path: str | Path) -> TrainedRun:
        try:
            return self._runs[str(path)]
        except KeyError:
            raise RecipeError(f"no run in {str(path)!r}; there are: {', '.join(self._runs) or 'none'}") from None

    def eval_batches(self, encoder: Encoder, keys: Sequence[str] = ("image", "label")) -> Iterator[Batch]:
        for batch in self._batches:
            yield {key: batch[key] for key in keys}


def make_batch(
    keys: Sequence[str],
    *,
    batch_size: int,
    image_size: int | tuple[int, int],
    num_classes: int,
    seed: int,
    old_dim: int = 6,
) -> Batch:
    """Random entries for ``keys`` of a batch, reproducible by ``seed``; labels go through all classes.

    ``image_size`` is the side of square pictures, or (height, width).
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    known: dict[str, Any] = {
        "image": torch.randn(batch_size, 3, height, width, generator=generator),
        "video": torch.randn(batch_size, 2, 3, height, width, generator=generator),
        "text": {
            "input_ids": torch.randint(1, 50, (batch_size, 6), generator=generator),
            "attention_mask": torch.ones(batch_size, 6, dtype=torch.long),
        },
        "label": torch.arange(batch_size) % num_classes,
        "item_id": [f"item-{i}" for i in range(batch_size)],
        "index": torch.arange(batch_size),
        "domain": torch.arange(batch_size) % 2,
        "old_features": torch.randn(batch_size, old_dim, generator=generator),
    }
    missing = [key for key in keys if key not in known]
    if missing:
        accepted = "in bowerbird.batch, but of no fixed size" if set(missing) <= BATCH_KEYS.keys() else "unknown"
        raise NotImplementedError(f"batch keys {missing} are {accepted}: override make_batch in the test class")
    return {key: known[key] for key in keys}


def _total_gradients(module: nn.Module) -> list[str]:
    """Names of the trainable parameters that got no gradient, or only zeros and NaN."""
    return [
        name
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
        and (parameter.grad is None or not parameter.grad.isfinite().all() or not parameter.grad.any())
    ]


def _frozen_with_gradient(module: nn.Module) -> list[str]:
    return [
        name
        for name, parameter in module.named_parameters()
        if not parameter.requires_grad and parameter.grad is not None
    ]


class EncoderContract(Contract):
    """Set ``name``, a small ``config`` and, where the encoder names no preprocessing, ``image_size``."""

    kind = "encoder"
    image_size: ClassVar[int] = 32  # used where the encoder has no preprocessing of its own
    tolerance: ClassVar[float] = 1e-4  # of embeddings that are equal but for the order of float32 sums

    def build(self, seed: int = 0) -> Encoder:
        torch.manual_seed(seed)
        return self.target.build(self.make_config())

    def make_batch(self, encoder: Encoder, *, batch_size: int = 4, seed: int = 0) -> Batch:
        prepared = encoder.preprocessing
        size = (prepared.height, prepared.width) if prepared else self.image_size
        record = self.record
        assert isinstance(record, EncoderRecord)
        return make_batch(record.inputs, batch_size=batch_size, image_size=size, num_classes=2, seed=seed)

    def wrong_batches(self, encoder: Encoder) -> Iterator[tuple[str, Batch]]:
        """What is wrong -> a batch that must be refused. Add what else your encoder cannot take."""
        good = self.make_batch(encoder)
        for key in good:
            yield f"a batch without {key!r}", {other: value for other, value in good.items() if other != key}
        if "image" in good:
            yield (
                "an image with five channels",
                {**good, "image": torch.cat([good["image"], good["image"][:, :2]], dim=1)},
            )
            yield "an image of shape (B, H)", {**good, "image": good["image"][:, 0, 0]}

    def test_it_is_an_encoder_with_the_outputs_of_its_record(self) -> None:
        """Fix: return ``Features`` with ``pooled (B, embed_dim)``, and ``tokens (B, N, D)`` if the record says so."""
        encoder = self.build().eval()
        assert isinstance(encoder, Encoder), f"{self.record.target} builds a {type(encoder).__name__}, not an Encoder"
        batch = self.make_batch(encoder)
        with torch.no_grad():
            features = encoder(batch)
        assert isinstance(features, Features), f"forward returns {type(features).__name__}, not Features"
        assert features.pooled.shape == (4, encoder.embed_dim), f"pooled {tuple(features.pooled.shape)}"
        assert features.pooled.isfinite().all(), "pooled has NaN or infinity"
        record = self.record
        assert isinstance(record, EncoderRecord)
        if "tokens" in record.outputs:
            assert features.tokens is not None, "the record promises tokens"
            assert features.tokens.ndim == 3 and len(features.tokens) == 4, f"tokens {tuple(features.tokens.shape)}"

    def test_the_same_seed_builds_the_same_encoder(self) -> None:
        """Fix: draw first weights from torch's generator only."""
        first, second = self.build(seed=3).eval(), self.build(seed=3).eval()
        different = list(first_difference(first.state_dict(), second.state_dict()))
        assert not different, f"two builds with one seed differ in {different[:5]}"
        batch = self.make_batch(first)
        with torch.no_grad():
            assert torch.equal(first(batch).pooled, second(batch).pooled), "two equal encoders give different numbers"

    def test_a_saved_state_gives_bit_equal_embeddings(self) -> None:
        """Fix: keep everything that forward reads in parameters or persistent buffers."""
        first, second = self.build(seed=1).eval(), self.build(seed=2).eval()
        second.load_state_dict(first.state_dict(), strict=True)
        batch = self.make_batch(first)
        with torch.no_grad():
            assert torch.equal(first(batch).pooled, second(batch).pooled), "a restored encoder gives different numbers"

    def test_an_embedding_does_not_depend_on_the_rest_of_the_batch(self) -> None:
        """Fix: in eval mode, nothing may mix items (batch statistics, padding to the longest without a mask)."""
        encoder = self.build().eval()
        batch = self.make_batch(encoder)
        with torch.no_grad():
            together = encoder(batch).pooled
            for i in range(4):
                alone = encoder(_rows(batch, slice(i, i + 1))).pooled[0]
                worst = (alone - together[i]).abs().max() / together[i].abs().max().clamp_min(1e-12)
                assert worst <= self.tolerance, f"item {i} alone differs from item {i} in a batch by {worst:.2g}"

    def test_the_batch_is_left_as_it_was(self) -> None:
        """Fix: no in-place operation on what comes in."""
        encoder = self.build().eval()
        batch, untouched = self.make_batch(encoder), self.make_batch(encoder)
        with torch.no_grad():
            encoder(batch)
        assert batch.keys() == untouched.keys(), "forward adds or removes batch keys"
        for key, value in untouched.items():
            if isinstance(value, Tensor):
                assert torch.equal(batch[key], value), f"forward changes batch[{key!r}]"

    def test_gradients_reach_every_trainable_parameter_and_no_frozen_one(self) -> None:
        """Fix: freeze what is not trained (``requires_grad_(False)``); remove parameters that nothing reads."""
        encoder = self.build().train()
        features = encoder(self.make_batch(encoder))
        outputs = [features.pooled] + ([features.tokens] if features.tokens is not None else [])
        generator = torch.Generator().manual_seed(0)
        # A random direction: the plain sum of normalised outputs has no gradient.
        loss = torch.stack([(o * torch.randn(o.shape, generator=generator)).sum() for o in outputs]).sum()
        if not loss.requires_grad:  # a wholly frozen encoder
            assert not any(p.requires_grad for p in encoder.parameters()), "no gradient reaches any parameter"
            return
        loss.backward()
        assert not (unreached := _total_gradients(encoder)), f"no useful gradient reaches {unreached[:5]}"
        assert not (reached := _frozen_with_gradient(encoder)), f"frozen parameters get gradients: {reached[:5]}"

    def test_a_cached_frozen_trunk_gives_the_same_embeddings(self) -> None:
        """Fix: ``forward`` must accept ``frozen_features`` for the image if ``frozen_trunk`` returns a tensor."""
        encoder = self.build().eval()
        batch = self.make_batch(encoder)
        with torch.no_grad():
            trunk = encoder.frozen_trunk(batch)
            if trunk is None:
                return
            rest = {key: value for key, value in batch.items() if key != "image"}
            assert torch.equal(encoder({**rest, "frozen_features": trunk}).pooled, encoder(batch).pooled)

    def test_wrong_batches_are_refused(self) -> None:
        """Fix: check shapes where torch would broadcast or crash far away; name what was expected and what came."""
        encoder = self.build().eval()
        for what, batch in self.wrong_batches(encoder):
            with torch.no_grad():
                must_raise(lambda batch=batch: encoder(batch), what)  # type: ignore[misc]


def _rows(batch: Batch, rows: slice) -> Batch:
    return {key: _rows(value, rows) if isinstance(value, dict) else value[rows] for key, value in batch.items()}


class ObjectiveContract(Contract):
    """Set ``name`` and ``config``; override ``make_encoder``, ``make_context`` or ``make_batch`` where needed."""

    kind = "objective"
    encoder_inputs: ClassVar[Sequence[str]] = ("image",)  # batch keys of make_encoder's encoder
    num_classes: ClassVar[int] = 3
    batch_size: ClassVar[int] = 12
    image_size: ClassVar[int] = 8
    learning_rate: ClassVar[float] = 0.01
    learning_steps: ClassVar[int] = 40

    def make_encoder(self) -> Encoder:
        return TinyEncoder()

    def make_context(self) -> BuildContext:
        return SimpleBuildContext(classes=[f"class-{i}" for i in range(self.num_classes)])

    def make_batch(self, *, seed: int = 0) -> Batch:
        """A batch of random numbers, made by the objective's ``item_transform`` from random pictures if it has one."""
        record = self.record
        assert isinstance(record, ObjectiveRecord)
        keys = [*dict.fromkeys([*self.encoder_inputs, *record.needs])]
        batch = make_batch(
            keys, batch_size=self.batch_size, image_size=self.image_size, num_classes=self.num_classes, seed=seed
        )
        transform = self._transform
        if transform is None:
            return batch
        generator = np.random.default_rng(seed)
        size = (self.image_size, self.image_size, 3)
        pictures = [Image.fromarray(generator.integers(0, 256, size, np.uint8)) for _ in range(self.batch_size)]
        rows: list[dict[str, Any]] = [
            {**{key: batch[key][i] for key in keys}, "image": picture, "index": i} for i, picture in enumerate(pictures)
        ]
        return collate([transform(row, np.random.default_rng([seed, i])) for i, row in enumerate(rows)])

    @cached_property
    def _transform(self) -> ItemTransform | None:
        if self.target.item_transform is Objective.item_transform:
            return None  # without building one: a context may be made of batches
        with torch.random.fork_rng(devices=[]):  # asked for in the middle of a test: its random state must not move
            return self.build().item_transform()

    def make_encoder_batch(self, encoder: Encoder) -> Batch:
        """What the exported encoder reads."""
        if self._transform is None:
            return self.make_batch()
        prepared = encoder.preprocessing
        size = (prepared.height, prepared.width) if prepared else self.image_size
        return make_batch(self.encoder_inputs, batch_size=self.batch_size, image_size=size, num_classes=1, seed=0)

    def build(self, seed: int = 0) -> Objective:
        torch.manual_seed(seed)
        return self.target.build(self.make_config(), self.make_encoder(), self.make_context())

    def wrong_batches(self) -> Iterator[tuple[str, Batch]]:
        """What is wrong -> a batch that must be refused."""
        good = self.make_batch()
        for key in good:
            yield f"a batch without {key!r}", {other: value for other, value in good.items() if other != key}
        if "label" in good:
            yield "one label too few", {**good, "label": good["label"][:-1]}
            yield "a label that is no class", {**good, "label": torch.full_like(good["label"], self.num_classes + 1000)}

    def train_steps(self, objective: Objective, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
        """Losses of optimiser steps as the training loop takes them, on one batch per step."""
        losses = []
        for step in steps:
            torch.manual_seed(1000 + step)  # what a resumed run would restore
            objective.before_step(step)
            output = objective(self.make_batch(seed=step))
            optimizer.zero_grad(set_to_none=True)
            output.total.backward()
            objective.before_update(step)
            optimizer.step()
            objective.after_step(step)
            losses.append(output.total.item())
        return losses

    def optimizer(self, objective: Objective) -> torch.optim.Optimizer:
        groups = [{k: v for k, v in group.items() if k != "lr_scale"} for group in objective.parameter_groups()]
        return torch.optim.AdamW(groups, lr=self.learning_rate)

    def test_the_loss_is_a_finite_scalar_with_named_parts(self) -> None:
        """Fix: return ``LossOutput(total, parts, stats)`` with a scalar total that requires a gradient."""
        objective = self.build().train()
        assert isinstance(objective, Objective), f"{self.record.target} builds a {type(objective).__name__}"
        output = objective(self.make_batch())
        assert isinstance(output, LossOutput), f"forward returns {type(output).__name__}, not LossOutput"
        assert output.total.ndim == 0 and output.total.isfinite(), f"total is {output.total}"
        assert output.total.requires_grad, "total does not require a gradient"
        for name, part in output.parts.items():
            assert isinstance(part, Tensor) and part.ndim == 0 and part.isfinite(), f"part {name!r} is {part}"
        for name, value in output.stats.items():
            # A detached scalar is fine: it is read when it is logged, and the step need not wait for the device.
            scalar = isinstance(value, Tensor) and value.ndim == 0 and not value.requires_grad
            assert scalar or isinstance(value, int | float), f"stat {name!r} is no number: {value!r}"

    def test_gradients_reach_every_trainable_parameter_and_no_frozen_one(self) -> None:
        """Fix: freeze teachers and old encoders (``bowerbird.protocols.freeze``); drop parameters that no loss uses."""
        objective = self.build().train()
        objective.before_step(0)
        objective(self.make_batch()).total.backward()
        assert not (unreached := _total_gradients(objective)), f"no useful gradient reaches {unreached[:5]}"
        assert not (reached := _frozen_with_gradient(objective)), f"frozen parameters get gradients: {reached[:5]}"

    def test_parameter_groups_hold_every_trainable_parameter_once_and_nothing_frozen(self) -> None:
        """Fix: ``parameter_groups`` must cover ``parameters()``; the encoder's included."""
        objective = self.build()
        names = {id(parameter): name for name, parameter in objective.named_parameters()}
        grouped = [names.get(id(p), "a stranger") for group in objective.parameter_groups() for p in group["params"]]
        wanted = [name for name, parameter in objective.named_parameters() if parameter.requires_grad]
        assert sorted(grouped) == sorted(wanted), f"in groups {sorted(grouped)}, trainable {sorted(wanted)}"

    def test_an_optimiser_step_leaves_frozen_parameters_alone(self) -> None:
        """Fix: a teacher moves in ``after_step``, never by the optimiser."""
        objective = self.build().train()
        frozen = {n: p.detach().clone() for n, p in objective.named_parameters() if not p.requires_grad}
        optimizer = self.optimizer(objective)
        objective(self.make_batch()).total.backward()
        optimizer.step()
        moved = [
            name
            for name, parameter in objective.named_parameters()
            if name in frozen and (parameter != frozen[name]).any()
        ]
        assert not moved, f"the optimiser moved {moved[:5]}"

    def test_the_same_seed_gives_the_same_losses(self) -> None:
        """Fix: draw randomness from torch's generator or the context's seed, and from nothing else."""
        losses = []
        for _ in range(2):
            objective = self.build(seed=5).train()
            losses.append(self.train_steps(objective, self.optimizer(objective), range(3)))
        assert losses[0] == losses[1], f"two runs with one seed: {losses[0]} and {losses[1]}"

    def test_a_resumed_run_is_bit_equal_to_an_undisturbed_one(self) -> None:
        """Fix: keep queues, moving averages and counters in persistent buffers, so that ``state_dict`` has them."""
        objective = self.build(seed=5).train()
        optimizer = self.optimizer(objective)
        self.train_steps(objective, optimizer, range(2))
        saved = {name: value.clone() for name, value in objective.state_dict().items()}
        resumed = self.build(seed=6).train()
        resumed.load_state_dict(saved, strict=True)
        resumed_optimizer = self.optimizer(resumed)
        resumed_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # it would share the tensors

        undisturbed = self.train_steps(objective, optimizer, range(2, 4))
        again = self.train_steps(resumed, resumed_optimizer, range(2, 4))
        assert again == undisturbed, f"losses after resuming {again}, undisturbed {undisturbed}"
        different = list(first_difference(resumed.state_dict(), objective.state_dict()))
        assert not different, f"states after resuming differ in {different[:5]}"

    def test_training_on_one_batch_lowers_the_loss(self) -> None:
        """Fix: look for a wrong sign or a detached tensor; raise ``learning_steps`` if it only needs longer."""
        objective = self.build().train()
        optimizer = self.optimizer(objective)
        batch, losses = self.make_batch(), []
        for step in range(self.learning_steps):
            objective.before_step(step)
            total = objective(batch).total
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            objective.before_update(step)
            optimizer.step()
            objective.after_step(step)
            losses.append(total.item())
        quarter = max(1, len(losses) // 4)
        first, last = sum(losses[:quarter]), sum(losses[-quarter:])
        assert last < first, f"mean loss {first / quarter:.4f} at the start, {last / quarter:.4f} at the end"

    def test_a_joined_batch_gives_the_mean_of_its_halves_where_the_record_says_so(self) -> None:
        """Fix: set ``batch_additive=False``, or take means over items. Data parallel training relies on it."""
        record = self.record
        assert isinstance(record, ObjectiveRecord)
        if not record.batch_additive:
            return
        objective = self.build().train()
        batch, half = self.make_batch(), self.batch_size // 2
        with torch.no_grad():
            joined = objective(batch).total
            halves = [objective(_rows(batch, slice(start, start + half))).total for start in (0, half)]
        torch.testing.assert_close(joined, (halves[0] + halves[1]) / 2, rtol=1e-5, atol=1e-6)

    def test_the_exported_encoder_encodes(self) -> None:
        """Fix: ``exported_encoder`` returns an ``Encoder`` whose output has ``embed_dim`` columns."""
        objective = self.build()
        encoder = objective.exported_encoder().eval()
        assert isinstance(encoder, Encoder), f"exported_encoder returns a {type(encoder).__name__}"
        with torch.no_grad():
            pooled = encoder(self.make_encoder_batch(encoder)).pooled
        assert pooled.shape == (self.batch_size, encoder.embed_dim), f"pooled {tuple(pooled.shape)}"

    def test_wrong_batches_are_refused(self) -> None:
        """Fix: check shapes and ranges before torch broadcasts or indexes."""
        objective = self.build().train()
        for what, batch in self.wrong_batches():
            must_raise(lambda batch=batch: objective(batch), what)  # type: ignore[misc]
