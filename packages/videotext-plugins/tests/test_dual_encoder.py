"""The encoder of clips and captions: its contract, its folder, its first weights, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny_pairs import CAPTIONS, tiny_batch, tiny_config, tiny_encoder

from bowerbird.batch import Batch
from bowerbird.encoders import load_encoder, save_encoder
from bowerbird.errors import DataError, InputError
from bowerbird.protocols import Encoder
from bowerbird.testing import EncoderContract, override_contract_test
from bowerbird_videotext.dual_encoder import DualEncoder, load_vit_weights
from bowerbird_videotext.space_time import SpaceTimeTransformer, inflate_temporal_embedding
from bowerbird_videotext.text import TextTransformer
from bowerbird_videotext.tokenizer import WordPieceTokenizer

USE = "videotext:dual-encoder"


def opened(**settings: Any) -> DualEncoder:
    encoder = tiny_encoder(**settings)
    encoder.open(CAPTIONS)
    torch.nn.init.normal_(encoder.video_encoder.temporal_embed)
    return encoder.eval()


def saved(encoder: DualEncoder, folder: Path, **settings: Any) -> str:
    config = tiny_config(**settings).model_dump(mode="json", exclude_defaults=True)
    return save_encoder(encoder, folder, use=USE, config=config)


class TestDualEncoder(EncoderContract):
    name = USE
    config: ClassVar[dict[str, Any]] = tiny_config().model_dump(mode="json", exclude_defaults=True)

    def build(self, seed: int = 0) -> DualEncoder:
        torch.manual_seed(seed)
        encoder = DualEncoder.build(self.make_config())
        encoder.open(CAPTIONS)
        return encoder

    def make_batch(self, encoder: Encoder, *, batch_size: int = 4, seed: int = 0) -> Batch:
        return {"video": tiny_batch(encoder, batch_size, seed=seed)["video"]}

    def wrong_batches(self, encoder: Encoder) -> Any:
        good = self.make_batch(encoder)["video"]
        yield "nothing", {}
        yield "three frames", {"video": torch.cat([good, good], dim=1)}
        yield "frames of another size", {"video": good[..., :4]}
        yield "a picture with one channel", {"image": good[:, 0, :1]}

    @override_contract_test(reason="clips and captions go through encoders of their own")
    def test_gradients_reach_every_trainable_parameter_and_no_frozen_one(self) -> None:
        encoder = self.build()
        batch = tiny_batch(encoder)
        for key in ("video", "text"):
            pooled = encoder({key: batch[key]}).pooled
            (pooled * torch.randn_like(pooled)).sum().backward()
        lacking = [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]
        assert not lacking


# ------------------------------------------------------------------------------------------------ vectors


def test_a_picture_is_a_video_of_one_frame_and_a_batch_with_a_video_gives_the_video() -> None:
    encoder = opened()
    batch = tiny_batch(encoder)
    first = batch["video"][:, 0]
    assert torch.equal(encoder({"image": first}).pooled, encoder({"video": first[:, None]}).pooled)
    assert torch.equal(encoder(batch).pooled, encoder.encode_video(batch["video"]))
    assert torch.equal(encoder({"text": batch["text"]}).pooled, encoder.encode_text(batch["text"]))
    assert torch.equal(encoder.encode_text(*batch["text"].values()), encoder.encode_text(batch["text"]))


def test_vectors_are_linear_maps_of_the_class_tokens_with_a_relu_before_that_of_texts() -> None:
    encoder = opened().double()
    batch = tiny_batch(encoder)
    video = batch["video"].double()
    whole, patches = encoder.video_encoder(video, return_tokens=True)
    found, projected = encoder.encode_video(video, return_tokens=True)
    weight, bias = encoder.video_proj.weight, encoder.video_proj.bias
    torch.testing.assert_close(found, whole @ weight.T + bias)
    torch.testing.assert_close(projected, patches @ weight.T + bias)
    states = encoder.text_encoder(**batch["text"])
    expected = states[-1][:, 0].clamp(min=0) @ encoder.text_proj.weight.T + encoder.text_proj.bias
    torch.testing.assert_close(encoder.encode_text(batch["text"]), expected)


def test_several_clips_of_a_video_give_the_mean_of_their_vectors() -> None:
    encoder = opened()
    clips = torch.randn(3, 4, 2, 3, 8, 8)
    torch.testing.assert_close(
        encoder.encode_video(clips), torch.stack([encoder.encode_video(clips[:, i]) for i in range(4)]).mean(0)
    )


def test_encoders_can_be_put_together_by_hand() -> None:
    words = WordPieceTokenizer.train(CAPTIONS)
    encoder = DualEncoder(
        SpaceTimeTransformer(8, 4, 8, 1, 2, max_frames=3), TextTransformer(len(words), 12, 1, 2), 5, tokenizer=words
    )
    texts, videos = encoder.encode_text(encoder.tokenize(["a boot"])), encoder.encode_video(torch.randn(4, 3, 3, 8, 8))
    assert encoder.similarity(texts, videos).shape == (1, 4) and encoder.frames == 3 and encoder.embed_dim == 5


# ------------------------------------------------------------------------------------------------ folders


def test_a_saved_encoder_brings_its_tokenizer_and_gives_the_same_vectors(tmp_path: Path) -> None:
    encoder = opened()
    fingerprint = saved(encoder, tmp_path / "encoder")
    loaded = load_encoder(tmp_path / "encoder")
    assert loaded.fingerprint == fingerprint and loaded.module.frames == 2
    batch = tiny_batch(encoder)
    texts = loaded.module.tokenize(CAPTIONS[:6])
    assert torch.equal(texts["input_ids"], batch["text"]["input_ids"])
    with torch.no_grad():
        for key in ("video", "text"):
            assert torch.equal(loaded.module({key: batch[key]}).pooled, encoder({key: batch[key]}).pooled)
    config = json.loads((tmp_path / "encoder" / "encoder.json").read_text())["config"]
    assert config["vocabulary"] == len(encoder.ready_tokenizer()) and "weights" not in config


def test_the_fingerprint_depends_on_the_vocabulary_and_another_tokenizer_is_refused(tmp_path: Path) -> None:
    first, second = opened(), tiny_encoder()
    second.open([caption.replace("boot", "toob") for caption in CAPTIONS])  # as many pieces of the same letters
    assert len(second.ready_tokenizer()) == len(first.ready_tokenizer())
    second.load_state_dict({**first.state_dict(), "vocabulary": second.vocabulary})
    assert saved(first, tmp_path / "first") != saved(second, tmp_path / "second")
    second.ready_tokenizer().save_pretrained(tmp_path / "first" / "tokenizer")
    with pytest.raises(DataError, match="not the one that this text encoder was trained with"):
        load_encoder(tmp_path / "first")


def test_an_encoder_without_tokenizer_says_what_to_do() -> None:
    encoder = tiny_encoder()
    for use in (
        lambda: encoder.tokenize(["a boot"]),
        lambda: encoder.encode_text(torch.zeros(1, 3, dtype=torch.int64)),
    ):
        with pytest.raises(InputError, match="training makes one of the captions, or set tokenizer"):
            use()
    assert encoder.encode_video(torch.zeros(1, 1, 3, 8, 8)).shape == (1, 6)
    with pytest.raises(InputError, match="no tokenizer came with it"):
        tiny_encoder(vocabulary=30).open(CAPTIONS)


def test_a_tokenizer_that_does_not_match_the_text_encoder_is_refused(tmp_path: Path) -> None:
    words = WordPieceTokenizer.train(CAPTIONS)
    words.save_pretrained(tmp_path)
    count = len(words)
    with pytest.raises(InputError, match=f"the tokenizer has {count} word pieces, the text encoder {count - 1}"):
        tiny_encoder(vocabulary=count - 1, tokenizer=str(tmp_path))
    with pytest.raises(InputError, match="do not belong together"):
        tiny_encoder(vocabulary=30_522, tokenizer=str(tmp_path))
    encoder = tiny_encoder(tokenizer=str(tmp_path))
    assert encoder.ready_tokenizer().max_length == 16  # the context of the encoder, not what the folder says
    encoder.open(["zebra"])
    assert encoder.ready_tokenizer().digest() == words.digest()


def test_captions_are_cut_to_the_shorter_of_the_limits_of_the_text_encoder_and_of_its_tokenizer() -> None:
    words = WordPieceTokenizer.train(CAPTIONS, max_length=9)
    video = SpaceTimeTransformer(8, 4, 8, 1, 2)
    for longest, limit in ((6, 6), (12, 9)):
        words.max_length = 9
        encoder = DualEncoder(video, TextTransformer(len(words), 8, 1, 2, max_length=longest), 5, tokenizer=words)
        words.truncated = 1  # it has warned
        pieces = encoder.tokenize([" ".join(CAPTIONS)])
        assert pieces["input_ids"].shape == (1, limit) and encoder.encode_text(pieces).shape == (1, 5)


def test_a_batch_of_nothing_gives_no_vectors_and_pieces_without_ids_are_refused() -> None:
    encoder = opened()
    nothing = torch.zeros(0, 3, dtype=torch.int64)
    assert encoder({"video": torch.zeros(0, 2, 3, 8, 8)}).pooled.shape == (0, 6)
    assert encoder({"text": {"input_ids": nothing, "attention_mask": nothing}}).pooled.shape == (0, 6)
    with pytest.raises(InputError, match="text has attention_mask; expected input_ids"):
        encoder({"text": {"attention_mask": nothing}})


# ------------------------------------------------------------------------------------------------ first weights


def test_weights_that_were_trained_with_another_tokenizer_are_refused(tmp_path: Path) -> None:
    saved(opened(), tmp_path / "encoder")
    other = WordPieceTokenizer.train([caption.replace("boot", "toob") for caption in CAPTIONS])  # as many pieces
    other.save_pretrained(tmp_path / "words")
    with pytest.raises(DataError, match=r"weights '.*encoder': the tokenizer is not the one"):
        tiny_encoder(weights=str(tmp_path / "encoder"), tokenizer=str(tmp_path / "words"))


def test_a_trained_encoder_starts_one_of_more_frames(tmp_path: Path) -> None:
    trained = opened()
    saved(trained, tmp_path / "encoder")
    for inflate in ("zeros", "bilinear"):
        encoder = tiny_encoder(frames=5, weights=str(tmp_path / "encoder"), inflate=inflate).eval()
        table = trained.video_encoder.temporal_embed
        assert torch.equal(encoder.video_encoder.temporal_embed, inflate_temporal_embedding(table, 5, inflate))
        assert torch.equal(
            encoder.encode_text(encoder.tokenize(CAPTIONS)), trained.encode_text(trained.tokenize(CAPTIONS))
        )
        if inflate == "zeros":
            video = torch.randn(2, 2, 3, 8, 8)
            assert torch.equal(encoder.encode_video(video), trained.encode_video(video))


def test_a_run_and_what_is_no_encoder_of_this_kind_are_told_apart(tmp_path: Path) -> None:
    saved(opened(), tmp_path / "run" / "encoder")
    tiny_encoder(weights=str(tmp_path / "run"))
    with pytest.raises(DataError, match="of another shape"):
        tiny_encoder(weights=str(tmp_path / "run"), embed_dim=16)
    with pytest.raises(DataError, match=r"missing.*timeattn|unknown.*timeattn"):
        tiny_encoder(weights=str(tmp_path / "run"), temporal_attention=False)
    with pytest.raises(DataError, match="no such file"):
        tiny_encoder(weights=str(tmp_path / "none.safetensors"))


def test_a_timm_transformer_starts_the_video_encoder(tmp_path: Path) -> None:
    vit: Any = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=8, depth=3, num_heads=2, num_classes=10
    ).eval()
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    encoder = tiny_encoder(weights=str(tmp_path / "vit.safetensors"), time_init="zeros").eval()
    picture = torch.randn(2, 3, 8, 8)
    expected = vit.forward_head(vit.forward_features(picture), pre_logits=True)
    torch.testing.assert_close(encoder.video_encoder(picture[:, None]), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(DataError, match="of another shape"):
        load_vit_weights(SpaceTimeTransformer(12, 4, 8, 3, 2), tmp_path / "vit.safetensors")


def test_settings_that_do_not_fit_each_other_are_refused() -> None:
    for settings in ({"patch_size": 3}, {"num_heads": 3}, {"text_heads": 3}, {"frames": 0}, {"frame": 2}):
        with pytest.raises(ValueError):
            tiny_config(**settings)
    with pytest.raises(ValueError, match="give one of them"):
        tiny_config(text_model="a", text_architecture={"model_type": "distilbert"})
