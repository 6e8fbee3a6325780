"""The units' layers: the parts of what a layer computes, whatever stands in its place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mimic_el.layers_mimic import UnitLayerNorm, UnitLinear, linear_part, offset, scaled


class Adapted(nn.Module):
    """What libraries put around a layer: it takes a batch, and no argument that is not its own."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.change = nn.Parameter(torch.randn(layer.out_features, layer.in_features))

    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() > 1
        return self.layer(x) + x @ self.change.T


@pytest.mark.parametrize("width", [1, 5])
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6)])
def test_parts_of_a_linear_layer(shape: tuple[int, ...], width: int) -> None:
    torch.manual_seed(0)
    layer, x = UnitLinear(6, width), torch.randn(shape)
    torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)
    torch.testing.assert_close(linear_part(layer, x), x @ layer.weight.T)
    assert torch.equal(offset(layer, x), layer.bias)
    adapted = Adapted(layer)
    torch.testing.assert_close(linear_part(adapted, x), x @ (layer.weight + adapted.change).T)
    torch.testing.assert_close(offset(adapted, x), layer.bias)


def test_parts_of_a_layer_norm() -> None:
    torch.manual_seed(0)
    layer, plain, x = UnitLayerNorm(6, eps=1e-3), nn.LayerNorm(6, eps=1e-3), torch.randn(4, 6)
    with torch.no_grad():
        for parameter, same in zip(layer.parameters(), plain.parameters(), strict=True):
            parameter.normal_()
            same.copy_(parameter)
    torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(scaled(layer, x), layer.weight * x)
    assert torch.equal(offset(layer, x), layer.bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layers_in_half_precision_compute_in_that_of_their_input(dtype: torch.dtype) -> None:
    x = torch.randn(4, 6)
    for layer in (UnitLinear(6, 5).to(dtype), UnitLayerNorm(6).to(dtype)):
        exact = type(layer)(6, 5) if isinstance(layer, nn.Linear) else type(layer)(6)
        exact.load_state_dict({name: tensor.float() for name, tensor in layer.state_dict().items()})
        assert torch.equal(layer(x), exact(x))
        assert torch.equal(offset(layer, x), offset(exact, x))
