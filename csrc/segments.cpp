#include "segments.hpp"

#include <algorithm>
#include <limits>
#include <numeric>

#include "key_index.hpp"
#include "run_map.hpp"

namespace ldmseg {
namespace {

// Run lengths in COCO's order, down the columns: zeros, ones, zeros, ...
struct Runs {
    std::vector<uint32_t> counts;
    size_t end = 0;  // just past the last one

    void add(size_t start, size_t length) {
        if (!counts.empty() && start == end) {
            counts.back() += static_cast<uint32_t>(length);
        } else {
            counts.push_back(static_cast<uint32_t>(start - end));
            counts.push_back(static_cast<uint32_t>(length));
        }
        end = start + length;
    }
};

// COCO's string: differences to the count before last, five bits a character, lowest first, bit 5 = more to come.
std::string compress(const std::vector<uint32_t>& counts) {
    std::string text;
    for (size_t k = 0; k < counts.size(); ++k) {
        int64_t value = counts[k];
        if (k > 2) value -= counts[k - 2];
        for (bool more = true; more;) {
            int character = value & 0x1f;
            value >>= 5;
            more = character & 0x10 ? value != -1 : value != 0;
            text.push_back(static_cast<char>((more ? character | 0x20 : character) + 48));
        }
    }
    return text;
}

struct Stretch {  // a run of one row, [begin, end)
    int32_t id, row, begin, end;
};

size_t root(std::vector<size_t>& parent, size_t k) {
    while (parent[k] != k) k = parent[k] = parent[parent[k]];
    return k;
}

}  // namespace

std::vector<SegmentShape> segment_shapes(const int32_t* ids, size_t height, size_t width, bool rle) {
    constexpr size_t block = 16;  // columns at a time: one cache line of a row
    KeyIndex index;
    std::vector<SegmentShape> shapes;
    std::vector<Runs> runs;
    std::vector<int32_t> columns(block * height);
    for (size_t first = 0; first < width; first += block) {
        const size_t count = std::min(block, width - first);
        for (size_t y = 0; y < height; ++y)
            for (size_t k = 0; k < count; ++k) columns[k * height + y] = ids[y * width + first + k];
        for (size_t k = 0; k < count; ++k) {
            const int32_t* column = columns.data() + k * height;
            const auto x = static_cast<int32_t>(first + k);
            for (size_t y = 0, end; y < height; y = end) {
                for (end = y + 1; end < height && column[end] == column[y];) ++end;
                if (column[y] == 0) continue;
                const size_t at = index[static_cast<uint32_t>(column[y])];
                if (at == shapes.size()) {
                    shapes.push_back({column[y], 0, x, x, std::numeric_limits<int32_t>::max(), -1, {}});
                    runs.emplace_back();
                }
                SegmentShape& shape = shapes[at];
                shape.area += static_cast<int64_t>(end - y);
                shape.right = x;
                shape.top = std::min(shape.top, static_cast<int32_t>(y));
                shape.bottom = std::max(shape.bottom, static_cast<int32_t>(end) - 1);
                if (rle) runs[at].add((first + k) * height + y, end - y);
            }
        }
    }
    for (size_t at = 0; rle && at < shapes.size(); ++at) {
        if (runs[at].end < height * width) runs[at].counts.push_back(static_cast<uint32_t>(height * width - runs[at].end));
        shapes[at].rle = compress(runs[at].counts);
    }
    std::sort(shapes.begin(), shapes.end(), [](const SegmentShape& a, const SegmentShape& b) { return a.id < b.id; });
    return shapes;
}

std::vector<int32_t> split_segments(int32_t* ids, size_t height, size_t width, int64_t least) {
    const RunMap map(ids, height, width);
    std::vector<Stretch> runs;
    std::vector<size_t> first_of_row(height + 1);
    for (size_t y = 0; y < height; ++y) {
        first_of_row[y] = runs.size();
        for (const Run* run = map.row(y); run->begin < static_cast<int32_t>(width); ++run)
            runs.push_back({run->id, static_cast<int32_t>(y), run->begin, run[1].begin});
    }
    first_of_row[height] = runs.size();

    // Union-find: runs of equal id that overlap from one row to the next are one piece, whose root is its first run.
    std::vector<size_t> parent(runs.size());
    std::iota(parent.begin(), parent.end(), size_t{0});
    for (size_t y = 1; y < height; ++y) {
        for (size_t a = first_of_row[y - 1], b = first_of_row[y]; a < first_of_row[y] && b < first_of_row[y + 1];) {
            if (runs[a].id == runs[b].id) {
                const size_t above = root(parent, a), below = root(parent, b);
                parent[std::max(above, below)] = std::min(above, below);
            }
            const int32_t a_end = runs[a].end, b_end = runs[b].end;
            a += a_end <= b_end;
            b += b_end <= a_end;
        }
    }
    std::vector<int64_t> area(runs.size(), 0);
    for (size_t k = 0; k < runs.size(); ++k) area[root(parent, k)] += runs[k].end - runs[k].begin;

    std::vector<int32_t> sources, number(runs.size(), 0);
    for (size_t k = 0; k < runs.size(); ++k) {
        const Stretch& run = runs[k];
        const size_t first = root(parent, k);
        if (first == k && run.id != 0 && area[k] >= least) {
            sources.push_back(run.id);
            number[k] = static_cast<int32_t>(sources.size());
        }
        std::fill(ids + run.row * width + run.begin, ids + run.row * width + run.end, number[first]);
    }
    return sources;
}

}  // namespace ldmseg
