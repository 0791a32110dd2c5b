"""Helpers beside the tests (``training_fixtures``, ``upgrade_world``) can be imported by their names."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from importlib.util import find_spec

# Without torch (session core_bare) the tests of training and of encoders have nothing to test.
collect_ignore = (
    []
    if find_spec("torch")
    else [
        "test_benchmark.py",
        "test_benchmark_trained_maps.py",
        "test_commands_of_training.py",
        "test_detect.py",
        "test_encoders.py",
        "test_gallery_videos.py",
        "test_objectives.py",
        "test_perceptron.py",
        "test_recipe.py",
        "test_train.py",
        "test_train_context.py",
    ]
)
if not find_spec("torch") or not find_spec("fastapi"):  # the extra `serve`
    collect_ignore += [path.name for path in Path(__file__).parent.glob("test_serve_*.py")]
