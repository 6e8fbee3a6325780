"""The weights of a matcher whose layers were adapted, quantized or moved, by the libraries that do so."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from tiny_clip import tiny_inputs, tiny_model
from torch import nn

from mimic_el.identity_mimic import copy_of_matcher
from mimic_el.modeling_mimic import MimicModel
from mimic_el.weights_mimic import matcher_weights, state_at_hand

# PEFT, of transformers and of layers that it does not know; Accelerate, of a map that transformers makes.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following device_map keys:UserWarning"),
]
INPUTS = {**tiny_inputs(4), **tiny_inputs(3, 1, "entity_")}


def assert_its_scores(model: Any) -> None:
    """The copy of the matcher scores the model's own features as the model does."""
    with torch.no_grad():
        output = model(**INPUTS, return_features=True)
        copied = copy_of_matcher(model)(output.mention_features, output.entity_features)
    torch.testing.assert_close(copied.total, output.logits, rtol=1e-5, atol=1e-5)


def test_plain_weights_are_copied_bit_for_bit() -> None:
    model = tiny_model()
    weights = matcher_weights(model)
    expected = model.matcher.state_dict()
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name])
        assert tensor.data_ptr() != expected[name].data_ptr()
    half = matcher_weights(tiny_model().to(torch.bfloat16))
    assert all(tensor.dtype == torch.float32 for tensor in half.values())


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", {"r": 4, "target_modules": "all-linear"}),
    "DoRA": ("LoraConfig", {"r": 4, "target_modules": "all-linear", "use_dora": True}),
    "the matcher in full": ("LoraConfig", {"target_modules": ["q_proj"], "modules_to_save": ["matcher"]}),
    "layers in full": ("LoraConfig", {"target_modules": ["q_proj"], "modules_to_save": ["gate_fc", "layer_norm"]}),
    "IA3": ("IA3Config", {"target_modules": ["fc", "cls_fc"], "feedforward_modules": ["fc"]}),
    "LNTuning": ("LNTuningConfig", {"target_modules": ["layer_norm", "add_layer_norm", "text_cls_layernorm"]}),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters(kind: str) -> None:
    """All train, and the copy has them merged; switched off, it has not."""
    peft = pytest.importorskip("peft")
    name, options = CONFIGS[kind]
    model = peft.get_peft_model(tiny_model(), getattr(peft, name)(**options))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model(**INPUTS, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert [name for name, parameter in trained.items() if parameter.grad is None or not parameter.grad.any()] == []
    if kind != "layers in full":
        assert any("matcher" in name for name in trained)

    assert_its_scores(model)
    merged = copy.deepcopy(model).merge_and_unload()
    for name, tensor in matcher_weights(model).items():
        torch.testing.assert_close(tensor, merged.matcher.state_dict()[name])
    with torch.no_grad():
        torch.testing.assert_close(merged(**INPUTS).logits, model(**INPUTS).logits, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        before = tiny_model().matcher.state_dict()
        assert all(torch.equal(tensor, before[name]) for name, tensor in matcher_weights(model).items())


def test_a_layer_of_unknown_make() -> None:
    """A linear one is known by what it computes; another is refused, not guessed."""

    class Doubled(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.inner = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.inner(x)

    model = tiny_model()
    fc = model.matcher.vdlu.dual_ent2men.fc
    expected = 2 * fc.weight.detach()
    model.matcher.vdlu.dual_ent2men.fc = Doubled(fc)
    torch.testing.assert_close(matcher_weights(model)["vdlu.dual_ent2men.fc.weight"], expected)
    assert_its_scores(model)
    model.matcher.tglu.layer_norm = Doubled(model.matcher.tglu.layer_norm)
    with pytest.raises(TypeError, match="It is not known what a Doubled in the matcher computes"):
        matcher_weights(model)


@pytest.mark.parametrize("how", ["cpu", "disk", "device map"])
def test_offloaded_weights(how: str, tmp_path: Path) -> None:
    """Accelerate keeps weights elsewhere until a layer is called: forward is the same, and so are the weights."""
    model = tiny_model()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        logits = model(**INPUTS).logits
    if how == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    elif how == "disk":
        accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    else:
        model.save_pretrained(tmp_path, max_shard_size="30KB")
        model = MimicModel.from_pretrained(
            tmp_path, device_map="auto", max_memory={"cpu": 60_000}, offload_folder=tmp_path
        )
        assert "disk" in model.hf_device_map.values()
    assert any(parameter.is_meta for parameter in model.matcher.parameters())
    assert model.device.type == "cpu"
    with torch.no_grad():
        # Weights that were read elsewhere lie otherwise in memory, which may round a sum otherwise.
        torch.testing.assert_close(model(**INPUTS).logits, logits, rtol=1e-6, atol=1e-6)
    for name, tensor in state_at_hand(model).items():
        assert torch.equal(tensor, expected[name]), name
    for name, tensor in matcher_weights(model).items():
        assert torch.equal(tensor, expected[f"matcher.{name}"]), name
