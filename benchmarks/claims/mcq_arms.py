"""The arms of mcq.toml: retrieval, and how often the bridge says what was erased."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from moving_arms import Clips, Trained, Values, measured_arms

from bowerbird.train.checkpoint import latest_checkpoint, load_checkpoint
from bowerbird_videotext.mcq import (
    BridgeFormer,
    MCQObjective,
    answer_accuracy,
    build_multiple_choice_question,
    draw_phrase,
    moving_vocabulary,
    same_answers,
)
from bowerbird_videotext.phrases import words_of

BATCH = 32
KINDS: tuple[Literal["noun", "verb"], ...] = ("noun", "verb")


def run(plan: Mapping[str, Any], seed: int) -> Values:
    return measured_arms(plan, seed, answers)


@torch.no_grad()
def answers(name: str, made: Trained, test: Clips) -> Values:
    """Of runs with a bridge, in percent: right answers, right ones with the clip of the next pair, and a guess."""
    checkpoint = latest_checkpoint(made.folder / "checkpoints")
    assert checkpoint is not None
    state = load_checkpoint(checkpoint).objective
    if not any(key.startswith("bridge.") for key in state):
        return {}
    module: Any = copy.deepcopy(made.loaded.module)
    video = module.video_encoder
    objective = MCQObjective(module, BridgeFormer(video.embed_dim, video.depth, video.num_heads))
    objective.load_state_dict(state)
    objective.eval()
    return {key: value for kind in KINDS for key, value in _of_kind(objective, kind, test).items()}


def _of_kind(objective: MCQObjective, kind: Literal["noun", "verb"], test: Clips) -> Values:
    vocabulary, generator = moving_vocabulary(test.dataset), np.random.default_rng(0)
    pieces = objective.encoder.ready_tokenizer().pieces
    found: dict[str, list[float]] = {"answer": [], "blind": [], "guess": []}
    for start in range(0, len(test) - BATCH + 1, BATCH):
        asked = []
        for caption in test.captions[start : start + BATCH]:
            nouns, verbs = vocabulary.nouns(caption), vocabulary.verbs(caption)
            phrase = draw_phrase(words_of(caption), nouns, verbs, kind, generator)
            asked.append(build_multiple_choice_question(caption, phrase, pieces))
        questions, said = [question for question, _ in asked], [answer for _, answer in asked]
        video = test.batch(objective.encoder, slice(start, start + BATCH))
        same = same_answers(said, video.device)
        for key, clip in (("answer", video), ("blind", video.roll(1, 0))):
            states = objective.encoder.video_encoder.hidden_states(clip)
            choices = objective.choices(states, video.shape[1], questions, said)
            found[key].append(float(answer_accuracy(choices, same)))
        found["guess"].append(float((same.sum(dim=0) + 1).float().mean()) / BATCH)
    return {f"{kind} {key}": 100 * float(np.mean(values)) for key, values in found.items()}
