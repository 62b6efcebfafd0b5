#include "outlines.hpp"

#include <algorithm>

namespace ldmseg {
namespace {

int32_t root(std::vector<int32_t>& parent, int32_t k) {
    while (parent[k] != k) k = parent[k] = parent[parent[k]];
    return k;
}

// Numbers the 4-connected pieces of equal id; void, and a border of one pixel around the map, is 0.
std::vector<int32_t> number_pieces(const int32_t* ids, size_t height, size_t width) {
    const size_t stride = width + 2;
    std::vector<int32_t> piece((height + 2) * stride, 0), parent{0};
    for (size_t y = 0; y < height; ++y) {
        const int32_t* row = ids + y * width;
        const int32_t* above = y > 0 ? row - width : nullptr;
        int32_t* numbers = piece.data() + (y + 1) * stride + 1;
        for (size_t x = 0; x < width; ++x) {
            if (row[x] == 0) continue;
            const bool left = x > 0 && row[x - 1] == row[x], up = above && above[x] == row[x];
            if (left) {
                numbers[x] = numbers[x - 1];
                if (up && above[x - 1] != row[x]) {
                    const auto [low, high] = std::minmax({root(parent, numbers[x]), root(parent, *(numbers + x - stride))});
                    parent[high] = low;  // the lower: numbers follow the order in which pieces begin
                }
            } else if (up) {
                numbers[x] = *(numbers + x - stride);
            } else {
                numbers[x] = static_cast<int32_t>(parent.size());
                parent.push_back(numbers[x]);
            }
        }
    }
    for (size_t k = 1; k < parent.size(); ++k) parent[k] = root(parent, static_cast<int32_t>(k));
    for (int32_t& number : piece) number = parent[number];
    return piece;
}

}  // namespace

Outlines outlines(const int32_t* ids, size_t height, size_t width) {
    const std::vector<int32_t> piece = number_pieces(ids, height, width);
    const auto stride = static_cast<ptrdiff_t>(width) + 2;
    std::vector<uint8_t> walked(piece.size(), 0);  // whether the upper edge of a pixel lies on a ring already
    // right, down, left, up: the step of a corner; from the corner the pixels ahead, on the right hand and on the left
    constexpr int32_t dx[] = {1, 0, -1, 0}, dy[] = {0, 1, 0, -1};
    const ptrdiff_t right[] = {0, -1, -stride - 1, -stride}, left[] = {-stride, 0, -1, -stride - 1};

    Outlines found;
    for (size_t top = 0; top < height; ++top) {
        for (size_t begin = 0; begin < width; ++begin) {
            const ptrdiff_t first = static_cast<ptrdiff_t>(top + 1) * stride + static_cast<ptrdiff_t>(begin) + 1;
            const int32_t own = piece[first];
            if (own == 0 || piece[first - stride] == own || walked[first]) continue;
            ptrdiff_t at = first;  // the pixel to the lower right of the corner
            auto x = static_cast<int32_t>(begin), y = static_cast<int32_t>(top);
            int turn = 0;
            do {  // the piece lies on the right hand
                found.points.push_back(x);
                found.points.push_back(y);
                bool straight = true;
                while (straight) {
                    if (turn == 0) walked[at] = 1;
                    x += dx[turn];
                    y += dy[turn];
                    at += dx[turn] + dy[turn] * stride;
                    straight = piece[at + left[turn]] != own && piece[at + right[turn]] == own;
                }
                turn = (turn + (piece[at + left[turn]] == own ? 3 : 1)) % 4;
            } while (at != first || turn != 0);
            found.ends.push_back(static_cast<int64_t>(found.points.size() / 2));
            found.ids.push_back(ids[top * width + begin]);
            found.pieces.push_back(own);
        }
    }
    return found;
}

}  // namespace ldmseg
