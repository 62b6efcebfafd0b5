// Mask logits -> panoptic map. The definition is kernels/panoptic_head/reference.py.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ldmseg {

struct Size {
    size_t height, width;
};

struct HeadThresholds {
    float mask;
    int64_t count;
    double overlap;
};

enum class Simd { plain, avx2, avx512 };

// Outputs of one image of H x W pixels and Q slots.
struct HeadOutput {
    int32_t* segmentation;  // [H, W], 0 = void, otherwise slot + 1
    float* probability;     // [H, W], softmax probability of the best slot, before any filter
    int32_t* area;          // [Q], 0 where dropped, as below
    int32_t* box;           // [Q, 4]: x, y, width, height
    float* score;           // [Q]: mean probability
};

// logits: [Q, h, w]; resized bilinearly (align_corners false) to `network`, then to `target`, composed into one step. Pixels
// that take something from a cell with a NaN or an infinity are void, of probability 0, and part of no area.
// simd: the widest instruction set to use, where the processor has it.
void panoptic_head(const float* logits, size_t slots, Size source, Size network, Size target, HeadThresholds thresholds,
                   size_t threads, Simd simd, const HeadOutput& output);

}  // namespace ldmseg
