"""The main job on real images: ``bowerbird demo``.

An image search over emoji pictures serves with an old encoder; a better one is there. Four ways to move are measured on
real galleries: switching at once, rank merge by plain distances and on one scale, and a new encoder that was trained to
be compatible (BCT).
"""

from __future__ import annotations
