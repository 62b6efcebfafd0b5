// Rows of 8-bit RGB PNGs <-> segment ids (id = R + 256 G + 65536 B).
#pragma once
#include <cstddef>
#include <cstdint>

#include "run_map.hpp"

namespace ldmseg {

// rows: height x (1 filter byte + 3 width bytes), as inflated. False if a filter byte is not 0..4.
bool unfilter_ids(const uint8_t* rows, size_t height, size_t width, int32_t* ids);

// The same into runs, without writing the map.
bool unfilter_runs(const uint8_t* rows, RunMap& map);

// The reverse: filters each row by Up, the first by Sub. Ids must lie in 0..2^24-1.
void filter_ids(const int32_t* ids, size_t height, size_t width, uint8_t* rows);

}  // namespace ldmseg
