"""``domain:looks``: the pictures of another data set rendered in different looks: domains without a download.

Made for small pictures of bright things on black, such as ``core:digits`` and ``core:fashion-mnist``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from bowerbird.data.dataset import Dataset
from bowerbird.data.uris import open_dataset
from bowerbird.errors import DataError
from bowerbird_domain.configs import LOOKS, Look, LooksConfig
from bowerbird_domain.domains import check_split

Picture = NDArray[np.float64]  # (H, W, 3), 0 to 1


def _blurred(x: Picture, generator: np.random.Generator) -> Picture:
    picture = Image.fromarray(np.rint(255 * x).astype(np.uint8))
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(len(x) / 16))) / 255


# look -> what it makes of a picture; everything random comes from the generator of the item
RENDER: Mapping[Look, Callable[[Picture, np.random.Generator], Picture]] = {
    "plain": lambda x, g: x,
    "tint": lambda x, g: x * g.uniform(0.3, 1.0, 3),  # a coloured lamp
    "blur": _blurred,
    "low-contrast": lambda x, g: 0.4 + 0.25 * x,  # fog
    "bright-background": lambda x, g: x + (1 - x) * g.uniform(0.3, 0.8, 3),  # on coloured paper
    "noise": lambda x, g: x + 0.35 * g.standard_normal(x.shape),  # a camera in the dark
}
assert tuple(RENDER) == LOOKS


class Looks(Dataset):
    """Every item of the source in every look, look by look; the id is ``look/id``.

    ``domain`` is the position in ``domains``, all looks that there are, whatever the settings. A look's random colours
    and noise are a function of seed, look and id: an item is the same whenever it is read.
    """

    domains = LOOKS

    def __init__(self, source: Dataset, looks: Sequence[Look], *, size: int | None, seed: int) -> None:
        self.source, self.looks, self.size, self.seed = source, tuple(looks), size, seed
        self.classes = source.classes

    @classmethod
    def build(cls, config: LooksConfig | None = None, split: str | None = None) -> Self:
        """``train``: the source's training items in the looks that are not ``unseen``; ``validation``: its test items
        in the same looks; ``test``: its test items in the ``unseen`` looks; ``all``: all items in all looks.

        Raises:
            UnknownNameError: Another data set, or a split that it or the source does not have.
            InputError: ``unseen`` leaves nothing to train on, or nothing to test on.
            DataError: The items of the source have no classes.
        """
        config = config or LooksConfig()
        split = check_split(split, config.unseen, config.looks, name="domain:looks")
        of_source = {"all": None, "train": config.train_split}.get(split, config.test_split)
        source, _ = open_dataset(config.source, of_source)
        if not source.classes:
            raise DataError(f"domain:looks: the items of {config.source!r} have no classes; name a set with labels")
        looks = [look for look in config.looks if split == "all" or (look in config.unseen) == (split == "test")]
        return cls(source, looks, size=config.size, seed=config.seed)

    def __len__(self) -> int:
        return len(self.looks) * len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"position {index} of {len(self)}")
        place, position = divmod(index, len(self.source))
        look, item = self.looks[place], self.source[position]
        image = item["image"]
        if self.size is not None and image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        domain = LOOKS.index(look)
        generator = np.random.default_rng([self.seed, domain, zlib.crc32(item["item_id"].encode())])
        pixels = RENDER[look](np.asarray(image.convert("RGB")) / 255, generator)
        return {
            "image": Image.fromarray(np.rint(255 * pixels.clip(0, 1)).astype(np.uint8)),
            "label": item["label"],
            "item_id": f"{look}/{item['item_id']}",
            "domain": domain,
        }

    @cached_property
    def item_ids(self) -> Sequence[str]:
        ids = list(self.source.item_ids)
        return [f"{look}/{item}" for look in self.looks for item in ids]

    def labels(self) -> Sequence[int]:
        return list(self.source.labels()) * len(self.looks)

    def domain_indices(self) -> Sequence[int]:
        return [LOOKS.index(look) for look in self.looks for _ in range(len(self.source))]

    def metadata(self) -> list[dict[str, str]]:
        """``label`` and ``domain`` of every item, by name."""
        labels = [self.classes[label] for label in self.source.labels()]
        return [{"domain": look, "label": label} for look in self.looks for label in labels]
