"""Muon (K. Jordan, 2024): momentum whose matrices are made orthogonal before each step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Muon):
    """torch's Muon with a choice of the products' number type, and faster.

    Steps have AdamW's size (arXiv 2502.16982). torch multiplies in bf16, for which many CPUs have
    no units; `products` is the type to use, and is stored with the state, so that a resumed run
    keeps it. Matrices of the same shape are processed as one batch.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, weight_decay: float, products: torch.dtype
    ) -> None:
        super().__init__(params, lr, weight_decay, adjust_lr_fn="match_rms_adamw")
        for group in self.param_groups:
            group["products"] = str(products).removeprefix("torch.")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for same in by_shape.values():
                self._step_stacked(same, group)
        return loss

    def _step_stacked(self, same: list[Tensor], group: dict[str, Any]) -> None:
        """Update parameters of the same shape."""
        momentum, lr = group["momentum"], float(group["lr"])
        updates = []
        for parameter in same:
            assert parameter.grad is not None
            buffer = self.state[parameter].setdefault(
                "momentum_buffer", torch.zeros_like(parameter)
            )
            buffer.lerp_(parameter.grad, 1 - momentum)
            updates.append(parameter.grad.lerp(buffer, momentum))
        # Older checkpoints lack the type; theirs is torch's own.
        products = getattr(torch, group.get("products", "bfloat16"))
        steps = orthogonal(
            torch.stack(updates).to(products),
            group["ns_coefficients"],
            group["ns_steps"],
            group["eps"],
        )
        size = lr * 0.2 * max(same[0].shape) ** 0.5
        for parameter, update in zip(same, steps):
            parameter.mul_(1 - lr * group["weight_decay"])
            parameter.add_(update, alpha=-size)


def orthogonal(
    matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Each of the matrices, (n, rows, columns), with its singular values brought near 1.

    A step of Newton and Schulz is X <- (a + b G + c G^2) X with G = X X^T. In float32 matrices at
    least twice as wide as high go through the iteration by their small G alone, which turns
    into P G P where P is the bracket, and are multiplied once, by the product of all P.
    """
    a, b, c = coefficients
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal(matrices.mT, coefficients, steps, eps).mT
    x = matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp(min=eps)
    if matrices.dtype == torch.bfloat16 or matrices.shape[2] < 2 * matrices.shape[1]:
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x
    gram, whole = x @ x.mT, None
    for step in range(steps):
        bracket = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        bracket.diagonal(dim1=1, dim2=2).add_(a)
        whole = bracket if whole is None else bracket @ whole
        if step < steps - 1:
            gram = bracket @ gram @ bracket
    return whole @ x
