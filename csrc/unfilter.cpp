#include "unfilter.hpp"

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "cpu.hpp"

namespace ldmseg {
namespace {

using UnequalBytes = void (*)(const uint8_t*, const uint8_t*, size_t, uint64_t*);

// Bit k is set where a[k] != b[k], for whole words; up to 63 bytes beyond `count` are read.
void unequal_bytes_plain(const uint8_t* a, const uint8_t* b, size_t count, uint64_t* bits) {
    for (size_t first = 0; first < count; first += 64) {
        uint64_t word = 0;
        for (size_t k = 0; k < 64; ++k) word |= static_cast<uint64_t>(a[first + k] != b[first + k]) << k;
        *bits++ = word;
    }
}

#if LDMSEG_X86
__attribute__((target("avx2"))) void unequal_bytes_avx2(const uint8_t* a, const uint8_t* b, size_t count, uint64_t* bits) {
    const auto equal = [](const uint8_t* p, const uint8_t* q) __attribute__((target("avx2"))) {
        const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        const __m256i y = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
        return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(x, y)));
    };
    for (size_t k = 0; k < count; k += 64)
        *bits++ = ~(equal(a + k, b + k) | static_cast<uint64_t>(equal(a + k + 32, b + k + 32)) << 32);
}

__attribute__((target("avx512bw"))) void unequal_bytes_avx512(const uint8_t* a, const uint8_t* b, size_t count,
                                                            uint64_t* bits) {
    for (size_t k = 0; k < count; k += 64)
        *bits++ = _mm512_cmpneq_epi8_mask(_mm512_loadu_si512(a + k), _mm512_loadu_si512(b + k));
}
#endif

UnequalBytes best_unequal_bytes() {
#if LDMSEG_X86
    if (__builtin_cpu_supports("avx512bw")) return unequal_bytes_avx512;
    if (__builtin_cpu_supports("avx2")) return unequal_bytes_avx2;
#endif
    return unequal_bytes_plain;
}

inline uint32_t load_pixel(const uint8_t* bytes) {
    return bytes[0] | static_cast<uint32_t>(bytes[1]) << 8 | static_cast<uint32_t>(bytes[2]) << 16;
}

inline uint32_t average_bytes(uint32_t a, uint32_t b) { return (a & b) + (((a ^ b) & 0xfefefefeu) >> 1); }

inline uint32_t paeth(uint32_t left, uint32_t up, uint32_t corner) {
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

}  // namespace

// Label maps have few pixels that differ from what their filter predicts. Between two of these, a row goes on with the
// pixel to the left or with the runs above, so that the work is that of the runs, not that of the pixels.
class RowFilters::Rows {
   public:
    explicit Rows(size_t width) : width_(width), zeros_(3 * width + 64, 0), bits_(3 * width / 64 + 2) {}

    // False if the filter is unknown.
    bool undo(const uint8_t* row, const Run* above, Run*& out) {
        bytes_ = row + 1;
        above_ = above;
        out_ = out;
        switch (row[0]) {
            case 0:
                raw();
                break;
            case 1:
                look_for_changes(zeros_.data());
                sub();
                break;
            case 2:
                look_for_changes(zeros_.data());
                up();
                break;
            case 3:
                average();
                break;
            case 4:
                look_for_changes(zeros_.data());
                paeth_row();
                break;
            default:
                return false;
        }
        out = out_;
        return true;
    }

   private:
    void look_for_changes(const uint8_t* against) {
        static const UnequalBytes unequal_bytes = best_unequal_bytes();
        unequal_bytes(bytes_, against, 3 * width_, bits_.data());
        const size_t last = 3 * width_ / 64;  // one more change stands past the end of the row
        const uint64_t end = uint64_t{1} << (3 * width_ % 64);
        bits_[last] = (3 * width_ % 64 ? bits_[last] & (end - 1) : 0) | end;
        bits_[last + 1] = 0;
        word_ = 0;
        left_ = bits_[0];
    }

    // The next pixel of which a byte changes, the width after the last one. Not to be called again then.
    size_t next_change() {
        while (left_ == 0) left_ = bits_[++word_];
        const size_t pixel = (64 * word_ + static_cast<size_t>(lowest_bit(left_))) / 3;
        const size_t end = 3 * (pixel + 1) - 64 * word_;
        if (end < 64)
            left_ &= ~uint64_t{0} << end;
        else
            left_ = bits_[++word_] & ~uint64_t{0} << (end - 64);
        return pixel;
    }

    uint32_t difference(size_t x) const { return load_pixel(bytes_ + 3 * x); }

    // The id above pixel x; x never goes back within a row.
    uint32_t up_at(size_t x) {
        while (above_[1].begin <= static_cast<int32_t>(x)) ++above_;
        return static_cast<uint32_t>(above_->id);
    }

    void as_above(size_t begin, size_t end) {
        add_run(out_, begin, up_at(begin));
        while (above_[1].begin < static_cast<int32_t>(end)) {
            ++above_;
            add_run(out_, static_cast<size_t>(above_->begin), static_cast<uint32_t>(above_->id));
        }
    }

    void raw() {
        look_for_changes(bytes_ - 3);
        for (size_t x = 0; x < width_; x = next_change()) add_run(out_, x, difference(x));
    }

    void sub() {
        uint32_t left = 0;
        size_t x = next_change();
        if (x > 0) add_run(out_, 0, 0);
        for (; x < width_; x = next_change()) {
            left = add_bytes(left, difference(x));
            add_run(out_, x, left);
        }
    }

    void up() {
        for (size_t x = 0;; ++x) {
            const size_t change = next_change();
            if (x < change) as_above(x, change);
            if (change >= width_) return;
            x = change;
            add_run(out_, x, add_bytes(up_at(x), difference(x)));
        }
    }

    void average() {
        uint32_t left = 0;
        for (size_t x = 0; x < width_; ++x) {
            left = add_bytes(average_bytes(left, up_at(x)), difference(x));
            add_run(out_, x, left);
        }
    }

    void paeth_row() {
        uint32_t left = 0, corner = 0;
        for (size_t x = 0;; ++x) {
            const size_t change = next_change();
            while (x < change) {
                const uint32_t above = up_at(x);
                if (left == corner) {
                    as_above(x, change);
                    left = corner = static_cast<uint32_t>(above_->id);
                    x = change;
                } else if (above == corner) {
                    x = std::min(static_cast<size_t>(above_[1].begin), change);
                } else {
                    left = paeth(left, above, corner);
                    corner = above;
                    add_run(out_, x++, left);
                }
            }
            if (change >= width_) return;
            const uint32_t above = up_at(x);
            left = add_bytes(paeth(left, above, corner), difference(x));
            corner = above;
            add_run(out_, x, left);
        }
    }

    size_t width_;
    std::vector<uint8_t> zeros_;
    std::vector<uint64_t> bits_;
    size_t word_ = 0;
    uint64_t left_ = 0;
    const uint8_t* bytes_ = nullptr;
    const Run* above_ = nullptr;
    Run* out_ = nullptr;
};

RowFilters::RowFilters(size_t width) : rows_(new Rows(width)) {}
RowFilters::~RowFilters() = default;
bool RowFilters::undo(const uint8_t* row, const Run* above, Run*& out) { return rows_->undo(row, above, out); }

}  // namespace ldmseg
