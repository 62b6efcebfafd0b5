#include <algorithm>
#include <cmath>

#include "matching.hpp"

namespace ldmseg {
namespace {

// Bit x |= bit x + shift, as one long row of bits; the word after the last is read and must be 0.
void or_shifted_down(uint64_t* words, size_t count, size_t shift) {
    for (; shift >= 64; shift -= 64) {  // wide windows, of images beyond 3000 pixels
        for (size_t k = 0; k < count; ++k) words[k] |= words[k + 1];
        if (shift == 64) return;
    }
    if (shift == 0) return;
    for (size_t k = 0; k < count; ++k) words[k] |= words[k] >> shift | words[k + 1] << (64 - shift);
}

void shift_up(uint64_t* words, size_t count, size_t shift) {
    for (; shift >= 64; shift -= 64)
        for (size_t k = count; k-- > 0;) words[k] = k > 0 ? words[k - 1] : 0;
    if (shift == 0) return;
    for (size_t k = count; k-- > 1;) words[k] = words[k] << shift | words[k - 1] >> (64 - shift);
    words[0] <<= shift;
}

// The windows below hold 2 distance edges, and are put together from two whose length is the power of two below that.
size_t power_of_two_below(size_t length) {
    size_t power = 1;
    while (2 * power <= length) power *= 2;
    return power;
}

void set_bits(uint64_t* words, size_t begin, size_t end) {
    for (; begin < end && begin % 64; ++begin) words[begin / 64] |= uint64_t{1} << (begin % 64);
    for (; begin + 64 <= end; begin += 64) words[begin / 64] = ~uint64_t{0};
    if (begin < end) words[begin / 64] |= (uint64_t{1} << (end - begin)) - 1;
}

// Pixels whose ids differ in two rows.
void set_differing(const Run* above, const Run* row, size_t width, uint64_t* words) {
    for (size_t x = 0; x < width;) {
        const auto end = static_cast<size_t>(std::min(above[1].begin, row[1].begin));
        if (above->id != row->id) set_bits(words, x, end);
        above += static_cast<size_t>(above[1].begin) == end;
        row += static_cast<size_t>(row[1].begin) == end;
        x = end;
    }
}

}  // namespace

size_t boundary_distance(size_t height, size_t width) {
    const double diagonal = std::sqrt(static_cast<double>(height * height + width * width));
    return static_cast<size_t>(std::max(1.0, std::nearbyint(0.02 * diagonal)));
}

// Edge j lies between pixels j - 1 and j; edges 0 and the last are the image's own. A pixel is in the boundary if one of
// the edges x - distance + 1 .. x + distance is there in any row of its window, or vertically likewise.
BitRows boundary_rows(const RunMap& map, size_t distance) {
    const size_t height = map.height, width = map.width;
    distance = std::min(distance, std::max(height, width));  // from here on, each window reaches over an edge
    const size_t window = 2 * distance, power = power_of_two_below(window);
    BitRows edges(height + 1, width + 1);  // row j: what stands between and in rows j - 1 and j
    std::vector<uint64_t> across(edges.words + 1), above(edges.words + 1, 0);  // and the zero that shifting reads
    for (size_t y = 0; y < height; ++y) {
        std::fill(across.begin(), across.end(), 0);
        const Run* run = map.row(y);
        for (; run->begin < static_cast<int32_t>(width); ++run) across[run->begin / 64] |= uint64_t{1} << (run->begin % 64);
        across[width / 64] |= uint64_t{1} << (width % 64);
        for (size_t step = 1; step < power; step *= 2) or_shifted_down(across.data(), edges.words, step);
        or_shifted_down(across.data(), edges.words, window - power);
        shift_up(across.data(), edges.words, distance - 1);
        for (size_t x = 0; x + 1 < distance && x < width; ++x) across[x / 64] |= uint64_t{1} << (x % 64);
        uint64_t* row = edges.row(y);
        if (y > 0) set_differing(map.row(y - 1), map.row(y), width, row);
        for (size_t k = 0; k < edges.words; ++k) row[k] |= across[k] | above[k];
        std::swap(across, above);
    }
    for (size_t step = 1; step < power; step *= 2)
        for (size_t j = 0; j + step < height; ++j)
            for (size_t k = 0; k < edges.words; ++k) edges.row(j)[k] |= edges.row(j + step)[k];

    BitRows boundary(height, width);
    for (size_t y = 0; y < height; ++y) {
        uint64_t* row = boundary.row(y);
        if (y < distance || y + distance >= height) {
            std::fill(row, row + boundary.words, ~uint64_t{0});
            continue;
        }
        const uint64_t *low = edges.row(y - distance + 1), *high = edges.row(y + distance + 1 - power);
        for (size_t k = 0; k < boundary.words; ++k) row[k] = low[k] | high[k];
    }
    return boundary;
}

}  // namespace ldmseg
