// PNG's row filters, undone into runs.
#pragma once
#include <cstddef>
#include <cstdint>

#include "run_map.hpp"

namespace ldmseg {

constexpr size_t kUnfilterMargin = 64;  // bytes before and after the rows that may be read

// rows: height x (1 filter byte + 3 width bytes), as inflated. False if a filter byte is not 0..4.
bool unfilter(const uint8_t* rows, RunMap& map);

// A pixel is kept as 0x00BBGGRR: one id, and three bytes that never carry into each other.
inline uint32_t add_bytes(uint32_t a, uint32_t b) {
    return ((a & 0x7f7f7f7fu) + (b & 0x7f7f7f7fu)) ^ ((a ^ b) & 0x80808080u);
}

inline uint32_t sub_bytes(uint32_t a, uint32_t b) {
    return ((a | 0x80808080u) - (b & 0x7f7f7f7fu)) ^ ((a ^ ~b) & 0x80808080u);
}

}  // namespace ldmseg
