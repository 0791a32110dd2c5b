"""Settings of sparse training. Apart from what uses them, so that they are shown and checked without torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Mode = Literal["spartan", "magnitude", "dual_averaging"]
BlockSize = Annotated[tuple[int, ...], Field(strict=False)]
Names = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]


class _Budget(BaseModel):
    """What all modes share: how much is kept, of what, in which shapes, and when."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)

    target_density: float = Field(
        default=0.1, gt=0, le=1, description="Share of the cost that is kept at the end: 1 - sparsity."
    )
    initial_density: float = Field(default=1.0, gt=0, le=1, description="Share that is kept at the start.")
    layers: Names | None = Field(
        default=None,
        description="Names or globs of the sparse layers; default: all linear ones and 2-d convolutions.",
    )
    allocation: Literal["global", "uniform", "erk"] = Field(
        default="global", description="One budget for all layers together, the same share of each, or Erdos-Renyi."
    )
    pattern: str = Field(default="blocks", description="`blocks` of block_size, or `n:m`: n of every m inputs, as 2:4.")
    block_size: BlockSize = Field(
        default=(1, 1),
        description="Weights kept or dropped together: (outputs, inputs[, rows, columns]); -1: the whole dimension.",
    )
    warmup_fraction: float = Field(default=0.2, ge=0, le=1, description="Share of the steps until target_density.")
    finetune_fraction: float = Field(default=0.2, ge=0, lt=1, description="Share of the steps with frozen masks.")
    annealing: Literal["linear", "cosine"] = Field(default="linear", description="Form of both ramps.")
    adjust: bool = Field(
        default=True,
        description="Count all parameters of the model, also the dense ones, for target_density (parameter cost only).",
    )
    strict: bool = Field(default=True, description="Refuse layers that blocks or groups do not divide, or do without.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.block_size) not in (2, 4) or any(size != -1 and size < 1 for size in self.block_size):
            raise ValueError(
                f"block_size = {list(self.block_size)}: two numbers (outputs, inputs), or four with the rows and "
                "columns of a convolution's kernel, are accepted, each at least 1 or -1 (all)"
            )
        if self.warmup_fraction + self.finetune_fraction > 1:
            raise ValueError(
                f"warmup_fraction + finetune_fraction = {self.warmup_fraction + self.finetune_fraction:g}: the masks "
                "would be frozen before the target is reached; together they may be at most 1"
            )
        if self.pattern != "blocks":
            self._check_groups()
        return self

    def _check_groups(self) -> None:
        n, colon, m = self.pattern.partition(":")
        if not (colon and n.isascii() and n.isdigit() and m.isascii() and m.isdigit() and 0 < int(n) < int(m)):
            raise ValueError(f"pattern = {self.pattern!r}: 'blocks', or 'n:m' with n < m such as '2:4', is accepted")
        if abs(self.target_density - int(n) / int(m)) > 1e-6:  # 0.666667 will do for 2:3
            raise ValueError(
                f"pattern = {self.pattern!r} keeps {int(n) / int(m):g} of the weights of every layer, and "
                f"target_density is {self.target_density:g}; set target_density = {int(n) / int(m):g}"
            )
        if any(size != 1 for size in self.block_size):
            raise ValueError(f"block_size = {list(self.block_size)} has no meaning with pattern = {self.pattern!r}")


class _Soft(BaseModel):
    """What only the soft mask has."""

    beta_init: float = Field(default=1.0, gt=0, description="Sharpness at the start, in 1 / weight.")
    beta_final: float = Field(
        default=20.0, gt=0, description="Sharpness when the masks freeze; times the root of the weights of a block."
    )
    solver: Literal["sinkhorn", "root"] = Field(default="sinkhorn", description="How a step's masks are found.")
    max_iters: int = Field(default=100, ge=1, description="Most iterations of sinkhorn.")
    tol: float = Field(default=0.01, ge=0, description="Relative change of the kept value at which sinkhorn stops.")


class SparsityConfig(_Budget, _Soft):
    """Settings of a ``Sparsifier``.

    ``mode``: ``spartan`` differentiates through a soft mask, ``magnitude`` gives dropped weights no gradient,
    ``dual_averaging`` gives them the gradient of the dense weight (top-k straight-through). ``cost_model``:
    ``"parameters"``, or an object as ``bowerbird_sparsity.costs.CostModel``.
    """

    mode: Mode = "spartan"
    cost_model: Any = "parameters"

    @model_validator(mode="after")
    def _known_cost(self) -> Self:
        if self.cost_model != "parameters" and not callable(getattr(self.cost_model, "cost", None)):
            raise ValueError(
                f"cost_model = {self.cost_model!r}: 'parameters' or an object with cost(name, module, weight, "
                "block_size) is accepted, such as FlopsCost(sample_input) or LatencyCost(table)"
            )
        return self


class _Recipe(_Budget):
    """What the tables of a recipe add."""

    mode: ClassVar[Mode]

    cost_model: Literal["parameters", "flops", "latency"] = Field(
        default="parameters", description="What the budget counts: weights, multiplications, or latency_table."
    )
    latency_table: dict[str, float] | None = Field(
        default=None, description="With cost_model = latency: name of a layer -> measured time of the dense layer."
    )

    @model_validator(mode="after")
    def _table(self) -> Self:
        if (self.latency_table is None) == (self.cost_model == "latency"):
            raise ValueError("cost_model = 'latency' needs latency_table, and the other cost models have no use for it")
        return self


class MagnitudeConfig(_Recipe):
    """Settings of ``sparsity:magnitude``."""

    mode: ClassVar[Mode] = "magnitude"


class TopKConfig(_Recipe):
    """Settings of ``sparsity:top-k``."""

    mode: ClassVar[Mode] = "dual_averaging"


class SpartanConfig(_Recipe, _Soft):
    """Settings of ``sparsity:spartan``."""

    mode: ClassVar[Mode] = "spartan"
