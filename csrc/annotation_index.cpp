#include "annotation_index.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <limits>

namespace ldmseg {
namespace {

constexpr int64_t kLargestId = (1 << 24) - 1;
constexpr int64_t kLargestNumber = std::numeric_limits<int32_t>::max();
constexpr uint64_t kLongestCategories = 1 << 20;

void require(bool condition) {
    if (!condition) throw UnusualJson();
}

// Whether a key is there for the first time; Python keeps the last of several.
void once(bool& seen) {
    require(!seen);
    seen = true;
}

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

std::string read_part(int file, uint64_t begin, uint64_t end) {
    require(end - begin <= kLongestCategories);
    std::string text(end - begin, '\0');
    require(pread(file, text.data(), text.size(), static_cast<off_t>(begin)) == static_cast<ssize_t>(text.size()));
    return text;
}

}  // namespace

AnnotationIndex::AnnotationIndex(const std::string& path, bool predictions) : predictions_(predictions) {
    require(path.find('\0') == std::string::npos);
    file_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe must not keep it waiting
    require(file_ >= 0);
    struct stat status;
    try {
        require(fstat(file_, &status) == 0 && S_ISREG(status.st_mode));
        scan(static_cast<uint64_t>(status.st_size));
    } catch (...) {
        close(file_);
        throw;
    }
}

AnnotationIndex::~AnnotationIndex() { close(file_); }

void AnnotationIndex::scan(uint64_t size) {
    JsonScanner json(file_, 0, size);
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
            categories_ = read_part(file_, begin, json.offset());
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
    JsonScanner json(file_, place.offset, place.offset + place.size);
    return read_annotation(json, predictions_);
}

}  // namespace ldmseg
