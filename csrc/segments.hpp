// Areas, boxes, run lengths and connected pieces of a map's segments. The definitions are in ldmseg_fast/panoptic/shapes.py.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace ldmseg {

struct SegmentShape {
    int32_t id;
    int64_t area = 0;
    int32_t left, right, top, bottom;  // inclusive
    std::string rle;                   // pycocotools' compressed counts; empty unless asked for
};

// Every id but 0, ascending, in one pass over the map.
std::vector<SegmentShape> segment_shapes(const int32_t* ids, size_t height, size_t width, bool rle);

// In place: 4-connected pieces of a segment under `min_island` pixels become void, then pieces of void of at most
// `max_hole` pixels that touch one segment alone, and not the image's edge, are given to it.
void clean_segments(int32_t* ids, size_t height, size_t width, int64_t min_island, int64_t max_hole);

}  // namespace ldmseg
