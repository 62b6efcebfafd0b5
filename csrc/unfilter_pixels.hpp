// Undoes PNG's row filters into pixels: for pictures, of which no two neighbours need be alike.
//
// Generated scenes are PNGs, and Pillow's decoder would take most of an item's time on them.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ldmseg {

// rows: height x (1 filter byte + channels * width bytes), as inflated, with kUnfilterMargin bytes before and after them
// that may be read. pixels: [height, width, channels]; channels is 1 or 3. False if a filter byte is not 0..4.
bool unfilter_pixels(const uint8_t* rows, size_t height, size_t width, size_t channels, uint8_t* pixels);

}  // namespace ldmseg
