"""Draws docs/quickstart.png: the same seeds by each model of a run on the testbed.

grafting run recipes/testbed/quickstart.yaml --set "rows=[pretrained, random, inherited, distilled, finetuned]"
python tools/draw_quickstart.py runs/quickstart docs/quickstart.png
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file

WORDS = {
    "pretrained": "pretrained",
    "random": "operators at random",
    "inherited": "host's weights",
    "distilled": "after stage 1",
    "finetuned": "after stage 2",
}
SIDE, GAP, LEFT, COLUMNS = 72, 4, 220, 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    size = (LEFT + COLUMNS * (SIDE + GAP), len(WORDS) * (SIDE + GAP))
    picture = Image.new("L", size, 255)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(20)
    for i, (row, words) in enumerate(WORDS.items()):
        top = i * (SIDE + GAP)
        draw.text((LEFT - 14, top + SIDE / 2), words, fill=40, font=font, anchor="rm")
        images = load_file(args.run / "samples" / f"{row}.safetensors")["images"][:COLUMNS]
        for j, image in enumerate(images.to(torch.uint8)):
            enlarged = Image.fromarray(image[0].numpy()).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            picture.paste(enlarged, (LEFT + j * (SIDE + GAP), top))
    picture.save(args.out, optimize=True)


if __name__ == "__main__":
    main()
