"""The COCO-panoptic folder of the data tests, for the commands that check and merge such folders."""

from tests.data.conftest import folder, quarters

__all__ = ["folder", "quarters"]
