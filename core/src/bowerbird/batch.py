"""The keys of a batch, a plain ``dict``: data sets say which keys they provide, methods which they need."""

from __future__ import annotations

from typing import Any

Batch = dict[str, Any]

# key -> shape and meaning. B batch, T frames, H x W pixels, L tokens, R regions, D width.
BATCH_KEYS: dict[str, str] = {
    "image": "float32 (B, 3, H, W), normalised as the encoder's preprocessing says",
    "video": "float32 (B, T, 3, H, W), normalised as the encoder's preprocessing says; zeros after the last frame",
    "text": "dict with input_ids int64 (B, L) and attention_mask int64 (B, L)",
    "label": "int64 (B,), class index in 0..num_classes-1",
    "item_id": "list of B strings, stable ids of the items",
    "index": "int64 (B,), position of the item in its split",
    "domain": "int64 (B,), index of the domain (style, camera, dataset)",
    "boxes": "list of B float32 (R_i, 4), x1 y1 x2 y2 in pixels",
    "label_map": "int64 (B, H, W), class index of every pixel, 255 where it does not count",
    "masks": "list of B bool (R_i, H, W)",
    "keypoints": "list of B float32 (R_i, K, 3), x y in pixels and visibility 0, 1 or 2",
    "crowd": "list of B bool (R_i,), boxes around groups, which do not count",
    "image_size": "int64 (B, 2), height and width before a picture was padded at the bottom and the right",
    "box_labels": "list of B lists of R_i class indices, one per box",
    "regions": "float32 (B, T, R, D), region features",
    "frozen_features": "float32 (B, F), cached output of the encoder's frozen trunk; replaces image",
    "old_features": "float32 (B, D_old), output of the old encoder for the same items",
}
