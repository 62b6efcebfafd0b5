// Masks as COCO writes them: run lengths down the columns, and outlines. The rules are pycocotools'; the twin is
// panoptic/coco_masks.py.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string_view>
#include <vector>

#include "run_map.hpp"

namespace ldmseg {

// No mask; it tells why.
struct BadMask : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Span {  // pixels begin <= p < end of a mask, counted down the columns
    uint32_t begin, end;
};

// COCO's compressed counts. Throws BadMask for characters that are none, and for counts below 0 or over 2^32 - 1.
std::vector<int64_t> counts_of_text(std::string_view text);

// Throws BadMask for counts below 0, and where they do not add up to `pixels`. Empty spans are left out.
std::vector<Span> spans_of_counts(const std::vector<int64_t>& counts, size_t pixels);

// The same of compressed counts, in one pass where they are right.
std::vector<Span> spans_of_text(std::string_view text, size_t pixels);

// Puts outlines together to one mask.
class OutlineMask {
   public:
    OutlineMask(size_t height, size_t width);

    // Adds the pixels that pycocotools' rasteriser sets for the polygon (x, y), `points` times, which may lie outside.
    // Throws BadMask for coordinates that are not finite or do not fit int32 at a fifth of a pixel, and for an outline
    // that goes to and fro over 2^27 columns.
    void add(const double* xy, size_t points);
    std::vector<Span> spans() const;

   private:
    void add_edge(const int64_t* from, const int64_t* to);
    void toggle(int64_t column, int64_t fifths);

    int64_t height_, width_;
    size_t crossings_ = 0;
    std::vector<uint64_t> toggles_, pixels_;  // a bit a pixel
};

// The order in which masks are painted: those of `above` after the others, and of each the larger first, of equal ones the
// earlier.
std::vector<size_t> painting_order(const std::vector<std::vector<Span>>& masks, const std::vector<uint8_t>& above);

// Paints mask k as k + 1.
template <typename Id>
void paint_pixels(const std::vector<std::vector<Span>>& masks, const std::vector<size_t>& order, Id* pixels) {
    for (const size_t k : order)
        for (const Span& span : masks[k]) std::fill(pixels + span.begin, pixels + span.end, static_cast<Id>(k + 1));
}

// Masks painted over each other, mask k as id k + 1. The map lies on its side, [width, height], as columns are
// its rows: to matching and boundaries both are one.
struct PaintedMasks {
    RunMap map;
    std::vector<size_t> gone;  // masks of which no pixel is left, ascending
    int64_t hidden;            // pixels of masks under others
};
PaintedMasks paint_masks(const std::vector<std::vector<Span>>& masks, const std::vector<uint8_t>& above, size_t height,
                         size_t width);

}  // namespace ldmseg
