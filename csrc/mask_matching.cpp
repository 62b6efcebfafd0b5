#include "mask_matching.hpp"

#include <algorithm>
#include <numeric>

namespace ldmseg {
namespace {

// Where the id of a pixel may differ from that of the pixel before: a bit a pixel, in the order of spans.
struct Steps {
    std::vector<uint64_t> begins;  // from here on it is ids[pixel]
    std::vector<uint64_t> ends;    // from here on it is 0, where no mask begins
    std::vector<uint8_t> ids;      // of pixels at which no mask begins: anything

    void start(size_t pixels) {
        const size_t words = pixels / 64 + 1;
        if (ids.size() > 4 * pixels) *this = {};
        begins.assign(words, 0);
        ends.assign(words, 0);
        if (ids.size() < pixels) ids.resize(pixels);
    }
};

void set_bit(uint64_t* bits, uint32_t at) { bits[at / 64] |= uint64_t{1} << (at % 64); }

// Right where no two masks share a pixel. Otherwise some pieces of masks come out shorter than they are, none longer.
void mark_spans(const MaskSide& side, size_t pixels, Steps& steps) {
    steps.start(pixels);
    uint64_t *begins = steps.begins.data(), *ends = steps.ends.data();  // else looked up again after every id, a char
    uint8_t* ids = steps.ids.data();
    for (size_t k = 0; k < side.masks.size(); ++k)
        for (const Span& span : side.masks[k]) {
            set_bit(begins, span.begin);
            set_bit(ends, span.end);
            ids[span.begin] = static_cast<uint8_t>(k + 1);
        }
}

void mark_painted(const MaskSide& side, size_t pixels, Steps& steps) {
    steps.start(pixels);
    std::fill(steps.ids.begin(), steps.ids.begin() + static_cast<std::ptrdiff_t>(pixels), 0);
    paint_pixels(side.masks, painting_order(side.masks, side.above), steps.ids.data());
    unequal_bits(steps.ids.data(), pixels, steps.begins.data());
    set_bit(steps.begins.data(), 0);
}

// Pixels of each pair of ids: that of (g, p) stands at g * stride + p.
void count_pairs(const Steps& gt, const Steps& pred, size_t pixels, size_t stride, uint32_t* pairs) {
    const uint8_t *gt_ids = gt.ids.data(), *pred_ids = pred.ids.data();
    size_t last = 0, g = 0, p = 0;
    for (size_t word = 0; word < gt.begins.size(); ++word) {
        const uint64_t gt_begins = gt.begins[word], pred_begins = pred.begins[word];
        const uint64_t gt_any = gt_begins | gt.ends[word], pred_any = pred_begins | pred.ends[word];
        for (uint64_t left = gt_any | pred_any; left; left &= left - 1) {
            const int bit = lowest_bit(left);
            const size_t at = 64 * word + static_cast<size_t>(bit);
            if (at >= pixels) break;  // where the last spans end
            pairs[g * stride + p] += static_cast<uint32_t>(at - last);
            // both are looked up whether they are needed or not: a branch would be guessed wrong every other time
            const size_t next_g = gt_begins >> bit & 1 ? gt_ids[at] : 0, next_p = pred_begins >> bit & 1 ? pred_ids[at] : 0;
            g = gt_any >> bit & 1 ? next_g : g;
            p = pred_any >> bit & 1 ? next_p : p;
            last = at;
        }
    }
    pairs[g * stride + p] += static_cast<uint32_t>(pixels - last);
}

int64_t area_of(const MaskSide& side) {
    int64_t area = 0;
    for (const std::vector<Span>& mask : side.masks)
        for (const Span& span : mask) area += span.end - span.begin;
    return area;
}

}  // namespace

MaskMatches match_masks(const MaskSide& gt, const MaskSide& pred, size_t pixels) {
    static thread_local std::array<Steps, 2> steps;  // fresh pages cost more than what is written to them
    static thread_local std::vector<uint32_t> pairs;
    const std::array<const MaskSide*, 2> sides{&gt, &pred};
    const size_t stride = pred.masks.size() + 1;
    std::array<std::vector<int64_t>, 2> left;  // pixels of each mask, behind those of none
    const auto count = [&] {
        pairs.assign((gt.masks.size() + 1) * stride, 0);
        count_pairs(steps[0], steps[1], pixels, stride, pairs.data());
        for (size_t side = 0; side < 2; ++side) left[side].assign(sides[side]->masks.size() + 1, 0);
        for (size_t g = 0, at = 0; g < left[0].size(); ++g)
            for (size_t p = 0; p < stride; ++p, ++at) {
                left[0][g] += pairs[at];
                left[1][p] += pairs[at];
            }
    };
    const auto hidden = [&](size_t side) {
        return area_of(*sides[side]) - std::accumulate(left[side].begin() + 1, left[side].end(), int64_t{0});
    };
    for (size_t side = 0; side < 2; ++side) mark_spans(*sides[side], pixels, steps[side]);
    count();
    bool overlaps = false;
    for (size_t side = 0; side < 2; ++side) {
        if (hidden(side) == 0) continue;
        mark_painted(*sides[side], pixels, steps[side]);
        overlaps = true;
    }
    if (overlaps) count();

    std::vector<Overlap> found;
    for (size_t at = 0; at < pairs.size(); ++at)
        if (pairs[at]) found.push_back({static_cast<int32_t>(at / stride), static_cast<int32_t>(at % stride), pairs[at]});
    MaskMatches result;
    std::array<std::vector<Segment>, 2> segments;
    for (size_t side = 0; side < 2; ++side) {
        for (size_t k = 0; k < sides[side]->segments.size(); ++k)
            if (left[side][k + 1] > 0) segments[side].push_back(sides[side]->segments[k]);
        result.hidden[side] = hidden(side);
        result.gone[side] = sides[side]->segments.size() - segments[side].size();
    }
    result.matches = match_overlaps(found, segments[0], segments[1]);
    return result;
}

}  // namespace ldmseg
