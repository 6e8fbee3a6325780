"""Whether the libraries of the published code and those of today agree, in three steps.

    python benchmarks/old_libraries.py write DIR        # with this project: what is to be compared
    python3.8 benchmarks/old_libraries.py compare DIR   # with the old libraries: compares it, and trains a checkpoint
    python benchmarks/old_libraries.py read DIR         # with this project: reads that checkpoint

The old libraries: Python 3.8 with torch==1.11.0 transformers==4.18.0 pytorch-lightning==1.7.7 omegaconf==2.2.3
torchmetrics<1 numpy<1.24 pillow==9.1.0 safetensors six setuptools<60, and the environment variable
PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=python.
"""

# One of its halves always runs with other libraries than those that are installed.
# mypy: ignore-errors

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
SIDE = 224
TEXTS = [
    "Leonardo [SEP] Leonardo da Vinci's Mona Lisa, 1503.",
    "São Paulo [SEP] Город 東京 is big",
    "  spaces   and\ttabs\nnewlines ",
    "",
    " [SEP] ",
    "A very long text that goes on and on and on beyond the limit of forty tokens by far, it is",
    "don't we'll I'm 100% sure... e.g. U.S.A. (2023)",
    "emoji 🍊 and accents: é ü ñ Å",
    "Zürich–Köln “quotes” ‘single’ — dash",
    "ﬁne ligature ① ½ ™",
    "e\u0301 combining, a\u00a0b\u200bc",
    "Ωmega ΑΒΓ İstanbul STRASSE ß",
    "&amp; &quot;html&quot;",
    "<|endoftext|> in text",
]


def difference(ours, theirs):
    return float(np.abs(np.asarray(ours) - np.asarray(theirs)).max() / np.abs(np.asarray(theirs)).max())


def write(directory):
    """The golden model in the published format, tokens of texts, and normalized pixels of images."""
    from transformers import CLIPConfig

    from mimic_el.processing_mimic import MimicProcessor
    from mimic_el.scripts.convert_original_checkpoint import main
    from mimic_el.tests.tiny_clip import tiny_tokenizer

    clip = str(GOLDEN / "golden.json")
    main(["--checkpoint", str(GOLDEN / "lightning.ckpt"), "--clip", clip, "--output_dir", str(directory / "model")])
    back = ["--to_original", "--position_ids", "--checkpoint", str(directory / "model")]
    main([*back, "--output_dir", str(directory)])

    tokenizer = tiny_tokenizer()
    (directory / "vocab.json").write_text(json.dumps(tokenizer.get_vocab()))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    tokens = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=40)["input_ids"]
    (directory / "tokens.json").write_text(json.dumps(tokens))

    random = np.random.default_rng(0)
    for number, (width, height) in enumerate([(640, 480), (100, 333), (224, 224), (17, 23), (1200, 90)]):
        noise = random.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        image.save(directory / f"{number}.png")
        image.save(directory / f"{number}.jpg", quality=85)
    paths = sorted([*directory.glob("*.png"), *directory.glob("*.jpg")])
    image_processor = MimicProcessor.image_processor_for(CLIPConfig())
    processor = MimicProcessor(image_processor, tokenizer, correct_images=False)
    np.savez(directory / "pixels.npz", **{path.name: processor.pixels([path])[0].numpy() for path in paths})


def published_module(weights):
    """Modules whose state dict has the published names: CLIP of transformers, and parameters for all the rest."""
    from transformers import CLIPConfig, CLIPModel

    clip = json.loads((GOLDEN / "golden.json").read_text())["clip_config"]
    root = torch.nn.Module()
    for name, tensor in weights.items():
        if name.startswith("encoder.clip."):
            continue
        *path, last = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                setattr(module, part, torch.nn.Module())
            module = getattr(module, part)
        setattr(module, last, torch.nn.Parameter(tensor.clone()))
    root.encoder.clip = CLIPModel(
        CLIPConfig(
            text_config_dict=clip["text_config"],
            vision_config_dict=clip["vision_config"],
            projection_dim=clip["projection_dim"],
        )
    )
    return root


def compare(directory):
    """With the old libraries."""
    import PIL
    import pytorch_lightning as lightning
    import transformers
    from omegaconf import OmegaConf

    print(f"torch {torch.__version__}, transformers {transformers.__version__}, Lightning {lightning.__version__}")
    weights = torch.load(directory / "mimic.ckpt")["state_dict"]

    class Published(lightning.LightningModule):
        def __init__(self, args):
            super().__init__()
            self.save_hyperparameters(args)
            module = published_module(weights)
            self.encoder, self.matcher = module.encoder, module.matcher

        def training_step(self, batch, index):
            return sum(parameter.square().sum() for parameter in self.parameters())

        def validation_step(self, batch, index):
            self.log("Val/mrr", 0.5)

        def test_step(self, batch, index):
            pass

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-5, eps=1e-4)

    model = {"dv": 24, "TGLU_hidden_dim": 24, "layers": [1, 2]}
    args = OmegaConf.create({"seed": 43, "lr": 1e-5, "model": model, "data": {"batch_size": 128}})
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    data = torch.utils.data.DataLoader([0, 1], batch_size=1)

    module = Published(args)
    lightning.Trainer(**quiet).test(module, data, ckpt_path=str(directory / "mimic.ckpt"))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())
    print(f"Trainer.test loaded {len(weights)} tensors of mimic.ckpt, none missing and none left over")

    inputs, expected = (
        load_file(str(GOLDEN / "batch.safetensors")),
        load_file(str(GOLDEN / "expected_batch.safetensors")),
    )
    encoder, worst = module.encoder.eval(), 0.0
    for who in ("mention", "entity"):
        batch = {name.split(".")[1]: tensor for name, tensor in inputs.items() if name.startswith(who)}
        with torch.no_grad():
            out = encoder.clip(**batch)
            image_tokens = torch.nn.functional.linear(
                out.vision_model_output[0], encoder.image_tokens_fc.weight, encoder.image_tokens_fc.bias
            )
        for name, tensor in (
            ("text_embeds", out.text_embeds),
            ("text_tokens", out.text_model_output[0]),
            ("image_tokens", image_tokens),
        ):
            worst = max(worst, difference(tensor, expected[f"{who}_{name}"]))
    print(f"largest relative difference of the encoder's outputs from the golden ones: {worst:.1e}")

    tokens = json.loads((directory / "tokens.json").read_text())
    for kind in (transformers.CLIPTokenizerFast, transformers.CLIPTokenizer):
        tokenizer = kind(str(directory / "vocab.json"), str(directory / "merges.txt"))
        old = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=40)["input_ids"]
        others = [text for text, a, b in zip(TEXTS, old, tokens) if a != b]  # noqa: B905  Python 3.8 has no strict
        print(f"{kind.__name__}: {len(TEXTS) - len(others)} of {len(TEXTS)} texts have the same tokens; not {others}")

    pixels, processor = np.load(directory / "pixels.npz"), transformers.CLIPFeatureExtractor()
    levels = []
    for name in pixels:
        image = Image.open(directory / name).convert("RGB").resize((SIDE, SIDE), Image.LANCZOS)
        old = np.asarray(processor(image)["pixel_values"][0])
        deviation = np.array(processor.image_std)[:, None, None]
        levels.append(float(np.abs((pixels[name] - old) * deviation * 255).max()))
    print(f"Pillow {PIL.__version__}: largest difference of each image, in levels of 255: {np.round(levels).tolist()}")

    callbacks = [
        lightning.callbacks.ModelCheckpoint(str(directory), monitor="Val/mrr", mode="max", filename="trained"),
        lightning.callbacks.EarlyStopping("Val/mrr", mode="max", patience=3),
    ]
    lightning.Trainer(max_epochs=1, callbacks=callbacks, **quiet).fit(module, data, data)
    torch.save(module.state_dict(), directory / "trained.pt")


def read(directory):
    """With this project."""
    from mimic_el.scripts.convert_original_checkpoint import from_original, read_checkpoint, read_clip_config

    whole, weights = read_checkpoint(directory / "trained.ckpt"), read_checkpoint(directory / "trained.pt")
    assert whole.keys() == weights.keys()
    assert all(torch.equal(whole[name], tensor) for name, tensor in weights.items())
    model = from_original(whole, read_clip_config(str(GOLDEN / "golden.json")))
    print(f"trained.ckpt: {len(whole)} tensors read, {sum(p.numel() for p in model.parameters()):,} numbers converted")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("write", "compare", "read"):
        sys.exit(__doc__)
    folder = Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    {"write": write, "compare": compare, "read": read}[sys.argv[1]](folder)
