#include "matching.hpp"

#include <algorithm>
#include <iterator>
#include <limits>
#include <string>
#include <unordered_map>

#include "cpu.hpp"
#include "key_index.hpp"

namespace ldmseg {
namespace {

constexpr int32_t kTruePositive = 0, kFalseNegative = 1, kFalsePositive = 2, kFalsePositiveOneCrowd = 3;

struct Pair {
    uint64_t key;  // gt_id << 24 | pred_id
    int64_t pixels = 0, gt_boundary = 0, pred_boundary = 0, both_boundary = 0;

    int32_t gt_id() const { return static_cast<int32_t>(key >> 24); }
    int32_t pred_id() const { return static_cast<int32_t>(key & 0xffffffu); }
};

// Pixels of the boundary in [begin, end) of a row.
struct BoundaryCounts {
    int64_t gt = 0, pred = 0, both = 0;
};

ALWAYS_INLINE BoundaryCounts count_boundary(const uint64_t* gt, const uint64_t* pred, size_t begin, size_t end) {
    BoundaryCounts counts;
    while (begin < end) {
        const size_t next = std::min(end, (begin / 64 + 1) * 64);
        const uint64_t mask = ~uint64_t{0} >> (64 - (next - begin)) << (begin % 64);
        const uint64_t g = gt[begin / 64] & mask, p = pred[begin / 64] & mask;
        counts.gt += count_bits(g);
        counts.pred += count_bits(p);
        counts.both += count_bits(g & p);
        begin = next;
    }
    return counts;
}

// Goes over pieces of rows in which both ids are constant. Without boundaries their counts stay 0.
ALWAYS_INLINE std::vector<Pair> count_pieces(const RunMap& gt, const RunMap& pred, const BitRows* gt_boundary,
                                             const BitRows* pred_boundary, size_t most) {
    KeyIndex index;
    std::vector<Pair> pairs;
    for (size_t y = 0; y < gt.height; ++y) {
        const Run *g = gt.row(y), *p = pred.row(y);
        for (size_t x = 0; x < gt.width;) {
            const auto end = static_cast<size_t>(std::min(g[1].begin, p[1].begin));
            if ((g->id | p->id) & 0xff000000) throw Inconsistent("ids outside 0..2^24-1");
            const uint64_t key = static_cast<uint64_t>(g->id) << 24 | static_cast<uint64_t>(p->id);
            const size_t at = index[key];
            if (at == pairs.size()) {
                if (at == most)
                    throw Inconsistent("over " + std::to_string(most) + " pairs of segments overlap: the maps hold noise");
                pairs.push_back({key});
            }
            Pair& pair = pairs[at];
            pair.pixels += static_cast<int64_t>(end - x);
            if (gt_boundary) {
                const BoundaryCounts counts = count_boundary(gt_boundary->row(y), pred_boundary->row(y), x, end);
                pair.gt_boundary += counts.gt;
                pair.pred_boundary += counts.pred;
                pair.both_boundary += counts.both;
            }
            g += static_cast<size_t>(g[1].begin) == end;
            p += static_cast<size_t>(p[1].begin) == end;
            x = end;
        }
    }
    return pairs;
}

std::vector<Pair> count_pieces_plain(const RunMap& gt, const RunMap& pred, const BitRows* gb, const BitRows* pb,
                                     size_t most) {
    return count_pieces(gt, pred, gb, pb, most);
}

#if LDMSEG_X86
__attribute__((target("popcnt,bmi"))) std::vector<Pair> count_pieces_popcnt(const RunMap& gt, const RunMap& pred,
                                                                          const BitRows* gb, const BitRows* pb,
                                                                          size_t most) {
    return count_pieces(gt, pred, gb, pb, most);
}
#endif

std::string size_of(const RunMap& map) { return std::to_string(map.width) + "x" + std::to_string(map.height); }

std::vector<Pair> count_pairs(const RunMap& gt, const RunMap& pred, size_t distance,
                              size_t most = std::numeric_limits<size_t>::max()) {
    if (gt.height != pred.height || gt.width != pred.width)
        throw Inconsistent("ground truth is " + size_of(gt) + ", prediction is " + size_of(pred) + "; sizes must be equal");
    auto count = count_pieces_plain;
#if LDMSEG_X86
    if (__builtin_cpu_supports("popcnt") && __builtin_cpu_supports("bmi")) count = count_pieces_popcnt;
#endif
    std::vector<Pair> pairs;
    if (distance > 0) {
        const BitRows gt_boundary = boundary_rows(gt, distance), pred_boundary = boundary_rows(pred, distance);
        pairs = count(gt, pred, &gt_boundary, &pred_boundary, most);
    } else {
        pairs = count(gt, pred, nullptr, nullptr, most);
    }
    std::sort(pairs.begin(), pairs.end(), [](const Pair& a, const Pair& b) { return a.key < b.key; });
    return pairs;
}

struct Side {  // what is summed per segment of one map
    const Segment* segment;
    int64_t area = 0, boundary = 0, on_void = 0, on_last_crowd = 0, on_crowds = 0;
    bool matched = false;
};

using Sides = std::unordered_map<int64_t, Side>;

Sides index_segments(const std::vector<Segment>& segments) {
    Sides sides;
    for (const Segment& segment : segments)
        if (segment.id < 1 || !sides.try_emplace(segment.id, Side{&segment}).second) throw Inconsistent("segment ids");
    return sides;
}

Side& find(Sides& sides, int64_t id) {
    const auto found = sides.find(id);
    if (found == sides.end()) throw Inconsistent("an id of the map is not in segments_info");
    return found->second;
}

std::string listed(const std::vector<int64_t>& ids) {
    constexpr size_t limit = 20;
    std::string text;
    for (size_t k = 0; k < std::min(ids.size(), limit); ++k) text += (k > 0 ? ", " : "") + std::to_string(ids[k]);
    return text + (ids.size() > limit ? " and " + std::to_string(ids.size() - limit) + " more" : "");
}

// Throws where the ids of a map are not those of its table.
void check_ids(const RunMap& map, const std::vector<Segment>& segments, const std::string& name) {
    std::vector<int64_t> table, unlisted, absent;
    for (const Segment& segment : segments) table.push_back(segment.id);
    std::vector<int64_t> ascending = table;
    std::sort(ascending.begin(), ascending.end());
    if (std::adjacent_find(ascending.begin(), ascending.end()) != ascending.end())
        throw Inconsistent(name + ": segments_info lists an id twice: " + listed(table));
    std::vector<int32_t> there = map.ids();
    there.erase(std::remove(there.begin(), there.end(), 0), there.end());
    std::set_difference(there.begin(), there.end(), ascending.begin(), ascending.end(), std::back_inserter(unlisted));
    std::set_difference(ascending.begin(), ascending.end(), there.begin(), there.end(), std::back_inserter(absent));
    if (!unlisted.empty())
        throw Inconsistent(name + ": ids in the map but not in segments_info: " + listed(unlisted) + "; add or void them");
    if (!absent.empty())
        throw Inconsistent(name + ": ids in segments_info but not in the map: " + listed(absent) + "; remove the entries");
}

}  // namespace

std::vector<Overlap> joint_histogram(const RunMap& gt, const RunMap& pred) {
    std::vector<Overlap> overlaps;
    for (const Pair& pair : count_pairs(gt, pred, 0)) overlaps.push_back({pair.gt_id(), pair.pred_id(), pair.pixels});
    return overlaps;
}

static std::vector<Match> match_pairs(const std::vector<Pair>& pairs, const std::vector<Segment>& gt_segments,
                                      const std::vector<Segment>& pred_segments, size_t boundary_distance) {
    Sides gt_sides = index_segments(gt_segments), pred_sides = index_segments(pred_segments);
    std::unordered_map<int64_t, int64_t> last_crowd;  // category -> id, as panopticapi remembers it
    for (const Segment& segment : gt_segments)
        if (segment.iscrowd) last_crowd[segment.category_id] = segment.id;

    for (const Pair& pair : pairs) {
        const int64_t gt_id = pair.gt_id(), pred_id = pair.pred_id();
        if (gt_id != 0) {
            Side& side = find(gt_sides, gt_id);
            side.area += pair.pixels;
            side.boundary += pair.gt_boundary;
        }
        if (pred_id == 0) continue;
        Side& side = find(pred_sides, pred_id);
        side.area += pair.pixels;
        if (gt_id == 0) {
            side.on_void += pair.pixels;
            continue;
        }
        side.boundary += pair.pred_boundary;
        const Segment& crowd = *find(gt_sides, gt_id).segment;
        if (crowd.iscrowd && crowd.category_id == side.segment->category_id) {
            side.on_crowds += pair.pixels;
            if (last_crowd.at(crowd.category_id) == gt_id) side.on_last_crowd += pair.pixels;
        }
    }
    for (const Sides* sides : {&gt_sides, &pred_sides})
        for (const auto& [id, side] : *sides)
            if (side.area == 0) throw Inconsistent("an id of segments_info is not in the map");
    for (auto& [id, side] : gt_sides)
        if (side.segment->area >= 0) side.area = side.segment->area;

    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    std::vector<Match> matches;
    for (const Pair& pair : pairs) {
        if (pair.gt_id() == 0 || pair.pred_id() == 0) continue;
        Side &g = find(gt_sides, pair.gt_id()), &p = find(pred_sides, pair.pred_id());
        if (g.segment->iscrowd || g.segment->category_id != p.segment->category_id) continue;
        const int64_t joined = p.area + g.area - pair.pixels - p.on_void;
        if (joined < pair.pixels)
            throw Inconsistent("ground-truth segment " + std::to_string(pair.gt_id()) + ": area " + std::to_string(g.area) +
                               " in the JSON cannot be right");
        const double iou = static_cast<double>(pair.pixels) / static_cast<double>(joined);
        if (iou <= 0.5) continue;
        g.matched = p.matched = true;
        const double boundary_union = static_cast<double>(g.boundary + p.boundary - pair.both_boundary);
        matches.push_back({0, static_cast<int32_t>(p.segment->category_id), kTruePositive, pair.gt_id(), pair.pred_id(), g.area,
                           iou, boundary_distance ? static_cast<double>(pair.both_boundary) / boundary_union : nan});
    }
    for (const Segment& segment : gt_segments) {
        const Side& g = find(gt_sides, segment.id);
        if (!g.matched && !segment.iscrowd)
            matches.push_back({0, static_cast<int32_t>(segment.category_id), kFalseNegative, static_cast<int32_t>(segment.id), 0,
                               g.area, 0.0, nan});
    }
    for (const Segment& segment : pred_segments) {
        const Side& p = find(pred_sides, segment.id);
        const double area = static_cast<double>(p.area);
        if (p.matched || static_cast<double>(p.on_void + p.on_last_crowd) / area > 0.5) continue;
        const bool excused = static_cast<double>(p.on_void + p.on_crowds) / area > 0.5;
        matches.push_back({0, static_cast<int32_t>(segment.category_id), excused ? kFalsePositiveOneCrowd : kFalsePositive, 0,
                           static_cast<int32_t>(segment.id), p.area, 0.0, nan});
    }
    return matches;
}

std::vector<Match> match_overlaps(const std::vector<Overlap>& overlaps, const std::vector<Segment>& gt_segments,
                                  const std::vector<Segment>& pred_segments) {
    std::vector<Pair> pairs;
    for (const Overlap& overlap : overlaps)
        pairs.push_back({static_cast<uint64_t>(overlap.gt_id) << 24 | static_cast<uint64_t>(overlap.pred_id), overlap.pixels});
    return match_pairs(pairs, gt_segments, pred_segments, 0);
}

std::vector<Match> match_segments(const RunMap& gt, const std::vector<Segment>& gt_segments, const RunMap& pred,
                                  const std::vector<Segment>& pred_segments, size_t boundary_distance, size_t most_pairs) {
    try {
        return match_pairs(count_pairs(gt, pred, boundary_distance, most_pairs), gt_segments, pred_segments,
                           boundary_distance);
    } catch (const Inconsistent&) {
        if (gt.height == pred.height && gt.width == pred.width) {
            check_ids(gt, gt_segments, "ground truth");
            check_ids(pred, pred_segments, "prediction");
        }
        throw;
    }
}

}  // namespace ldmseg
