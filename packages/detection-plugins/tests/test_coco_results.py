from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval import mask as rle_masks
from PIL import Image

from bowerbird.coco import coco_results, run_lengths
from bowerbird.data.uris import open_dataset
from bowerbird.protocols import Objects


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (33, 1), (64, 96)])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.99, 1.0])
def test_masks_of_a_results_file_are_what_coco_writes(size, share):
    mask = np.random.default_rng(int(100 * share)).random(size) < share
    mask[size[0] // 3 : size[0] // 2] = True
    encoded = rle_masks.encode(np.asfortranarray(mask, dtype=np.uint8))
    counts = encoded["counts"].decode() if isinstance(encoded["counts"], bytes) else encoded["counts"]
    assert run_lengths(mask) == {"size": list(size), "counts": counts}


def test_a_results_file_of_the_right_answers_has_the_ap_of_one():
    dataset, _ = open_dataset("detection:canvases?count=6", "test")
    annotations = dataset.coco()
    ids = [category["id"] for category in dataset.categories()]
    results = []
    for index in range(len(dataset)):
        right = dataset.objects(index)
        found = Objects(right.boxes, right.labels, torch.linspace(0.9, 0.8, len(right.boxes)), right.masks)
        results += coco_results(found, annotations["images"][index]["id"], ids)
    truth = COCO(annotations)
    for kind in ("bbox", "segm"):
        measured = COCOeval_faster(truth, truth.loadRes(results), kind, print_function=lambda *_: None)
        measured.run()
        assert measured.stats[0] == pytest.approx(1.0)


def test_a_set_keeps_the_ids_of_its_annotation_file_for_results(tmp_path):
    images = []
    for number, name in ((139, "b.png"), (42, "a.png")):
        Image.new("RGB", (30, 20)).save(tmp_path / name)
        images.append({"id": number, "file_name": name, "width": 30, "height": 20})
    boxes = [
        {"id": i + 1, "image_id": 139, "category_id": c, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}
        for i, c in enumerate((90, 7))
    ]
    file = {
        "images": images,
        "annotations": boxes,
        "categories": [{"id": 90, "name": "red"}, {"id": 7, "name": "blue"}],
    }
    (tmp_path / "all.json").write_text(json.dumps(file))
    dataset, _ = open_dataset(f"detection:coco?root={tmp_path}&annotations=all.json&images=.", "all")
    assert dict(zip(dataset.item_ids, dataset.image_ids, strict=True)) == {"b.png": 139, "a.png": 42}
    assert dict(zip(dataset.classes, dataset.category_ids, strict=True)) == {"red": 90, "blue": 7}
