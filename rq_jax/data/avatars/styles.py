"""The world of the avatars in one table: styles, their attributes, how an option is drawn and what it is called.

An attribute is a choice that an image shows plainly at 64x64. Smaller things (noses, eyebrows, stars, shapes of hills)
are fixed, or left to the drawing package, which draws them from the seed of the image.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Option(NamedTuple):
    """One value of an attribute.

    Attributes:
      phrase: its words in a caption, with other attributes in braces; "" where there is nothing to say.
      drawn: the settings of the drawing package.
    """

    phrase: str
    drawn: Mapping[str, Any]


class Style(NamedTuple):
    """A style of drawing.

    Attributes:
      attributes: attribute -> value -> option, drawn in this order: later settings replace earlier ones.
      subjects: wordings of what the image shows, with attributes in braces.
      details: wordings of each detail that a caption may name, to follow "with".
      settings: wordings of what is behind.
      crossed: pairs of attributes of which some combinations are held out.
      fixed: settings of the drawing package that are the same in all images.
    """

    attributes: Mapping[str, Mapping[str, Option]]
    subjects: Sequence[str]
    details: Sequence[Sequence[str]]
    settings: Sequence[str]
    crossed: Sequence[tuple[str, str]]
    fixed: Mapping[str, Any]


def _colours(parts: str, **codes: str) -> dict[str, Option]:
    """Options that paint these parts, named in one string; a value is called what its colour is called."""
    return {name: Option(name, {f"{part}Color": code for part in parts.split()}) for name, code in codes.items()}


def _variants(component: str, **variants: tuple[str, str]) -> dict[str, Option]:
    """Options from a variant of one component and its phrase; without a variant the component is left away."""
    return {
        value.replace("_", " "): Option(phrase, _variant(component, variant))
        for value, (variant, phrase) in variants.items()
    }


def _variant(component: str, name: str = "") -> dict[str, Any]:
    return {f"{component}Variant": name, f"{component}Probability": 100} if name else {f"{component}Probability": 0}


def _faces(**faces: tuple[str, str, str]) -> dict[str, Option]:
    """Expressions from a variant of the eyes, one of the mouth, and a phrase."""
    return {
        value: Option(phrase, _variant("eyes", eyes) | _variant("mouth", mouth))
        for value, (eyes, mouth, phrase) in faces.items()
    }


def _hair(**cuts: tuple[str, str, str]) -> dict[str, Option]:
    """Hair from a variant of its front, one of its rear, and a phrase."""
    return {
        value.replace("_", " "): Option(phrase, _variant("hair", front) | _variant("rearHair", rear))
        for value, (front, rear, phrase) in cuts.items()
    }


def _hills(parts: tuple[str, str], **codes: tuple[str, str]) -> dict[str, Option]:
    """Two ridges in two shades of one colour."""
    keys = [f"{part}Color" for part in parts]
    return {name: Option(name, dict(zip(keys, shades, strict=True))) for name, shades in codes.items()}


NONE = ("", "")
HAIR = dict(
    black="1f1a1a", brown="7b4a2a", blonde="eac063", red="c2451e", pink="f27fb2", blue="3f6fe0", green="3fa35a"
)  # fmt: skip
SKIN = dict(light="f6d3bb", brown="b0764d", dark="6b4129")
CLOTHES = dict(red="d6363a", yellow="f2c230", green="2f9e57", blue="2f62c9", purple="7b3fc0", black="26262b")
BODIES = dict(red="f0605d", orange="f59e42", yellow="f6cf3f", green="5cc46f", blue="5b9bf0", purple="a47be0")
PLANETS = dict(red="e0524a", orange="ee9440", yellow="e8d04a", green="6cc04f", blue="4f93ea", purple="a878e0")
BACKGROUNDS = dict(white="fafafa", blue="a9d3f5", pink="f9bdd2", yellow="fbe9a0", green="bfe6b3", grey="aab0b9")
SKIES = dict(blue="aed8f8", pink="f9c3d2", yellow="fbeeb0", purple="d3c4f5")
NIGHTS = {"dark blue": "16225a", "black": "0a0a0c", "dark green": "06402f", "dark red": "521420"}
SUNS = dict(yellow="f4c020", orange="f58a1f", red="dd3b30")
BEHIND = (
    "on a {background} background",
    "against a {background} background",
    "in front of a {background} wall",
    "before a {background} backdrop",
)

_TOON_HEAD = Style(
    {
        "skin": _colours("skin", **SKIN),
        "hair_colour": _colours("hair", **HAIR),
        "hair": _hair(
            short=("undercut", "", "short {hair_colour} hair"),
            spiky=("spiky", "", "spiky {hair_colour} hair"),
            bun=("bun", "", "{hair_colour} hair in a bun"),
            long_straight=("sideComed", "longStraight", "long straight {hair_colour} hair"),
            long_wavy=("sideComed", "longWavy", "long wavy {hair_colour} hair"),
        ),
        "beard": _variants("beard", none=NONE, full=("fullBeard", "a full beard"), long=("longBeard", "a long beard")),
        "clothes_colour": _colours("clothes", **CLOTHES),
        "clothes": _variants(
            "clothes",
            turtleneck=("turtleNeck", "a {clothes_colour} turtleneck"),
            tank_top=("dress", "a {clothes_colour} tank top"),
            jacket=("shirt", "a {clothes_colour} jacket with a pale collar"),
        ),
        "expression": _faces(
            calm=("happy", "smile", ""),
            talking=("happy", "laugh", "an open mouth"),
            surprised=("wide", "agape", "a surprised look"),
            winking=("wink", "smile", "a wink"),
            sleepy=("humble", "smile", "closed eyes"),
        ),
        "background": _colours("background", **BACKGROUNDS),
    },
    ("a toon head", "a toon character", "a cartoon head"),
    (("{hair}",), ("{beard}",), ("{clothes}",), ("{expression}",), ("{skin} skin",)),
    BEHIND,
    (("hair_colour", "clothes_colour"), ("hair", "background")),
    {**_variant("eyebrows", "neutral")},
)

_MICAH = Style(
    {
        "skin": _colours("base", **SKIN),
        "hair_colour": _colours("hair", **HAIR),
        "hair": _variants(
            "hair",
            long_wavy=("full", "long wavy {hair_colour} hair"),
            bob=("pixie", "a {hair_colour} bob"),
            swept_up=("fonze", "swept-up {hair_colour} hair"),
            mohawk=("mrT", "a {hair_colour} mohawk"),
        ),
        "glasses": _variants(
            "glasses", none=NONE, round=("round", "round glasses"), square=("square", "square glasses")
        ),
        "clothes_colour": _colours("shirt", **CLOTHES),
        "expression": _variants(
            "mouth",
            smiling=("smile", "a smile"),
            laughing=("laughing", "a big laugh"),
            sad=("frown", "a frown"),
            nervous=("nervous", "clenched teeth"),
            surprised=("surprised", "an open mouth"),
        ),
        "background": _colours("background", **BACKGROUNDS),
    },
    ("a line-drawn person", "an outlined portrait", "a black-outlined person"),
    (
        ("{hair}",),
        ("{glasses}",),
        ("a {clothes_colour} shirt", "a {clothes_colour} sweater"),
        ("{expression}",),
        ("{skin} skin",),
    ),
    BEHIND,
    (("hair_colour", "glasses"), ("hair", "clothes_colour")),
    {
        **_variant("facialHair"), **_variant("earrings"), **_variant("eyebrows", "up"), **_variant("eyes", "eyes"),
        **_variant("nose", "curve"), **_variant("clothes", "crew"), **_variant("ears", "attached"),
        "glassesColor": "000000",
    },
)  # fmt: skip

_BIG_SMILE = Style(
    {
        "skin": _colours("skin", **SKIN),
        "hair_colour": _colours("hair", **HAIR),
        "hair": _variants(
            "hair",
            long_with_a_fringe=("bangs", "long {hair_colour} hair with a fringe"),
            bun=("bunHair", "{hair_colour} hair in a bun"),
            short_curly=("curlyShortHair", "short curly {hair_colour} hair"),
            short=("shortHair", "short {hair_colour} hair"),
            long_wavy=("wavyBob", "long wavy {hair_colour} hair"),
        ),
        "accessory": _variants(
            "accessories",
            none=NONE,
            glasses=("glasses", "round glasses"),
            sunglasses=("sunglasses", "sunglasses"),
            cat_ears=("catEars", "cat ears"),
            clown_nose=("clownNose", "a red clown nose"),
            moustache=("mustache", "a moustache"),
            sleep_mask=("sleepMask", "a purple sleep mask"),
        ),
        "expression": _variants(
            "mouth",
            grinning=("teethSmile", "a toothy grin"),
            laughing=("openedSmile", "a laughing mouth"),
            unimpressed=("unimpressed", "a closed mouth"),
        ),
        "background": _colours("background", **BACKGROUNDS),
    },
    ("a big cartoon face", "a round cartoon face", "a big face looking to the right"),
    (("{hair}",), ("{accessory}",), ("{expression}",), ("{skin} skin",)),
    BEHIND,
    (("hair_colour", "accessory"), ("hair", "background")),
    {**_variant("eyes", "normal")},
)

_VOXEL_ART = Style(
    {
        "skin": _colours("skin", **SKIN),
        "top_colour": _colours("hair hat", **HAIR),
        "top": {
            **_variants(
                "top",
                spiky_hair=("spiky", "spiky {top_colour} hair"),
                mohawk=("mohawk", "a {top_colour} mohawk"),
                long_hair=("longStraight", "long {top_colour} hair"),
            ),
            # The hair below a hat is brown.
            "cap": Option("a {top_colour} cap", {**_variant("top", "cap"), "hairColor": "3b2f2f"}),
            "hat with ears": Option(
                "a {top_colour} hat with ears", {**_variant("top", "bunnyEars"), "hairColor": "3b2f2f"}
            ),
        },
        "glasses": _variants("glasses", none=NONE, glasses=("square", "glasses"), sunglasses=("shades", "sunglasses")),
        "clothes_colour": _colours("shirt jacket", **CLOTHES),
        "clothes": _variants(
            "outfit",
            plain_shirt=("plain", "a plain {clothes_colour} shirt"),
            striped_shirt=("stripes", "a striped {clothes_colour} shirt"),
            overalls=("overalls", "a {clothes_colour} shirt under overalls"),
            suit=("suit", "a {clothes_colour} suit"),
        ),
        "background": _colours("background", **BACKGROUNDS),
    },
    ("a blocky little figure", "a voxel character", "a person made of blocks"),
    (("{top}",), ("{glasses}",), ("{clothes}",), ("{skin} skin",)),
    BEHIND,
    (("top_colour", "clothes_colour"), ("top", "glasses")),
    {
        **_variant("beard"), **_variant("cheeks"), **_variant("eyebrows"), **_variant("eyes", "open"),
        **_variant("mouth", "smile"), **_variant("nose", "small"), "pantsColor": "3b5b8c", "shoesColor": "343a40",
    },
)  # fmt: skip

_CRITTERS = Style(
    {
        "colour": _colours("body", **BODIES),
        "shape": _variants(
            "body",
            dome=("dome", "dome-shaped"),
            square=("block", "square"),
            tall=("tower", "tall"),
            bell=("bell", "bell-shaped"),
        ),
        "top": _variants(
            "top",
            none=NONE,
            horns=("horns", "two horns"),
            antennae=("antennae", "two antennae"),
            spikes=("spikes", "three spikes"),
            round_ears=("earsRound", "round ears"),
            sprout=("sprout", "a sprout on its head"),
        ),
        "eyes": _variants(
            "eyes",
            one=("mono", "one big eye"),
            two=("round", "two round eyes"),
            three=("trio", "three eyes"),
            closed=("happy", "closed happy eyes"),
            angry=("angry", "angry eyes"),
        ),
        "mouth": _variants(
            "mouth",
            smile=("smile", "a smile"),
            frown=("frown", "a frown"),
            open=("open", "an open mouth"),
            zigzag=("zigzag", "a zigzag mouth"),
            tongue=("tongue", "its tongue out"),
        ),
        "background": _colours("background", **BACKGROUNDS),
    },
    ("a {shape} {colour} monster", "a {shape} {colour} creature", "a {colour} monster, {shape},"),
    (("{top}",), ("{eyes}",), ("{mouth}",)),
    BEHIND,
    (("colour", "top"), ("eyes", "mouth")),
    {**_variant("pattern"), **_variant("cheeks"), "accentColor": "d9589b"},
)

_SPROUTS = Style(
    {
        "plant": _variants(
            "plant",
            cactus=("cactus", "cactus"),
            tulip=("tulip", "pink tulip"),
            flower=("flower", "pink flower"),
            palm_tree=("palm", "palm tree"),
            spiky_plant=("succulent", "spiky plant"),
            bush=("bush", "bush"),
            sprout=("sprout", "sprout"),
        ),
        "pot_colour": _colours("pot", **BODIES),
        "pot": _variants(
            "pot", square=("cylinder", "square"), round=("round", "round"), bowl=("bowl", "bowl-shaped")
        ),
        "expression": _faces(
            smiling=("round", "smile", "a smile"),
            sad=("round", "frown", "a frown"),
            angry=("angry", "frown", "an angry face"),
            sleepy=("closedLine", "line", "a sleeping face"),
            surprised=("wide", "open", "a surprised face"),
            winking=("wink", "smile", "a wink"),
        ),
        "background": _colours("background", **BACKGROUNDS),
    },
    (
        "a {plant} in a {pot} {pot_colour} pot",
        "a {pot} {pot_colour} pot holding a {plant}",
        "a potted {plant}, its pot {pot_colour} and {pot},",
    ),
    (("{expression}",),),
    BEHIND,
    (("plant", "pot_colour"), ("expression", "background")),
    {**_variant("pattern"), **_variant("cheeks"), "plantColor": "3fae5a", "bloomColor": "f0649b"},
)  # fmt: skip

_PLANETS = Style(
    {
        "colour": _colours("planet", **PLANETS),
        "surface": _variants(
            "surface",
            striped=("banded", "striped"),
            cratered=("cratered", "cratered"),
            patchy=("terra", "patchy"),
            smooth=("", "smooth"),
        ),
        "ring": _variants("ring", none=NONE, thin=("thin", "a thin ring"), wide=("bold", "a wide ring")),
        "moons": _variants("moons", none=NONE, one=("one", "one moon"), two=("two", "two moons")),
        "sky": _colours("background", **NIGHTS),
    },
    ("a {surface} {colour} planet", "a {colour} {surface} planet"),
    (("{ring}",), ("{moons}",)),
    ("in a {sky} sky", "in {sky} space", "against a {sky} sky", "on a {sky} background with stars"),
    (("colour", "ring"), ("surface", "sky")),
    {**_variant("shade", "soft")},
)

_LANDSCAPE = Style(
    {
        "sky": _colours("background", **SKIES),
        "sun": {
            "none": Option("", _variant("orb")),
            **{
                name: Option(f"a {name} sun", {**_variant("orb", "sun"), "orbColor": code})
                for name, code in SUNS.items()
            },
        },
        "far_hills": _hills(
            ("hill1", "hill2"), green=("b0d6a0", "8abb7c"), blue=("9cc4e4", "6f9fc8"), red=("e4a597", "cc7a68")
        ),
        "near_hills": _hills(
            ("hill3", "hill4"), green=("4f8a4a", "2c5c34"), blue=("3f6d9c", "274a72"), brown=("8a5a34", "5f3a20")
        ),
    },
    ("a landscape", "rolling hills", "a hilly landscape"),
    (
        ("{near_hills} hills in front", "{near_hills} hills nearby"),
        ("{far_hills} hills far away", "{far_hills} hills behind"),
        ("{sun}",),
    ),
    ("under a {sky} sky", "below a {sky} sky", "beneath {sky} skies"),
    (("sky", "near_hills"), ("sun", "far_hills")),
    {},
)

# The names are those of the drawing package.
STYLES: Mapping[str, Style] = {
    "toon-head": _TOON_HEAD,
    "micah": _MICAH,
    "big-smile": _BIG_SMILE,
    "voxel-art": _VOXEL_ART,
    "critters": _CRITTERS,
    "sprouts": _SPROUTS,
    "planets": _PLANETS,
    "landscape": _LANDSCAPE,
}
