// Where the annotations of a COCO panoptic JSON stand in it. Its twin is Python's reader with load_panoptic_json's checks.
#pragma once
#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "json_scanner.hpp"
#include "matching.hpp"

namespace ldmseg {

struct Annotation {
    std::string image_id;  // as it is written: 12 or "a"
    std::string file_name;
    std::vector<Segment> segments;
};

// One pass checks the whole file and keeps some tens of bytes an annotation; an annotation is read again when it is asked
// for. Throws UnusualJson for all that is not plainly right.
class AnnotationIndex {
   public:
    AnnotationIndex(const std::string& path, bool predictions);

    const std::vector<std::string>& image_ids() const { return image_ids_; }
    const std::string& categories() const { return categories_; }            // the list as it is written, or empty
    std::vector<int64_t> used_categories() const { return {used_.begin(), used_.end()}; }  // ascending
    Annotation annotation(size_t k) const;

   private:
    struct Place {
        uint64_t offset;
        uint32_t size;
    };

    void scan();
    void add_annotation(JsonScanner& json);

    JsonFile file_;
    bool predictions_;
    std::vector<Place> places_;
    std::vector<std::string> image_ids_;
    std::set<int64_t> used_;
    std::string categories_;
};

}  // namespace ldmseg
