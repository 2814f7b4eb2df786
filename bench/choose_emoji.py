"""Chooses the pictures that the emoji model learns, and names them, from an archive of all emoji.

The archive is a NumPy file with `images` (N, 32, 32, 3) of uint8, `names` and `subcategories`, from
the npm package emoji-datasource-google 16.0.0: `img/google/64`, scaled down to 32 pixels with a
Lanczos filter and put on white, and `emoji_pretty.json`.

    python bench/choose_emoji.py emoji32.npz --out pabc/demo/weights/emoji
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from pabc.demo.emoji import WEIGHTS, Pictures

GROUPS = {
    "animal-mammal": "animal",
    "animal-reptile": "animal",
    "animal-marine": "animal",
    "animal-bug": "animal",
    "animal-bird": "animal",
    "animal-amphibian": "animal",
    "food-prepared": "food",
    "food-vegetable": "vegetable",
    "food-fruit": "fruit",
    "food-asian": "food",
    "food-sweet": "sweet",
    "drink": "drink",
    "transport-ground": "vehicle",
    "transport-air": "vehicle",
    "transport-water": "vehicle",
}
"""The subcategories that are chosen, and the group that captions say."""
LEFT_OUT = (
    "aerial tramway",
    "anchor",
    "bus stop",
    "construction sign",
    "feather",
    "fuel pump",
    "guide dog",
    "horizontal traffic light",
    "manual wheelchair",
    "microbe",
    "motorized wheelchair",
    "motorway",
    "mountain cableway",
    "octagonal sign",
    "oil drum",
    "paw prints",
    "pig nose",
    "police cars revolving light",
    "railway track",
    "ring buoy",
    "seat",
    "service dog",
    "spider web",
    "station",
    "suspension railway",
    "vertical traffic light",
    "wheel",
    "wing",
)
"""The pictures of no animal, food or vehicle, and those that show the same as another."""
NAMES = {
    "ear of maize": ["corn", "maize"],
    "aubergine": ["eggplant", "aubergine"],
    "hamburger": ["hamburger", "burger"],
    "french fries": ["french fries", "chips"],
    "honeybee": ["honeybee", "bee"],
    "lady beetle": ["ladybug", "lady beetle"],
    "t-rex": ["t-rex", "tyrannosaurus"],
    "sauropod": ["sauropod", "dinosaur"],
    "dromedary camel": ["dromedary", "dromedary camel"],
    "bactrian camel": ["camel", "bactrian camel"],
    "automobile": ["car", "automobile"],
    "articulated lorry": ["lorry", "articulated lorry"],
    "steam locomotive": ["steam locomotive", "steam engine"],
    "fire engine": ["fire engine", "fire truck"],
    "doughnut": ["donut", "doughnut"],
    "soft ice cream": ["soft ice cream", "ice cream cone"],
    "custard": ["custard", "pudding"],
    "slice of pizza": ["pizza", "slice of pizza"],
    "rooster": ["rooster", "cock"],
    "small airplane": ["small airplane", "small plane"],
    "airplane": ["airplane", "plane"],
    "flying saucer": ["flying saucer", "ufo"],
    "bicycle": ["bicycle", "bike"],
    "motorcycle": ["motorcycle", "motorbike"],
    "frog face": ["frog", "frog face"],
    "lion face": ["lion", "lion face"],
    "panda face": ["panda", "panda face"],
    "fox face": ["fox", "fox face"],
    "unicorn face": ["unicorn", "unicorn face"],
    "giraffe face": ["giraffe", "giraffe face"],
    "zebra face": ["zebra", "zebra face"],
    "hamster face": ["hamster", "hamster face"],
    "wolf face": ["wolf", "wolf face"],
    "bear face": ["bear", "bear face"],
    "hot beverage": ["coffee", "hot beverage"],
    "meat on bone": ["meat on bone", "meat"],
    "poultry leg": ["poultry leg", "chicken leg"],
    "stuffed flatbread": ["kebab", "stuffed flatbread"],
    "shallow pan of food": ["paella", "shallow pan of food"],
    "steaming bowl": ["ramen", "steaming bowl"],
    "cup with straw": ["cup with straw", "soda"],
    "beverage box": ["juice box", "beverage box"],
    "teacup without handle": ["teacup without handle", "green tea"],
    "cut of meat": ["steak", "cut of meat"],
    "red apple": ["red apple", "apple"],
    "cherries": ["cherries", "cherry"],
    "blowfish": ["blowfish", "pufferfish"],
    "spouting whale": ["spouting whale", "blowing whale"],
    "front-facing baby chick": ["front-facing chick", "front-facing baby chick"],
    "hatching chick": ["hatching chick", "chick in egg"],
    "rhinoceros": ["rhinoceros", "rhino"],
    "hippopotamus": ["hippopotamus", "hippo"],
    "tangerine": ["tangerine", "orange"],
    "wine glass": ["wine glass", "red wine"],
    "cocktail glass": ["cocktail glass", "cocktail"],
    "beer mug": ["beer mug", "beer"],
    "clinking beer mugs": ["clinking beer mugs", "cheers"],
    "high-speed train with bullet nose": ["bullet train"],
    "passenger ship": ["passenger ship", "cruise ship"],
    "sailboat": ["sailboat", "sailing boat"],
}
"""Other names, for pictures whose own one is unusual, or that have several."""


def choose(archive: Path) -> Pictures:
    """Returns the chosen pictures, in the order of the archive."""
    with np.load(archive) as file:
        images, names, kinds = file["images"], file["names"].tolist(), file["subcategories"]
    chosen = [
        index
        for index, (name, kind) in enumerate(zip(names, kinds.tolist(), strict=True))
        if kind in GROUPS and name not in LEFT_OUT
    ]
    return Pictures(
        images[chosen],
        [NAMES.get(names[index], [names[index]]) for index in chosen],
        [GROUPS[kinds[index]] for index in chosen],
    )


def main() -> None:
    """Writes the chosen pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archive", type=Path)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    pictures = choose(args.archive)
    pictures.save(args.out)
    print(f"wrote {len(pictures.images)} pictures to {args.out}")


if __name__ == "__main__":
    main()
