#include "unfilter_pixels.hpp"

#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu.hpp"

namespace ldmseg {
namespace {

enum Filter : uint8_t { kNone, kSub, kUp, kAverage, kPaeth };

inline int paeth(int left, int up, int corner) {
    const int of_left = std::abs(up - corner), of_up = std::abs(left - corner), of_corner = std::abs(left + up - 2 * corner);
    return of_left <= of_up && of_left <= of_corner ? left : of_up <= of_corner ? up : corner;
}

// The filters in the bytes' own order. `above` is a row of zeros for the first row.
template <size_t Channels>
void undo_row(uint8_t filter, const uint8_t* row, const uint8_t* above, size_t size, uint8_t* pixels) {
    const auto left = [&](size_t k) -> int { return k < Channels ? 0 : pixels[k - Channels]; };
    const auto corner = [&](size_t k) -> int { return k < Channels ? 0 : above[k - Channels]; };
    const auto undo = [&](auto predicted) {
        for (size_t k = 0; k < size; ++k) pixels[k] = static_cast<uint8_t>(row[k] + predicted(k));
    };
    switch (filter) {
        case kNone:
            std::memcpy(pixels, row, size);
            break;
        case kSub:
            undo(left);
            break;
        case kUp:
            for (size_t k = 0; k < size; ++k) pixels[k] = static_cast<uint8_t>(row[k] + above[k]);
            break;
        case kAverage:
            undo([&](size_t k) { return (left(k) + above[k]) / 2; });
            break;
        default:
            undo([&](size_t k) { return paeth(left(k), above[k], corner(k)); });
    }
}

#if LDMSEG_X86
// A row's filter as masks over its predictions.
inline __m128i lanes_with(const uint8_t* filters, Filter wanted) {
    return _mm_set_epi32(-(filters[3] == wanted), -(filters[2] == wanted), -(filters[1] == wanted), -(filters[0] == wanted));
}

inline int load_four(const uint8_t* bytes) {
    int value;
    std::memcpy(&value, bytes, 4);
    return value;
}

inline __m128i either(__m128i mask, __m128i yes, __m128i no) {
    return _mm_or_si128(_mm_and_si128(mask, yes), _mm_andnot_si128(mask, no));
}

// A pixel depends on the one before it, so that a row alone keeps a processor waiting. Four rows go together instead, each
// a pixel behind the one above: lane r of a vector is pixel x - r of row r, in three of its four bytes. All is inlined, or
// the bytes written might be the members for all that the compiler knows.
class FourRows {
   public:
    // above: the row above the first, of which up to 12 bytes beyond its end are read.
    ALWAYS_INLINE FourRows(const uint8_t* rows, const uint8_t* above, size_t width, uint8_t* pixels)
        : stride_(1 + 3 * width), width_(width), above_(above) {
        uint8_t filters[4];
        for (size_t r = 0; r < 4; ++r) {
            filters[r] = rows[r * stride_];
            in_[r] = rows + r * stride_ + 1 - 3 * r;
            out_[r] = pixels + r * 3 * width - 3 * r;
        }
        sub_ = lanes_with(filters, kSub);
        up_ = lanes_with(filters, kUp);
        average_ = lanes_with(filters, kAverage);
        paeth_ = lanes_with(filters, kPaeth);
        left_ = corner_ = _mm_setzero_si128();
    }

    ALWAYS_INLINE void undo() {
        size_t x = 0;
        for (; x < 3 && x < width_ + 3; ++x) edge(x);
        for (; x + 1 < width_; ++x) {
            next(x);
            for (size_t r = 0; r < 4; ++r) {
                const int pixel = _mm_cvtsi128_si32(lane(r));
                std::memcpy(out_[r] + 3 * x, &pixel, 4);  // the fourth byte is the next pixel's, which comes later
            }
        }
        for (; x < width_ + 3; ++x) edge(x);
    }

   private:
    // Where some rows have not begun or have ended.
    ALWAYS_INLINE void edge(size_t x) {
        next(x);
        const auto begun = [&](size_t r) { return -static_cast<int>(r <= x); };
        left_ = _mm_and_si128(left_, _mm_set_epi32(begun(3), begun(2), begun(1), begun(0)));  // zeros before the first
        for (size_t r = 0; r < 4; ++r) {
            const int pixel = _mm_cvtsi128_si32(lane(r));
            if (r <= x && x - r < width_) std::memcpy(out_[r] + 3 * x, &pixel, 3);
        }
    }

    ALWAYS_INLINE __m128i lane(size_t r) const {
        return r == 0   ? left_
               : r == 1 ? _mm_srli_si128(left_, 4)
               : r == 2 ? _mm_srli_si128(left_, 8)
                        : _mm_srli_si128(left_, 12);
    }

    ALWAYS_INLINE void next(size_t x) {
        const auto in = [&](size_t r) { return load_four(in_[r] + 3 * x); };
        const __m128i difference = _mm_set_epi32(in(3), in(2), in(1), in(0));
        const __m128i up = _mm_or_si128(_mm_slli_si128(left_, 4), _mm_cvtsi32_si128(load_four(above_ + 3 * x)));
        const __m128i odd = _mm_and_si128(_mm_xor_si128(left_, up), _mm_set1_epi8(1));
        const __m128i average = _mm_sub_epi8(_mm_avg_epu8(left_, up), odd);
        // |up - corner|, |left - corner| and |left + up - 2 corner|, the last no larger than a byte: more changes nothing
        const __m128i up_rises = _mm_subs_epu8(up, corner_), up_falls = _mm_subs_epu8(corner_, up);
        const __m128i left_rises = _mm_subs_epu8(left_, corner_), left_falls = _mm_subs_epu8(corner_, left_);
        const __m128i rises = _mm_adds_epu8(up_rises, left_rises), falls = _mm_adds_epu8(up_falls, left_falls);
        const __m128i of_left = _mm_or_si128(up_rises, up_falls), of_up = _mm_or_si128(left_rises, left_falls);
        const __m128i of_corner = _mm_or_si128(_mm_subs_epu8(rises, falls), _mm_subs_epu8(falls, rises));
        const __m128i least = _mm_min_epu8(of_corner, _mm_min_epu8(of_left, of_up));
        const __m128i other = either(_mm_cmpeq_epi8(of_up, least), up, corner_);
        const __m128i paeth = either(_mm_cmpeq_epi8(of_left, least), left_, other);
        const __m128i simple = _mm_or_si128(_mm_or_si128(_mm_and_si128(sub_, left_), _mm_and_si128(up_, up)),
                                            _mm_and_si128(average_, average));
        corner_ = up;
        left_ = _mm_add_epi8(_mm_add_epi8(difference, simple), _mm_and_si128(paeth_, paeth));
    }

    size_t stride_, width_;
    const uint8_t* above_;
    const uint8_t* in_[4];
    uint8_t* out_[4];
    __m128i sub_, up_, average_, paeth_, left_, corner_;
};
#endif

}  // namespace

bool unfilter_pixels(const uint8_t* rows, size_t height, size_t width, size_t channels, uint8_t* pixels) {
    const size_t size = channels * width;
    for (size_t y = 0; y < height; ++y)
        if (rows[y * (1 + size)] > kPaeth) return false;
    const std::vector<uint8_t> zeros(size + 16, 0);
    const uint8_t* above = zeros.data();
    size_t y = 0;
#if LDMSEG_X86
    for (; channels == 3 && y + 4 <= height; y += 4) {
        FourRows(rows + y * (1 + size), above, width, pixels + y * size).undo();
        above = pixels + (y + 3) * size;
    }
#endif
    for (; y < height; ++y) {
        const uint8_t* row = rows + y * (1 + size);
        uint8_t* const out = pixels + y * size;
        (channels == 3 ? undo_row<3> : undo_row<1>)(row[0], row + 1, above, size, out);
        above = out;
    }
    return true;
}

}  // namespace ldmseg
