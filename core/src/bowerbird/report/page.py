"""Self-contained HTML pages: one file, no network, everything inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


def render_page(template: str, values: Mapping[str, Any]) -> str:
    """The text of ``templates/<template>``; HTML in ``values`` is escaped unless the template says ``|safe``."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("bowerbird.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def data_uri(image: Image, *, side: int = 64, format: str = "WEBP") -> str:
    """The image, at most ``side`` pixels high and wide, as a ``data:`` address."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    out = io.BytesIO()
    small.save(out, format=format, quality=80)
    return f"data:image/{format.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"
