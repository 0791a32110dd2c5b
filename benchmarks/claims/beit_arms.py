"""The arms of beit.toml and mc-beit.toml: a tokenizer for each seed, then what is pre-trained on its tokens.

The mechanism of mc-BEiT is measured on hidden patches of test pictures. The near-duplicates are the 2 % of pairs of one
picture that differ least in their pixels, flat patches (background) left out; other pairs are the rest. A distance of
two distributions is their total variation.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pretraining_arms import Pretrained, Values, World, make_world, measured_arms, pictures, run_folder
from torch import Tensor

from bowerbird.data import subset
from bowerbird_mim.beit import BEiTObjective, MaskedTokenObjective, RandomMaskGenerator
from bowerbird_mim.mc_beit import McBEiTObjective, mean_perplexity, refine_choices, soft_choices
from bowerbird_mim.patches import patchify

PICTURES, FLAT, NEAR = 512, 0.2, 0.02  # test pictures, least deviation of a patch's pixels, share of pairs


def run(plan: Mapping[str, Any], seed: int) -> Values:
    """``<arm>.<metric>`` of ``pretraining_arms.measure``, and of ``tokens_of`` for the trained arms."""
    plan = copy.deepcopy(dict(plan))
    recipe = plan.pop("tokenizer")
    world = make_world(seed, **plan.get("data", {}))
    with run_folder(recipe, world.unlabelled, seed) as tokenizer:
        plan["recipe"]["objective"]["tokenizer"] = str(tokenizer)

        def more(name: str, made: Pretrained, world: World) -> Values:
            return tokens_of(made, world, seed) if made.log else {}

        values = measured_arms(plan, seed, more)
    if "hard.finetune" in values:  # of mc-beit.toml: a margin of two points
        values["hard.finetune less 2 points"] = values["hard.finetune"] - 0.02
    return values


@torch.no_grad()
def tokens_of(made: Pretrained, world: World, seed: int) -> Values:
    """What the model predicts for hidden patches of test pictures, the same patches in every arm.

    ``accuracy``: how often the tokenizer's token is the most likely one; ``commonest``: how often the commonest token
    is right; ``near distance``, ``far distance``: between predictions of near-duplicates and of other pairs;
    ``relative distance``: their ratio; ``agreement``: near-duplicates with the same most likely token; ``target
    distance``: between the targets of near-duplicates; ``perplexity``: mean exp(entropy) of the targets.
    """
    objective = made.objective.eval()
    assert isinstance(objective, MaskedTokenObjective)
    tokenizer: Any = objective.tokenizer
    items = subset(world.test, range(min(PICTURES, len(world.test))))
    images, grid = pictures(made.encoder, items), objective.model.encoder.grid
    hide, generator = RandomMaskGenerator(grid, 0.75), np.random.default_rng(seed)
    mask = torch.stack([hide(generator).flatten() for _ in range(len(images))])
    seen = pictures(tokenizer, items)
    logits, features, teacher = [], [], []
    for part in torch.arange(len(images)).split(128):
        h, o = objective.model(images[part], mask[part])
        logits.append(o)
        features.append(h)
        teacher.append(objective.tokenizer_logits(seen[part]))
    predicted, teaching = torch.cat(logits).softmax(dim=-1), torch.cat(teacher)
    ids = teaching.argmax(dim=1).flatten(1)
    target = targets_of(objective, teaching, torch.cat(features))

    near, far = pairs(images, mask, made.encoder.patch_size)
    apart = {kind: float(distance(predicted, chosen).mean()) for kind, chosen in (("near", near), ("far", far))}
    top = predicted.argmax(dim=-1)
    return {
        "accuracy": float((top == ids)[mask].float().mean()),
        "commonest": float(ids[mask].bincount().max() / mask.sum()),
        "near distance": apart["near"],
        "far distance": apart["far"],
        "relative distance": apart["near"] / apart["far"],
        "agreement": float((top[near[0], near[1]] == top[near[0], near[2]]).float().mean()),
        "target distance": float(distance(target, near).mean()),
        "perplexity": float(mean_perplexity(target[mask])),
    }


def targets_of(objective: MaskedTokenObjective, teaching: Tensor, features: Tensor) -> Tensor:
    """``(N, L, V)``: what the objective compares its predictions with."""
    if isinstance(objective, McBEiTObjective):
        choices = soft_choices(teaching, objective.temperature)
        return refine_choices(choices, features, objective.refine_weight, objective.similarity_temperature)
    assert isinstance(objective, BEiTObjective)
    return F.one_hot(teaching.argmax(dim=1).flatten(1), objective.model.vocab_size).float()


def pairs(images: Tensor, mask: Tensor, patch_size: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Near-duplicates and other pairs of hidden patches: (picture, patch, patch) each."""
    patches = patchify(images, patch_size)
    wanted = mask & (patches.std(dim=-1) > FLAT)
    both = (wanted[:, :, None] & wanted[:, None, :]).triu(diagonal=1)
    difference = torch.cdist(patches, patches)[both]
    close = difference <= difference.kthvalue(max(1, int(NEAR * len(difference)))).values
    where = both.nonzero(as_tuple=True)
    return tuple(w[close] for w in where), tuple(w[~close] for w in where)


def distance(distributions: Tensor, chosen: tuple[Tensor, ...]) -> Tensor:
    """Total variation of the pairs, ``(N, L, V)`` to one number per pair; a sample of 20,000 where there are more."""
    step = max(1, len(chosen[0]) // 20_000)
    picture, first, second = (index[::step] for index in chosen)
    return (distributions[picture, first] - distributions[picture, second]).abs().sum(dim=-1) / 2
