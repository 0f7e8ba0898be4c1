"""Muon, an optimizer of matrices (Jordan et al., 2024): `--optimizer muon`.

Its update is the momentum M of the gradients with all singular values made about equal, so that no direction is left
behind: with M = U S V^T, nearly U V^T. Five steps X <- (a + b X X^T + c (X X^T)^2) X of a Newton-Schulz iteration do
that, without a decomposition.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

A, B, C, STEPS = 3.4445, -4.7750, 2.0315, 5  # theirs: steep at 0, so that small singular values grow fast


def orthogonalized(matrices: Tensor) -> Tensor:
    """Matrices (K, m, n) with their singular values brought near to 1 (most to 0.7 ... 1.2).

    All that multiplies X from the left is a polynomial of X X^T: so the steps go on with that small square matrix, and
    X itself is multiplied once, in the end.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalized(matrices.mT).mT
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    square, product = x @ x.mT, torch.eye(x.shape[1], device=x.device)
    for _ in range(STEPS):
        step = B * square + C * square @ square
        step.diagonal(dim1=1, dim2=2).add_(A)
        product, square = step @ product, step @ square @ step
    return product @ x


class Muon(torch.optim.Muon):
    """torch.optim.Muon in the precision of its matrices, those of a shape at once.

    That one rounds to bf16, which a processor that only emulates it takes dozens of times as long for.
    """

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
                self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            for shape, matrices in by_shape.items():
                gradients, momenta = [p.grad for p in matrices], [self.state[p]["momentum_buffer"] for p in matrices]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov's
                updates = orthogonalized(torch.stack(ahead)).unbind()
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                # As large as an update of AdamW, so that both take the same learning rate (Liu et al., 2025).
                torch._foreach_add_(matrices, updates, alpha=-group["lr"] * 0.2 * math.sqrt(max(shape)))


def muon_for(blocks: nn.Module, weight_decay: float) -> Muon:
    """Muon for the blocks' matrices; the rest of a model is another optimizer's."""
    return Muon([p for p in blocks.parameters() if p.ndim == 2], weight_decay=weight_decay)
