"""Label sets: names of the classes, the colours they are drawn in, and tables from one set to another.

Class lists, tables and palettes of the benchmarks are those OpenScene evaluates with (label/*.py,
label/label_constants.py); NYU40 ids and colours are ScanNet's (BenchmarkScripts/util.py), SemanticKITTI's its own.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt8

IGNORE = 255  # a label that is neither trained nor evaluated


@dataclass(frozen=True, eq=False)
class LabelSet:
    """K class names and their colours; label i is `classes[i]`, 255 is none of them."""

    name: str
    classes: tuple[str, ...]
    palette: UInt8[np.ndarray, "K 3"]

    def __post_init__(self):
        if self.palette.shape != (len(self.classes), 3):
            raise ValueError(
                f"label set '{self.name}': palette must be [{len(self.classes)}, 3], one colour per class, "
                f"got {list(self.palette.shape)}"
            )

    def colorize(self, labels: Int[np.ndarray, " N"]) -> UInt8[np.ndarray, "N 3"]:
        """The colour of each label; labels outside the set (255, -1) are black."""
        inside = (labels >= 0) & (labels < len(self.classes))
        return np.where(inside[:, None], self.palette[np.where(inside, labels, 0)], np.uint8(0))


def unknown_label_set(name: str, known: Iterable[str]) -> str:
    """What to say of a name that is none of the known ones."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
    return f"unknown label set {name!r}; did you mean {near[0]!r}? known: {', '.join(known)}"


class _LabelSets(dict):
    def __missing__(self, name: str) -> LabelSet:
        raise ValueError(unknown_label_set(name, self))


def _names(text: str) -> tuple[str, ...]:
    return tuple(" ".join(name.split()) for name in text.split(","))


def _palette(hex_colors: str) -> UInt8[np.ndarray, "K 3"]:
    return np.array([list(bytes.fromhex(color)) for color in hex_colors.split()], dtype=np.uint8)


_NYU40 = LabelSet(
    "nyu40",  # id 1 is class 0; id 0 is "not annotated"
    _names("""
        wall, floor, cabinet, bed, chair, sofa, table, door, window, bookshelf, picture, counter, blinds,
        desk, shelves, curtain, dresser, pillow, mirror, floor mat, clothes, ceiling, books, refrigerator,
        television, paper, towel, shower curtain, box, whiteboard, person, night stand, toilet, sink, lamp,
        bathtub, bag, otherstructure, otherfurniture, otherprop
    """),
    _palette("""
        aec7e8 98df8a 1f77b4 ffbb78 bcbd22 8c564b ff9896 d62728 c5b0d5 9467bd c49c94 17becf b24c4c f7b6d2
        42bc66 dbdb8d 8c39c5 cab934 33b0cb c83683 5cc13d 4e47b7 ac7252 ff7f0e 5ba38a 99629c 8c9965 9edae5
        647d9a b27f87 78b980 926fc2 2ca02c 708090 60cfd1 e377c2 d55cb0 5e6ad3 5254a3 645590
    """),
)

_NYU37 = LabelSet("nyu37", _NYU40.classes[:37], _NYU40.palette[:37])  # without the three catch-alls "other..."

_SCANNET20_NYU40_IDS = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 24, 28, 33, 34, 36, 39])

NYU40_TO_SCANNET20 = np.full(41, IGNORE, np.int32)
"""int32 [41]: NYU40 id 0..40 to ScanNet class 0..19, 255 for ids outside the benchmark."""
NYU40_TO_SCANNET20[_SCANNET20_NYU40_IDS] = np.arange(20)

_SCANNET20 = LabelSet(
    "scannet20",
    tuple(_NYU40.classes[i - 1] for i in _SCANNET20_NYU40_IDS),
    _NYU40.palette[_SCANNET20_NYU40_IDS - 1],
)

_MATTERPORT21 = LabelSet(
    "matterport21",
    (*_SCANNET20.classes[:19], "other", "ceiling"),
    np.concatenate([_SCANNET20.palette, np.array([[58, 98, 26]], np.uint8)]),
)

# The 160 most frequent names of the nyuClass column of Matterport3D's category_mapping.tsv, most frequent
# first, spelled as there; the 40- and 80-class sets are its beginnings.
_MATTERPORT160 = _names("""
    wall, door, ceiling, floor, picture, window, chair, pillow, lamp, cabinet, curtain, table, plant,
    mirror, towel, sink, shelves, sofa, bed, night stand, toilet, column, banister, stairs, stool, vase,
    television, pot, desk, box, coffee table, counter, bench, garbage bin, fireplace, clothes, bathtub,
    book, air vent, faucet, photo, toilet paper, fan, railing, sculpture, dresser, rug, ottoman, bottle,
    refridgerator, bookshelf, wardrobe, pipe, monitor, stand, drawer, container, light switch, purse, door
    way, basket, chandelier, oven, clock, stove, washing machine, shower curtain, fire alarm, bin, chest,
    microwave, blinds, bowl, tissue box, plate, tv stand, shoe, heater, headboard, bucket, candle, flower
    pot, speaker, furniture, sign, air conditioner, fire extinguisher, curtain rod, floor mat, printer,
    telephone, blanket, handle, shower head, soap, keyboard, thermostat, radiator, kitchen island, paper
    towel, sheet, glass, dishwasher, cup, ladder, garage door, hat, exit sign, piano, board, rope, ball,
    excercise equipment, hanger, candlestick, light, scale, bag, laptop, treadmill, guitar, display case,
    toilet paper holder, bar, tray, urn, decorative plate, pool table, jacket, bottle of soap, water cooler,
    utensil, tea pot, stuffed animal, paper towel dispenser, lamp shade, car, toilet brush, doll, drum,
    whiteboard, range hood, candelabra, toy, foot rest, soap dish, placemat, cleaner, computer, knob, paper,
    projector, coat hanger, case, pan, luggage, trinket, chimney, person, alarm
""")

# OpenScene's list without its black entry 40, which falls on a class where more than 40 are drawn.
_MATTERPORT160_PALETTE = _palette("""
    aec7e8 d62728 bac53e 98df8a c49c94 c5b0d5 bcbd22 8d5be5 edcc25 1f77b4 dbdb8d ff9896 963538 a23e3c 3e8f94
    708090 e55b68 8c564b ffbb78 893f0e 2ca02c 2713d0 409e46 d03154 5a77c9 76ae4c 8f2d73 996cea f7b6d2 b152ef
    3a6289 17becf 11f2ab 4f3789 7f3f34 220e82 e377c2 c0e55b 31ce57 fafd1a 524be3 fd3bde f08259 7bac2f 47c285
    185ecd 8610b3 9f2034 d5d058 409e46 12a3c2 411d99 b10a6d 985307 53af1e 12c799 3d51d0 d555d8 aa352a a1c026
    17f15b 0c67aa 9729f5 853350 b8a25b 328a26 1fedec 2713d0 df1bb4 fe8d55 619027 6ae7b0 0c3da2 7c428c 894249
    fafd1a 37bf49 3c7e92 996cea b83a7d 87540e 8bf85b 35c8ac 3f4586 be4bba 7f3f34 8db619 389059 40a0fa b656f5
    8b1235 867836 31a52a 338085 2c15a3 e85dc1 b06636 74d911 36d196 3c63cc 812b90 fc646a bbc449 0d9e28 347a98
    804cca bb3273 b48d47 4dd023 48b7a8 6163cb ac169e 9b4028 769f1e 45fc94 2d67ad 6f2695 b80931 bcae43 35ce35
    61ebfc 4220b6 ec72c3 f19a53 85f034 10cd90 4b65c6 ed5ffb bf3431 e3fe36 31ce57 307196 7d49b6 e52072 9e771c
    3ccd1b 12d7c9 4f4c99 860d74 c0613f 6ca312 5fdc9c 628dd0 9013c1 a62439 d4ca22 17ce22 5bd3ec 4f3789 b61375
    864c0e 57b91c 52e0bb 5c6ed6 a850ab c53f33 afc74d 3eb462 085b96 4d0f82
""")

_NUSCENES16 = LabelSet(
    "nuscenes16",
    _names("""
        barrier, bicycle, bus, car, construction vehicle, motorcycle, person, traffic cone, trailer, truck,
        drivable surface, other flat, sidewalk, terrain, manmade, vegetation
    """),
    _palette("""
        dcdc00 770b20 003c64 0000fa e6e6fa 0000e6 dc143c faaa1e c89600 00006e 804080 00fafa f423e8 98fb98
        464646 6b8e23
    """),
)

# What the 16 categories mean in words a language model knows; predictions for these map back to the 16.
_NUSCENES_DETAILS = {
    "barrier": "barrier, barricade",
    "bicycle": "bicycle",
    "bus": "bus",
    "car": "car",
    "construction vehicle": "bulldozer, excavator, concrete mixer, crane, dump truck",
    "motorcycle": "motorcycle",
    "person": "person, pedestrian",
    "traffic cone": "traffic cone",
    "trailer": "trailer, semi trailer, cargo container, shipping container, freight container",
    "truck": "truck",
    "drivable surface": "road",
    "other flat": "curb, traffic island, traffic median",
    "sidewalk": "sidewalk",
    "terrain": "grass, grassland, lawn, meadow, turf, sod",
    "manmade": "building, wall, pole, awning",
    "vegetation": "tree, trunk, tree trunk, bush, shrub, plant, flower, woods",
}

NUSCENES43_TO_NUSCENES16 = np.array(
    [i for i, name in enumerate(_NUSCENES16.classes) for _ in _names(_NUSCENES_DETAILS[name])], np.int32
)
"""int32 [43]: detailed nuScenes name to one of the 16 classes."""

_NUSCENES43 = LabelSet(
    "nuscenes43",
    tuple(detail for name in _NUSCENES16.classes for detail in _names(_NUSCENES_DETAILS[name])),
    _NUSCENES16.palette[NUSCENES43_TO_NUSCENES16],
)

_SEMANTICKITTI19 = LabelSet(
    "semantickitti19",
    _names("""
        car, bicycle, motorcycle, truck, other vehicle, person, bicyclist, motorcyclist, road, parking, sidewalk,
        other ground, building, fence, vegetation, trunk, terrain, pole, traffic sign
    """),
    _palette("""
        6496f5 64e6f5 1e3c96 501eb4 0000ff ff1e1e ff28c8 961e5a ff00ff ff96ff 4b004b af004b ffc800 ff7832 00af00
        873c00 96f050 fff096 ff0000
    """),
)

LABEL_SETS: dict[str, LabelSet] = _LabelSets(
    (label_set.name, label_set)
    for label_set in (
        _NYU40,
        _NYU37,
        _SCANNET20,
        _MATTERPORT21,
        *(LabelSet(f"matterport{k}", _MATTERPORT160[:k], _MATTERPORT160_PALETTE[:k]) for k in (40, 80, 160)),
        _NUSCENES16,
        _NUSCENES43,
        _SEMANTICKITTI19,
    )
)
"""Label sets by name; an unknown name raises ValueError with the nearest known one."""

CLASS_OF_WORD: dict[tuple[str, str], Int[np.ndarray, " W"]] = {("nuscenes43", "nuscenes16"): NUSCENES43_TO_NUSCENES16}
"""By the names of a set of words and of a set of classes, the class that each word means."""
