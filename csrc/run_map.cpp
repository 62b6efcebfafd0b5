#include "run_map.hpp"

#include <algorithm>

#include "cpu.hpp"

namespace ldmseg {
namespace {

using UnequalBits = void (*)(const int32_t*, const int32_t*, size_t, uint64_t*);

void unequal_bits_plain(const int32_t* a, const int32_t* b, size_t count, uint64_t* bits) {
    for (size_t x = 0; x < count; x += 64) {
        uint64_t word = 0;
        for (size_t k = 0; k < 64 && x + k < count; ++k) word |= static_cast<uint64_t>(a[x + k] != b[x + k]) << k;
        *bits++ = word;
    }
}

#if LDMSEG_X86
__attribute__((target("avx2"))) void unequal_bits_avx2(const int32_t* a, const int32_t* b, size_t count, uint64_t* bits) {
    for (size_t x = 0; x < count; x += 64) {
        uint64_t word = 0;
        size_t k = 0;
        for (; k < 64 && x + k + 8 <= count; k += 8) {
            const __m256i p = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + x + k));
            const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + x + k));
            const int equal = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(p, q)));
            word |= static_cast<uint64_t>(~equal & 255) << k;
        }
        for (; k < 64 && x + k < count; ++k) word |= static_cast<uint64_t>(a[x + k] != b[x + k]) << k;
        *bits++ = word;
    }
}

__attribute__((target("avx512f"))) void unequal_bits_avx512(const int32_t* a, const int32_t* b, size_t count,
                                                          uint64_t* bits) {
    for (size_t x = 0; x < count; x += 64) {
        uint64_t word = 0;
        for (size_t k = 0; k < 64 && x + k < count; k += 16) {
            const size_t left = count - x - k;
            const auto lanes = static_cast<__mmask16>(left >= 16 ? 0xffff : (1 << left) - 1);
            const __m512i p = _mm512_maskz_loadu_epi32(lanes, a + x + k), q = _mm512_maskz_loadu_epi32(lanes, b + x + k);
            word |= static_cast<uint64_t>(_mm512_cmpneq_epi32_mask(p, q)) << k;
        }
        *bits++ = word;
    }
}
#endif

UnequalBits best_unequal_bits() {
#if LDMSEG_X86
    if (__builtin_cpu_supports("avx512f")) return unequal_bits_avx512;
    if (__builtin_cpu_supports("avx2")) return unequal_bits_avx2;
#endif
    return unequal_bits_plain;
}

}  // namespace

void unequal_bits(const int32_t* a, const int32_t* b, size_t count, uint64_t* bits) {
    static const UnequalBits best = best_unequal_bits();
    best(a, b, count, bits);
}

uint64_t RunMap::start_bits(const int32_t* row, size_t word) const {
    const size_t first = 64 * word, count = std::min<size_t>(64, width - first);
    uint64_t bits = 0;
    if (word > 0) {
        unequal_bits(row + first, row + first - 1, count, &bits);
        return bits;
    }
    unequal_bits(row + 1, row, count - 1, &bits);
    return bits << 1 | 1;
}

void RunMap::add_ids(size_t y, const int32_t* row) {
    const uint64_t* bits = starts.row(y);
    for (size_t word = 0; word < starts.words; ++word)
        for (uint64_t left = bits[word]; left; left &= left - 1) ids.push_back(row[64 * word + lowest_bit(left)]);
}

void RunMap::add_row(size_t y, const int32_t* row, const int32_t* above) {
    for (size_t word = 0; word < starts.words; ++word) starts.row(y)[word] = start_bits(row, word);
    add_ids(y, row);
    if (above) unequal_bits(row, above, width, steps.row(y));
}

}  // namespace ldmseg
