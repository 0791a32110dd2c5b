"""Charts (matplotlib, as SVG text) and self-contained HTML pages (jinja2). Needs the extra ``[report]``."""

from __future__ import annotations

from bowerbird.report.charts import Series, line_chart, themed
from bowerbird.report.page import data_uri, render_page

__all__ = ["Series", "data_uri", "line_chart", "render_page", "themed"]
