"""The plain vision transformer: DINO's forward pass, chosen patches, other picture sizes, refusals."""

from __future__ import annotations

import pytest
import torch

from bowerbird.errors import InputError
from bowerbird.testing import EncoderContract, assert_close
from bowerbird_mim.vit import ViTEncoder

SMALL = {"image_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0}


class TestContract(EncoderContract):
    name = "mim:vit"
    config = {**SMALL}


class TestContractOfARectangle(EncoderContract):
    name = "mim:vit"
    config = {**SMALL, "image_size": [16, 8], "position": "learned", "pooling": "class", "init": "truncated"}


def from_golden(values: dict, **options: object) -> ViTEncoder:
    encoder = ViTEncoder(
        image_size=values["img_size"],
        patch_size=values["patch_size"],
        embed_dim=values["embed_dim"],
        depth=values["depth"],
        num_heads=values["num_heads"],
        mlp_ratio=values["mlp_ratio"],
        in_channels=values["sd.patch_embed.proj.weight"].shape[1],
        layer_norm_eps=values["layernorm_eps"],
        **options,
    ).double()
    own = encoder.state_dict()
    encoder.load_state_dict({key: values[f"sd.{key}"] for key in own})
    return encoder


def test_global_and_local_views_of_dino(golden) -> None:
    values = golden("dino/vit_forward")
    encoder = from_golden(values, position="learned", pooling="class")
    out_global = encoder({"image": values["global_crop"]}).pooled
    out_local = encoder({"image": values["local_crop"]}).pooled
    assert_close(out_global, values["out_global"])
    assert_close(out_local, values["out_local"])
    _, attention = encoder.last_attention(values["global_crop"])
    assert_close(attention, values["last_attention_global"])
    rows, columns = (side // values["patch_size"] for side in values["local_crop"].shape[2:])
    assert_close(encoder.positions((rows, columns)), values["pos_embed_local"])


def test_masked_tokens_of_the_student_of_mst(golden) -> None:
    values = golden("mst/masked_student_tokens")
    encoder = from_golden(values, position="learned")
    tokens = encoder.tokens(values["images"], token_mask=values["mask"].bool(), mask_token=values["mask_token"])
    assert_close(tokens, values["tokens"])


def test_the_order_of_kept_patches_permutes_their_tokens_and_nothing_else() -> None:
    encoder = ViTEncoder(**SMALL).double().eval()
    images, keep = torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.stack([torch.randperm(16)[:5]] * 2)
    order = torch.randperm(5)
    tokens = encoder.tokens(images, ids_keep=keep)
    permuted = encoder.tokens(images, ids_keep=keep[:, order])
    torch.testing.assert_close(permuted[:, 1:], tokens[:, 1:][:, order])
    torch.testing.assert_close(permuted[:, 0], tokens[:, 0])


def test_keeping_all_patches_is_the_plain_forward_pass() -> None:
    encoder = ViTEncoder(**SMALL).double().eval()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    order = torch.stack([torch.randperm(16) for _ in range(2)])
    tokens = encoder.tokens(images, ids_keep=order)[:, 1:]
    back = order.argsort(dim=1)[..., None].expand(-1, -1, 12)
    torch.testing.assert_close(tokens.gather(1, back), encoder({"image": images}).tokens)


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(InputError, match="18 x 18 pixels cannot be divided into patches of 4"):
        ViTEncoder(image_size=18, patch_size=4)
    with pytest.raises(InputError, match="embed_dim = 10 is no multiple of num_heads = 3"):
        ViTEncoder(embed_dim=10, num_heads=3)
    with pytest.raises(InputError, match="embed_dim = 12 is no multiple of num_heads = 0"):
        ViTEncoder(embed_dim=12, num_heads=0)
    with pytest.raises(InputError, match="6 x 16 pixels cannot be divided"):
        ViTEncoder(**SMALL)({"image": torch.zeros(1, 3, 6, 16)})


@pytest.mark.parametrize(
    "options",
    [
        {"position": "cosine"}, {"pooling": "max"}, {"init": "normal"}, {"depth": -1}, {"in_channels": 0},
        {"mlp_ratio": 0.0}, {"drop_path": 1.5},
    ],
)  # fmt: skip
def test_values_that_no_encoder_has_are_refused_by_name(options: dict) -> None:
    ((name, value),) = options.items()
    with pytest.raises(InputError, match=f"{name} = {value!r}"):
        ViTEncoder(**{**SMALL, **options})
