#include "run_map.hpp"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

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

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx2"))) void unequal_bits_avx2(const int32_t* a, const int32_t* b, size_t count, uint64_t* bits) {
    size_t x = 0;
    for (; x + 64 <= count; x += 64) {
        uint64_t word = 0;
        for (size_t k = 0; k < 64; k += 8) {
            const __m256i p = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + x + k));
            const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + x + k));
            const int equal = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(p, q)));
            word |= static_cast<uint64_t>(static_cast<uint32_t>(equal)) << k;
        }
        *bits++ = ~word;
    }
    unequal_bits_plain(a + x, b + x, count - x, bits);
}

__attribute__((target("avx512f"))) void unequal_bits_avx512(const int32_t* a, const int32_t* b, size_t count,
                                                          uint64_t* bits) {
    size_t x = 0;
    for (; x + 64 <= count; x += 64) {
        uint64_t word = 0;
        for (size_t k = 0; k < 64; k += 16) {
            const __m512i p = _mm512_loadu_si512(a + x + k), q = _mm512_loadu_si512(b + x + k);
            word |= static_cast<uint64_t>(_mm512_cmpneq_epi32_mask(p, q)) << k;
        }
        *bits++ = word;
    }
    unequal_bits_plain(a + x, b + x, count - x, bits);
}
#endif

UnequalBits best_unequal_bits() {
#if defined(__x86_64__) && defined(__GNUC__)
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

void RunMap::add_row(size_t y, const int32_t* row, const int32_t* above) {
    uint64_t* bits = starts.row(y);
    unequal_bits(row + 1, row, width - 1, bits);
    for (size_t word = starts.words; word-- > 1;) bits[word] = bits[word] << 1 | bits[word - 1] >> 63;
    bits[0] = bits[0] << 1 | 1;
    for (size_t word = 0; word < starts.words; ++word)
        for (uint64_t left = bits[word]; left; left &= left - 1) ids.push_back(row[64 * word + lowest_bit(left)]);
    if (above) unequal_bits(row, above, width, steps.row(y));
}

}  // namespace ldmseg
