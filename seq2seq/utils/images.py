"""Attention weights as an image: target pieces in rows, source pieces in columns."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CELL, GAP, LETTERS = 28, 8, 17  # pixels: a weight's square, the gap around labels, their font size
# From weight 0 to 1; every step is darker than the one before, on screen and on paper.
COLOURS = np.array([(255, 255, 255), (215, 225, 243), (150, 184, 222), (75, 131, 190), (27, 77, 142), (8, 32, 74)])
INK, PAPER, FRAME = (33, 37, 41), (255, 255, 255), (173, 181, 189)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def attention_image(weights_TS: Tensor, source_pieces: Sequence[str], target_pieces: Sequence[str]) -> Image.Image:
    """Draw the heat map of one head, or of a mean of heads, with its rows and columns labelled."""
    font, every_letter = _font()
    sources, targets = ([_label(piece, every_letter) for piece in side] for side in (source_pieces, target_pieces))
    left, top = (GAP * 2 + max(_width(font, text) for text in [*side, ""]) for side in (targets, sources))
    cells = Image.fromarray(colours(weights_TS)).resize(
        (CELL * len(sources), CELL * len(targets)), Image.Resampling.BOX
    )
    image = Image.new("RGB", (left + cells.width + GAP, top + cells.height + GAP), PAPER)
    image.paste(cells, (left, top))
    draw = ImageDraw.Draw(image)
    draw.rectangle((left - 1, top - 1, left + cells.width, top + cells.height), outline=FRAME)
    for row, text in enumerate(targets):
        draw.text((left - GAP, top + CELL * (row + 0.5)), text, INK, font, anchor="rm")
    for column, text in enumerate(sources):
        # Drawn horizontally, then rotated: every label reads upwards from its column.
        label = Image.new("RGB", (_width(font, text) + 1, CELL), PAPER)
        ImageDraw.Draw(label).text((0, CELL // 2), text, INK, font, anchor="lm")
        turned = label.transpose(Image.Transpose.ROTATE_90)
        image.paste(turned, (left + CELL * column, top - GAP - turned.height))
    return image


def colours(weights: Tensor) -> NDArray[np.uint8]:
    """Map weights from 0 to 1 to red, green and blue, in an additional last dimension."""
    scaled = weights.detach().float().cpu().clamp(0, 1).nan_to_num().numpy() * (len(COLOURS) - 1)
    steps = np.arange(len(COLOURS))
    return (
        np.stack([np.interp(scaled, steps, COLOURS[:, channel]) for channel in range(3)], -1).round().astype(np.uint8)
    )


def _font() -> tuple[Font, bool]:
    """Return a system font or Pillow's default, and whether it covers more than ASCII."""
    for name in ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf"):
        try:
            return ImageFont.truetype(name, LETTERS), True
        except OSError:
            continue
    return ImageFont.load_default(LETTERS), False


def _label(piece: str, every_letter: bool) -> str:
    text = piece.replace("▁", "_")
    return (
        text
        if every_letter
        else unicodedata.normalize("NFKD", text.replace("ß", "ss")).encode("ascii", "ignore").decode()
    )


def _width(font: Font, text: str) -> int:
    return int(font.getlength(text)) + 1
