// Segments of two id maps, matched by panopticapi's rules. The definition, line by line, is metrics/matching.py.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "run_map.hpp"

namespace ldmseg {

// Maps and segment tables disagree; it tells how.
struct Inconsistent : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Match {  // MATCH_DTYPE
    int32_t image, category_id, outcome, gt_id, pred_id;
    int64_t area;
    double iou, boundary_iou;
};

struct Segment {  // a row of segment_table(); area -1: count it
    int64_t id, category_id, iscrowd, area;
};

struct Overlap {
    int32_t gt_id, pred_id;
    int64_t pixels;
};

// Pixels of each pair of ids that occurs, in ascending order. Throws Inconsistent for ids outside 0..2^24-1, and for maps
// that differ in size.
std::vector<Overlap> joint_histogram(const RunMap& gt, const RunMap& pred);

// As metrics/matching.py has it.
size_t boundary_distance(size_t height, size_t width);

// boundary_distance 0: no boundary IoU (NaN). Throws Inconsistent, also for over `most_pairs` pairs of ids.
constexpr size_t kMostPairs = size_t{1} << 19;  // of maps from files: some tens of megabytes
std::vector<Match> match_segments(const RunMap& gt, const std::vector<Segment>& gt_segments, const RunMap& pred,
                                  const std::vector<Segment>& pred_segments, size_t boundary_distance, size_t most_pairs);

// The same of all pairs of ids of two maps, in ascending order, without boundary IoU.
std::vector<Match> match_overlaps(const std::vector<Overlap>& overlaps, const std::vector<Segment>& gt_segments,
                                  const std::vector<Segment>& pred_segments);

// Pixels whose (2 distance + 1)^2 window holds another id or reaches over the edge. Bits past the width are undefined.
BitRows boundary_rows(const RunMap& map, size_t distance);

}  // namespace ldmseg
