#include "png.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

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

#if defined(__x86_64__) && defined(__GNUC__)
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
#if defined(__x86_64__) && defined(__GNUC__)
    if (__builtin_cpu_supports("ssse3")) return widen_ssse3;
#endif
    return widen;
}

constexpr size_t kBlock = 16;

inline bool all_equal(const uint32_t* pixels, uint32_t value) {
    uint32_t different = 0;
    for (size_t k = 0; k < kBlock; ++k) different |= pixels[k] ^ value;
    return different == 0;
}

void add_rows(const uint32_t* from, size_t width, uint32_t* to) {
    const auto* in = reinterpret_cast<const uint8_t*>(from);
    auto* out = reinterpret_cast<uint8_t*>(to);
    for (size_t k = 0; k < 4 * width; ++k) out[k] = static_cast<uint8_t>(out[k] + in[k]);
}

bool all_zero(const uint8_t* bytes, size_t count) {
    uint64_t any = 0, eight;
    size_t k = 0;
    for (; k + 8 <= count; k += 8) {
        std::memcpy(&eight, bytes + k, 8);
        any |= eight;
    }
    for (; k < count; ++k) any |= bytes[k];
    return any == 0;
}

// A row filtered by Up is the one above plus differences, most of them zero: only the words with others are touched.
void add_differences(const uint8_t* bytes, size_t y, uint32_t* row, RunMap& map, Widen widen_row) {
    static constexpr int32_t zeros[64] = {};
    uint32_t differences[64];
    uint64_t *starts = map.starts.row(y), *steps = map.steps.row(y);
    const uint64_t* starts_above = map.starts.row(y - 1);
    bool previous_changed = false;
    for (size_t word = 0; word < map.starts.words; ++word) {
        const size_t first = 64 * word, count = std::min<size_t>(64, map.width - first);
        const bool changed = !all_zero(bytes + 3 * first, 3 * count);
        if (changed) {
            widen_row(bytes + 3 * first, count, differences);
            add_rows(differences, count, row + first);
            unequal_bits(reinterpret_cast<const int32_t*>(differences), zeros, count, steps + word);
        }
        starts[word] = changed || previous_changed ? map.start_bits(reinterpret_cast<const int32_t*>(row), word)
                                                   : starts_above[word];
        previous_changed = changed;
    }
    map.add_ids(y, reinterpret_cast<const int32_t*>(row));
}

// Turns one row's differences, already widened, into pixels. False if the filter is unknown.
bool unfilter_row(uint8_t filter, const uint32_t* up, size_t width, uint32_t* row) {
    uint32_t left = 0, corner = 0;
    switch (filter) {
        case 0:
            return true;
        case 1:
            for (size_t x = 0; x < width; ++x) row[x] = left = add_bytes(row[x], left);
            return true;
        case 2:
            add_rows(up, width, row);
            return true;
        case 3:
            for (size_t x = 0; x < width; ++x) row[x] = left = add_bytes(row[x], average_bytes(left, up[x]));
            return true;
        case 4:
            for (size_t x = 0; x < width;) {
                // inside a segment: no differences, and nothing but one id around
                if (left == corner && x + kBlock <= width && all_equal(row + x, 0) && all_equal(up + x, left)) {
                    for (size_t k = 0; k < kBlock; ++k) row[x + k] = left;
                    x += kBlock;
                    continue;
                }
                for (const size_t end = std::min(x + kBlock, width); x < end; ++x) {
                    row[x] = left = add_bytes(row[x], paeth(left, up[x], corner));
                    corner = up[x];
                }
            }
            return true;
        default:
            return false;
    }
}

}  // namespace

bool unfilter_ids(const uint8_t* rows, size_t height, size_t width, int32_t* ids) {
    static const Widen widen_row = best_widen();
    const std::vector<uint32_t> zeros(width, 0);
    const uint32_t* up = zeros.data();
    for (size_t y = 0; y < height; ++y, rows += 1 + 3 * width) {
        uint32_t* row = reinterpret_cast<uint32_t*>(ids) + y * width;
        widen_row(rows + 1, width, row);
        if (!unfilter_row(rows[0], up, width, row)) return false;
        up = row;
    }
    return true;
}

bool unfilter_runs(const uint8_t* rows, RunMap& map) {
    static const Widen widen_row = best_widen();
    std::vector<uint32_t> row(map.width, 0), next(map.width);
    for (size_t y = 0; y < map.height; ++y, rows += 1 + 3 * map.width) {
        if (rows[0] == 2 && y > 0) {
            add_differences(rows + 1, y, row.data(), map, widen_row);
            continue;
        }
        widen_row(rows + 1, map.width, next.data());
        if (!unfilter_row(rows[0], row.data(), map.width, next.data())) return false;
        std::swap(row, next);
        const auto* above = y > 0 ? reinterpret_cast<const int32_t*>(next.data()) : nullptr;
        map.add_row(y, reinterpret_cast<const int32_t*>(row.data()), above);
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
