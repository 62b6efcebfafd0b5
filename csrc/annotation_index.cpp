#include "annotation_index.hpp"

#include <algorithm>
#include <limits>

namespace ldmseg {
namespace {

constexpr int64_t kLargestId = (1 << 24) - 1;
constexpr int64_t kLargestNumber = std::numeric_limits<int32_t>::max();

Segment read_segment(JsonScanner& json, bool predictions) {
    Segment segment{0, 0, 0, -1};
    bool id = false, category_id = false, iscrowd = false, area = false;
    json.each_entry([&](const std::string& key) {
        if (key == "id") {
            once(id);
            segment.id = json.integer();
        } else if (key == "category_id") {
            once(category_id);
            segment.category_id = json.integer();
        } else if (key == "iscrowd") {
            once(iscrowd);
            segment.iscrowd = json.integer();
        } else if (key == "area") {
            once(area);
            segment.area = json.integer();
            require(segment.area >= 0 && segment.area <= kLargestNumber);
        } else {
            json.skip_value();
        }
    });
    require(id && segment.id >= 1 && segment.id <= kLargestId && category_id && segment.iscrowd >> 1 == 0);
    require(segment.category_id >= 0 && segment.category_id <= kLargestNumber);
    if (predictions) segment.area = -1;  // counted, whatever the file says
    return segment;
}

Annotation read_annotation(JsonScanner& json, bool predictions) {
    Annotation annotation;
    bool image_id = false, file_name = false, segments_info = false;
    json.each_entry([&](const std::string& key) {
        if (key == "image_id") {
            once(image_id);
            annotation.image_id = json.raw_scalar();
        } else if (key == "file_name") {
            once(file_name);
            annotation.file_name = json.text();
        } else if (key == "segments_info") {
            once(segments_info);
            json.each_item([&] { annotation.segments.push_back(read_segment(json, predictions)); });
        } else {
            json.skip_value();
        }
    });
    require(image_id && annotation.image_id != "\"\"" && !annotation.file_name.empty() && segments_info);
    return annotation;
}

std::string read_image_id(JsonScanner& json, bool predictions) {
    std::string id;
    bool file_name = false, height = false, width = false;
    json.each_entry([&](const std::string& key) {
        if (key == "id") {
            require(id.empty());
            id = json.raw_scalar();
        } else if (key == "file_name") {
            once(file_name);
            require(!json.text().empty());
        } else if (key == "height" || key == "width") {
            once(key == "height" ? height : width);
            const int64_t side = json.integer();
            require(side >= 1 && side <= kLargestNumber);
        } else {
            json.skip_value();
        }
    });
    require(!id.empty() && id != "\"\"" && (file_name || predictions));
    return id;
}

template <typename Value>
std::vector<Value> sorted_and_different(std::vector<Value> values) {
    std::sort(values.begin(), values.end());
    require(std::adjacent_find(values.begin(), values.end()) == values.end());
    return values;
}

}  // namespace

AnnotationIndex::AnnotationIndex(const std::string& path, bool predictions) : file_(path), predictions_(predictions) {
    scan();
}

void AnnotationIndex::scan() {
    JsonScanner json(file_.descriptor(), 0, file_.size());
    bool images = false, annotations = false, categories = false;
    std::vector<std::string> listed;
    json.each_entry([&](const std::string& key) {
        if (key == "images") {
            once(images);
            json.each_item([&] { listed.push_back(read_image_id(json, predictions_)); });
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
    require(json.peek() == 0 && annotations && (predictions_ || (images && categories && !places_.empty())));
    listed = sorted_and_different(std::move(listed));
    const std::vector<std::string> annotated = sorted_and_different(image_ids_);
    require(!images || std::includes(listed.begin(), listed.end(), annotated.begin(), annotated.end()));
}

void AnnotationIndex::add_annotation(JsonScanner& json) {
    const uint64_t begin = json.offset();
    Annotation annotation = read_annotation(json, predictions_);
    const uint64_t size = json.offset() - begin;
    require(size <= std::numeric_limits<uint32_t>::max());
    places_.push_back({begin, static_cast<uint32_t>(size)});
    image_ids_.push_back(std::move(annotation.image_id));
    std::vector<int64_t> ids;
    for (const Segment& segment : annotation.segments) {
        ids.push_back(segment.id);
        used_.insert(segment.category_id);
    }
    sorted_and_different(std::move(ids));
}

Annotation AnnotationIndex::annotation(size_t k) const {
    const Place& place = places_.at(k);
    JsonScanner json(file_.descriptor(), place.offset, place.offset + place.size);
    return read_annotation(json, predictions_);
}

}  // namespace ldmseg
