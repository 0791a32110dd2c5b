"""The main job on real images: ``bowerbird demo``.

An image search over emoji pictures serves with an old encoder; a better one is there. Three ways to move are played on
a real gallery: switching at once, rank merge, and a new encoder that was trained to be compatible (BCT).
"""

from __future__ import annotations
