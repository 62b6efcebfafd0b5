// PNG's row filters, undone into runs.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

#include "run_map.hpp"

namespace ldmseg {

constexpr size_t kUnfilterMargin = 64;  // bytes before and after a row that may be read

// Undoes the filters of a map's rows, from top to bottom.
class RowFilters {
   public:
    explicit RowFilters(size_t width);
    ~RowFilters();

    // row: 1 filter byte + 3 width bytes, as inflated. above: the runs of the row above, or of a row of zeros. Writes runs
    // from `out` on, which comes to stand behind the last one. False if the filter is unknown.
    bool undo(const uint8_t* row, const Run* above, Run*& out);

   private:
    class Rows;
    std::unique_ptr<Rows> rows_;
};

// A pixel is kept as 0x00BBGGRR: one id, and three bytes that never carry into each other.
inline uint32_t add_bytes(uint32_t a, uint32_t b) {
    return ((a & 0x7f7f7f7fu) + (b & 0x7f7f7f7fu)) ^ ((a ^ b) & 0x80808080u);
}

inline uint32_t sub_bytes(uint32_t a, uint32_t b) {
    return ((a | 0x80808080u) - (b & 0x7f7f7f7fu)) ^ ((a ^ ~b) & 0x80808080u);
}

}  // namespace ldmseg
