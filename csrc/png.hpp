// 8-bit PNGs: maps <-> segment ids (id = R + 256 G + 65536 B), and pictures.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "run_map.hpp"

namespace ldmseg {

// Of another pixel format than asked for, interlaced, of more pixels than allowed, or damaged.
struct UnreadablePng : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Runs of a small file that would take hundreds of megabytes.
struct TooManyRuns : UnreadablePng {
    using UnreadablePng::UnreadablePng;
};

constexpr size_t kPiece = size_t{1} << 22;     // bytes of rows that are inflated at a time
constexpr size_t kLongestSide = 65536;         // of a map; a JPEG has at most 65535
constexpr size_t kMostRuns = size_t{1} << 22;  // of a map, and one more for each byte of its file

struct PngHeader {
    size_t height, width, channels;  // 3: RGB; 1: grey
};

// Of an 8-bit RGB or grey PNG without interlacing. Throws UnreadablePng.
PngHeader read_png_header(const uint8_t* content, size_t size, size_t max_pixels);

// rgb: [height, width, 3], as the file stores them: no gamma, profile, transparency or orientation is applied. Throws
// UnreadablePng.
void read_png_picture(const uint8_t* content, size_t size, const PngHeader& header, uint8_t* rgb);

// The ids of an RGB PNG, whose rows are inflated a few at a time. Only runs are made of the pixels, so most of the cost is
// inflating. Throw UnreadablePng.
RunMap read_png(const uint8_t* content, size_t size, size_t max_pixels, size_t piece = kPiece);
RunMap read_png_file(const std::string& path, size_t max_pixels);

// Of an 8-bit RGB PNG without interlacing, whose sides a map may have. Throws UnreadablePng.
PngHeader read_map_header(const uint8_t* content, size_t size, size_t max_pixels);

// ids: [height, width]; any number of runs. Throws UnreadablePng.
void read_png_ids(const uint8_t* content, size_t size, const PngHeader& header, int32_t* ids, size_t piece = kPiece);

// Rows as a PNG holds them, height x (1 filter byte + 3 width bytes): the first filtered by Sub, the others by Up. Ids must
// lie in 0..2^24-1.
void filter_ids(const int32_t* ids, size_t height, size_t width, uint8_t* rows);

}  // namespace ldmseg
