"""A training step of every method of videotext-plugins beside the same step in plain torch; and what masks, rolled
tokens and training-only parts cost.

python benchmarks/videotext_steps.py --output benchmarks/results/videotext_steps.json
python benchmarks/videotext_steps.py frozen mac                only these methods
python benchmarks/videotext_steps.py --only inference          only this part

A step is forward, loss and backward on one batch of made videos, read as in training; what moves after a step is
left out. Both sides have the same parameters, the same batch and the same random numbers; a pair whose losses or
gradients differ is refused. The sides alternate in one process on one thread; ratios are of the shortest processor
times, which others on the machine disturb least. Peak memory is what torch's allocator holds above what it held before
the step.

masked      a step of the video encoder on 40 % of the patches (MAC's default), against one on all of them
roll        a step of the unified transformer with rolled tokens, against one without
inference   embedding with the encoder that MCQ, MILES and MAC export, against a dual encoder alone; the vectors are
            compared with those of the encoder while it trains, too
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bowerbird.batch import Batch
from bowerbird.errors import UnknownNameError
from bowerbird.protocols import Dataset, Encoder, Objective
from bowerbird.recipe import build_config
from bowerbird.registry import get_registry
from bowerbird.testing import SimpleBuildContext
from bowerbird.train.data import TrainItems, collate
from common import peak_bytes, shortest, write_result

PLAIN = Path(__file__).parent / "videotext_plain"
STEP_LIMIT, MASKED_LIMIT, ROLL_LIMIT, INFERENCE_LIMIT = 1.05, 0.55, 1.03, 1.02
ROUNDS = {"small": 24, "tiny": 6}
BATCH = {"small": 32, "tiny": 8}
# 32 pixels: the small recipes; ViT-Tiny on 112 pixels: 4 x 49 patches, as many as a picture of 224.
VIDEO: dict[str, dict[str, Any]] = {
    "small": {"image_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4, "frames": 4},
    "tiny": {"image_size": 112, "patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3, "frames": 4},
}
TEXT: dict[str, dict[str, Any]] = {
    "small": {"text_dim": 128, "text_depth": 4, "text_heads": 4},
    "tiny": {"text_dim": 192, "text_depth": 6, "text_heads": 3},
}
DUAL = {size: VIDEO[size] | TEXT[size] for size in VIDEO}
PARTS = ("steps", "masked", "roll", "inference")


@dataclass(frozen=True)
class Case:
    """A method: its encoder with settings by size, its objective, and what it needs of a data set of made videos."""

    encoder: str
    settings: Mapping[str, Mapping[str, Any]]
    objective: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    dataset: str = "videotext:moving"


FRAMEWISE = {"temporal_attention": False, "temporal_embedding": False}  # MCQ's video encoder
REGIONS = {
    size: TEXT[size] | {key: VIDEO[size][key] for key in ("image_size", "embed_dim", "depth", "num_heads", "frames")}
    for size in VIDEO
}
FRAMES = {  # sixteen frames in two views; the backbone is never trained
    "small": {"backbone": "test_resnet", "image_size": 32, "blocks": (2,), "hidden": 64, "ffn": 128, "layers": 2},
    "tiny": {"backbone": "vit_tiny_patch16_224", "image_size": 112, "blocks": (3, 7, 11)},
}
CASES = {
    "all-in-one": Case("videotext:all-in-one", {s: VIDEO[s] | {"dropout": 0.0, "drop_path": 0.0} for s in VIDEO}),
    "demovlp": Case("videotext:demovlp", REGIONS, data={"verbs": (), "distractor_boxes": 4}),
    "frozen": Case("videotext:dual-encoder", DUAL),
    "mac": Case("videotext:dual-encoder", DUAL),
    "mcq": Case("videotext:dual-encoder", {size: DUAL[size] | FRAMEWISE for size in DUAL}),
    "miles": Case("videotext:dual-encoder", DUAL),
    "mv-former": Case(
        "videotext:mv-former",
        {size: {**FRAMES[size], "frames": 16, "dropout": 0.0} for size in FRAMES},
        data={"frames": 16},
    ),
}

# --------------------------------------------------------------------------------------------------------- together


def component(kind: str, use: str, settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """The class of a record and its settings."""
    record = get_registry().get(kind, use)
    return get_registry().load(record), build_config(record, dict(settings), where=f"{kind} {use!r}")


def videos(case: Case, folder: Path, count: int) -> Dataset:
    settings: dict[str, Any] = {
        "root": folder,
        "counts": {"train": count, "val": 1, "test": 1},
        "sprites": {"source": "core:digits", "names": {str(i): f"digit{i}" for i in range(10)}},
        **case.data,
    }
    target, config = component("dataset", case.dataset, settings)
    dataset: Dataset = target.build(config, "train")
    return dataset


def built(slug: str, size: str, folder: Path) -> tuple[Objective, Batch]:
    """The objective of a method in training mode, and a batch that training would give it."""
    case = CASES[slug]
    torch.manual_seed(0)
    dataset = videos(case, folder, max(BATCH.values()))
    target, config = component("encoder", case.encoder, case.settings[size])
    encoder: Encoder = target.build(config)
    target, config = component("objective", f"videotext:{slug}", case.objective)
    objective: Objective = target.build(config, encoder, SimpleBuildContext(dataset=dataset, total_steps=100))
    items = TrainItems(dataset, encoder.preprocessing, augment="none", seed=0, transform=objective.item_transform())
    chosen = [items[0, index] for index in range(BATCH[size])]
    return objective.train(), collate(chosen, getattr(encoder, "tokenize", None))


@contextmanager
def seeded() -> Iterator[None]:
    torch.manual_seed(1)
    yield


def step_of(module: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def step() -> Tensor:
        module.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        return value.detach()

    return step


def timed(ours: Callable[[], Any], other: Callable[[], Any], rounds: int) -> dict[str, float]:
    best = shortest({"ours": ours, "other": other}, rounds, within={"ours": seeded, "other": seeded})
    return {
        "ms": round(1e3 * best["ours"], 2),
        "reference_ms": round(1e3 * best["other"], 2),
        "ratio": round(best["ours"] / best["other"], 4),
    }


# ------------------------------------------------------------------------------------------------------- the parts


def method_step(slug: str, size: str, folder: Path) -> dict[str, Any]:
    objective, batch = built(slug, size, folder)
    plain = importlib.import_module(f"videotext_plain.{slug.replace('-', '_')}").plain(objective)
    steps = (step_of(objective, lambda: objective(batch).total), step_of(objective, lambda: plain(batch)))
    found = []
    for step in steps:
        with seeded():
            loss = float(step())
        found.append((loss, {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}))
    refuse_different(f"{slug}, {size}", *found[0], *found[1])
    memory = []
    for step in steps:
        objective.zero_grad(set_to_none=True)
        with seeded():
            memory.append(peak_bytes(step))
    return {
        "loss": found[0][0],
        **timed(*steps, ROUNDS[size]),
        "mb": round(memory[0] / 2**20, 2),
        "reference_mb": round(memory[1] / 2**20, 2),
    }


def refuse_different(
    what: str, loss: float, gradients: Mapping[str, Tensor], other: float, others: Mapping[str, Tensor]
) -> None:
    """End with a message unless both sides have the same loss and the same gradients, up to rounding."""
    if abs(loss - other) > 1e-4 * abs(other):
        raise SystemExit(f"{what}: ours gives the loss {loss}, plain torch {other}: not the same step")
    largest = max(float(gradient.abs().max()) for gradient in others.values())
    for name in {*gradients, *others}:
        zero = torch.zeros(())
        apart = float((gradients.get(name, zero) - others.get(name, zero)).abs().max())
        if apart > 1e-3 * largest:
            raise SystemExit(f"{what}: the gradients of {name} are {apart:.2e} apart: not the same step")


def masked_encoder(size: str, folder: Path) -> dict[str, Any]:
    """A step of MAC's video encoder on the patches that it keeps, against one on all of them."""
    from bowerbird_videotext.mac import kept_patches

    objective, batch = built("mac", size, folder)
    encoder, video = objective.encoder.video_encoder, batch["video"]
    keep = kept_patches(batch["patch_noise"], objective.video_ratio)
    whole = step_of(encoder, lambda: encoder(video).square().mean())
    kept = step_of(encoder, lambda: encoder(video, keep=keep).square().mean())
    share = keep.shape[-1] / batch["patch_noise"].shape[-1]
    return {**timed(kept, whole, ROUNDS[size]), "kept_share": round(share, 4)}


def rolled_tokens(size: str, folder: Path) -> dict[str, Any]:
    """A step of the unified transformer on clips and captions, with rolled tokens against one without."""
    case = CASES["all-in-one"]
    _, batch = built("all-in-one", size, folder)
    models = []
    for roll in (True, False):
        torch.manual_seed(0)
        target, config = component("encoder", case.encoder, {**case.settings[size], "roll": roll})
        encoder = target.build(config)
        encoder.open(batch["caption"])
        models.append(encoder.train())
    text = models[0].tokenize(batch["caption"])
    counts = [sum(p.numel() for p in model.parameters()) for model in models]

    def step(model: Any) -> Callable[[], Tensor]:
        return step_of(model, lambda: model.run(batch["video"], text).pooled.square().mean())

    return {**timed(step(models[0]), step(models[1]), ROUNDS[size]), "more_parameters": counts[0] - counts[1]}


def inference(slug: str, size: str, folder: Path) -> dict[str, Any]:
    """What a method exports, against the dual encoder alone with the same weights."""
    objective, batch = built(slug, size, folder)
    exported = objective.exported_encoder().eval()
    case = CASES[slug]
    target, config = component("encoder", case.encoder, case.settings[size])
    alone = target.build(config)
    alone.use_tokenizer(exported.ready_tokenizer())
    alone.load_state_dict(exported.state_dict())  # refuses parts that a dual encoder does not have
    alone.eval()

    def embed(encoder: Any) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            return encoder({"video": batch["video"]}).pooled, encoder({"text": batch["text"]}).pooled

    vectors = [embed(alone), embed(exported), embed(objective.encoder.eval())]  # the last with all parts of training
    equal = all(torch.equal(a, b) for others in vectors[1:] for a, b in zip(vectors[0], others, strict=True))
    sides = (lambda: embed(exported), lambda: embed(alone))
    return {**timed(*sides, 2 * ROUNDS[size]), "bit_equal": equal}


# ------------------------------------------------------------------------------------------------------------- main


def available(slug: str) -> str | None:
    """Why a method cannot be measured; ``None`` where it can."""
    try:
        get_registry().get("objective", f"videotext:{slug}")
    except UnknownNameError:
        return f"there is no objective videotext:{slug}"
    file = PLAIN / f"{slug.replace('-', '_')}.py"
    return None if file.is_file() else f"benchmarks/videotext_plain/{file.name} is not there"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slugs", nargs="*", choices=[*CASES, []], help="default: all")
    parser.add_argument("--only", choices=PARTS, help="default: all parts")
    parser.add_argument("--size", choices=sorted(VIDEO), help="default: every size")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    slugs, parts = options.slugs or list(CASES), (options.only,) if options.only else PARTS
    result: dict[str, Any] = {
        "limit_step": STEP_LIMIT,
        "limit_masked": MASKED_LIMIT,
        "limit_roll": ROLL_LIMIT,
        "limit_inference": INFERENCE_LIMIT,
        "not_measured": {},
        **{part: {} for part in parts},
    }
    measures: dict[str, tuple[list[str], Callable[[str, str, Path], dict[str, Any]]]] = {
        "steps": (slugs, method_step),
        "masked": (["mac"], lambda slug, size, folder: masked_encoder(size, folder)),
        "roll": (["all-in-one"], lambda slug, size, folder: rolled_tokens(size, folder)),
        "inference": ([slug for slug in ("mcq", "miles", "mac") if slug in slugs], inference),
    }
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            names, measure = measures[part]
            for slug in names:
                why = available(slug) if part == "steps" else None
                if why is not None:
                    result["not_measured"][slug] = why
                    print(f"{slug}: {why}", flush=True)
                    continue
                for size in (options.size,) if options.size else VIDEO:
                    result[part][f"{slug}, {size}"] = measure(slug, size, Path(folder))
                    print(part, slug, size, result[part][f"{slug}, {size}"], flush=True)
    write_result("videotext_steps", result, out=options.output)


if __name__ == "__main__":
    main()
