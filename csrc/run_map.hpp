// A map as the runs of its rows: what matching, boundaries and pieces need of it, a hundredth of the pixels' bytes.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace ldmseg {

// One bit a pixel, 64 pixels a word. Bits past the width are 0 unless said otherwise.
struct BitRows {
    size_t height, words;
    std::vector<uint64_t> bits;

    BitRows(size_t height, size_t width) : height(height), words((width + 63) / 64), bits(height * words, 0) {}
    uint64_t* row(size_t y) { return bits.data() + y * words; }
    const uint64_t* row(size_t y) const { return bits.data() + y * words; }
};

inline int lowest_bit(uint64_t word) { return __builtin_ctzll(word); }
inline int count_bits(uint64_t word) { return __builtin_popcountll(word); }

// Sets bit x where a[x] != b[x], for x < count; by the widest instruction set that the processor has.
void unequal_bits(const int32_t* a, const int32_t* b, size_t count, uint64_t* bits);

struct RunMap {
    size_t height, width;
    BitRows starts;            // where a run begins: pixel 0 and every pixel that differs from its left neighbour
    BitRows steps;             // pixels that differ from the one above; row 0 is empty
    std::vector<int32_t> ids;  // of the runs, in reading order

    RunMap(size_t height, size_t width) : height(height), width(width), starts(height, width), steps(height, width) {}

    RunMap(const int32_t* map, size_t height, size_t width) : RunMap(height, width) {
        for (size_t y = 0; y < height; ++y) add_row(y, map + y * width, y > 0 ? map + (y - 1) * width : nullptr);
    }

    // Rows are added from top to bottom.
    void add_row(size_t y, const int32_t* row, const int32_t* above);

    // The parts of add_row: one word of `starts`, and the ids of the runs once the row's `starts` are there.
    uint64_t start_bits(const int32_t* row, size_t word) const;
    void add_ids(size_t y, const int32_t* row);
};

}  // namespace ldmseg
