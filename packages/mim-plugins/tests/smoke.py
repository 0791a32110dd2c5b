"""Run with the Python of an environment that holds only bowerbird-mim and core."""

import subprocess
import sys
from pathlib import Path

out = subprocess.run(
    [str(Path(sys.executable).with_name("bowerbird")), "list"], capture_output=True, text=True, check=True
)
NAMES = """
vit mae emae saim dino knn linear-probe finetune beit-vit beit mc-beit mst part-vit pass
reid-finetune reid composite-people dvae vqvae tokenizer tokenizer-quality univip canvases
"""
for name in NAMES.split():
    assert f"mim:{name}" in out.stdout, f"mim:{name} is not in\n{out.stdout}"

import torch  # noqa: E402

from bowerbird_mim.mae import MaskedAutoencoder  # noqa: E402
from bowerbird_mim.vit import ViTEncoder  # noqa: E402

encoder = ViTEncoder(image_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2)
output = MaskedAutoencoder(encoder, decoder_dim=8, decoder_depth=1, decoder_heads=2)(torch.randn(2, 3, 16, 16))
assert output.pred.shape == (2, 16, 48)
print("bowerbird-mim alone: ok")
