"""How far the words of a caption are from the patches of a video: the cost of the cheapest transport between them.

The transport plan is found by proximal points, as in Xie et al.: A Fast Proximal Point Method for Computing Exact
Wasserstein Distance, UAI 2019 (arXiv 1802.04307); as a loss between words and patches, Chen et al.: UNITER, ECCV 2020
(arXiv 1909.11740).

B pairs, M words, N patches, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bowerbird.errors import InputError


@torch.no_grad()
def ipot_transport(
    cost: Tensor, x_pad: Tensor, y_pad: Tensor, beta: float = 0.5, iterations: int = 50, *, inner: int = 1
) -> Tensor:
    """Plan of the transport between words x and patches y, all of one side with equal mass.

    With A = exp(-cost / beta), T = 1 and s = 1 / M, every iteration sets Q = A T (elementwise) and, ``inner`` times,
    d = 1 / (N Q s) and s = 1 / (M Q' d); then T = diag(d) Q diag(s). The marginals of the words are exact, those of the
    patches become so with the iterations. Sizes M and N are those without padding.

    Args:
        cost: ``(B, M, N)``, finite.
        x_pad, y_pad: bool ``(B, M)`` and ``(B, N)``, true at what does not take part.
        beta: Step of the proximal points, in units of the cost.
        iterations: How many, at least 1.
        inner: Updates of both sides in each of them.

    Returns:
        ``(B, N, M)``, patches by words, without gradient; 0 at padding, and all of it where one side is empty.

    Raises:
        InputError: Shapes that do not fit, ``beta`` not above 0, or no iteration.
    """
    _check_pads(cost, x_pad, y_pad)
    if not beta > 0 or iterations < 1 or inner < 1:
        raise InputError(
            f"beta = {beta}, iterations = {iterations}, inner = {inner}: expected above 0, 1 or more, 1 or more"
        )
    with torch.autocast(cost.device.type, enabled=False):  # 50 products would add up the errors of half precision
        return _transport(
            cost.to(torch.promote_types(cost.dtype, torch.float32)), ~x_pad, ~y_pad, beta, iterations, inner
        )


def _transport(cost: Tensor, words: Tensor, patches: Tensor, beta: float, iterations: int, inner: int) -> Tensor:
    real_x, real_y = words.to(cost.dtype), patches.to(cost.dtype)
    both = real_y[:, :, None] * real_x[:, None, :]  # (B, N, M)
    kernel = (cost.transpose(1, 2) / -beta).exp() * both
    plan = both
    # Mass of one word and of one patch; 0 for padding (all is padding where the other side is empty), which then stays
    # out of every product.
    word_mass = both.sum(dim=1).clamp(max=1) / real_x.sum(dim=1, keepdim=True).clamp(min=1)
    patch_mass = both.sum(dim=2).clamp(max=1) / real_y.sum(dim=1, keepdim=True).clamp(min=1)
    word_scale = word_mass[:, :, None]
    for _ in range(iterations):
        product = kernel * plan
        for _ in range(inner):
            patch_scale = _divided(patch_mass[:, :, None], product @ word_scale)
            word_scale = _divided(word_mass[:, :, None], product.transpose(1, 2) @ patch_scale)
        plan = patch_scale * product * word_scale.transpose(1, 2)
    return plan


def _divided(mass: Tensor, by: Tensor) -> Tensor:
    """``mass / by``, and 0 where there is no mass: at padding ``by`` is 0, too."""
    return torch.where(mass > 0, mass / by, 0.0)


def transport_distance(
    words: Tensor,
    patches: Tensor,
    word_pad: Tensor,
    patch_pad: Tensor,
    *,
    beta: float = 0.5,
    iterations: int = 50,
) -> Tensor:
    """``(B,)``: the sum over a pair's words and patches of transported mass times cost, one minus the cosine.

    The gradient flows through the costs, not through the plan. At least 0, up to rounding.

    Args:
        words: ``(B, M, D)``.
        patches: ``(B, N, D)``.
        word_pad, patch_pad: bool ``(B, M)`` and ``(B, N)``, true at what does not take part.
        beta, iterations: See ``ipot_transport``.

    Raises:
        InputError: Shapes that do not fit, or other values than ``ipot_transport`` accepts.
    """
    if words.ndim != 3 or patches.ndim != 3 or words.shape[::2] != patches.shape[::2]:
        raise InputError(
            f"words {tuple(words.shape)}, patches {tuple(patches.shape)} do not fit: expected (B, M, D) and (B, N, D)"
        )
    words, patches = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (words, patches))
    with torch.autocast(words.device.type, enabled=False):
        cost = 1 - normalize(words, dim=-1) @ normalize(patches, dim=-1).transpose(1, 2)  # (B, M, N)
    plan = ipot_transport(cost.detach(), word_pad, patch_pad, beta, iterations)
    return (cost * plan.transpose(1, 2)).sum(dim=(1, 2))


def word_patch_alignment_loss(
    words: Tensor,
    patches: Tensor,
    word_pad: Tensor,
    patch_pad: Tensor,
    matched: Tensor,
    *,
    beta: float = 0.5,
    iterations: int = 50,
) -> Tensor:
    """Distances of the pairs that belong together minus those of the others, over the number of all pairs.

    Args:
        words, patches, word_pad, patch_pad, beta, iterations: See ``transport_distance``. Class tokens and separators
            are padding here.
        matched: bool or 0 and 1 ``(B,)``, true where words and patches belong together.

    Raises:
        InputError: Shapes that do not fit, or values that are not accepted.
    """
    if matched.shape != words.shape[:1]:
        raise InputError(f"matched has shape {tuple(matched.shape)}; expected ({len(words)},), one value per pair")
    distance = transport_distance(words, patches, word_pad, patch_pad, beta=beta, iterations=iterations)
    return torch.where(matched.bool(), distance, -distance).mean()


def _check_pads(cost: Tensor, x_pad: Tensor, y_pad: Tensor) -> None:
    fits = cost.ndim == 3 and x_pad.shape == cost.shape[:2] and y_pad.shape == (cost.shape[0], cost.shape[2])
    if not fits or x_pad.dtype != torch.bool or y_pad.dtype != torch.bool:
        raise InputError(
            f"cost {tuple(cost.shape)}, x_pad {x_pad.dtype} {tuple(x_pad.shape)} and y_pad {y_pad.dtype} "
            f"{tuple(y_pad.shape)} do not fit: expected (B, M, N), and bool (B, M) and (B, N)"
        )
