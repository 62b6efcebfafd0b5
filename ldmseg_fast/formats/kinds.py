"""Holds the table of formats. Each has a module with `read`, `write`, or both."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """Describes one format.

    Attributes:
        title: what people call it.
        module: below `ldmseg_fast.formats`. A format that is read has `read(source, options) -> DataSet`, one that is
            written `write(data_set, out, options) -> Summary`.
        reads, writes: which of the two it has.
        back: the kind that reads what this one writes, "" where none does.
        keeps: what is in the files that are written, beside the pixels of each segment and its category: "instances",
            "crowds", "scores".
        used_by: libraries and tools that they are written for.
    """

    title: str
    module: str
    reads: bool = False
    writes: bool = False
    back: str = ""
    keeps: tuple[str, ...] = ()
    used_by: str = ""


ALL = ("instances", "crowds", "scores")
KINDS = {
    "ade20k": Kind("ADE20K, full with instances", "ade20k", reads=True),
    "ade20k-150": Kind("ADE20K, 150 classes of the challenge", "ade20k_challenge", reads=True),
    "bsds500": Kind("BSDS500, .mat", "bsds500", reads=True),
    "cityscapes": Kind("Cityscapes, gtFine panoptic or instanceIds", "cityscapes", reads=True),
    "coco-instances": Kind(
        "COCO instances and stuff: polygons, RLE, crowd",
        "coco_instances",
        reads=True,
        writes=True,
        back="coco-instances",
        keeps=ALL,
        used_by="pycocotools, detectron2, FiftyOne, CVAT",
    ),
    "cvat": Kind(
        "CVAT segmentation masks 1.1",
        "cvat_masks",
        reads=True,
        writes=True,
        back="cvat",
        keeps=("instances",),
        used_by="CVAT",
    ),
    "hugging-face": Kind("Hugging Face data set with `image` and `segments_info`", "hugging_face", reads=True),
    "kitti-360": Kind("KITTI-360 panoptic", "kitti_360", reads=True),
    "label-studio": Kind(
        "Label Studio, brush and polygons",
        "label_studio",
        reads=True,
        writes=True,
        back="label-studio",
        keeps=("instances", "scores"),
        used_by="Label Studio",
    ),
    "labelme": Kind("LabelMe JSON", "labelme", reads=True, writes=True, back="labelme", keeps=ALL, used_by="LabelMe"),
    "mapillary": Kind("Mapillary Vistas 1.2 and 2.0", "mapillary", reads=True),
    "pascal-context": Kind("PASCAL Context", "pascal_context", reads=True),
    "roboflow": Kind("Roboflow's COCO export", "roboflow", reads=True),
    "semantic": Kind("folder of semantic PNGs", "semantic_folder", reads=True),
    "voc": Kind("PASCAL VOC, SegmentationClass and SegmentationObject", "voc", reads=True),
    "cityscapes-results": Kind(
        "Cityscapes results, of its 19 classes",
        "cityscapes_results",
        writes=True,
        keeps=ALL,
        used_by="cityscapesscripts",
    ),
    "coco-panoptic": Kind(
        "COCO panoptic",
        "coco_panoptic",
        reads=True,
        writes=True,
        back="coco-panoptic",
        keeps=ALL,
        used_by="panopticapi, detectron2, hotcoco",
    ),
    "fiftyone": Kind("FiftyOne data set folder", "fiftyone", writes=True, keeps=ALL, used_by="FiftyOne"),
    "geojson": Kind("polygons as GeoJSON", "geojson", writes=True, keeps=ALL, used_by="shapely, QuPath"),
    "palette": Kind(
        "palette PNGs",
        "palette",
        writes=True,
        back="semantic",
        keeps=("instances",),
        used_by="Pillow, viewers of pictures",
    ),
}
