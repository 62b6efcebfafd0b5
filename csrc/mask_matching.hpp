// Masks of two sides matched by their spans, without a map of either. What it returns equals what paint_masks and
// match_segments do of the same masks.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "coco_masks.hpp"
#include "matching.hpp"

namespace ldmseg {

constexpr size_t kMostMasks = 255;  // of a side

struct MaskSide {
    std::vector<Segment> segments;  // segment k has the id k + 1
    std::vector<std::vector<Span>> masks;
    std::vector<uint8_t> above;  // see paint_masks
};

struct MaskMatches {
    std::vector<Match> matches;
    std::array<int64_t, 2> hidden;  // of ground truth and prediction, see PaintedMasks
    std::array<size_t, 2> gone;     // masks of which no pixel is left
};

// Both sides have at most kMostMasks masks. There are no boundary IoUs (NaN).
MaskMatches match_masks(const MaskSide& gt, const MaskSide& pred, size_t pixels);

}  // namespace ldmseg
