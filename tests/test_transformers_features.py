"""What transformers does with a model, done with MIMIC: each row of the table in docs/models.md has its test, most of
them here."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import run_together
from python_processes import ForkingPython, own_python
from tiny import knowledge_base, mentions_of, tiny_processor
from tiny_backbones import FAMILIES
from tiny_clip import tiny_clip_config, tiny_config, tiny_inputs, tiny_model
from torch import Tensor, nn
from transformers import AutoModel, BitsAndBytesConfig, CLIPConfig, Trainer, TrainingArguments
from transformers.quantizers.base import HfQuantizer

from mimic_el.configuration_mimic import MimicConfig
from mimic_el.index_mimic import EntityIndex
from mimic_el.modeling_mimic import MimicModel
from mimic_el.tests import oracle

# PEFT, of transformers; bitsandbytes, of its kernels.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
]
TESTS = str(Path(__file__).parent)
LOGITS = ("logits", "text_logits", "image_logits", "cross_modal_logits")
ENCODED = ("text_embeds", "text_tokens", "image_embeds", "image_tokens")


def both_sides(mentions: int, entities: int, seed: int = 0) -> dict[str, Tensor]:
    return {**tiny_inputs(mentions, seed), **tiny_inputs(entities, seed + 1, "entity_")}


def assert_same_scores(one: Any, other: Any, tolerance: float = 1e-4) -> None:
    for name in LOGITS:
        torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance)


# --- Graphs -------------------------------------------------------------------------------------------------------


def shallow_model(**settings: Any) -> MimicModel:
    """Graphs of few layers are made in less time."""
    backbone = tiny_clip_config()
    backbone.text_config.num_hidden_layers = backbone.vision_config.num_hidden_layers = 1
    return tiny_model(backbone_config=backbone, **settings)


def exported(model: MimicModel, inputs: dict[str, Tensor]) -> torch.export.ExportedProgram:
    """A graph for any number of mentions and of entities."""
    sizes = {False: torch.export.Dim("mentions", min=2), True: torch.export.Dim("entities", min=2)}
    dynamic = {name: {0: sizes[name.startswith("entity_")]} for name in inputs}
    with torch.no_grad():
        return torch.export.export(model, args=(), kwargs=inputs, dynamic_shapes=dynamic, strict=False)


def test_export() -> None:
    """One graph for batches of any size, with padding and images of their own, with the scores of the model."""
    model, inputs = shallow_model(mask_text_padding=True), both_sides(4, 5)
    program = exported(model, inputs).module()
    with torch.no_grad():
        for each in (inputs, both_sides(7, 3, seed=5)):
            assert_same_scores(program(**each), model(**each))


def test_graphs_score_what_cancels() -> None:
    """Keys and queries whose sum vanishes, where the expanded form has no digits left: the graph has the same scores as
    the model, which computes those pairs again."""
    model = tiny_model()
    unit = model.matcher.vdlu.dual_ent2men
    torch.manual_seed(0)
    with torch.no_grad():
        unit.tokens_fc.weight.copy_(unit.cls_fc.weight)
        unit.tokens_fc.bias.copy_(-unit.cls_fc.bias)
        images = torch.randn(6, 10)
        tokens = -images.unsqueeze(1) + 1e-4 * torch.randn(6, 1, 10)
        query, key = unit.query_features(images), unit.key_features(torch.randn(6, 10), tokens)
        compiled = torch.compile(unit, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(query, key), unit(query, key), rtol=1e-3, atol=1e-3)


def test_compiled_training() -> None:
    """Without a break in the graph."""
    torch._dynamo.reset()
    inputs, found = both_sides(4, 4) | {"labels": torch.arange(4)}, []
    for compiled in (False, True):
        model = shallow_model().train()
        output = (torch.compile(model, backend="eager", fullgraph=True) if compiled else model)(**inputs)
        output.loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        found[-1]["logits"] = output.logits
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tracing itself is
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_trace() -> None:
    class Tuples(nn.Module):
        def __init__(self, model: MimicModel) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: Tensor) -> Any:
            return self.model(*inputs, return_dict=False)

    model, inputs, others = shallow_model(), both_sides(4, 4), both_sides(3, 5)
    with torch.no_grad():
        traced = torch.jit.trace(Tuples(model), tuple(inputs.values()))
        for each in (inputs, others):
            assert_same_scores(dict(zip(LOGITS, traced(*each.values()), strict=True)), model(**each))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the exporter's own use
def test_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, inputs = shallow_model(), both_sides(4, 5)
    program = torch.onnx.export(exported(model, inputs), dynamo=True, output_names=list(LOGITS), verbose=False)
    assert program is not None
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    with torch.no_grad():
        for each in (inputs, both_sides(7, 3, seed=5)):
            arrays = session.run(list(LOGITS), {name: tensor.numpy() for name, tensor in each.items()})
            found = {name: torch.from_numpy(array) for name, array in zip(LOGITS, arrays, strict=True)}
            assert_same_scores(found, model(**each))


# --- Outputs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_hidden_states_and_attentions(masked: bool) -> None:
    """Those that CLIP gives, of mentions and of entities, padding and blank images included."""
    model, inputs = tiny_model(mask_text_padding=masked), both_sides(5, 4)
    model.set_attn_implementation("eager")
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        output, plain = model(**inputs, **asked), model(**inputs)
        assert_same_scores(output, plain)
        assert plain.mention_encoder_output is None
        for prefix, encoded in (("", output.mention_encoder_output), ("entity_", output.entity_encoder_output)):
            own = {name: inputs[prefix + name] for name in ("input_ids", "attention_mask", "pixel_values")}
            clip = model.encoder.clip(**own, **asked)
            for name in ("text_model_output", "vision_model_output"):
                for kind in ("hidden_states", "attentions"):
                    given, expected = encoded[name][kind], clip[name][kind]
                    assert len(given) == len(expected) > 0
                    for layer, of_clip in zip(given, expected, strict=True):
                        torch.testing.assert_close(layer, of_clip, rtol=1e-4, atol=1e-4)
            again = model.encode(**own, output_hidden_states=True)
            assert torch.equal(again.text_model_output.hidden_states[0], encoded.text_model_output.hidden_states[0])
        assert len(model(**inputs, output_attentions=True, return_dict=False)) == 6
        model.config.output_hidden_states = True
        assert model(**inputs).entity_encoder_output.vision_model_output.hidden_states is not None
        assert model(**inputs, output_hidden_states=False).entity_encoder_output is None
    with pytest.raises(ValueError, match="Features have no room for what `output_attentions` asks for"):
        model.encode_mentions(**tiny_inputs(2), output_attentions=True)


def test_hooks_on_every_module_fire() -> None:
    model, fired = tiny_model(), set()
    for name, module in model.matcher.named_modules():
        module.register_forward_hook(lambda *_, name=name: fired.add(name))
    with torch.no_grad():
        model(**both_sides(2, 2))
    assert fired == {name for name, _ in model.matcher.named_modules()}


# --- Precision and quantization -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_of_a_new_model(dtype: torch.dtype) -> None:
    model = AutoModel.from_config(tiny_config(), dtype=dtype)
    assert {parameter.dtype for parameter in model.encoder.parameters()} == {dtype}
    assert {parameter.dtype for parameter in model.matcher.parameters()} == {torch.promote_types(dtype, torch.float32)}
    # What the backbone was saved in does not make a part of a model that is in another.
    config = tiny_config()
    config.backbone_config.dtype = dtype
    assert {parameter.dtype for parameter in MimicModel(config).parameters()} == {torch.float32}


def wide_model() -> MimicModel:
    """Kernels for quantized weights want widths of 64."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 64, "intermediate_size": 64}
    text = {"vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "max_position_embeddings": 40, **sizes}
    backbone = CLIPConfig(
        text_config=text, vision_config={"image_size": 24, "patch_size": 8, **sizes}, projection_dim=64
    )
    widths: dict[str, Any] = {f"{unit}_hidden_size": 64 for unit in ("image", "tglu", "vdlu", "cmfu")}
    torch.manual_seed(0)
    return MimicModel(MimicConfig(backbone_config=backbone, text_max_length=12, **widths)).eval()


def test_every_quantizer_is_told_to_leave_the_matcher_alone() -> None:
    model = tiny_model()
    kept = model._keep_in_fp32_modules
    assert "matcher" in HfQuantizer.get_modules_to_not_convert(model, None, kept)
    assert "matcher" in HfQuantizer.get_modules_to_not_convert(model, ["visual_projection"], kept)


def quantized_model(kind: str, folder: Path) -> Any:
    model = wide_model()
    if kind == "dynamic":
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    model.save_pretrained(folder)
    if kind == "torchao":
        torchao = pytest.importorskip("torchao.quantization")
        from transformers import TorchAoConfig

        config: Any = TorchAoConfig(torchao.Int8WeightOnlyConfig())
        return MimicModel.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_8bit=True) if kind == "8 bit" else BitsAndBytesConfig(load_in_4bit=True)
    return MimicModel.from_pretrained(folder, quantization_config=config, device_map="cpu")


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["dynamic", "torchao", "8 bit", "4 bit"])
def test_quantized(kind: str, tmp_path: Path) -> None:
    """The encoder is, the matcher is not: its scores are those of the equations on the encoder's outputs. An index of
    the quantized model knows it again."""
    model, inputs = quantized_model(kind, tmp_path), both_sides(4, 5)
    plain = wide_model()
    layers = [module for module in model.encoder.modules() if getattr(module, "in_features", 0)]
    assert layers
    assert not any(type(getattr(layer, "weight", None)) is nn.Parameter for layer in layers)
    state = model.matcher.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.matcher.state_dict().items())
    weights = {f"matcher.{name}": tensor.double() for name, tensor in state.items()}
    with torch.no_grad():
        output = model(**inputs)
        sides = []
        for prefix in ("", "entity_"):
            own = {name: inputs[prefix + name] for name in ("input_ids", "attention_mask", "pixel_values")}
            encoded = model.encode(**own)
            sides.append({name: encoded[name].double() for name in ENCODED})
        exact = oracle.scores(weights, sides[0], sides[1])
        for name in LOGITS:
            torch.testing.assert_close(output[name].double(), exact[name], rtol=1e-3, atol=1e-3)
        error = (output.logits - plain(**inputs).logits).abs().max() / output.logits.abs().max()
    assert error < (0.15 if kind == "4 bit" else 0.05)
    entities = knowledge_base(6)
    processor = tiny_processor(plain)
    index = EntityIndex.build(model, processor, entities, show_progress=False)
    index.check_model(model)
    if kind != "dynamic":  # whose weights cannot be told from outside
        index.check_model(plain)
    found = index.link(model, processor, mentions_of(entities[:2]), top_k=3)
    assert [len(entities) for entities in found] == [3, 3]


# --- Adapters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"target_modules": "all-linear"}, {"target_modules": ["q_proj"]}])
def test_indexes_of_a_model_with_adapters(options: dict[str, Any], tmp_path: Path) -> None:
    """In memory and on disk: its own, with the scores that it gives."""
    peft = pytest.importorskip("peft")
    save = None if options["target_modules"] == "all-linear" else ["matcher"]
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=4, modules_to_save=save, **options)).eval()
    processor, entities = tiny_processor(tiny_model()), knowledge_base(6)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    for place in (None, tmp_path / "index"):
        index = EntityIndex.build(model, processor, entities, place, dtype="float32", show_progress=False)
        index.check_model(model)
        (found,) = index.link(model, processor, mentions_of(entities[:1]), top_k=6)
        with torch.no_grad():
            mention = model.encode_mentions(**processor.process_mentions(["Orange 0"], ["Orange 0 here."], [None]))
        result = index.search(mention, 6)
        assert len(found) == 6
        with torch.no_grad():
            names, texts, images = zip(*((e["name"], e["description"], e["images"]) for e in entities), strict=True)
            features = model.encode_entities(**processor.process_entities(list(names), list(texts), list(images)))
            exact = model.score(mention, features).logits[0]
        rows = [int(entity_id[1:]) for entity_id in result.entity_ids[0]]
        assert rows == exact.argsort(descending=True).tolist()
        torch.testing.assert_close(torch.from_numpy(result.scores[0]), exact[rows], rtol=1e-4, atol=1e-4)


# --- Embeddings, losses and the Trainer ---------------------------------------------------------------------------


def test_resized_embeddings(tmp_path: Path) -> None:
    model = tiny_model()
    model.resize_token_embeddings(520)
    assert model.config.get_text_config() is model.config.backbone_config.text_config
    assert model.config.backbone_config.text_config.vocab_size == 520
    model.save_pretrained(tmp_path)
    loaded = MimicModel.from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().weight.shape == (520, 16)
    inputs = both_sides(2, 2)
    inputs["input_ids"][0, 1] = 519
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def trainer(folder: Path, model: nn.Module, with_numbers: bool = False, **options: Any) -> Trainer:
    def collate(rows: list[Any]) -> dict[str, Tensor]:
        numbers = {"entity_labels": torch.arange(len(rows))} if with_numbers else {}
        return both_sides(len(rows), len(rows)) | {"labels": torch.arange(len(rows))} | numbers

    args = TrainingArguments(
        str(folder),
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        per_device_eval_batch_size=4,
        **options,
    )
    return Trainer(model, args, data_collator=collate, eval_dataset=[{"row": row} for row in range(4)])


@pytest.mark.parametrize("with_numbers", [False, True])
def test_a_trainer_finds_the_evaluation_loss(with_numbers: bool, tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        expected = model(**both_sides(4, 4), return_loss=True).loss.item()
    assert trainer(tmp_path, model, with_numbers).evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_what_a_trainer_would_spoil(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Smoothed labels train the total score alone; copies of a model on several GPUs are given parts of a batch."""
    from transformers.utils import logging

    model = tiny_model().train()
    smoothing = trainer(tmp_path, model, label_smoothing_factor=0.1)
    logger = logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    own: Any = logging.get_logger("mimic_el.modeling_mimic")
    own.addHandler(caplog.handler)
    own.warning_once.cache_clear()
    try:
        batch = smoothing.data_collator([{}] * 4)
        smoothing.compute_loss(model, batch)
    finally:
        logger.removeHandler(caplog.handler)
        own.removeHandler(caplog.handler)
    assert "`label_smoothing_factor` and `compute_loss_func` take the labels away" in caplog.text
    model._is_replica = True  # as DataParallel marks its copies
    with pytest.raises(ValueError, match="Start one process a GPU"):
        model(**both_sides(2, 2))


# --- Several processes --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def python(hub: Any) -> ForkingPython:
    return own_python(hub)


_STEP = """
import sys
sys.path.insert(0, tests)
import warnings
warnings.simplefilter("ignore")
import torch
from tiny_backbones import FAMILIES
from tiny_clip import tiny_inputs, tiny_model
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

torch.set_num_threads(1)
inputs = {**tiny_inputs(4, rank), **tiny_inputs(4, 10 + rank, "entity_")}
model = tiny_model().train()
wrapped = model
if kind == "FSDP":
    scalars = {model.encoder.clip.logit_scale}  # which FSDP does not take, of CLIPModel neither
    mesh = init_device_mesh("cpu", (count,))
    for module in reversed(list(model.modules())):
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh, ignored_params=scalars)
    fully_shard(model, mesh=mesh, ignored_params=scalars)
elif kind != "alone":
    if kind == "DDP with checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped = DistributedDataParallel(model)
result = {}
for _ in range(2):  # the second step is where DDP misses what has no gradient
    model.zero_grad()
    wrapped(**inputs, return_loss=True).loss.backward()
for name, parameter in model.named_parameters():
    if parameter.grad is not None:
        gradient = parameter.grad.full_tensor() if kind == "FSDP" else parameter.grad
        if kind == "alone":
            dist.all_reduce(gradient)
            gradient /= count
        result[name] = gradient.norm().item()
"""


@pytest.mark.parametrize("kind", ["DDP", "DDP with checkpointing", "FSDP"])
def test_several_processes(kind: str, python: ForkingPython, tmp_path: Path) -> None:
    """Gradients are the mean of those that the processes would have alone."""
    alone, *_ = run_together(python, 2, _STEP, tmp_path / "alone", tests=TESTS, kind="alone")
    results = run_together(python, 2, _STEP, tmp_path / "together", tests=TESTS, kind=kind)
    for found in results:
        assert found.keys() == alone.keys()
        assert found == pytest.approx(alone, rel=1e-3, abs=1e-5)


def without_gradient(model: MimicModel) -> set[str]:
    """Names of parameters that a step leaves without one; none that is to be trained may be among them."""
    side, length = model.config.image_size, model.config.text_max_length
    torch.manual_seed(0)
    ids = torch.randint(5, 200, (3, length))
    ids[:, -1] = 2
    pixels = torch.randn(3, 3, side, side)
    inputs = {"input_ids": ids, "pixel_values": pixels, "entity_input_ids": ids, "entity_pixel_values": pixels}
    model.train()(**inputs, return_loss=True).loss.backward()
    missing = {name: parameter for name, parameter in model.named_parameters() if parameter.grad is None}
    assert not any(parameter.requires_grad for parameter in missing.values()), sorted(missing)
    return set(missing)


def test_every_parameter_that_is_trained_has_a_gradient(tmp_path: Path) -> None:
    """A new model, a loaded one and one on a given backbone: else DistributedDataParallel would wait for it."""
    new = tiny_model()
    new.save_pretrained(tmp_path)
    clip = copy.deepcopy(new.encoder.clip).requires_grad_(True)
    for model in (new, MimicModel.from_pretrained(tmp_path), MimicModel.from_backbone(clip, text_max_length=12)):
        assert without_gradient(model) == {"encoder.clip.logit_scale"}


@pytest.mark.parametrize(
    ("name", "settings"),
    [(name, {}) for name in FAMILIES if name != "clip"] + [("bert and vit", {"text_pooling": "mean"})],
)
def test_every_parameter_of_other_backbones_has_a_gradient(name: str, settings: dict[str, Any]) -> None:
    family = FAMILIES[name]
    model = MimicModel.from_backbone(family.build(), **{**family.settings, **settings})
    assert without_gradient(model) <= {n for n, parameter in model.named_parameters() if not parameter.requires_grad}
