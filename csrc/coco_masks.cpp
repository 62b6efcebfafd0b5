#include "coco_masks.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>

namespace ldmseg {
namespace {

constexpr int kScale = 5;  // pycocotools draws outlines on a grid of fifths of a pixel
constexpr size_t kMostCrossings = size_t{1} << 27;

// Row p is inside where an odd number of toggles stands at or above p.
uint64_t prefix_parity(uint64_t word) {
    for (int shift = 1; shift < 64; shift *= 2) word ^= word << shift;
    return word;
}

// The grid point nearest to a coordinate. The cast cuts off towards 0, as pycocotools' does.
int64_t fifths(double coordinate) {
    const double scaled = kScale * coordinate + 0.5;
    if (!(std::abs(scaled) < std::numeric_limits<int32_t>::max()))
        throw BadMask("a coordinate is no number, or far outside every picture: " + std::to_string(coordinate));
    return static_cast<int64_t>(scaled);
}

}  // namespace

std::vector<int64_t> counts_of_text(std::string_view text) {
    std::vector<int64_t> counts;
    counts.reserve(text.size() / 2 + 1);
    const auto* characters = reinterpret_cast<const unsigned char*>(text.data());
    const size_t size = text.size();
    for (size_t at = 0; at < size;) {
        int64_t value = 0;
        unsigned digit;
        int shift = 0;
        do {
            if (at == size) throw BadMask("`counts` ends inside a number");
            digit = characters[at] - 48u;
            if (digit > 63)
                throw BadMask("`counts` has a character that run lengths do not have, at place " + std::to_string(at));
            if (shift > 35) throw BadMask("`counts` has a number of over 7 characters, at place " + std::to_string(at));
            ++at;
            value |= static_cast<int64_t>(digit & 31) << shift;
            shift += 5;
        } while (digit & 32);
        if (digit & 16) value -= int64_t{1} << shift;
        if (counts.size() > 2) value += counts[counts.size() - 2];
        if (value < 0 || value > std::numeric_limits<uint32_t>::max())
            throw BadMask("`counts` has the run length " + std::to_string(value));
        counts.push_back(value);
    }
    return counts;
}

std::vector<Span> spans_of_counts(const std::vector<int64_t>& counts, size_t pixels) {
    const auto size = static_cast<int64_t>(pixels);
    const auto least = std::min_element(counts.begin(), counts.end());
    if (least != counts.end() && *least < 0) throw BadMask("`counts` has the run length " + std::to_string(*least));
    int64_t covered = 0;
    for (const int64_t count : counts) {
        if (count > size - covered)
            throw BadMask("`counts` covers more than the " + std::to_string(size) + " pixels of `size`");
        covered += count;
    }
    if (covered != size)
        throw BadMask("`counts` covers " + std::to_string(covered) + " of the " + std::to_string(size) + " pixels of `size`");
    std::vector<Span> spans(counts.size() / 2 + 1);
    Span* last = spans.data();
    uint32_t at = 0;
    for (size_t k = 0; k + 1 < counts.size(); k += 2) {
        last->begin = at += static_cast<uint32_t>(counts[k]);
        last->end = at += static_cast<uint32_t>(counts[k + 1]);
        if (last->begin == last->end) continue;
        if (last != spans.data() && last[-1].end == last->begin)
            last[-1].end = last->end;
        else
            ++last;
    }
    spans.resize(static_cast<size_t>(last - spans.data()));
    return spans;
}

namespace {

// The spans of `text` where it is right in all, which the two functions above find out in more steps.
bool read_spans(std::string_view text, size_t pixels, std::vector<Span>& spans) {
    const auto* at = reinterpret_cast<const unsigned char*>(text.data());
    const auto* end = at + text.size();
    const auto add_difference = [&](int64_t& length) {
        int64_t value = 0;
        unsigned digit;
        int shift = 0;
        do {
            if (at == end || shift > 30) return false;
            digit = *at++ - 48u;
            if (digit > 63) return false;
            value |= static_cast<int64_t>(digit & 31) << shift;
            shift += 5;
        } while (digit & 32);
        if (digit & 16) value -= int64_t{1} << shift;
        length += value;
        return length >= 0 && length <= static_cast<int64_t>(pixels);
    };
    spans.resize(text.size() / 2 + 1);
    Span* last = spans.data();
    int64_t covered = 0, gap = 0, run = 0;
    for (bool first = true; at != end; first = false) {
        if (!add_difference(gap)) return false;
        covered += gap;
        if (at == end) break;
        if (!add_difference(run)) return false;
        const auto begin = static_cast<uint32_t>(covered);
        covered += run;
        if (covered > static_cast<int64_t>(pixels)) return false;
        if (run != 0) {
            if (last != spans.data() && last[-1].end == begin)
                --last;
            else
                last->begin = begin;
            last++->end = static_cast<uint32_t>(covered);
        }
        if (first) gap = 0;  // the third count is no difference yet
    }
    spans.resize(static_cast<size_t>(last - spans.data()));
    return covered == static_cast<int64_t>(pixels);
}

}  // namespace

std::vector<Span> spans_of_text(std::string_view text, size_t pixels) {
    std::vector<Span> spans;
    return read_spans(text, pixels, spans) ? spans : spans_of_counts(counts_of_text(text), pixels);
}

OutlineMask::OutlineMask(size_t height, size_t width)
    : height_(static_cast<int64_t>(height)),
      width_(static_cast<int64_t>(width)),
      toggles_(height * width / 64 + 1),
      pixels_(height * width / 64 + 1) {}

void OutlineMask::add(const double* xy, size_t points) {
    std::fill(toggles_.begin(), toggles_.end(), 0);
    const int64_t first[] = {fifths(xy[0]), fifths(xy[1])};
    int64_t from[] = {first[0], first[1]};
    for (size_t k = 1; k <= points; ++k) {
        const int64_t to[] = {k < points ? fifths(xy[2 * k]) : first[0], k < points ? fifths(xy[2 * k + 1]) : first[1]};
        add_edge(from, to);
        std::copy(to, to + 2, from);
    }
    uint64_t inside = 0;  // all bits: the parity of the words before
    for (size_t k = 0; k < toggles_.size(); ++k) {
        const uint64_t word = prefix_parity(toggles_[k]) ^ inside;
        pixels_[k] |= word;
        inside = word >> 63 ? ~uint64_t{0} : 0;
    }
}

// A line from point to point of the grid crosses column c between u = 5 c + 2 and 5 c + 3, which is the column's middle.
// The pixels from there down change sides. Only crossings in the picture are looked at, however long the line is.
void OutlineMask::add_edge(const int64_t* from, const int64_t* to) {
    const int64_t dx = std::abs(to[0] - from[0]), dy = std::abs(to[1] - from[1]);
    if (dx == 0) return;
    const bool flat = dx >= dy;
    if (flat ? from[0] > to[0] : from[1] > to[1]) std::swap(from, to);  // along the longer side
    const int64_t low = std::min(from[0], to[0]), high = std::max(from[0], to[0]);
    if (high < kScale / 2 + 1) return;
    const int64_t begin = std::max<int64_t>(0, (low + 1) / kScale - 1);
    const int64_t end = std::min(width_ - 1, (high - 3) / kScale);
    if (begin > end) return;
    crossings_ += static_cast<size_t>(end - begin + 1);
    if (crossings_ > kMostCrossings) throw BadMask("the outline crosses over 2^27 columns: it is no outline");
    const double slope = flat ? static_cast<double>(to[1] - from[1]) / static_cast<double>(dx)
                              : static_cast<double>(to[0] - from[0]) / static_cast<double>(dy);
    const auto minor = [&](int64_t t) {
        return static_cast<int64_t>(static_cast<double>(from[flat ? 1 : 0]) + slope * static_cast<double>(t) + 0.5);
    };
    for (int64_t column = begin; column <= end; ++column) {
        const int64_t u = kScale * column + 2;
        if (u < low || u + 1 > high) continue;
        if (flat) {
            toggle(column, std::min(minor(u - from[0]), minor(u + 1 - from[0])));
            continue;
        }
        // the first step t on the other side of the column's middle; `minor` never turns back
        const auto crossed = [&](int64_t t) { return slope > 0 ? minor(t) > u : minor(t) <= u; };
        auto t = static_cast<int64_t>((static_cast<double>(u) + 0.5 - static_cast<double>(from[0])) / slope);
        t = std::clamp<int64_t>(t, 1, dy);
        while (t > 1 && crossed(t - 1)) --t;
        while (t <= dy && !crossed(t)) ++t;
        if (t <= dy) toggle(column, from[1] + t - 1);
    }
}

void OutlineMask::toggle(int64_t column, int64_t fifths) {
    const double row = std::clamp((static_cast<double>(fifths) + 0.5) / kScale - 0.5, 0.0, static_cast<double>(height_));
    const auto pixel = static_cast<size_t>(column * height_ + static_cast<int64_t>(std::ceil(row)));
    toggles_[pixel / 64] ^= uint64_t{1} << (pixel % 64);
}

std::vector<Span> OutlineMask::spans() const {
    std::vector<Span> spans;
    const auto size = static_cast<uint32_t>(height_ * width_);
    uint64_t before = 0;  // the bit before the word
    for (size_t k = 0; k < pixels_.size(); ++k) {
        for (uint64_t left = pixels_[k] ^ (pixels_[k] << 1 | before); left; left &= left - 1) {
            const auto at = static_cast<uint32_t>(64 * k) + static_cast<uint32_t>(lowest_bit(left));
            if (at >= size) break;
            if (spans.empty() || spans.back().end != size)
                spans.push_back({at, size});
            else
                spans.back().end = at;
        }
        before = pixels_[k] >> 63;
    }
    return spans;
}

namespace {

template <typename Id>
RunMap map_of_layers(const std::vector<std::vector<Span>>& masks, const std::vector<size_t>& order, size_t height,
                     size_t width) {
    static thread_local std::vector<Id> pixels;  // a fresh page costs more than what is painted on it
    if (pixels.size() > 4 * height * width) pixels = {};
    pixels.assign(height * width, 0);
    paint_pixels(masks, order, pixels.data());
    return RunMap(pixels.data(), width, height);
}

}  // namespace

std::vector<size_t> painting_order(const std::vector<std::vector<Span>>& masks, const std::vector<uint8_t>& above) {
    std::vector<int64_t> area(masks.size(), 0);
    for (size_t k = 0; k < masks.size(); ++k)
        for (const Span& span : masks[k]) area[k] += span.end - span.begin;
    std::vector<size_t> order(masks.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
        return above[a] != above[b] ? above[a] < above[b] : area[a] > area[b];
    });
    return order;
}

PaintedMasks paint_masks(const std::vector<std::vector<Span>>& masks, const std::vector<uint8_t>& above, size_t height,
                         size_t width) {
    int64_t hidden = 0;
    for (const std::vector<Span>& mask : masks)
        for (const Span& span : mask) hidden += span.end - span.begin;
    const std::vector<size_t> order = painting_order(masks, above);
    const bool few = masks.size() <= std::numeric_limits<uint8_t>::max();  // a quarter of the memory to be written
    RunMap map = few ? map_of_layers<uint8_t>(masks, order, height, width) : map_of_layers<int32_t>(masks, order, height, width);
    std::vector<uint8_t> there(masks.size() + 1, 0);
    for (size_t x = 0; x < width; ++x)
        for (const Run* run = map.row(x); run->begin < static_cast<int32_t>(height); ++run) {
            there[static_cast<size_t>(run->id)] = 1;
            if (run->id != 0) hidden -= run[1].begin - run->begin;
        }
    std::vector<size_t> gone;
    for (size_t k = 0; k < masks.size(); ++k)
        if (!there[k + 1]) gone.push_back(k);
    return {std::move(map), std::move(gone), hidden};
}

}  // namespace ldmseg
