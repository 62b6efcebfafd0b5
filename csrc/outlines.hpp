// Closed rings along the pixel edges of a map's segments. The definition is in ldmseg_fast/panoptic/outlines.py.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace ldmseg {

struct Outlines {
    std::vector<int32_t> points;  // x, y of all corners, ring after ring
    std::vector<int64_t> ends;    // of each ring, in corners
    std::vector<int32_t> ids;     // of each ring
    std::vector<int64_t> pieces;  // 4-connected piece that each ring belongs to; its outer ring comes first
};

Outlines outlines(const int32_t* ids, size_t height, size_t width);

}  // namespace ldmseg
