"""Run with the Python of an environment that holds only bowerbird-emoji and core: the pictures are in the wheel."""

from bowerbird.recipe import build_config
from bowerbird.registry import get_registry

registry = get_registry()
record = registry.get("dataset", "emoji:styles")
dataset = registry.load(record).build(build_config(record, {}, "smoke"), "all")
assert len(dataset) == 896 * 5, len(dataset)
assert dataset[0]["image"].mode == "RGB"
print("bowerbird-emoji alone: ok")
