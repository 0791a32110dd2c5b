"""Parts of a data set by domain: what is trained on, and the domains that are left out of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from bowerbird.data import subset
from bowerbird.data.dataset import Dataset
from bowerbird.errors import DataError, InputError, UnknownNameError, did_you_mean

SPLITS = ("all", "train", "validation", "test")


def check_split(split: str | None, unseen: Sequence[str], known: Sequence[str], *, name: str) -> str:
    """``split``, ``all`` by default.

    Raises:
        UnknownNameError: A split or a domain in ``unseen`` that does not exist.
        InputError: Nothing is left out where the split ``test`` is asked for, or everything is.
    """
    split = split or "all"
    if split not in SPLITS:
        raise UnknownNameError(
            f"{name} has no split {split!r}; it has {', '.join(SPLITS)}.{did_you_mean(split, SPLITS)}"
        )
    for domain in unseen:
        if domain not in known:
            raise UnknownNameError(
                f"{name}: unseen = {list(unseen)}: there is no domain {domain!r}; there are {', '.join(known)}."
                f"{did_you_mean(domain, known)}"
            )
    if split == "test" and not unseen:
        raise InputError(
            f"{name}: the split 'test' holds the domains in unseen, which is empty; choose of {', '.join(known)}"
        )
    if split in ("train", "validation") and set(known) <= set(unseen):
        raise InputError(f"{name}: unseen = {list(unseen)} leaves no domain for the split {split!r}")
    return split


def leave_out(
    dataset: Dataset, split: str | None, unseen: Sequence[str], *, validation_fraction: float, name: str
) -> Dataset:
    """The items of ``dataset`` that are in ``split``.

    Args:
        dataset: Its items have a ``domain``.
        split: ``test``: every item of the domains in ``unseen``; ``train`` and ``validation``: the items of the others,
            divided by a hash of their ids, so that an item stays on its side when others come or go; ``all``.
        unseen: Names of domains.
        validation_fraction: Share of ``validation``.
        name: Of the data set, for messages.

    Raises:
        UnknownNameError, InputError: As ``check_split``.
        DataError: The split is empty.
    """
    domains = dataset.domain_indices()
    there = [dataset.domains[i] for i in sorted(set(domains))]
    split = check_split(split, unseen, there, name=name)
    if split == "all":
        return dataset

    def belongs(item_id: str, domain: int) -> bool:
        if split == "test" or dataset.domains[domain] in unseen:
            return split == "test" and dataset.domains[domain] in unseen
        return (_fraction(item_id) < validation_fraction) == (split == "validation")

    chosen = [
        i for i, (item, domain) in enumerate(zip(dataset.item_ids, domains, strict=True)) if belongs(item, domain)
    ]
    if not chosen:
        raise DataError(
            f"{name}: the split {split!r} is empty ({len(dataset)} items in all, unseen = {list(unseen)}, "
            f"validation_fraction = {validation_fraction})"
        )
    return subset(dataset, chosen)


def _fraction(item_id: str) -> float:
    return int.from_bytes(hashlib.sha256(item_id.encode("utf-8", "surrogateescape")).digest()[:7], "big") / 2**56
