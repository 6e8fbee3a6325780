"""The weights that a model works with, also if its layers are adapted, quantized or offloaded.

Libraries that train, compress or move models replace layers by their own, or load weights only when they are needed.
The functions here work for all of these.
"""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .matching_mimic import Matcher


def matcher_weights(model: Any) -> dict[str, Tensor]:
    """The state of a model's matcher as the model works with it: in float32 on the CPU, with adapters merged."""
    state: dict[str, Tensor] = {}
    with torch.no_grad():
        for path, layer in matcher_shape(model.config).named_modules():
            if layer._parameters:
                values = _weight_and_bias(operator.attrgetter(path)(model.matcher), layer)
                state |= {f"{path}.{name}": tensor for name, tensor in zip(("weight", "bias"), values, strict=True)}
    return state


def matcher_shape(config: Any) -> Matcher:
    """A matcher without values."""
    with torch.device("meta"):
        return Matcher(config)


def state_at_hand(model: nn.Module) -> dict[str, Any]:
    """The state of a model, with the values of weights that Accelerate offloaded; without what bitsandbytes casts when
    a layer of 4 bits is first called."""
    state = model.state_dict()
    for path in [name.partition(".weight.quant_state")[0] for name in state if ".weight.quant_state" in name]:
        for name in [name for name in state if name.startswith(f"{path}.") and name != f"{path}.weight"]:
            del state[name]
    if any(isinstance(value, Tensor) and value.is_meta for value in state.values()):
        for path, part in model.named_modules():
            kept: Any = getattr(getattr(part, "_hf_hook", None), "weights_map", None)
            for name in (*part._parameters, *part._buffers) if kept is not None else ():
                whole = f"{path}.{name}".lstrip(".")
                if isinstance(state.get(whole), Tensor) and state[whole].is_meta:
                    state[whole] = kept[name]
    return state


# --- Layers that became others ------------------------------------------------------------------------------------


def _weight_and_bias(layer: Any, expected: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer that stands where the matcher has `expected`."""
    layer = _merged(layer)
    with _at_hand(layer):
        weight: Any = getattr(layer, "weight", None)
        bias: Any = getattr(layer, "bias", None)
        if not _is_plain(weight) or not _is_plain(bias):
            if not isinstance(expected, nn.Linear):
                raise TypeError(f"It is not known what a {type(layer).__name__} in the matcher computes.")
            weight, bias = _of_calls(layer, expected.in_features)
        return tuple(tensor.detach().to("cpu", torch.float32, copy=True) for tensor in (weight, bias))


def _merged(layer: Any) -> Any:
    """A layer of PEFT as one without adapters that computes the same; any other layer as it is."""
    if hasattr(layer, "modules_to_save"):  # a copy that is trained in its place
        active = [] if layer.disable_adapters else list(layer.active_adapters)
        return layer.modules_to_save[active[0]] if active else layer.original_module
    if not _is_adapted(layer):
        return layer
    layer = copy.deepcopy(layer)
    if layer.disable_adapters and layer.merged:
        layer.unmerge()
    elif not layer.disable_adapters and not layer.merged:
        layer.merge()
    return layer.get_base_layer()


def _is_adapted(layer: Any) -> bool:
    return hasattr(layer, "get_base_layer") and hasattr(layer, "merge")


def _is_plain(weight: Any) -> bool:
    return type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point()


def _of_calls(layer: Any, width: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear layer, from what it makes of unit vectors and of zeros."""
    device = next((tensor.device for tensor in (*layer.parameters(), *layer.buffers())), torch.device("cpu"))
    device = torch.device("cpu") if device.type == "meta" else device
    values = layer(torch.eye(width + 1, width, device=device)).float()
    return (values[:-1] - values[-1]).T, values[-1]


@contextlib.contextmanager
def _at_hand(layer: nn.Module) -> Iterator[None]:
    """Fetches the weights of a layer that Accelerate offloaded, as calling the layer would."""
    hook: Any = getattr(layer, "_hf_hook", None)
    if hook is None or not any(tensor.device.type == "meta" for tensor in layer.parameters(recurse=False)):
        yield
        return
    hook.pre_forward(layer)
    try:
        yield
    finally:
        hook.post_forward(layer, None)


__all__ = ["matcher_shape", "matcher_weights", "state_at_hand"]
