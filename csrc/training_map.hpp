// What becomes of a map between its file and the network.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "run_map.hpp"

namespace ldmseg {

constexpr size_t kMostSegments = 255;

// Numbers the segments of a map by their place in `segment_ids`: [height, width], 0 void and 1..size. Those marked in
// `dropped` (as long, or empty) and those under `min_area` pixels become void. Throws std::invalid_argument for more than
// kMostSegments and for an id of the map that the list lacks.
void dense_ids(const RunMap& map, const std::vector<int32_t>& segment_ids, const std::vector<uint8_t>& dropped,
               int64_t min_area, uint8_t* out);

struct Numbering {
    uint8_t of[256];  // new numbers, 1..count in the old order; 0 for void and what is dropped
    size_t count;
    bool changes;
};

// Numbers without gaps for a map of `pixels`; of more than `max_segments` the largest stay.
Numbering compact_numbers(const uint8_t* dense, size_t pixels, size_t max_segments);

}  // namespace ldmseg
