"""Reads Roboflow's export "COCO Segmentation" (https://docs.roboflow.com; roboflow.com/formats/coco-segmentation-json).

It has a folder a split with the pictures and `_annotations.coco.json`. Category 0 is no class but the name of the
project, which stands as the `supercategory` of all others.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from ldmseg_fast.errors import DataError
from ldmseg_fast.files import real_path
from ldmseg_fast.formats.coco_files import CocoFile, data_set_of
from ldmseg_fast.formats.data_set import DataSet
from ldmseg_fast.formats.options import ReadOptions
from ldmseg_fast.formats.trees import Tree

NAME = "_annotations.coco.json"


def read(source: Path, options: ReadOptions) -> DataSet:
    """Reads SRC/train, SRC/valid and SRC/test, those that there are.

    Args:
        source: the folder, or the `.zip` that Roboflow gives.
        options: `version` has no meaning.

    Raises:
        DataError: no split, or one that `data_set_of` refuses.
    """
    options.one_version((), "roboflow")
    tree = Tree(source)
    names = [tree.only] if tree.only else [name for name in tree.names if PurePosixPath(name).name == NAME]
    if not names:
        raise DataError(f"{source}: no SPLIT/{NAME}; export the project as COCO Segmentation")
    files = []
    for name in names:
        folder = "" if (parent := PurePosixPath(name).parent.as_posix()) == "." else parent
        split = PurePosixPath(folder).name or real_path(tree.root).name
        files.append(CocoFile(name, split, (folder,), placeholder=True))
    return data_set_of(tree, files, options)
