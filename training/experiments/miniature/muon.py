"""Muon for a few small matrices: momentum whose singular values are made equal before each step.

It needs about half of AdamW's steps here.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


def make_muon(
    params: Iterable[torch.nn.Parameter],
    *,
    lr: float,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """`torch.optim.Muon` where torch has it (2.9 and later), and otherwise `Muon`.

    Both take the same steps, but torch's rounds the direction to bfloat16. The bundled base was
    made with `Muon`, so a base that is made again has other weights.

    Raises:
        ValueError: a parameter is not a matrix.
    """
    made = getattr(torch.optim, "Muon", Muon)
    optimizer: torch.optim.Optimizer = made(
        params, lr=lr, momentum=momentum, weight_decay=weight_decay
    )
    return optimizer


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, in the parameters' precision.

    Matrices of equal shape are handled together.

    Raises:
        ValueError: a parameter is not a matrix.

    Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        shapes = [tuple(p.shape) for group in self.param_groups for p in group["params"]]
        if any(len(shape) != 2 for shape in shapes):
            raise ValueError(f"expected matrices only, found shapes {sorted(set(shapes))}")

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                ahead = [self._nesterov(p, p.grad, group) for p in parameters if p.grad is not None]
                directions = orthogonalise(torch.stack(ahead))
                # Tall matrices: keep the size of the change of each output, not of the matrix.
                size = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(direction, alpha=size)

    def _nesterov(
        self, parameter: torch.nn.Parameter, grad: torch.Tensor, group: dict[str, float]
    ) -> torch.Tensor:
        """Running mean of the gradients, looked at one step ahead."""
        state = self.state[parameter]
        if "mean" not in state:
            state["mean"] = torch.zeros_like(parameter)
        state["mean"].lerp_(grad, 1 - group["momentum"])
        return grad.lerp(state["mean"], group["momentum"])


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Move all singular values of matrices (M, A, B) close to 1 (0.7 to 1.2), keeping the vectors.

    Five Newton-Schulz iterations with Jordan's quintic coefficients.
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT
