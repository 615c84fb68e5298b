"""Linear layers whose weights are stored in fewer bits and computed from them in each call."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.functional import linear


class _Product(torch.autograd.Function):
    """x W^T of a stored weight W, which is computed from its storage in both passes.

    Autograd would keep each computed weight for the backward pass: all of them together are the
    memory that the storage saves.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: StoredLinear) -> Tensor:
        ctx.layer = layer
        return linear(x, layer.values(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.values(gradient.dtype), None


class StoredLinear(nn.Linear):
    """A linear layer that computes its weight; gradients flow to its input and its bias alone.

    Args:
        like: the layer that it stands for.
        weight: the storage of the weight.
        bias: (O,) or None.
    """

    def __init__(self, like: nn.Linear, weight: nn.Parameter, bias: Tensor | None) -> None:
        super().__init__(like.in_features, like.out_features, bias is not None, device="meta")
        self.weight = weight
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)

    def values(self, dtype: torch.dtype) -> Tensor:
        """Returns the weight (O, I) in a precision."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b, in the precision of x."""
        product: Tensor = _Product.apply(x, self)
        return product if self.bias is None else product + self.bias.to(x.dtype)


class GgufLinear(StoredLinear):
    """A linear layer whose weight is in a type of GGUF, a `GGUFParameter` of diffusers."""

    def values(self, dtype: torch.dtype) -> Tensor:
        """Returns the weight (O, I) in a precision."""
        from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

        weight: Tensor = dequantize_gguf_tensor(self.weight)
        # Files may store a weight in other rows than its own.
        return weight.to(dtype).reshape(self.out_features, self.in_features)


class Fp8Linear(StoredLinear):
    """A linear layer whose weight is in 8-bit floating point, with a scale or without.

    Args:
        like, bias: see `StoredLinear`.
        weight: (O, I) in 8-bit floating point.
        scale: () or (O, 1), what the stored values are multiplied with.
    """

    scale: Tensor

    def __init__(
        self, like: nn.Linear, weight: nn.Parameter, bias: Tensor | None, scale: Tensor
    ) -> None:
        super().__init__(like, weight, bias)
        self.register_buffer("scale", scale.float())

    def values(self, dtype: torch.dtype) -> Tensor:
        """Returns the weight (O, I) in a precision."""
        return self.weight.to(dtype) * self.scale.to(dtype)
