"""What the built-in model knows: styles, objects, their second names, caption templates; and what its banks hold."""

from __future__ import annotations

# Name -> a second name that occurs in captions too, so that an erasure can be tested on a name it never saw.
STYLES: dict[str, str | None] = {
    "stencil": "cutout",
    "pixel": "bitmap",
    "pencil": "graphite",
    "woodcut": "linocut",
    "blueprint": "cyanotype",
    "halftone": None,
    "neon": "glowing",
    "watercolour": "aquarelle",
    "mosaic": None,
    "chalk": None,
    "popart": None,
    "thermal": None,
}

# What a prompt without a style gives: the emoji art as it is. The judge's last style class; no caption says it.
PLAIN = "plain"

OBJECTS: dict[str, str | None] = {
    # animals
    "cat": "kitty", "dog": "puppy", "fox": None, "panda": None, "tiger": None, "lion": None, "pig": None,
    "frog": "toad", "monkey": None, "rabbit": "bunny", "cow": None, "unicorn": None, "chick": None,
    "penguin": None, "owl": None, "duck": None, "flamingo": None, "turtle": None, "snake": None,
    "crocodile": "alligator", "whale": None, "dolphin": None, "octopus": None, "crab": None, "shark": None,
    "snail": None, "butterfly": None, "bee": None, "ladybug": "ladybird", "spider": None,
    "elephant": None, "giraffe": None, "hedgehog": None, "bat": None, "dinosaur": None,
    # food
    "apple": None, "banana": None, "cherry": None, "grapes": None, "strawberry": None, "pineapple": None,
    "watermelon": None, "lemon": None, "carrot": None, "corn": "maize", "eggplant": "aubergine",
    "mushroom": None, "avocado": None, "pizza": None, "burger": "hamburger", "fries": None,
    "donut": "doughnut", "cake": None, "cupcake": "muffin", "lollipop": None, "pretzel": None,
    "croissant": None, "popcorn": None, "coffee": None, "beer": None, "cocktail": "martini",
    # nature
    "pine": None, "palm": None, "cactus": None, "sunflower": None, "rose": None, "tulip": None,
    "clover": "shamrock", "maple": None, "sun": None, "moon": None, "star": None, "cloud": None,
    "rainbow": None, "snowflake": None, "fire": "flame", "lightning": None,
    # things
    "car": "automobile", "bus": None, "bicycle": "bike", "airplane": "plane", "helicopter": None,
    "rocket": "spaceship", "sailboat": "yacht", "anchor": None, "house": "home", "castle": None,
    "umbrella": "parasol", "balloon": None, "guitar": None, "trumpet": None, "camera": None, "bulb": None,
    "key": None, "lock": "padlock", "hammer": None, "scissors": None, "crown": None, "glasses": "spectacles",
    "gem": "diamond", "trophy": None, "bell": None, "gift": "present", "heart": None, "skull": None,
    "ghost": None, "robot": None, "pumpkin": None, "basketball": None, "bomb": None,
}  # fmt: skip

# In no shipped bank: they stand for whatever a bank never heard of.
UNBANKED_STYLES: tuple[str, ...] = ("chalk", "popart")
UNBANKED_OBJECTS: tuple[str, ...] = (
    "panda", "dolphin", "banana", "pizza", "cactus", "moon", "bicycle", "guitar", "heart", "robot",
)  # fmt: skip
BANKED_STYLES: tuple[str, ...] = tuple(name for name in STYLES if name not in UNBANKED_STYLES)
BANKED_OBJECTS: tuple[str, ...] = tuple(name for name in OBJECTS if name not in UNBANKED_OBJECTS)
# The model's kinds fill their templates with the other half: what erasing a style does is judged on these.
TEST_OBJECTS: tuple[str, ...] = tuple(OBJECTS)[1::2]

PAIR_TEMPLATES: tuple[str, ...] = (
    "a {object} in the style of {style}",
    "{style} {object}",
    "a {style} picture of a {object}",
    "{object}, {style} style",
)
OBJECT_TEMPLATES: tuple[str, ...] = ("a {object}", "a picture of a {object}", "{object}")
STYLE_TEMPLATES: tuple[str, ...] = ("a picture in {style} style", "{style} style", "{style}")
# Never trained on; what the model and every erasure are judged by.
HELD_OUT_TEMPLATES: tuple[str, ...] = ("a {style} {object}", "a {object} in {style} style")
WATERMARK = "watermark"


def held_out_pair(style: str, object_: str) -> bool:
    """Tell whether the denoiser never saw this (style, object) pair: one in ten, spread evenly over both."""
    return (list(OBJECTS).index(object_) + 3 * list(STYLES).index(style)) % 10 == 0
