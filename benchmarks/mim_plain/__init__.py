"""The training steps of mim-plugins a second time: each formula written straight from its paper in plain torch.

``mim_plain/<slug>.py`` (dashes as underscores) holds

    SIZES = ("small", "tiny")     # of ``mim_plain.vit.SIZES``; leave "tiny" out where it makes no sense

    def plain_<slug>(size: str) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        ...
        return ours, plain

Both callables do one step without the optimiser, zero gradients, forward, loss, backward, on equal weights and the same
batch, and return the loss (detached). They hold nothing back between calls but weights and gradients. Moving averages
belong to the step where the method has them. ``benchmarks/mim_steps.py`` times them in turns and compares their peak
memory; it refuses a pair whose losses differ.
"""
