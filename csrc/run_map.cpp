#include "run_map.hpp"

#include <algorithm>
#include <cstring>
#include <new>

#include "cpu.hpp"

namespace ldmseg {
namespace {

using UnequalBits = void (*)(const int32_t*, size_t, uint64_t*);

// Sets bit x where row[x] != row[x - 1], for 1 <= x < count.
template <typename Id>
void steps_plain(const Id* row, size_t count, uint64_t* bits) {
    std::fill(bits, bits + (count + 63) / 64, 0);
    for (size_t x = 1; x < count; ++x) bits[x / 64] |= static_cast<uint64_t>(row[x] != row[x - 1]) << (x % 64);
}

#if LDMSEG_X86
// Both look at full words that begin past pixel 0; the rest is left to steps_plain's way.
__attribute__((target("avx2"))) void steps_avx2(const int32_t* row, size_t count, uint64_t* bits) {
    steps_plain(row, std::min<size_t>(count, 64), bits);
    for (size_t x = 64; x < count; x += 64) {
        uint64_t word = 0;
        size_t k = 0;
        for (; k < 64 && x + k + 8 <= count; k += 8) {
            const __m256i p = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + x + k));
            const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + x + k - 1));
            const int equal = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(p, q)));
            word |= static_cast<uint64_t>(~equal & 255) << k;
        }
        for (; k < 64 && x + k < count; ++k) word |= static_cast<uint64_t>(row[x + k] != row[x + k - 1]) << k;
        bits[x / 64] = word;
    }
}

void steps_of_bytes(const uint8_t* row, size_t count, uint64_t* bits) {  // SSE2, which every x86-64 has
    steps_plain(row, std::min<size_t>(count, 64), bits);
    for (size_t x = 64; x < count; x += 64) {
        uint64_t word = 0;
        size_t k = 0;
        for (; k < 64 && x + k + 16 <= count; k += 16) {
            const __m128i p = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + x + k));
            const __m128i q = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + x + k - 1));
            word |= static_cast<uint64_t>(~_mm_movemask_epi8(_mm_cmpeq_epi8(p, q)) & 0xffff) << k;
        }
        for (; k < 64 && x + k < count; ++k) word |= static_cast<uint64_t>(row[x + k] != row[x + k - 1]) << k;
        bits[x / 64] = word;
    }
}

__attribute__((target("avx512f"))) void steps_avx512(const int32_t* row, size_t count, uint64_t* bits) {
    const auto lanes = [](size_t left) { return static_cast<__mmask16>(left >= 16 ? 0xffff : (1 << left) - 1); };
    for (size_t x = 0; x < count; x += 64) {
        uint64_t word = 0;
        for (size_t k = 0; k < 64 && x + k < count; k += 16) {
            const __mmask16 there = lanes(count - x - k), before = x + k == 0 ? there & 0xfffe : there;
            const __m512i p = _mm512_maskz_loadu_epi32(before, row + x + k);
            const __m512i q = _mm512_maskz_loadu_epi32(before, row + x + k - 1);
            word |= static_cast<uint64_t>(_mm512_cmpneq_epi32_mask(p, q)) << k;
        }
        bits[x / 64] = word;
    }
}
#endif

UnequalBits best_steps() {
#if LDMSEG_X86
    if (__builtin_cpu_supports("avx512f")) return steps_avx512;
    if (__builtin_cpu_supports("avx2")) return steps_avx2;
#endif
    return steps_plain<int32_t>;
}

#if !LDMSEG_X86
constexpr auto steps_of_bytes = steps_plain<uint8_t>;
#endif

}  // namespace

void unequal_bits(const uint8_t* ids, size_t count, uint64_t* bits) { steps_of_bytes(ids, count, bits); }

RunMap::RunMap(size_t height, size_t width) : height(height), width(width), first_{1} {
    start_row();
    runs_[0] = {0, kEndOfRow};
}

RunMap::RunMap(const int32_t* map, size_t height, size_t width) : RunMap(height, width) {
    static const UnequalBits steps = best_steps();
    add_rows(map, steps);
}

RunMap::RunMap(const uint8_t* map, size_t height, size_t width) : RunMap(height, width) {
    add_rows<uint8_t>(map, steps_of_bytes);
}

template <typename Id>
void RunMap::add_rows(const Id* map, void (*steps)(const Id*, size_t, uint64_t*)) {
    std::vector<uint64_t> bits((width + 63) / 64);
    for (size_t y = 0; y < height; ++y, map += width) {
        steps(map, width, bits.data());
        Run* end = start_row();
        *end++ = {0, static_cast<int32_t>(map[0])};
        for (size_t word = 0; word < bits.size(); ++word)
            for (uint64_t left = bits[word]; left; left &= left - 1) {
                const size_t x = 64 * word + static_cast<size_t>(lowest_bit(left));
                *end++ = {static_cast<int32_t>(x), static_cast<int32_t>(map[x])};
            }
        end_row(end);
    }
}

Run* RunMap::start_row() {
    const size_t used = first_.back();
    if (used + width + 2 > room_) {
        const size_t room = std::max(2 * room_, used + width + 2);
        void* grown = std::realloc(runs_.get(), room * sizeof(Run));
        if (grown == nullptr) throw std::bad_alloc();
        static_cast<void>(runs_.release());
        runs_.reset(static_cast<Run*>(grown));
        room_ = room;
    }
    return runs_.get() + used;
}

void RunMap::end_row(Run* end) {
    *end++ = {static_cast<int32_t>(width), kEndOfRow};
    first_.push_back(static_cast<size_t>(end - runs_.get()));
}

void RunMap::paint(int32_t* map) const {
    for (size_t y = 0; y < height; ++y, map += width) paint_row(row(y), width, map);
}

std::vector<int32_t> RunMap::ids() const {
    std::vector<int32_t> ids;
    ids.reserve(runs());
    for (size_t y = 0; y < height; ++y)
        for (const Run* run = row(y); run->begin < static_cast<int32_t>(width); ++run) ids.push_back(run->id);
    std::sort(ids.begin(), ids.end());
    ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
    return ids;
}

}  // namespace ldmseg
