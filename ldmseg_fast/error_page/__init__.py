"""One offline HTML page of images beside their truth, their prediction and what is wrong, with each segment's IoU.

Pointing at a segment tells its IoU and shows it in all four pictures; a table under each image says the same without
a pointer or scripts. Everything is embedded in the file.
"""

from ldmseg_fast.error_page.entry import PageEntry, image_quality
from ldmseg_fast.error_page.page import render_entry, write_error_page

__all__ = ["PageEntry", "image_quality", "render_entry", "write_error_page"]
