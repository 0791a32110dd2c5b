"""The model card of an exported encoder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def model_card(
    name: str, manifest: Mapping[str, Any], text: str, state: Mapping[str, Tensor], usage: str | None = None
) -> str:
    """Markdown with the front matter that model hubs read. ``usage`` is Python for folders of other libraries."""
    usage = (
        usage
        or f"""from bowerbird.encoders import load_encoder

encoder = load_encoder("{name}")  # this folder
vectors = encoder.encode(["a.png", "b.jpg"])  # (2, {manifest["dim"]}), unit length"""
    )
    size = sum(tensor.numel() for tensor in state.values())
    kind = "image-feature-extraction" if manifest["preprocessing"] is not None else "feature-extraction"
    trained = f"{len(manifest['classes'])} classes" if manifest["classes"] else "no named classes"
    settings = json.dumps(manifest["config"], indent=2)
    preparation = json.dumps(manifest["preprocessing"], indent=2)
    return f"""---
library_name: bowerbird
pipeline_tag: {kind}
tags: [bowerbird, embedding, retrieval]
---

# {name}

{text.strip() or "An encoder exported by Bowerbird."}

| | |
|---|---|
| encoder | `{manifest["use"]}` |
| vectors | {manifest["dim"]} numbers, compared by cosine |
| numbers stored | {size:,} |
| trained on | {trained} |
| fingerprint | `{manifest["fingerprint"]}` |
| made with | {", ".join(f"{key} {value}" for key, value in manifest["versions"].items())} |

Vectors of encoders with different fingerprints must not be compared, unless one was trained to be compatible with the
other.

```python
{usage}
```

Settings:

```json
{settings}
```

Preprocessing (mean and deviation on the scale 0 to 1):

```json
{preparation}
```
"""
