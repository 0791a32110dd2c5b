"""Tokenizers of others from files: the same numbers as their formulas, whatever the sizes; other files are refused.

The networks are written here a second time, as functions of a file's tensors.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from bowerbird.errors import DataError, InputError
from bowerbird.testing import assert_close
from bowerbird_mim.tokenizer import DiscreteVAE, ImageTokenizer, load_tokenizer

State = dict[str, Tensor]


def conv(
    state: State, name: str, out: int, into: int, kernel: int, names: tuple[str, str] = ("weight", "bias")
) -> None:
    state[f"{name}.{names[0]}"] = torch.randn(out, into, kernel, kernel) / (into * kernel**2) ** 0.5
    state[f"{name}.{names[1]}"] = torch.randn(out) / 4


# ------------------------------------------------------------------------------------------------ DALL-E


def dalle_blocks(state: State, hidden: int, blocks: int, ends: dict[str, tuple[int, int, int]], decoder: bool) -> State:
    """Tensors with DALL-E's names: ``blocks.group_1.block_1.res_path.conv_1.w``."""
    widths = [hidden * 2**group for group in range(4)]
    kernels = (1, 3, 3, 3) if decoder else (3, 3, 3, 1)
    for end, sizes in ends.items():
        conv(state, f"blocks.{end}", *sizes, names=("w", "b"))
    into = ends["input"][0]
    for group, width in enumerate(reversed(widths) if decoder else widths, start=1):
        for block in range(1, blocks + 1):
            name = f"blocks.group_{group}.block_{block}"
            if into != width:
                conv(state, f"{name}.id_path", width, into, 1, names=("w", "b"))
            inner = [into, width // 4, width // 4, width // 4, width]
            for i in range(4):
                conv(state, f"{name}.res_path.conv_{i + 1}", inner[i + 1], inner[i], kernels[i], names=("w", "b"))
            into = width
    return state


def dalle_forward(state: State, x: Tensor, blocks: int, decoder: bool) -> Tensor:
    def apply(name: str, x: Tensor) -> Tensor:
        weight = state[f"blocks.{name}.w"]
        return F.conv2d(x, weight, state[f"blocks.{name}.b"], padding=(weight.shape[-1] - 1) // 2)

    x = apply("input", x)
    for group in range(1, 5):
        for block in range(1, blocks + 1):
            name = f"group_{group}.block_{block}"
            branch = x
            for i in range(1, 5):
                branch = apply(f"{name}.res_path.conv_{i}", branch.relu())
            x = (apply(f"{name}.id_path", x) if f"blocks.{name}.id_path.w" in state else x) + branch / (4 * blocks) ** 2
        if group < 4:
            x = F.interpolate(x, scale_factor=2, mode="nearest") if decoder else F.max_pool2d(x, 2)
    return apply("output.conv", x.relu())


def test_the_encoder_of_dalle(tmp_path: Path) -> None:
    state = dalle_blocks({}, 8, 2, {"input": (8, 3, 7), "output.conv": (20, 64, 1)}, decoder=False)
    save_file(state, tmp_path / "encoder.safetensors")
    tokenizer = load_tokenizer(tmp_path / "encoder.safetensors")
    assert isinstance(tokenizer, ImageTokenizer)
    assert (tokenizer.vocab_size, tokenizer.stride, tokenizer.preprocessing.size) == (20, 8, 112)
    images = torch.randn(2, 3, 16, 24)
    assert_close(tokenizer.logits(images), dalle_forward(state, images, 2, decoder=False), rtol=1e-4, atol=1e-5)
    assert tokenizer.ids(images).shape == (2, 2, 3)
    with pytest.raises(InputError, match="holds no decoder"):
        tokenizer.decode(tokenizer.ids(images))


def test_pictures_for_dalle_go_from_a_tenth_to_nine_tenths(tmp_path: Path) -> None:
    state = dalle_blocks({}, 4, 1, {"input": (4, 3, 7), "output.conv": (20, 32, 1)}, decoder=False)
    torch.save(state, tmp_path / "encoder.pth")
    numbers = load_tokenizer(tmp_path / "encoder.pth").preprocessing
    assert_close((torch.tensor([0.0, 0.5, 1.0]) - numbers.mean[0]) / numbers.std[0], torch.tensor([0.1, 0.5, 0.9]))


def test_encoder_and_decoder_of_dalle_in_one_file(tmp_path: Path) -> None:
    encoder = dalle_blocks({}, 4, 1, {"input": (4, 3, 7), "output.conv": (20, 32, 1)}, decoder=False)
    decoder = dalle_blocks({}, 4, 1, {"input": (6, 20, 1), "output.conv": (6, 4, 1)}, decoder=True)
    both = {f"encoder.{k}": v for k, v in encoder.items()} | {f"decoder.{k}": v for k, v in decoder.items()}
    save_file(both, tmp_path / "dvae.safetensors")
    tokenizer = load_tokenizer(tmp_path / "dvae.safetensors")
    ids = torch.randint(0, 20, (2, 2, 3))
    one_hot = F.one_hot(ids, 20).movedim(-1, 1).float()
    expected = dalle_forward(decoder, one_hot, 1, decoder=True)[:, :3].sigmoid()
    assert_close(tokenizer.decode(ids), expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ VQGAN


def vq_norm(state: State, name: str, width: int) -> None:
    state[f"{name}.weight"], state[f"{name}.bias"] = 1 + torch.randn(width) / 4, torch.randn(width) / 4


def vq_block(state: State, name: str, out: int, into: int) -> None:
    vq_norm(state, f"{name}.norm1", into)
    conv(state, f"{name}.conv1", out, into, 3)
    vq_norm(state, f"{name}.norm2", out)
    conv(state, f"{name}.conv2", out, out, 3)
    if into != out:
        conv(state, f"{name}.nin_shortcut", out, into, 1)


def vq_attention(state: State, name: str, width: int) -> None:
    vq_norm(state, f"{name}.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        conv(state, f"{name}.{part}", width, width, 1)


def vq_half(state: State, side: str, widths: list[int], first: int, blocks: int, latent: int, attention: int) -> None:
    levels = range(len(widths))
    if side == "encoder":
        conv(state, "encoder.conv_in", first, 3, 3)
        conv(state, "encoder.conv_out", latent, widths[-1], 3)
        inputs, name, resize, last = [first, *widths[:-1]], "down", "downsample", widths[-1]
    else:
        conv(state, "decoder.conv_in", widths[-1], latent, 3)
        conv(state, "decoder.conv_out", 3, widths[0], 3)
        inputs, name, resize, last, blocks = [*widths[1:], widths[-1]], "up", "upsample", widths[0], blocks + 1
    vq_norm(state, f"{side}.norm_out", last)
    for part in ("block_1", "block_2"):
        vq_block(state, f"{side}.mid.{part}", widths[-1], widths[-1])
    vq_attention(state, f"{side}.mid.attn_1", widths[-1])
    for level in levels:
        for i in range(blocks):
            vq_block(state, f"{side}.{name}.{level}.block.{i}", widths[level], widths[level] if i else inputs[level])
            if level == attention:
                vq_attention(state, f"{side}.{name}.{level}.attn.{i}", widths[level])
        if (level < len(widths) - 1) if side == "encoder" else level:
            conv(state, f"{side}.{name}.{level}.{resize}.conv", widths[level], widths[level], 3)


def vqgan(widths: list[int], *, first: int = 32, blocks: int = 1, attention: int = 1, gumbel: bool = False) -> State:
    """Tensors with VQGAN's names, a piece of its loss included."""
    state: State = {"loss.discriminator.main.0.weight": torch.zeros(1)}
    latent, dim, vocab = 12, 12 if gumbel else 7, 10
    vq_half(state, "encoder", widths, first, blocks, latent, attention)
    vq_half(state, "decoder", widths, first, blocks, latent, attention)
    conv(state, "quant_conv", dim, latent, 1)
    conv(state, "post_quant_conv", latent, dim, 1)
    if gumbel:
        conv(state, "quantize.proj", vocab, latent, 1)
        state["quantize.embed.weight"] = torch.randn(vocab, dim)
    else:
        state["quantize.embedding.weight"] = torch.randn(vocab, dim)
    return state


def vq_forward(state: State, side: str, x: Tensor, levels: int) -> Tensor:
    def apply(name: str, x: Tensor, **how: int) -> Tensor:
        weight = state[f"{side}.{name}.weight"]
        return F.conv2d(x, weight, state[f"{side}.{name}.bias"], **({"padding": weight.shape[-1] // 2} | how))

    def norm(name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, state[f"{side}.{name}.weight"], state[f"{side}.{name}.bias"], eps=1e-6)

    def swish(x: Tensor) -> Tensor:
        return x * x.sigmoid()

    def block(name: str, x: Tensor) -> Tensor:
        h = apply(f"{name}.conv1", swish(norm(f"{name}.norm1", x)))
        h = apply(f"{name}.conv2", swish(norm(f"{name}.norm2", h)))
        return h + (apply(f"{name}.nin_shortcut", x) if f"{side}.{name}.nin_shortcut.weight" in state else x)

    def attend(name: str, x: Tensor) -> Tensor:
        q, k, v = (apply(f"{name}.{part}", norm(f"{name}.norm", x)).flatten(2) for part in "qkv")  # (B, C, h * w)
        weights = (q.transpose(1, 2) @ k * x.shape[1] ** -0.5).softmax(dim=2)
        return x + apply(f"{name}.proj_out", (v @ weights.transpose(1, 2)).reshape(x.shape))

    def middle(x: Tensor) -> Tensor:
        return block("mid.block_2", attend("mid.attn_1", block("mid.block_1", x)))

    def level(name: str, x: Tensor) -> Tensor:
        i = 0
        while f"{side}.{name}.block.{i}.conv1.weight" in state:
            x = block(f"{name}.block.{i}", x)
            if f"{side}.{name}.attn.{i}.q.weight" in state:
                x = attend(f"{name}.attn.{i}", x)
            i += 1
        return x

    x = apply("conv_in", x)
    if side == "encoder":
        for i in range(levels):
            x = level(f"down.{i}", x)
            if i < levels - 1:
                x = apply(f"down.{i}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
        x = middle(x)
    else:
        x = middle(x)
        for i in reversed(range(levels)):
            x = level(f"up.{i}", x)
            if i:
                x = apply(f"up.{i}.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    return apply("conv_out", swish(norm("norm_out", x)))


@pytest.mark.parametrize("gumbel", [True, False])
@pytest.mark.parametrize("widths", [[32, 64], [64, 64, 32]])
def test_vqgan(tmp_path: Path, gumbel: bool, widths: list[int]) -> None:
    state = vqgan(widths, gumbel=gumbel)
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "last.ckpt")
    tokenizer = load_tokenizer(tmp_path / "last.ckpt")
    assert isinstance(tokenizer, ImageTokenizer)
    stride = 2 ** (len(widths) - 1)
    assert (tokenizer.vocab_size, tokenizer.stride) == (10, stride)
    assert tokenizer.preprocessing.mean == tokenizer.preprocessing.std == (0.5, 0.5, 0.5)

    images = torch.randn(2, 3, 4 * stride, 2 * stride)
    features = vq_forward(state, "encoder", images, len(widths))
    features = F.conv2d(features, state["quant_conv.weight"], state["quant_conv.bias"])
    if gumbel:
        codes = state["quantize.embed.weight"]
        expected = F.conv2d(features, state["quantize.proj.weight"], state["quantize.proj.bias"])
    else:
        codes = state["quantize.embedding.weight"]
        expected = -(features[:, None] - codes[None, :, :, None, None]).square().sum(dim=2)
    close = {"rtol": 1e-3, "atol": 1e-4}
    assert_close(tokenizer.logits(images), expected, **close)

    ids = tokenizer.ids(images)
    assert torch.equal(ids, expected.argmax(dim=1))
    latent = F.conv2d(codes[ids].movedim(-1, 1), state["post_quant_conv.weight"], state["post_quant_conv.bias"])
    assert_close(tokenizer.decode(ids), vq_forward(state, "decoder", latent, len(widths)), **close)


def test_a_vqgan_without_its_decoder_and_with_a_moving_average_codebook(tmp_path: Path) -> None:
    state = vqgan([32, 32], blocks=2)
    state["quantize.embedding.cluster_size"] = torch.ones(10)
    state["quantize.embedding.embed_avg"] = torch.ones(10, 7)
    kept = {name: value for name, value in state.items() if not name.startswith(("decoder.", "loss."))}
    save_file(kept, tmp_path / "vqgan.safetensors")
    tokenizer = load_tokenizer(tmp_path / "vqgan.safetensors")
    assert tokenizer.ids(torch.randn(1, 3, 8, 8)).shape == (1, 4, 4)
    with pytest.raises(InputError, match="no decoder"):
        tokenizer.decode(torch.zeros(1, 4, 4, dtype=torch.int64))


# ------------------------------------------------------------------------------------------------ BEiT's dVAE, refusals


@pytest.mark.parametrize("num_layers", [1, 3])
def test_the_dvae_of_beits_code(tmp_path: Path, num_layers: int) -> None:
    model = DiscreteVAE(16, 3, num_tokens=9, codebook_dim=5, hidden_dim=4, num_layers=num_layers).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "dvae.pth")
    again = load_tokenizer(tmp_path / "dvae.pth")
    images = torch.randn(2, 3, 16, 16)
    assert again.stride == 2**num_layers
    with torch.no_grad():
        assert torch.equal(again.reconstruct(images), model.reconstruct(images))


def test_files_of_another_layout_are_refused_with_what_differs(tmp_path: Path) -> None:
    def kept(name: str, state: State) -> Path:
        save_file(state, tmp_path / name)
        return tmp_path / name

    with pytest.raises(DataError, match=r"no known layout: it has 1 tensors \(patch_embed\.proj\.weight, \.\.\.\)"):
        load_tokenizer(kept("vit.safetensors", {"patch_embed.proj.weight": torch.zeros(1)}))
    state = vqgan([32, 64])
    del state["encoder.mid.attn_1.q.weight"]
    state["encoder.extra"] = torch.zeros(2)
    state["encoder.norm_out.weight"] = torch.zeros(32)
    message = (
        r"1 missing: encoder\.mid\.attn_1\.q\.weight; 1 unknown: encoder\.extra; "
        r"1 of another shape: encoder\.norm_out\.weight \(32,\) instead of \(64,\)"
    )
    with pytest.raises(DataError, match=message):
        load_tokenizer(kept("vqgan.safetensors", state))
    state = dalle_blocks({}, 4, 1, {"input": (4, 3, 7), "output.conv": (20, 32, 1)}, decoder=False)
    state["blocks.group_2.block_1.res_path.conv_2.w"] = torch.zeros(2, 2, 5, 5)
    with pytest.raises(DataError, match=r"conv_2\.weight \(2, 2, 5, 5\) instead of \(2, 2, 3, 3\)"):
        load_tokenizer(kept("dalle.safetensors", state))
    with pytest.raises(DataError, match=r"lacks encoder\.blocks\.output\.conv\.weight"):
        load_tokenizer(kept("half.safetensors", {k: v for k, v in state.items() if "output" not in k}))
    (tmp_path / "broken.safetensors").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="cannot be read as tensors"):
        load_tokenizer(tmp_path / "broken.safetensors")
    with pytest.raises(InputError, match="there is no such folder"):
        load_tokenizer(tmp_path / "nothing")


def test_pictures_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_file(vqgan([32, 32]), tmp_path / "vqgan.safetensors")
    tokenizer = load_tokenizer(tmp_path / "vqgan.safetensors")
    with pytest.raises(InputError, match="7 x 8 pixels: both sides must be multiples of 2"):
        tokenizer.logits(torch.zeros(1, 3, 7, 8))
    with pytest.raises(InputError, match=r"needs \(B, 3, height, width\)"):
        tokenizer.logits(torch.zeros(1, 1, 8, 8))
    with pytest.raises(InputError, match="NaN or infinite"):
        tokenizer.logits(torch.full((1, 3, 8, 8), torch.nan))
