"""The layers of the units, and their arithmetic.

The factored form of the units needs parts of a layer: the linear part of one, the scale of another. To get a part, the
layer is called; its weights are never read. So hooks fire, weights that are stored elsewhere are loaded, and a wrapper
around the layer (an adapter, a copy that is trained instead) takes effect.

All arithmetic is in float32 (or float64, for a model in float64). It costs little compared with the encoder, and the
expanded sums would lose too many digits in half precision.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


# Of the class that PyTorch and torchao leave in full precision: what is gained by quantizing a layer of the matcher is
# small, and what is lost is not.
class UnitLinear(nn.modules.linear.NonDynamicallyQuantizableLinear):
    """A linear layer that works in the precision of its input, and gives a part of what it computes if asked to."""

    def forward(self, input: Tensor, part: str | None = None) -> Tensor:
        """`W x + b`; with `part`, "linear" for `W x` or "offset" for `b`, of which x tells the precision alone."""
        if part == "offset":
            return self.bias.to(input.dtype)
        weight = self.weight.to(input.dtype)
        if part is None:
            return F.linear(input, weight, self.bias.to(input.dtype))
        if self.out_features == 1:
            return (input @ weight[0]).unsqueeze(-1)  # twice as fast
        return F.linear(input, weight)


class UnitLayerNorm(nn.LayerNorm):
    """A layer norm that works in the precision of its input, and gives a part of what it computes if asked to."""

    def forward(self, input: Tensor, part: str | None = None) -> Tensor:
        """`gamma * normalized(x) + beta`; with `part`, "scale" for `gamma * x` or "offset" for `beta`."""
        if part == "offset":
            return self.bias.to(input.dtype)
        weight = self.weight.to(input.dtype)
        if part == "scale":
            return weight * input
        return F.layer_norm(input, self.normalized_shape, weight, self.bias.to(input.dtype), self.eps)


def linear_part(layer: nn.Module, x: Tensor) -> Tensor:
    """`W x` of a layer that is `W x + b`."""
    if isinstance(layer, UnitLinear):
        return layer(x, part="linear")
    # An adapter around the layer, perhaps, which is still `W x + b`, but does not know the argument.
    return called(layer, x) - offset(layer, x)


def offset(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer makes of zeros as wide as x, and of x's type: `b` of a linear layer, `beta` of a layer norm."""
    if isinstance(layer, UnitLinear | UnitLayerNorm):
        return layer(x, part="offset")
    return called(layer, x.new_zeros(x.shape[-1]))


def scaled(layer: nn.Module, x: Tensor) -> Tensor:
    """`gamma * x` of a layer norm, or of what is around one and hands its arguments on."""
    return layer(x, part="scale")


def called(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer makes of x, which may be a single vector: adapters, such as DoRA's, want a batch."""
    if x.dim() > 1 or isinstance(layer, UnitLinear | UnitLayerNorm):
        return layer(x)
    return layer(x.unsqueeze(0))[0]


def is_traced() -> bool:
    """Whether a graph is made of what runs (`torch.compile`, `torch.export`, `torch.jit.trace`). Then no branch may
    depend on the values of tensors, nor a shape."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def centered(x: Tensor) -> Tensor:
    x = x - x.mean(dim=-1, keepdim=True)
    return x - x.mean(dim=-1, keepdim=True)  # the rounding error of a large mean


def dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(dim=-1)


__all__ = [
    "UnitLayerNorm",
    "UnitLinear",
    "at_least_float32",
    "called",
    "centered",
    "dot",
    "is_traced",
    "linear_part",
    "offset",
    "scaled",
]
