#include "training_map.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>
#include <string>

namespace ldmseg {
namespace {

struct Known {
    int32_t id;
    uint8_t number;
};

// Void and the listed segments by ascending id; of an id that is there twice the first counts.
std::vector<Known> known_segments(const std::vector<int32_t>& segment_ids) {
    std::vector<Known> known{{0, 0}};
    for (size_t k = 0; k < segment_ids.size(); ++k) known.push_back({segment_ids[k], static_cast<uint8_t>(k + 1)});
    std::stable_sort(known.begin(), known.end(), [](const Known& a, const Known& b) { return a.id < b.id; });
    return known;
}

}  // namespace

void dense_ids(const RunMap& map, const std::vector<int32_t>& segment_ids, const std::vector<uint8_t>& dropped,
               int64_t min_area, uint8_t* out) {
    if (segment_ids.size() > kMostSegments) throw std::invalid_argument("more segments than fit a byte");
    if (!dropped.empty() && dropped.size() != segment_ids.size())
        throw std::invalid_argument("a mark for each segment expected");
    const std::vector<Known> known = known_segments(segment_ids);
    std::array<int64_t, 256> area{};
    std::vector<uint8_t> numbers;  // of the runs
    for (size_t y = 0; y < map.height; ++y) {
        for (const Run* run = map.row(y); run->begin < static_cast<int32_t>(map.width); ++run) {
            const auto found = std::lower_bound(known.begin(), known.end(), run->id,
                                                [](const Known& segment, int32_t id) { return segment.id < id; });
            if (found == known.end() || found->id != run->id)
                throw std::invalid_argument("segment id " + std::to_string(run->id) +
                                            " is in the map but not in segments_info");
            numbers.push_back(found->number);
            area[found->number] += run[1].begin - run->begin;
        }
    }
    std::array<uint8_t, 256> kept{};
    for (size_t k = 1; k <= segment_ids.size(); ++k)
        kept[k] = area[k] >= min_area && (dropped.empty() || !dropped[k - 1]) ? static_cast<uint8_t>(k) : 0;
    const uint8_t* number = numbers.data();
    for (size_t y = 0; y < map.height; ++y, out += map.width)
        for (const Run* run = map.row(y); run->begin < static_cast<int32_t>(map.width); ++run)
            std::memset(out + run->begin, kept[*number++], static_cast<size_t>(run[1].begin - run->begin));
}

Numbering compact_numbers(const uint8_t* dense, size_t pixels, size_t max_segments) {
    std::array<std::array<uint64_t, 256>, 4> areas{};  // four, or a run would wait for its own last count
    for (size_t k = 0; k < pixels; ++k) ++areas[k % 4][dense[k]];
    std::vector<uint8_t> kept;
    for (size_t id = 1; id < 256; ++id) {
        for (size_t part = 1; part < 4; ++part) areas[0][id] += areas[part][id];
        if (areas[0][id] > 0) kept.push_back(static_cast<uint8_t>(id));
    }
    const size_t highest = kept.empty() ? 0 : kept.back();
    if (kept.size() > max_segments) {
        std::stable_sort(kept.begin(), kept.end(), [&](uint8_t a, uint8_t b) { return areas[0][a] > areas[0][b]; });
        kept.resize(max_segments);
        std::sort(kept.begin(), kept.end());
    }
    Numbering numbering{{}, kept.size(), kept.size() != highest};
    for (size_t k = 0; k < kept.size(); ++k) numbering.of[kept[k]] = static_cast<uint8_t>(k + 1);
    return numbering;
}

}  // namespace ldmseg
