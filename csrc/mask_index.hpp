// Where the masks of COCO annotations, RLE or polygons, stand in a JSON. Its twin is metrics/mask_files.py.
#pragma once
#include <cstdint>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "coco_masks.hpp"
#include "json_scanner.hpp"
#include "mask_matching.hpp"

namespace ldmseg {

struct StoredMask {
    Segment segment;  // id: the place among the image's own, from 1
    size_t height = 0, width = 0;  // 0: polygons
    std::vector<Span> spans;
    std::vector<std::vector<double>> outlines;  // x, y, x, y, ...
};

struct Categories {  // ascending
    const int64_t *begin, *end;
};

struct ImageMasks {
    MaskSide side;
    size_t height, width;
};

// One pass checks the whole file but for the masks themselves, and keeps some tens of bytes an annotation. Throws
// UnusualJson for all that is not plainly right.
class MaskIndex {
   public:
    MaskIndex(const std::string& path, bool predictions);

    bool lists_images() const { return lists_images_; }
    const std::vector<std::string>& image_ids() const { return image_ids_; }
    const std::string& categories() const { return categories_; }  // the list as it is written, or empty
    std::vector<int64_t> used_categories() const { return {used_.begin(), used_.end()}; }

    // (height, width) as `images` or run lengths tell it, else (0, 0). Throws as image_masks does.
    std::pair<size_t, size_t> size(size_t k) const;

    // In the order of the file; height and width are those of an image whose size the file does not tell, or 0. Throws
    // UnusualJson and BadMask.
    ImageMasks image_masks(size_t k, const Categories& things, size_t height, size_t width) const;

   private:
    std::vector<StoredMask> masks(size_t k) const;

    struct Place {
        uint64_t offset;
        uint32_t size, image;
    };

    void scan();
    void add_image(JsonScanner& json);
    void add_annotation(JsonScanner& json);
    uint32_t image(const std::string& id);

    JsonFile file_;
    bool predictions_, lists_images_ = false;
    std::vector<Place> places_;  // sorted by image
    std::vector<size_t> first_;  // place of each image's first
    std::vector<std::string> image_ids_;
    std::unordered_map<std::string, uint32_t> numbers_;  // of images; empty after the scan
    std::vector<std::pair<size_t, size_t>> sizes_;
    std::set<int64_t> used_;
    std::string categories_;
};

}  // namespace ldmseg
