"""The contrastive objective of a dual encoder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tiny_pairs import CAPTIONS, Captioned, tiny_batch, tiny_encoder

from bowerbird.batch import Batch
from bowerbird.errors import InputError, RecipeError
from bowerbird.protocols import BuildContext, Encoder
from bowerbird.testing import ObjectiveContract, SimpleBuildContext, run_two_ranks
from bowerbird.testing.training import TinyEncoder
from bowerbird.train.data import collate
from bowerbird_videotext.contrastive import pair_accuracy, pair_similarities
from bowerbird_videotext.frozen import FrozenConfig, FrozenObjective
from bowerbird_videotext.losses import max_margin_loss, symmetric_info_nce


def made(**settings: Any) -> FrozenObjective:
    context = SimpleBuildContext(dataset=Captioned())
    return FrozenObjective.build(FrozenConfig(**settings), tiny_encoder(), context)


class TestFrozen(ObjectiveContract):
    name = "videotext:frozen"
    encoder_inputs = ("video", "text")
    batch_size = 6

    def make_encoder(self) -> Encoder:
        return tiny_encoder()

    def make_context(self) -> BuildContext:
        return SimpleBuildContext(dataset=Captioned())

    def make_batch(self, *, seed: int = 0) -> Batch:
        return tiny_batch(made().encoder, self.batch_size, seed=seed)

    def make_encoder_batch(self, encoder: Encoder) -> Batch:
        return {"video": self.make_batch()["video"]}


class TestFrozenWithAMargin(TestFrozen):
    config: ClassVar[dict[str, Any]] = {"loss": "max-margin"}


def test_the_loss_is_that_of_the_cosines_of_the_two_encoders() -> None:
    objective = made(temperature=0.1).eval()
    batch = tiny_batch(objective.encoder)
    texts, videos = objective.encoder.encode_text(batch["text"]), objective.encoder.encode_video(batch["video"])
    cosines = torch.nn.functional.cosine_similarity(texts[:, None], videos[None], dim=-1)
    own = torch.arange(6)
    cross = torch.nn.functional.cross_entropy
    expected = cross(cosines / 0.1, own) + cross(cosines.T / 0.1, own)
    output = objective(batch)
    torch.testing.assert_close(output.total, expected)
    assert output.stats["batch_accuracy"] == (cosines.argmax(1) == own).float().mean()
    margin = made(loss="max-margin", margin=0.3).eval()
    margin.load_state_dict(objective.state_dict())
    torch.testing.assert_close(margin(batch).total, max_margin_loss(cosines, 0.3))


def test_equal_vectors_give_the_loss_of_chance() -> None:
    loss = symmetric_info_nce(pair_similarities(torch.ones(5, 3), torch.ones(5, 3)))
    assert loss.item() == pytest.approx(2 * math.log(5), rel=1e-6)
    assert pair_accuracy(torch.eye(4)) == 1


def test_a_batch_of_pictures_is_a_batch_of_videos_of_one_frame() -> None:
    objective = made().eval()
    batch = tiny_batch(objective.encoder)
    first = batch["video"][:, :1]
    pictures = {"image": first[:, 0], "text": batch["text"]}
    assert torch.equal(objective(pictures).total, objective({**batch, "video": first}).total)


def test_items_become_clips_and_captions_that_depend_on_their_generator_alone() -> None:
    objective = made()
    transform = objective.item_transform()
    assert transform is not None
    items = [transform({**Captioned()[i], "index": i}, np.random.default_rng(i)) for i in range(4)]
    batch = collate(items, objective.encoder.tokenize)
    assert batch["video"].shape == (4, 2, 3, 8, 8) and batch["caption"] == CAPTIONS[:4]
    assert (batch["video"][:, 1] == 0).all()  # pictures have one frame
    assert objective(batch).total.isfinite()


def test_the_vocabulary_is_made_of_the_captions_once_and_kept_where_there_is_one(tmp_path: Path) -> None:
    encoder = made().encoder
    digest = encoder.ready_tokenizer().digest()
    again = FrozenObjective.build(
        FrozenConfig(), encoder, SimpleBuildContext(dataset=Captioned(["a zebra", "a zebra runs"]))
    )
    assert again.encoder.ready_tokenizer().digest() == digest
    encoder.ready_tokenizer().save_pretrained(tmp_path)
    FrozenObjective.build(FrozenConfig(), tiny_encoder(tokenizer=str(tmp_path)), SimpleBuildContext())


def test_other_encoders_and_data_without_captions_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"trains videotext:dual-encoder, not a TinyEncoder"):
        FrozenObjective.build(FrozenConfig(), TinyEncoder(), SimpleBuildContext(dataset=Captioned()))
    with pytest.raises(RecipeError, match=r"no captions to make a vocabulary of; set encoder.tokenizer"):
        FrozenObjective.build(FrozenConfig(), tiny_encoder(), SimpleBuildContext())
    with pytest.raises(InputError, match="it has video"):
        made()({"video": torch.zeros(2, 2, 3, 8, 8)})
    for settings in ({"temperature": 0.0}, {"margin": 0.0}, {"loss": "triplet"}):
        with pytest.raises(ValueError):
            FrozenConfig(**settings)
        with pytest.raises(ValueError):
            FrozenObjective(made().encoder, **settings)


# ------------------------------------------------------------------------------------------------ two processes


def gradients_of_a_rank(rank: int, state: dict[str, Any], count: int) -> dict[str, Any]:
    from bowerbird import dist

    objective = made().double()
    objective.load_state_dict(state)
    batch = tiny_batch(objective.encoder, count)
    part = slice(rank * count // dist.world_size(), (rank + 1) * count // dist.world_size())
    own = {
        "video": batch["video"].double()[part],
        "text": {key: value[part] for key, value in batch["text"].items()},
    }
    loss = objective(own).total
    loss.backward()
    # What DDP does: the mean of the gradients of all processes.
    means = {name: dist.mean_over_processes(p.grad) for name, p in objective.named_parameters()}
    return {"loss": loss.detach(), **means}


def test_two_processes_have_the_loss_and_the_gradient_of_one_with_the_whole_batch() -> None:
    state = made().double().state_dict()
    one = gradients_of_a_rank(0, state, 6)
    for rank in run_two_ranks(gradients_of_a_rank, state, 6, timeout=240):
        for name, value in one.items():
            torch.testing.assert_close(rank[name], value, rtol=1e-9, atol=1e-12, msg=f"{name} differs")
