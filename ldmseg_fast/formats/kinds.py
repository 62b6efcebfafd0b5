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
    """

    title: str
    module: str
    reads: bool = False
    writes: bool = False


KINDS = {
    "ade20k": Kind("ADE20K, full with instances", "ade20k", reads=True),
    "ade20k-150": Kind("ADE20K, 150 classes of the challenge", "ade20k_challenge", reads=True),
    "bsds500": Kind("BSDS500, .mat", "bsds500", reads=True),
    "cityscapes": Kind("Cityscapes, gtFine panoptic or instanceIds", "cityscapes", reads=True),
    "coco-instances": Kind("COCO instances and stuff: polygons, RLE, crowd", "coco_instances", reads=True, writes=True),
    "cvat": Kind("CVAT segmentation masks 1.1", "cvat_masks", reads=True, writes=True),
    "hugging-face": Kind("Hugging Face data set with `image` and `segments_info`", "hugging_face", reads=True),
    "kitti-360": Kind("KITTI-360 panoptic", "kitti_360", reads=True),
    "label-studio": Kind("Label Studio, brush and polygons", "label_studio", reads=True, writes=True),
    "labelme": Kind("LabelMe JSON", "labelme", reads=True, writes=True),
    "mapillary": Kind("Mapillary Vistas 1.2 and 2.0", "mapillary", reads=True),
    "pascal-context": Kind("PASCAL Context", "pascal_context", reads=True),
    "roboflow": Kind("Roboflow's COCO export", "roboflow", reads=True),
    "semantic": Kind("folder of semantic PNGs", "semantic_folder", reads=True),
    "voc": Kind("PASCAL VOC, SegmentationClass and SegmentationObject", "voc", reads=True),
    "cityscapes-results": Kind("Cityscapes result PNGs", "cityscapes_results", writes=True),
    "coco-panoptic": Kind("COCO panoptic", "coco_panoptic", reads=True, writes=True),
    "fiftyone": Kind("FiftyOne data set folder", "fiftyone", writes=True),
    "geojson": Kind("polygons as GeoJSON", "geojson", writes=True),
    "palette": Kind("palette PNGs", "palette", writes=True),
}
