#include "mask_index.hpp"

#include <algorithm>
#include <limits>
#include <string_view>
#include <tuple>

namespace ldmseg {
namespace {

constexpr int64_t kLargestNumber = std::numeric_limits<int32_t>::max();
constexpr int64_t kLongestSide = 1 << 16, kMostPixels = 1 << 26;

void read_run_lengths(JsonScanner& json, StoredMask& mask) {
    bool size = false, counts = false, compressed = false;
    std::vector<int64_t> lengths;
    std::string text;
    json.each_entry([&](std::string_view key) {
        if (key == "size") {
            once(size);
            std::vector<int64_t> sides;
            json.each_item([&] { sides.push_back(json.integer()); });
            require(sides.size() == 2);
            for (const int64_t side : sides) require(side >= 1 && side <= kLongestSide);
            require(sides[0] * sides[1] <= kMostPixels);
            mask.height = static_cast<size_t>(sides[0]);
            mask.width = static_cast<size_t>(sides[1]);
        } else if (key == "counts") {
            once(counts);
            compressed = json.peek() == '"';
            if (compressed)
                text = json.long_text();
            else
                json.each_item([&] { lengths.push_back(json.integer()); });
        } else {
            json.skip_value();
        }
    });
    require(size && counts);
    const size_t pixels = mask.height * mask.width;
    mask.spans = compressed ? spans_of_text(text, pixels) : spans_of_counts(lengths, pixels);
}

// One annotation; without `masks`, its mask is looked over only.
StoredMask read_mask(JsonScanner& json, std::string& image_id, bool masks) {
    StoredMask mask{{0, 0, 0, -1}, 0, 0, {}, {}};
    bool image = false, category = false, crowd = false, segmentation = false, score = false;
    json.each_entry([&](std::string_view key) {
        if (key == "image_id") {
            once(image);
            image_id = json.raw_scalar();
        } else if (key == "category_id") {
            once(category);
            mask.segment.category_id = json.integer();
        } else if (key == "iscrowd") {
            once(crowd);
            mask.segment.iscrowd = json.integer();
        } else if (key == "score") {
            once(score);
            json.number();
        } else if (key == "segmentation") {
            once(segmentation);
            const char kind = json.peek();
            require(kind == '{' || kind == '[');
            if (!masks) {
                json.skip_value();
            } else if (kind == '{') {
                read_run_lengths(json, mask);
            } else {
                json.each_item([&] {
                    mask.outlines.emplace_back();
                    json.each_item([&] { mask.outlines.back().push_back(json.number()); });
                    require(mask.outlines.back().size() >= 6 && mask.outlines.back().size() % 2 == 0);
                });
                require(!mask.outlines.empty());
            }
        } else {
            json.skip_value();
        }
    });
    require(image && image_id != "\"\"" && category && segmentation && mask.segment.iscrowd >> 1 == 0);
    require(mask.segment.category_id >= 0 && mask.segment.category_id <= kLargestNumber);
    return mask;
}

// The size of the masks of an image; `size` where there are outlines alone.
std::pair<size_t, size_t> size_of(const std::vector<StoredMask>& masks, std::pair<size_t, size_t> size) {
    for (const StoredMask& mask : masks) {
        if (mask.height == 0) continue;
        if (size.first == 0) size = {mask.height, mask.width};
        if (size != std::make_pair(mask.height, mask.width)) throw BadMask("sizes differ");
    }
    return size;
}

}  // namespace

MaskIndex::MaskIndex(const std::string& path, bool predictions) : file_(path), predictions_(predictions) { scan(); }

void MaskIndex::scan() {
    JsonScanner json(file_.descriptor(), 0, file_.size());
    bool annotations = false, categories = false;
    if (json.peek() == '[') {
        require(predictions_);
        json.each_item([&] { add_annotation(json); });
    } else {
        json.each_entry([&](std::string_view key) {
            if (key == "images") {
                once(lists_images_);
                require(!annotations);  // else ids that `images` lacks would not be seen
                json.each_item([&] { add_image(json); });
            } else if (key == "annotations") {
                once(annotations);
                json.each_item([&] { add_annotation(json); });
            } else if (key == "categories") {
                once(categories);
                const uint64_t begin = json.offset();
                require(json.peek() == '[');
                json.skip_value();
                categories_ = file_.part(begin, json.offset());
            } else {
                json.skip_value();
            }
        });
    }
    require(json.peek() == 0 && !places_.empty() && (predictions_ || (lists_images_ && categories)));
    std::stable_sort(places_.begin(), places_.end(), [](const Place& a, const Place& b) { return a.image < b.image; });
    first_.assign(image_ids_.size() + 1, 0);
    for (const Place& place : places_) ++first_[place.image + 1];
    for (size_t k = 1; k < first_.size(); ++k) first_[k] += first_[k - 1];
    numbers_ = {};
}

uint32_t MaskIndex::image(const std::string& id) {
    const auto [found, added] = numbers_.try_emplace(id, static_cast<uint32_t>(image_ids_.size()));
    if (added) {
        require(image_ids_.size() < std::numeric_limits<uint32_t>::max());
        image_ids_.push_back(id);
        sizes_.push_back({0, 0});
    }
    return found->second;
}

void MaskIndex::add_image(JsonScanner& json) {
    std::string id;
    bool height = false, width = false;
    int64_t sides[] = {0, 0};
    json.each_entry([&](std::string_view key) {
        if (key == "id") {
            require(id.empty());
            id = json.raw_scalar();
        } else if (key == "height" || key == "width") {
            once(key == "height" ? height : width);
            int64_t& side = sides[key == "width"];
            side = json.integer();
            require(side >= 1 && side <= kLongestSide);
        } else {
            json.skip_value();
        }
    });
    const size_t before = image_ids_.size();
    require(!id.empty() && id != "\"\"" && height == width && sides[0] * sides[1] <= kMostPixels);
    sizes_[image(id)] = {static_cast<size_t>(sides[0]), static_cast<size_t>(sides[1])};
    require(image_ids_.size() > before);  // else it is there twice
}

void MaskIndex::add_annotation(JsonScanner& json) {
    const uint64_t begin = json.offset();
    std::string image_id;
    const StoredMask mask = read_mask(json, image_id, false);
    const uint64_t size = json.offset() - begin;
    require(size <= std::numeric_limits<uint32_t>::max());
    const size_t before = image_ids_.size();
    const uint32_t number = image(image_id);
    require(!lists_images_ || image_ids_.size() == before);
    places_.push_back({begin, static_cast<uint32_t>(size), number});
    used_.insert(mask.segment.category_id);
}

std::pair<size_t, size_t> MaskIndex::size(size_t k) const {
    return sizes_.at(k).first ? sizes_[k] : size_of(masks(k), {0, 0});
}

ImageMasks MaskIndex::image_masks(size_t k, const Categories& things, size_t height, size_t width) const {
    std::vector<StoredMask> stored = masks(k);
    ImageMasks found;
    std::tie(found.height, found.width) = size_of(stored, sizes_[k]);
    if (found.height == 0) found.height = height, found.width = width;
    if (found.height == 0 || found.width == 0) throw BadMask("no size");
    for (StoredMask& mask : stored) {
        const Segment& segment = mask.segment;
        found.side.segments.push_back(segment);
        found.side.above.push_back(!segment.iscrowd && std::binary_search(things.begin, things.end, segment.category_id));
        if (mask.height == 0) {
            OutlineMask drawn(found.height, found.width);
            for (const std::vector<double>& xy : mask.outlines) drawn.add(xy.data(), xy.size() / 2);
            mask.spans = drawn.spans();
        }
        found.side.masks.push_back(std::move(mask.spans));
    }
    return found;
}

std::vector<StoredMask> MaskIndex::masks(size_t k) const {
    require(k < image_ids_.size());
    std::vector<StoredMask> masks;
    std::string image_id;
    const auto end_of = [&](size_t place) { return places_[place].offset + places_[place].size; };
    for (size_t place = first_[k]; place < first_[k + 1];) {
        size_t last = place;  // of those that stand one behind the other, which are read at once
        while (last + 1 < first_[k + 1] && places_[last + 1].offset - end_of(last) <= 8) ++last;
        JsonScanner json(file_.descriptor(), places_[place].offset, end_of(last));
        for (const size_t begin = place; place <= last; ++place) {
            if (place > begin) json.expect(',');
            masks.push_back(read_mask(json, image_id, true));
            masks.back().segment.id = static_cast<int64_t>(masks.size());
        }
    }
    return masks;
}

}  // namespace ldmseg
