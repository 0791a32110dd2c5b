"""The records of ``bowerbird-sparsity``. Light: standard library and records only."""

from __future__ import annotations

from collections.abc import Iterable

from bowerbird.hookspecs import hookimpl
from bowerbird.records import ModifierRecord

BOWERBIRD_API = "1.0"
SPARTAN = "Spartan: Differentiable Sparsity via Regularized Transportation, NeurIPS 2022, arXiv:2205.14107"
MASKED = ("Linear", "Conv2d", "MultiheadAttention")


@hookimpl
def bowerbird_modifiers() -> Iterable[ModifierRecord]:
    yield ModifierRecord(
        name="sparsity:magnitude",
        target="bowerbird_sparsity.modifier:SparsityModifier",
        config="bowerbird_sparsity.config:MagnitudeConfig",
        summary="Gradual magnitude pruning: the smallest weights of every step are zero and get no gradient.",
        paper="To prune, or not to prune, ICLR 2018 workshop, arXiv:1710.01878",
        attaches_to=MASKED,
    )
    yield ModifierRecord(
        name="sparsity:spartan",
        target="bowerbird_sparsity.modifier:SparsityModifier",
        config="bowerbird_sparsity.config:SpartanConfig",
        summary="Train towards an exact share of kept weights, blocks or 2:4 groups through a differentiable top-k.",
        paper=SPARTAN,
        attaches_to=MASKED,
    )
    yield ModifierRecord(
        name="sparsity:top-k",
        target="bowerbird_sparsity.modifier:SparsityModifier",
        config="bowerbird_sparsity.config:TopKConfig",
        summary="Top-k with a straight-through gradient (dual averaging): dropped weights move, too. The ablation.",
        paper=SPARTAN,
        attaches_to=MASKED,
    )
