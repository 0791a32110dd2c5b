"""The transform of a strategy that needs one: given, trained together with the new encoder, or fitted on a paired
sample; checked before it serves.

A map in the wrong direction has the right shape wherever two encoders have one width, and destroys the search. So its
direction is checked by name and, where pairs are at hand, by measurement. A map whose own verdict on held-out pairs is
that it is not usable, and one without verdict that cannot be measured either, are refused unless they are asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bowerbird.errors import InputError, SpaceError, UpgradeError
from bowerbird.gallery.routing import match_width
from bowerbird.gallery.transform import MIN_PAIRS, SURE, VectorTransform, with_evidence
from bowerbird.upgrade.sample import take_sample
from bowerbird.upgrade.strategies import Strategy, load_strategy, transform_direction, uses_trained_transform

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery
    from bowerbird.gallery.space import Space
    from bowerbird.upgrade.encoding import ItemEncoder

PAIRS = 2000  # items that are encoded to fit a map
CHECK_PAIRS = 256  # items that are encoded by the new encoder to check a direction, where it is at hand


def trained_transform(strategy: Strategy, encoder: ItemEncoder | None, old: Space) -> VectorTransform | None:
    """The map to ``old`` that was trained together with the new encoder, if there is one and the strategy uses it."""
    return encoder.transform_to(old) if encoder is not None and uses_trained_transform(strategy) else None


def needs_transform(gallery: Gallery, strategy: str, encoder: ItemEncoder) -> bool:
    """Whether an upgrade by this strategy needs a transform that neither the encoder brings nor the gallery has."""
    chosen, old = load_strategy(strategy)[1], gallery.snapshot().write_space
    return (
        transform_direction(chosen) == "query"
        and trained_transform(chosen, encoder, old) is None
        and gallery.transform(encoder.space.fingerprint, old.fingerprint) is None
    )


def fit_transform(
    gallery: Gallery,
    encoder: ItemEncoder,
    strategy: str,
    *,
    label_key: str | None = None,
    pairs: int = PAIRS,
    seed: int = 0,
    **settings: Any,
) -> VectorTransform:
    """Encode a sample of the gallery and fit the strategy's map on it.

    Args:
        label_key: Metadata key with the items' class, for strategies that learn from labels.
        pairs: Items to encode.
        settings: Of the strategy's ``fit``.

    Raises:
        InputError: If the strategy fits nothing, or there are too few items.
    """
    name, chosen = load_strategy(strategy)
    if transform_direction(chosen) is None:
        raise InputError(f"strategy {name!r} fits no transform")
    old = gallery.snapshot().write_space
    sample = take_sample(
        gallery, encoder, old, label_key=label_key, size=2 * pairs, fit=True, seed=seed, only_pairs=True
    )
    if sample.training is None:
        raise InputError(f"none of the sampled items of {gallery.path} can be encoded, so that nothing can be fitted")
    made: VectorTransform = chosen.fit(sample.training, seed=seed, **settings)  # type: ignore[attr-defined]
    return made


def use_transform(
    gallery: Gallery,
    name: str,
    strategy: Strategy,
    old: Space,
    new: Space,
    transform: VectorTransform | str | Path | None,
    *,
    encoder: ItemEncoder | None = None,
    accept_poor: bool = False,
) -> None:
    """Register the transform with which ``strategy`` will serve an upgrade from ``old`` to ``new``, if it needs one.

    Args:
        transform: The map, or its file. Default: the one that was trained together with the encoder, or else the one
            that is registered.
        encoder: The new encoder; where given, the direction is also measured, on items that it encodes.

    Raises:
        UpgradeError: If it needs one and there is none, it is not usable by its own verdict, the strategy takes none,
            or it is a lift, which has a verb of its own.
        SpaceError: If the transform goes another way, by name or by measurement, or nothing shows which way it goes.
    """
    direction = transform_direction(strategy)
    if direction == "gallery":
        raise UpgradeError(
            f"strategy {name!r} maps stored vectors: `bowerbird upgrade lift {gallery.path} --to ENCODER` does that, "
            "and `bowerbird upgrade run --on-top` re-encodes what was lifted"
        )
    if direction is None:
        if transform is not None:
            raise UpgradeError(f"strategy {name!r} uses no transform; leave it out")
        return
    if transform is None:
        transform = trained_transform(strategy, encoder, old) or gallery.transform(new.fingerprint, old.fingerprint)
        if transform is None:
            raise UpgradeError(
                f"strategy {name!r} needs a transform from {new} to {old}: give one (--transform FILE), or let "
                "`bowerbird upgrade run` fit it on a paired sample"
            )
    if not isinstance(transform, VectorTransform):
        transform = VectorTransform.load(transform)
    if (transform.source, transform.target) != (new.fingerprint, old.fingerprint):
        turned = (transform.source, transform.target) == (old.fingerprint, new.fingerprint)
        raise SpaceError(
            f"strategy {name!r} brings new queries into the old space and needs a transform {new.fingerprint[:12]} -> "
            f"{old.fingerprint[:12]}; {transform} {'goes the other way' if turned else 'is of other spaces'}"
        )
    if transform.evidence.get("usable") is False and not accept_poor:
        verdict = str(transform.evidence.get("verdict", "not usable"))
        sentence = str(transform.evidence.get("sentence", "its evidence says so."))
        said = sentence.removeprefix(f"{verdict.capitalize()}: ")  # the sentence begins with the verdict
        raise UpgradeError(
            f"the transform {transform} is {verdict}: {said} Use another strategy, for example rank-merge, or accept "
            "it (--accept-poor-transform)"
        )
    pairs = None if encoder is None else encoded_pairs(gallery, encoder)
    transform = with_evidence(
        transform,
        None if pairs is None else (pairs[1], pairs[0]),
        accept=accept_poor,
        ask="Give an encoder that can encode stored items, so that it is measured, or accept it "
        "(--accept-poor-transform, accept_poor_transform=True)",
    )
    gallery.register_space(new)
    gallery.register_transform(transform)


def check_compatible(gallery: Gallery, encoder: ItemEncoder, old: str | None = None) -> dict[str, Any] | None:
    """Whether the new encoder's vectors are nearer to the stored ones of the same items than to those of others.

    That is the least that compatible training gives. A relation that was declared by mistake would turn every search
    into noise, and it stays when the upgrade is rolled back.

    Args:
        old: Space of the stored vectors (fingerprint); default: the one that is written now.

    Returns:
        What was measured, for the relation's evidence; ``None`` where too few items can be encoded.

    Raises:
        SpaceError: If they are not; has the cosines.
    """
    pairs = encoded_pairs(gallery, encoder, old)
    if pairs is None:
        return None
    stored, new = np.asarray(pairs[0], np.float64), match_width(pairs[1], pairs[0].shape[1]).astype(np.float64)
    fit = (new * stored).sum(axis=1)
    strangers = (new * (stored.sum(axis=0) - stored)).sum(axis=1) / (len(stored) - 1)
    gain = fit - strangers
    if gain.mean() <= SURE * gain.std() / np.sqrt(len(gain)):
        raise SpaceError(
            f"{encoder.space} is not compatible with the stored vectors of {gallery.path}: mean cosine "
            f"{fit.mean():.3f} with those of the same items, {strangers.mean():.3f} with those of others ({len(fit)} "
            "items). Its queries would find noise; use a strategy that needs no trained encoder, for example rank-merge"
        )
    same, others = round(float(fit.mean()), 4), round(float(strangers.mean()), 4)
    return {"items": len(fit), "cosine_same_item": same, "cosine_other_items": others}


def encoded_pairs(gallery: Gallery, encoder: ItemEncoder, old: str | None = None) -> tuple[Any, Any] | None:
    """``(stored vectors, vectors by the new encoder)`` of some items; ``None`` where too few can be encoded.

    ``old``: the space of the stored vectors; default: the one that is written now.
    """
    snapshot = gallery.snapshot()
    part = snapshot.new if old is None else snapshot.rows_of(old)
    nums = np.sort(part.nums)
    if not len(nums):
        return None
    chosen = nums[np.unique(np.linspace(0, len(nums) - 1, CHECK_PAIRS).astype(np.int64))]
    found = gallery.store.items(chosen)
    items = [found[num] for num in chosen.tolist() if not encoder.reads_images or found[num].uri]
    if len(items) < MIN_PAIRS:
        return None
    encoded = encoder.items(items)
    if len(encoded.positions) < MIN_PAIRS:
        return None
    return part.vectors_of(np.array([items[row].num for row in encoded.positions])), encoded.vectors
