#include "png.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu.hpp"

namespace ldmseg {
namespace {

// A pixel is kept as 0x00BBGGRR: one id, and three bytes that never carry into each other.
inline uint32_t add_bytes(uint32_t a, uint32_t b) {
    return ((a & 0x7f7f7f7fu) + (b & 0x7f7f7f7fu)) ^ ((a ^ b) & 0x80808080u);
}

inline uint32_t sub_bytes(uint32_t a, uint32_t b) {
    return ((a | 0x80808080u) - (b & 0x7f7f7f7fu)) ^ ((a ^ ~b) & 0x80808080u);
}

inline uint32_t average_bytes(uint32_t a, uint32_t b) { return (a & b) + (((a ^ b) & 0xfefefefeu) >> 1); }

inline uint32_t paeth(uint32_t left, uint32_t up, uint32_t corner) {
    // Label maps are mostly flat, and there Paeth's choice is known without looking at the bytes.
    if (left == corner) return up;
    if (up == corner) return left;
    uint32_t predicted = 0;
    for (int shift = 0; shift < 24; shift += 8) {
        const int a = left >> shift & 255, b = up >> shift & 255, c = corner >> shift & 255;
        const int pa = std::abs(b - c), pb = std::abs(a - c), pc = std::abs(a + b - 2 * c);
        predicted |= static_cast<uint32_t>(pa <= pb && pa <= pc ? a : pb <= pc ? b : c) << shift;
    }
    return predicted;
}

// Three bytes a pixel -> four, the fourth zero.
void widen(const uint8_t* bytes, size_t width, uint32_t* pixels) {
    for (size_t x = 0; x + 1 < width; ++x) {
        uint32_t pixel;
        std::memcpy(&pixel, bytes + 3 * x, 4);
        pixels[x] = pixel & 0xffffffu;
    }
    const uint8_t* last = bytes + 3 * (width - 1);  // reading four bytes here could leave the buffer
    pixels[width - 1] = last[0] | last[1] << 8 | last[2] << 16;
}

#if LDMSEG_X86
// Sixteen bytes at a time, of which twelve are used.
__attribute__((target("ssse3"))) void widen_ssse3(const uint8_t* bytes, size_t width, uint32_t* pixels) {
    const __m128i spread = _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
    size_t x = 0;
    for (; 3 * x + 16 <= 3 * width; x += 4) {
        const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + 3 * x));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(pixels + x), _mm_shuffle_epi8(packed, spread));
    }
    widen(bytes + 3 * x, width - x, pixels + x);
}
#endif

using Widen = void (*)(const uint8_t*, size_t, uint32_t*);

Widen best_widen() {
#if LDMSEG_X86
    if (__builtin_cpu_supports("ssse3")) return widen_ssse3;
#endif
    return widen;
}

void add_rows(const uint32_t* from, size_t width, uint32_t* to) {
    const auto* in = reinterpret_cast<const uint8_t*>(from);
    auto* out = reinterpret_cast<uint8_t*>(to);
    for (size_t k = 0; k < 4 * width; ++k) out[k] = static_cast<uint8_t>(out[k] + in[k]);
}

constexpr size_t kWord = 64, kPiece = 16;  // pixels looked at together: a word of RunMap's bits, and a part of it

template <size_t Pixels>
bool no_differences(const uint8_t* bytes, size_t count) {
    uint8_t any = 0;
    if (count == Pixels)
        for (size_t k = 0; k < 3 * Pixels; ++k) any |= bytes[k];
    else
        for (size_t k = 0; k < 3 * count; ++k) any |= bytes[k];
    return any == 0;
}

// Undoes one row's filter in place: on entry `row` is the row above. Label maps have few differences, and where there are
// none, most filters mean that a stretch of the row is that of the row above, or goes on with the pixel to the left.
class Unfilter {
   public:
    explicit Unfilter(size_t width) : width_(width), widen_(best_widen()) {}

    // False if the filter is unknown.
    bool start_row(const uint8_t* bytes) {
        filter_ = bytes[0];
        bytes_ = bytes + 1;
        left_ = corner_ = 0;
        return filter_ <= 4;
    }

    // The next word of the row, from left to right. False if it stays as it was above.
    bool undo(uint32_t* row, size_t first) {
        const size_t count = std::min(kWord, width_ - first);
        if (goes_on_as_above() && no_differences<kWord>(bytes_ + 3 * first, count)) {
            left_ = corner_ = row[first + count - 1];
            return false;
        }
        widen_(bytes_ + 3 * first, count, differences_);
        switch (filter_) {
            case 0:
                std::copy_n(differences_, count, row + first);
                break;
            case 1:
                undo_pieces<1>(row + first, bytes_ + 3 * first, count);
                break;
            case 2:
                add_rows(differences_, count, row + first);
                break;
            case 3:
                undo_pieces<3>(row + first, bytes_ + 3 * first, count);
                break;
            case 4:
                undo_pieces<4>(row + first, bytes_ + 3 * first, count);
                break;
        }
        return true;
    }

   private:
    bool goes_on_as_above() const { return filter_ == 2 || (filter_ == 4 && left_ == corner_); }

    template <int Filter>
    void undo_pieces(uint32_t* row, const uint8_t* bytes, size_t count) {
        uint32_t left = left_, corner = corner_;
        for (size_t x = 0; x < count;) {
            const size_t end = std::min(x + kPiece, count);
            const bool flat = Filter != 3 && no_differences<kPiece>(bytes + 3 * x, end - x);
            if (Filter == 4 && flat && left == corner) {
                left = corner = row[end - 1];
                x = end;
            } else if (Filter == 1 && flat) {
                for (; x < end; ++x) row[x] = left;
            } else {
                for (; x < end; ++x) {
                    const uint32_t up = row[x];
                    const uint32_t predicted = Filter == 1   ? left
                                               : Filter == 3 ? average_bytes(left, up)
                                                             : paeth(left, up, corner);
                    row[x] = left = add_bytes(differences_[x], predicted);
                    corner = up;
                }
            }
        }
        left_ = left;
        corner_ = corner;
    }

    size_t width_;
    Widen widen_;
    uint8_t filter_ = 0;
    const uint8_t* bytes_ = nullptr;
    uint32_t left_ = 0, corner_ = 0;
    uint32_t differences_[kWord];
};

}  // namespace

bool unfilter_ids(const uint8_t* rows, size_t height, size_t width, int32_t* ids) {
    Unfilter unfilter(width);
    uint32_t* row = reinterpret_cast<uint32_t*>(ids);
    std::fill(row, row + width, 0);
    for (size_t y = 0; y < height; ++y, rows += 1 + 3 * width, row += width) {
        if (y > 0) std::copy(row - width, row, row);
        if (!unfilter.start_row(rows)) return false;
        for (size_t first = 0; first < width; first += kWord) unfilter.undo(row, first);
    }
    return true;
}

bool unfilter_runs(const uint8_t* rows, RunMap& map) {
    Unfilter unfilter(map.width);
    std::vector<uint32_t> row(kWord * map.starts.words, 0);
    uint32_t above[kWord];
    const auto ids = [](const uint32_t* pixels) { return reinterpret_cast<const int32_t*>(pixels); };
    for (size_t y = 0; y < map.height; ++y, rows += 1 + 3 * map.width) {
        if (!unfilter.start_row(rows)) return false;
        bool previous_changed = y == 0;
        for (size_t word = 0; word < map.starts.words; ++word) {
            const size_t first = kWord * word, count = std::min(kWord, map.width - first);
            std::memcpy(above, row.data() + first, sizeof(above));
            const bool changed = unfilter.undo(row.data(), first) || y == 0;
            if (changed && y > 0) unequal_bits(ids(row.data() + first), ids(above), count, map.steps.row(y) + word);
            map.starts.row(y)[word] =
                changed || previous_changed ? map.start_bits(ids(row.data()), word) : map.starts.row(y - 1)[word];
            previous_changed = changed;
        }
        map.add_ids(y, ids(row.data()));
    }
    return true;
}

void filter_ids(const int32_t* ids, size_t height, size_t width, uint8_t* rows) {
    const uint32_t* pixels = reinterpret_cast<const uint32_t*>(ids);
    for (size_t y = 0; y < height; ++y, pixels += width) {
        *rows++ = y == 0 ? 1 : 2;
        for (size_t x = 0; x < width; ++x, rows += 3) {
            const uint32_t before = y > 0 ? pixels[x - width] : x > 0 ? pixels[x - 1] : 0;
            const uint32_t delta = sub_bytes(pixels[x], before);
            rows[0] = delta & 255;
            rows[1] = delta >> 8 & 255;
            rows[2] = delta >> 16 & 255;
        }
    }
}

}  // namespace ldmseg
