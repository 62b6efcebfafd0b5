// A map as the runs of its rows: what matching, boundaries and pieces need of it, a hundredth of the pixels' bytes.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
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

constexpr int32_t kEndOfRow = -2147483647 - 1;  // no id that a map can have

struct Run {
    int32_t begin, id;  // goes on until the next one begins
};

// Sets bit k where ids[k] != ids[k - 1], for 1 <= k < count, and clears the others of their words.
void unequal_bits(const uint8_t* ids, size_t count, uint64_t* bits);

class RunMap {
   public:
    size_t height, width;

    // Rows are added from top to bottom, each between start_row and end_row.
    RunMap(size_t height, size_t width);
    RunMap(const int32_t* map, size_t height, size_t width);
    RunMap(const uint8_t* map, size_t height, size_t width);

    // The runs of a row, left to right; the one after the last begins at the width.
    const Run* row(size_t y) const { return runs_.get() + first_[y]; }

    // Room for the runs of the next row; `row(y)` of earlier ones is not valid any more.
    Run* start_row();
    void end_row(Run* end);

    size_t runs() const { return first_.back(); }  // of all rows, their ends included
    std::vector<int32_t> ids() const;              // ascending, each once, 0 included
    void paint(int32_t* map) const;

   private:
    template <typename Id>
    void add_rows(const Id* map, void (*steps)(const Id*, size_t, uint64_t*));

    struct Free {
        void operator()(Run* runs) const { std::free(runs); }
    };

    std::vector<size_t> first_;  // place of each row's first run, and of the row to come
    std::unique_ptr<Run[], Free> runs_;  // by realloc: pages move when it grows, and those not in use take no memory
    size_t room_ = 0;
};

// Fills a row of a map from its runs.
inline void paint_row(const Run* run, size_t width, int32_t* row) {
    for (; run->begin < static_cast<int32_t>(width); ++run) std::fill(row + run->begin, row + run[1].begin, run->id);
}

// Writes a run unless it goes on with the id of the last one. There is always one before: the end of the row above.
inline void add_run(Run*& end, size_t begin, uint32_t id) {
    *end = {static_cast<int32_t>(begin), static_cast<int32_t>(id)};
    end += end[-1].id != end->id;
}

}  // namespace ldmseg
