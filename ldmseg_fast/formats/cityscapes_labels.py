"""Holds the labels of Cityscapes and of KITTI-360, which continues them.

Their lists are https://github.com/mcordts/cityscapesScripts, helpers/labels.py, and
https://github.com/autonomousvision/kitti360Scripts, helpers/labels.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Label:
    """Describes one label.

    Attributes:
        id: in the maps.
        name: of the class.
        group: of classes.
        color: R, G, B.
        train_id: of the 19 classes that are evaluated, None: the label is void.
        isthing: whether it has instances.
    """

    id: int
    name: str
    group: str
    color: tuple[int, int, int]
    train_id: int | None = None
    isthing: bool = False

    def category(self) -> dict[str, Any]:
        """Returns the COCO entry."""
        return {
            "id": self.id,
            "name": self.name,
            "supercategory": self.group,
            "isthing": int(self.isthing),
            "color": list(self.color),
        }


CITYSCAPES = (
    Label(0, "unlabeled", "void", (0, 0, 0)),
    Label(1, "ego vehicle", "void", (0, 0, 0)),
    Label(2, "rectification border", "void", (0, 0, 0)),
    Label(3, "out of roi", "void", (0, 0, 0)),
    Label(4, "static", "void", (0, 0, 0)),
    Label(5, "dynamic", "void", (111, 74, 0)),
    Label(6, "ground", "void", (81, 0, 81)),
    Label(7, "road", "flat", (128, 64, 128), 0),
    Label(8, "sidewalk", "flat", (244, 35, 232), 1),
    Label(9, "parking", "flat", (250, 170, 160)),
    Label(10, "rail track", "flat", (230, 150, 140)),
    Label(11, "building", "construction", (70, 70, 70), 2),
    Label(12, "wall", "construction", (102, 102, 156), 3),
    Label(13, "fence", "construction", (190, 153, 153), 4),
    Label(14, "guard rail", "construction", (180, 165, 180)),
    Label(15, "bridge", "construction", (150, 100, 100)),
    Label(16, "tunnel", "construction", (150, 120, 90)),
    Label(17, "pole", "object", (153, 153, 153), 5),
    Label(18, "polegroup", "object", (153, 153, 153)),
    Label(19, "traffic light", "object", (250, 170, 30), 6),
    Label(20, "traffic sign", "object", (220, 220, 0), 7),
    Label(21, "vegetation", "nature", (107, 142, 35), 8),
    Label(22, "terrain", "nature", (152, 251, 152), 9),
    Label(23, "sky", "sky", (70, 130, 180), 10),
    Label(24, "person", "human", (220, 20, 60), 11, True),
    Label(25, "rider", "human", (255, 0, 0), 12, True),
    Label(26, "car", "vehicle", (0, 0, 142), 13, True),
    Label(27, "truck", "vehicle", (0, 0, 70), 14, True),
    Label(28, "bus", "vehicle", (0, 60, 100), 15, True),
    Label(29, "caravan", "vehicle", (0, 0, 90), None, True),
    Label(30, "trailer", "vehicle", (0, 0, 110), None, True),
    Label(31, "train", "vehicle", (0, 80, 100), 16, True),
    Label(32, "motorcycle", "vehicle", (0, 0, 230), 17, True),
    Label(33, "bicycle", "vehicle", (119, 11, 32), 18, True),
)

_THINGS_IN_360 = ("building", "pole", "traffic light", "traffic sign")

# of KITTI-360 the labels beyond Cityscapes have no train_id here: all that are no void make a category
KITTI_360 = (
    *(
        Label(each.id, each.name, each.group, each.color, each.train_id, each.isthing or each.name in _THINGS_IN_360)
        for each in CITYSCAPES
    ),
    Label(34, "garage", "construction", (64, 128, 128), isthing=True),
    Label(35, "gate", "construction", (190, 153, 153)),
    Label(36, "stop", "construction", (150, 120, 90), isthing=True),
    Label(37, "smallpole", "object", (153, 153, 153), isthing=True),
    Label(38, "lamp", "object", (0, 64, 64), isthing=True),
    Label(39, "trash bin", "object", (0, 128, 192), isthing=True),
    Label(40, "vending machine", "object", (128, 64, 0), isthing=True),
    Label(41, "box", "object", (64, 64, 128), isthing=True),
    Label(42, "unknown construction", "void", (102, 0, 0)),
    Label(43, "unknown vehicle", "void", (51, 0, 51)),
    Label(44, "unknown object", "void", (32, 32, 32)),
)
