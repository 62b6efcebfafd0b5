// 8-bit RGB PNGs <-> segment ids (id = R + 256 G + 65536 B).
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "run_map.hpp"

namespace ldmseg {

// No 8-bit RGB PNG without interlacing, more pixels than allowed, or damaged.
struct UnreadablePng : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Only runs are made of the pixels, so most of the cost is inflating. Throw UnreadablePng.
RunMap read_png(const uint8_t* content, size_t size, size_t max_pixels);
RunMap read_png_file(const std::string& path, size_t max_pixels);

// Rows as a PNG holds them, height x (1 filter byte + 3 width bytes): the first filtered by Sub, the others by Up. Ids must
// lie in 0..2^24-1.
void filter_ids(const int32_t* ids, size_t height, size_t width, uint8_t* rows);

}  // namespace ldmseg
