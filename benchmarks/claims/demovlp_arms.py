"""The arms of demovlp.toml: recipes of ``bowerbird train``, then which region each noun looks at, and retrieval."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bowerbird.encoders import load_encoder
from bowerbird.recipe import resolve_recipe
from bowerbird.train.loop import train
from bowerbird_videotext.data_configs import MovingConfig
from bowerbird_videotext.demovlp import attention_weights, relevance
from bowerbird_videotext.demovlp_encoder import DemoVLPEncoder, Parts
from bowerbird_videotext.losses import cosine_similarity_matrix
from bowerbird_videotext.moving import Moving
from bowerbird_videotext.region_cache import cache_regions
from bowerbird_videotext.tokenizer import WordPieceTokenizer
from bowerbird_videotext.video_retrieval import recall_summary, retrieval_ranks

Values = dict[str, float]
SPRITES = 2  # regions 0 and 1 of a frame, in the order of the caption; the others show none


def run(plan: Mapping[str, Any], seed: int) -> Values:
    """``<arm>.grounding``: percent of nouns that attend most to their own sprite. ``<arm>.R1``, ``<arm>.R1_pairs``:
    percent of captions that find their video among the held-out ones, by whole vectors and with regions and words.

    The seed sets the videos (training and test), the first weights and the order of batches.
    """
    values: Values = {}
    with tempfile.TemporaryDirectory(prefix="bowerbird-claim-") as name:
        folder = Path(name)
        recipe = copy.deepcopy(dict(plan["recipe"]))
        recipe["dataset"] |= {"root": str(folder / "videos"), "seed": seed}
        recipe["objective"]["region_cache"] = str(folder / "regions")
        settings = {key: value for key, value in recipe["dataset"].items() if key not in ("use", "split")}
        test = Moving.build(MovingConfig.model_validate(settings), "test")
        for arm in plan["arms"]:
            overrides = {"train.seed": seed, **arm.get("set", {})}
            texts = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
            run_dir = folder / arm["name"]
            train(resolve_recipe(copy.deepcopy(recipe), "plan", texts), run_dir)
            found = measured(load_encoder(run_dir, device="cpu").module, test, folder / "regions")
            values |= {f"{arm['name']}.{metric}": value for metric, value in found.items()}
    return values


@torch.no_grad()
def measured(encoder: Any, test: Moving, folder: Path) -> Values:
    assert isinstance(encoder, DemoVLPEncoder) and encoder.preprocessing is not None
    cache = cache_regions(
        test,
        encoder.extractor,
        folder,
        preprocessing=encoder.preprocessing,
        frames=1,
        regions_per_frame=encoder.config.regions_per_frame,
        identity=encoder.extractor_identity(),
    )
    rows = [cache.read(item_id).batch() for item_id in test.item_ids]
    batch: dict[str, Any] = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    captions = [test.captions(i)[0] for i in range(len(test))]
    batch["text"] = encoder.tokenize(captions)
    videos, texts = encoder.video_parts(batch), encoder.text_parts(batch["text"])
    return {
        "grounding": grounding(encoder, test, captions, videos, texts),
        "R1": recall_at_1(cosine_similarity_matrix(texts.whole, videos.whole)),
        "R1_pairs": recall_at_1(encoder.pair_scores(batch, batch, chunk=64)),
    }


def grounding(encoder: DemoVLPEncoder, test: Moving, captions: list[str], videos: Parts, texts: Parts) -> float:
    """Percent of nouns that attend most to the region of their own sprite."""
    right = total = 0
    tokenizer = encoder.ready_tokenizer()
    for i, caption in enumerate(captions):
        pairs = relevance(videos.parts[i : i + 1], texts.parts[i : i + 1]).transpose(2, 3)
        asks, there = texts.valid[i : i + 1], videos.valid[i : i + 1]
        weights = attention_weights(
            pairs, asks, there, scale=encoder.config.scale, focal=False, ignore_padding=encoder.config.ignore_padding
        )[0, 0]
        nouns = [actor.noun for actor in test.actors(i)]
        assert len(nouns) == SPRITES
        for sprite, place in enumerate(places_of(nouns, caption, tokenizer)):
            right += int(weights[place].argmax()) == sprite
            total += 1
    return 100 * right / total


def places_of(nouns: list[str], caption: str, tokenizer: WordPieceTokenizer) -> list[int]:
    """Rows of the last pieces of words among the rows behind the class piece."""
    places, row = {}, 0
    for word in caption.split():
        row += tokenizer.pieces(word)
        places[word] = row - 1
    return [places[noun] for noun in nouns]


def recall_at_1(similarity: Tensor) -> float:
    ranks = retrieval_ranks(similarity, torch.arange(len(similarity)), "t2v", "average")
    return float(recall_summary(ranks, (1,))["R@1"])
