"""The images of the sample data set: drawings shown as in a photo, and as in a catalog.

Takes drawings (SVG) and a random generator, and returns small RGB images. Knows nothing of entities, texts or files.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from mimic_el.datasets_scripts.sample_entities import Drawing, SampleError

IMAGE_SIZE = 64
DRAWING_SIZE = 192


def render(drawing: Drawing, ink: tuple[int, int, int] | None = None) -> Image.Image:
    """Draws an SVG as an RGBA image, trimmed to what is drawn, its longer side `DRAWING_SIZE` at most."""
    import resvg_py

    color = "#{:02x}{:02x}{:02x}".format(*(ink or drawing.ink or (0, 0, 0)))
    svg = drawing.svg.replace("currentColor", color)
    if drawing.ink is not None:
        svg = svg.replace("<svg ", f'<svg fill="{color}" ', 1)
    png = resvg_py.svg_to_bytes(svg_string=svg, width=DRAWING_SIZE, skip_system_fonts=True)
    with Image.open(io.BytesIO(png)) as file:
        image = file.convert("RGBA")
    box = image.getchannel("A").getbbox()
    if box is None:
        raise SampleError(f"A drawing of {drawing.package} came out empty.")
    image = image.crop(box)
    image.thumbnail((DRAWING_SIZE, DRAWING_SIZE), Image.Resampling.LANCZOS)
    return image


def brightness(color: Sequence[float]) -> float:
    """Perceived brightness of an RGB color, 0 to 255."""
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]


def random_color(rng: np.random.Generator) -> np.ndarray:
    grey = rng.uniform(60, 220)
    return np.clip(grey + rng.normal(0, 28, size=3), 0, 255)


def background(rng: np.random.Generator, size: int) -> Image.Image:
    """A scene without a subject: a gradient, cloudy noise, stripes, a horizon, tiles or lights out of focus."""
    first, second = random_color(rng), random_color(rng)
    second = first + (second - first) * rng.uniform(0.2, 0.8)
    rows, columns = np.mgrid[0:size, 0:size] / size
    angle = rng.uniform(0, 2 * math.pi)
    along = (columns - 0.5) * math.cos(angle) + (rows - 0.5) * math.sin(angle)
    style = rng.integers(6)
    if style == 0:
        weight = along + 0.5
    elif style == 1:
        grain = int(rng.integers(3, 9))
        noise = Image.fromarray(rng.uniform(0, 255, (grain, grain)).astype(np.uint8))
        weight = np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC)) / 255
    elif style == 2:
        weight = 0.5 + 0.5 * np.sin(along * rng.uniform(15, 60) + np.sin(rows * rng.uniform(2, 12)))
    elif style == 3:
        weight = 1 / (1 + np.exp(-(along - rng.uniform(-0.25, 0.25)) * rng.uniform(20, 90)))
    elif style == 4:
        tiles = rng.uniform(3, 9)
        across = (rows - 0.5) * math.cos(angle) - (columns - 0.5) * math.sin(angle)
        weight = ((np.floor(along * tiles) + np.floor(across * tiles)) % 2) * rng.uniform(0.3, 1)
    else:
        weight = np.zeros((size, size))
        for _ in range(int(rng.integers(4, 14))):
            x, y, radius = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.04, 0.2)
            weight = np.maximum(weight, ((columns - x) ** 2 + (rows - y) ** 2 < radius**2) * rng.uniform(0.3, 1))
    weight = np.clip(weight, 0, 1)[..., None]
    canvas = Image.fromarray((first * (1 - weight) + second * weight).astype(np.uint8))
    return canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3)))


def homography(source: Sequence[Sequence[float]], target: Sequence[Sequence[float]]) -> list[float]:
    """The eight coefficients with which Pillow's perspective transform takes `target` points back to `source`.

    Args:
        source, target: four (x, y) points each.
    """
    rows, values = [], []
    for (x, y), (u, v) in zip(target, source, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return np.linalg.solve(np.asarray(rows, dtype=float), np.asarray(values, dtype=float)).tolist()


def place(drawing: Image.Image, rng: np.random.Generator, size: int) -> Image.Image:
    """Puts a drawing on a transparent square of `size`, scaled, turned, tilted, and perhaps cut by the edge."""
    width, height = drawing.size
    scale = rng.uniform(0.72, 1.0) * size / max(width, height)
    half = np.array([width * scale / 2, height * scale / 2])
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half
    corners = corners + rng.uniform(-0.05, 0.05, size=(4, 2)) * 2 * half
    angle = math.radians(float(np.clip(rng.normal(0, 6), -18, 18)))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    # Up to a twentieth of the drawing may lie outside the image.
    room = np.maximum(size / 2 - half * 0.9, 0)
    corners = corners @ turn.T + size / 2 + rng.uniform(-1, 1, size=2) * room
    coefficients = homography([(0, 0), (width, 0), (width, height), (0, height)], corners.tolist())
    return drawing.transform((size, size), Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BICUBIC)


def on_card(drawing: Image.Image, paper: Sequence[int]) -> Image.Image:
    """A drawing on a rounded card, the way a logo is seen on a sign or a sticker."""
    side = round(max(drawing.size) * 1.16)
    card = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    ImageDraw.Draw(card).rounded_rectangle((0, 0, side - 1, side - 1), radius=side // 7, fill=(*paper, 255))
    card.alpha_composite(drawing, ((side - drawing.width) // 2, (side - drawing.height) // 2))
    return card


def camera(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """What a camera does to a scene: light, color, blur, noise, compression. Returns `IMAGE_SIZE` squared RGB."""
    image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.8, 1.15))
    image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.75, 1.15))
    image = ImageEnhance.Color(image).enhance(rng.uniform(0.75, 1.25))
    image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.8)))
    pixels = np.asarray(image, dtype=np.float64) * rng.uniform(0.94, 1.06, size=3)
    pixels += rng.normal(0, rng.uniform(0, 5), size=pixels.shape)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if rng.random() < 0.5:
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=int(rng.integers(45, 90)))
        with Image.open(buffer) as file:
            image = file.convert("RGB")
    return image


def photograph(drawing: Drawing | None, rng: np.random.Generator) -> Image.Image:
    """Shows a drawing the way a photo would, or only a background where there is none.

    Returns:
        an RGB image, `IMAGE_SIZE` squared; the same for the same drawing and generator state.
    """
    size = 2 * IMAGE_SIZE
    scene = background(rng, size)
    if drawing is not None:
        light = brightness(np.asarray(scene, dtype=float).mean(axis=(0, 1)).tolist())
        ink = drawing.ink
        if ink is None:
            subject = render(drawing)
            if rng.random() < 0.2:
                subject = on_card(subject, tuple(rng.integers(225, 256, size=3).tolist()))
        else:
            # A one-color drawing is printed in its own color most of the time, and else in black or white; mostly
            # on a card, the way logos are seen, and always where it would not stand out.
            chosen = ink if rng.random() < 0.9 else [(25, 25, 25), (245, 245, 245)][int(rng.integers(2))]
            subject = render(drawing, chosen)
            if abs(light - brightness(chosen)) < 90 or rng.random() < 0.6:
                tones = (215, 256) if brightness(chosen) <= 200 else (20, 70)
                subject = on_card(subject, tuple(rng.integers(*tones, size=3).tolist()))
        layer = place(subject, rng, size)
        if rng.random() < 0.5:
            shadow = Image.new("RGBA", (size, size), (0, 0, 0, 0))
            shadow.putalpha(layer.getchannel("A").point(lambda a: a // 2).filter(ImageFilter.GaussianBlur(3)))
            scene.paste(shadow, (int(rng.integers(0, 5)), int(rng.integers(0, 5))), shadow)
        scene.paste(layer, (0, 0), layer)
    return camera(scene, rng)


def catalogue_image(drawing: Drawing) -> Image.Image:
    """How the knowledge base shows a drawing: upright, whole, on plain paper. `IMAGE_SIZE` squared RGB."""
    subject = render(drawing)
    paper = (60, 60, 60) if drawing.ink is not None and brightness(drawing.ink) > 200 else (246, 246, 246)
    canvas = Image.new("RGB", (DRAWING_SIZE + 16, DRAWING_SIZE + 16), paper)
    canvas.paste(subject, ((canvas.width - subject.width) // 2, (canvas.height - subject.height) // 2), subject)
    return canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)


def encode(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=quality, method=6)
    return buffer.getvalue()
