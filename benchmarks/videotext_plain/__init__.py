"""The training steps of videotext-plugins a second time: each formula written straight from its paper in plain torch.

``videotext_plain/<slug>.py`` (dashes as underscores) holds

    def plain(objective) -> Callable[[Batch], Tensor]:
        ...

What it returns gives the loss of a batch, as ``objective(batch).total`` does, computed with the objective's own
parameters, which it reads by name, and with none of the package's modules. The batch is the one that training makes:
it holds what is random, too. A method that draws from torch's generator in its step draws here in the same order:
``benchmarks/videotext_steps.py`` seeds it before every step, and refuses a pair whose losses or gradients differ.
"""
