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

// In place: numbers the 4-connected pieces of segments from 1 in the order of reading; those under `least` pixels become
// void. Returns the segment that each piece is of.
std::vector<int32_t> split_segments(int32_t* ids, size_t height, size_t width, int64_t least);

}  // namespace ldmseg
