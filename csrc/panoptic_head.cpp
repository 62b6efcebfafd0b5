#include "panoptic_head.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu.hpp"
#include "parallel.hpp"
#include "vectors.hpp"

namespace ldmseg {
namespace {

constexpr size_t kWidest = 16;  // lanes; slots are padded to a multiple
constexpr float kLargest = 3.39e38f;  // logits are clamped to it, so that no weighted sum of theirs overflows
constexpr float kLowest = -std::numeric_limits<float>::infinity();  // logit of the slots that fill up the last vector
constexpr float kUnsoundWeight = 1e-4f;  // more than what two ways of rounding a position differ by
// Slots this far below the best add less than 2^-25 each to a sum that is at least 1.
constexpr float kNegligible = -18.0f;

// Up to four source samples whose weighted sum is one sample of the composed resize.
struct Taps {
    std::array<int32_t, 4> index{};
    std::array<float, 4> weight{};
    int count = 0;

    void add(int32_t i, float w) {
        if (w == 0.0f) return;
        for (int k = 0; k < count; ++k)
            if (index[k] == i) {
                weight[k] += w;
                return;
            }
        index[count] = i;
        weight[count++] = w;
    }
};

// torch's F.interpolate(mode="bilinear", align_corners=False) along one axis, in float32 as there.
Taps bilinear(size_t in, size_t out, size_t position) {
    Taps taps;
    if (in == out) {
        taps.add(static_cast<int32_t>(position), 1.0f);
        return taps;
    }
    const float scale = static_cast<float>(in) / static_cast<float>(out);
    // Fused as in torch's builds with FMA: a plain product differs by up to an ulp of the position, 1e-5 of a pixel.
    const float real = std::max(0.0f, std::fma(static_cast<float>(position) + 0.5f, scale, -0.5f));
    const auto low = std::min(static_cast<int32_t>(real), static_cast<int32_t>(in) - 1);
    const auto high = std::min(low + 1, static_cast<int32_t>(in) - 1);
    const float weight = std::clamp(real - static_cast<float>(low), 0.0f, 1.0f);
    taps.add(low, 1.0f - weight);
    taps.add(high, weight);
    return taps;
}

std::vector<Taps> composed(size_t source, size_t network, size_t target) {
    std::vector<Taps> all(target);
    for (size_t position = 0; position < target; ++position) {
        const Taps outer = bilinear(network, target, position);
        for (int k = 0; k < outer.count; ++k) {
            const Taps inner = bilinear(source, network, static_cast<size_t>(outer.index[k]));
            for (int n = 0; n < inner.count; ++n) all[position].add(inner.index[n], outer.weight[k] * inner.weight[n]);
        }
    }
    return all;
}

// The smallest float whose sigmoid, in float32, reaches `threshold`: comparing logits with it needs no exponential.
float logit_threshold(float threshold) {
    const auto reaches = [threshold](float x) { return 1.0f / (1.0f + std::exp(-x)) >= threshold; };
    float low = -120.0f, high = 120.0f;
    if (reaches(low)) return -std::numeric_limits<float>::infinity();
    if (!reaches(high)) return std::numeric_limits<float>::infinity();
    while (true) {
        const float middle = low + (high - low) / 2;
        if (middle <= low || middle >= high) return high;
        (reaches(middle) ? high : low) = middle;
    }
}

// What one band of rows adds up per slot.
struct Band {
    std::vector<int32_t> sigmoid_area, area, left, right, top, bottom;
    std::vector<double> score;

    explicit Band(size_t padded)
        : sigmoid_area(padded, 0), area(padded, 0), left(padded, std::numeric_limits<int32_t>::max()), right(padded, -1),
          top(padded, std::numeric_limits<int32_t>::max()), bottom(padded, -1), score(padded, 0.0) {}

    void add(int32_t slot, int32_t x, int32_t y, float probability) {
        ++area[slot];
        score[slot] += probability;
        left[slot] = std::min(left[slot], x);
        right[slot] = std::max(right[slot], x);
        top[slot] = std::min(top[slot], y);
        bottom[slot] = std::max(bottom[slot], y);
    }
};

struct Job {
    const float* logits;
    size_t slots, padded;
    Size source, target;
    std::vector<Taps> rows, columns;
    float mask_threshold, sigmoid_threshold;
    int32_t* label;  // [H, W]: best slot, or -1 under the mask threshold
    float* probability;
};

// Source row r as [w, padded], so that slots are neighbours in memory. A cell with a logit that is not finite gets zeros,
// and 1 in `unsound` [w], which is 0 elsewhere. Returns whether there is one.
bool transpose_row(const Job& job, size_t r, float* out, float* unsound) {
    constexpr size_t block = 64;
    const size_t plane = job.source.height * job.source.width;
    bool any = false;
    for (size_t first = 0; first < job.source.width; first += block) {
        const size_t last = std::min(first + block, job.source.width);
        float doubt[block] = {};  // NaN once a logit was not finite
        for (size_t q = 0; q < job.slots; ++q) {
            const float* in = job.logits + q * plane + r * job.source.width;
            for (size_t c = first; c < last; ++c) {
                out[c * job.padded + q] = std::clamp(in[c], -kLargest, kLargest);
                doubt[c - first] += in[c] * 0.0f;
            }
        }
        for (size_t c = first; c < last; ++c) {
            std::fill(out + c * job.padded + job.slots, out + (c + 1) * job.padded, kLowest);
            unsound[c] = std::isnan(doubt[c - first]) ? 1.0f : 0.0f;
            if (unsound[c] == 0.0f) continue;
            any = true;
            std::fill(out + c * job.padded, out + c * job.padded + job.slots, 0.0f);
        }
    }
    return any;
}

// Transposed source rows, the last few kept.
class RowCache {
   public:
    explicit RowCache(const Job& job)
        : job_(job), size_(job.source.width * job.padded), rows_(kRows * size_), unsound_(kRows * job.source.width) {
        held_.fill(-1);
    }

    const float* operator[](int32_t row) { return rows_.data() + place(row) * size_; }

    // Adds what unsound cells weigh per column, [w]; false where a row has none.
    bool add_unsound(int32_t row, float weight, float* sums) {
        const size_t k = place(row);
        for (size_t c = 0; any_[k] && c < job_.source.width; ++c) sums[c] += weight * unsound_[k * job_.source.width + c];
        return any_[k];
    }

   private:
    size_t place(int32_t row) {
        for (size_t k = 0; k < kRows; ++k)
            if (held_[k] == row) return k;
        const size_t k = next_++ % kRows;
        held_[k] = row;
        any_[k] = transpose_row(job_, static_cast<size_t>(row), rows_.data() + k * size_,
                                unsound_.data() + k * job_.source.width);
        return k;
    }

    // Never fewer than the taps of one row; rows are asked for in ascending order, so the oldest is the one to replace.
    static constexpr size_t kRows = 4;
    const Job& job_;
    size_t size_, next_ = 0;
    std::vector<float> rows_, unsound_;
    std::array<int32_t, kRows> held_;
    std::array<bool, kRows> any_{};
};

template <int N>
ALWAYS_INLINE typename Vectors<N>::Floats weighted_sum(const Taps& taps, const float* const* from, size_t at) {
    using V = Vectors<N>;
    typename V::Floats sum = V::template load<typename V::Floats>(from[0] + at) * taps.weight[0];
    for (int tap = 1; tap < taps.count; ++tap)
        sum += V::template load<typename V::Floats>(from[tap] + at) * taps.weight[tap];
    return sum;
}

float weight_of(const Taps& taps, const float* unsound) {
    float sum = 0.0f;
    for (int tap = 0; tap < taps.count; ++tap) sum += taps.weight[tap] * unsound[taps.index[tap]];
    return sum;
}

template <int N>
ALWAYS_INLINE void run_band(const Job& job, size_t first_row, size_t last_row, Band& band) {
    using V = Vectors<N>;
    using Floats = typename V::Floats;
    using Ints = typename V::Ints;
    RowCache cache(job);
    std::vector<float> line(job.source.width * job.padded), values(job.padded), highest(job.padded / N);
    std::vector<float> unsound(job.source.width);
    for (size_t y = first_row; y < last_row; ++y) {
        const float* from[4];
        for (int tap = 0; tap < job.rows[y].count; ++tap) from[tap] = cache[job.rows[y].index[tap]];
        for (size_t k = 0; k < line.size(); k += N) V::store(line.data() + k, weighted_sum<N>(job.rows[y], from, k));
        bool any_unsound = false;
        std::fill(unsound.begin(), unsound.end(), 0.0f);
        for (int tap = 0; tap < job.rows[y].count; ++tap)
            any_unsound |= cache.add_unsound(job.rows[y].index[tap], job.rows[y].weight[tap], unsound.data());
        for (size_t x = 0; x < job.target.width; ++x) {
            const Taps& taps = job.columns[x];
            const size_t pixel = y * job.target.width + x;
            if (any_unsound && weight_of(taps, unsound.data()) > kUnsoundWeight) {
                job.probability[pixel] = 0.0f;
                job.label[pixel] = -1;
                continue;
            }
            for (int tap = 0; tap < taps.count; ++tap) from[tap] = line.data() + taps.index[tap] * job.padded;
            float best = kLowest;
            for (size_t k = 0; k < job.padded; k += N) {
                const Floats value = weighted_sum<N>(taps, from, k);
                V::store(values.data() + k, value);
                int32_t* count = band.sigmoid_area.data() + k;
                V::store(count, V::template load<Ints>(count) - (value >= job.sigmoid_threshold));  // true is -1
                highest[k / N] = V::largest(value);
                best = std::max(best, highest[k / N]);
            }
            int32_t slot = -1;
            Floats sums = {};
            for (size_t k = 0; k < job.padded; k += N) {
                if (highest[k / N] < best + kNegligible) continue;
                sums += V::exponential(V::template load<Floats>(values.data() + k) - best);
                if (slot < 0 && highest[k / N] == best) {
                    slot = static_cast<int32_t>(k);
                    while (values[slot] != best) ++slot;
                }
            }
            const float probability = 1.0f / V::total(sums);
            job.probability[pixel] = probability;
            if (!(probability >= job.mask_threshold)) slot = -1;
            job.label[pixel] = slot;
            if (slot >= 0) band.add(slot, static_cast<int32_t>(x), static_cast<int32_t>(y), probability);
        }
    }
}

#if LDMSEG_X86
__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma"))) void run_band_avx512(const Job& job, size_t first,
                                                                                         size_t last, Band& band) {
    run_band<16>(job, first, last, band);
}
__attribute__((target("avx2,fma"))) void run_band_avx2(const Job& job, size_t first, size_t last, Band& band) {
    run_band<8>(job, first, last, band);
}
#endif
void run_band_plain(const Job& job, size_t first, size_t last, Band& band) { run_band<4>(job, first, last, band); }

using RunBand = void (*)(const Job&, size_t, size_t, Band&);

RunBand best_run_band(Simd at_most) {
#if LDMSEG_X86
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    if (at_most >= Simd::avx512 && avx512 && avx2) return run_band_avx512;
    if (at_most >= Simd::avx2 && avx2) return run_band_avx2;
#endif
    (void)at_most;
    return run_band_plain;
}

}  // namespace

void panoptic_head(const float* logits, size_t slots, Size source, Size network, Size target, HeadThresholds thresholds,
                   size_t threads, Simd simd, const HeadOutput& output) {
    const size_t padded = (slots + kWidest - 1) / kWidest * kWidest;
    const Job job{logits, slots, padded, source, target, composed(source.height, network.height, target.height),
                  composed(source.width, network.width, target.width), thresholds.mask, logit_threshold(thresholds.mask),
                  output.segmentation, output.probability};
    const size_t bands = std::min(thread_count(threads), target.height);
    std::vector<Band> parts(bands, Band(padded));
    const RunBand run = best_run_band(simd);
    parallel_for(bands, bands, [&](size_t k) {
        run(job, target.height * k / bands, target.height * (k + 1) / bands, parts[k]);
    });

    std::vector<int32_t> id_of(slots + 1, 0);  // of label -1 first
    for (size_t q = 0; q < slots; ++q) {
        Band sum(1);
        for (const Band& part : parts) {
            sum.sigmoid_area[0] += part.sigmoid_area[q];
            sum.area[0] += part.area[q];
            sum.score[0] += part.score[q];
            sum.left[0] = std::min(sum.left[0], part.left[q]);
            sum.right[0] = std::max(sum.right[0], part.right[q]);
            sum.top[0] = std::min(sum.top[0], part.top[q]);
            sum.bottom[0] = std::max(sum.bottom[0], part.bottom[q]);
        }
        const double area = sum.area[0];
        const bool kept = q > 0 && sum.area[0] > 0 && sum.area[0] >= thresholds.count &&
                          (sum.sigmoid_area[0] == 0 || area / sum.sigmoid_area[0] >= thresholds.overlap);
        int32_t* box = output.box + 4 * q;
        id_of[q + 1] = kept ? static_cast<int32_t>(q) + 1 : 0;
        output.area[q] = kept ? sum.area[0] : 0;
        output.score[q] = kept ? static_cast<float>(sum.score[0] / area) : 0.0f;
        box[0] = kept ? sum.left[0] : 0;
        box[1] = kept ? sum.top[0] : 0;
        box[2] = kept ? sum.right[0] - sum.left[0] + 1 : 0;
        box[3] = kept ? sum.bottom[0] - sum.top[0] + 1 : 0;
    }
    for (size_t pixel = 0; pixel < target.height * target.width; ++pixel)
        output.segmentation[pixel] = id_of[static_cast<size_t>(output.segmentation[pixel] + 1)];
}

}  // namespace ldmseg
