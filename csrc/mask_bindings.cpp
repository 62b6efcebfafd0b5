// The Python face of what reads annotations and masks from JSONs.
#include <algorithm>
#include <limits>

#include "annotation_index.hpp"
#include "bindings.hpp"
#include "coco_masks.hpp"
#include "mask_index.hpp"
#include "mask_matching.hpp"

namespace ldmseg {
namespace {

std::unique_ptr<AnnotationIndex> py_annotation_index(const std::string& path, bool predictions) {
    py::gil_scoped_release release;
    return std::make_unique<AnnotationIndex>(path, predictions);
}

py::list listed_ids(const std::vector<std::string>& written) {
    py::list ids;
    for (const std::string& id : written) {
        if (id[0] == '"')
            ids.append(py::str(id.substr(1, id.size() - 2)));
        else
            ids.append(py::int_(std::stoll(id)));
    }
    return ids;
}

py::list py_image_ids(const AnnotationIndex& index) { return listed_ids(index.image_ids()); }

Array<int64_t> table_of(const std::vector<Segment>& rows) {
    Array<int64_t> table({rows.size(), size_t{4}});
    int64_t* out = table.mutable_data();
    for (const Segment& segment : rows)
        for (const int64_t value : {segment.id, segment.category_id, segment.iscrowd, segment.area}) *out++ = value;
    return table;
}

std::unique_ptr<MaskIndex> py_mask_index(const std::string& path, bool predictions) {
    py::gil_scoped_release release;
    return std::make_unique<MaskIndex>(path, predictions);
}

std::pair<size_t, size_t> py_mask_size(const MaskIndex& index, size_t k) {
    py::gil_scoped_release release;
    return index.size(k);
}

Categories categories_of(const Array<int64_t>& things) { return {things.data(), things.data() + things.size()}; }

// things: ascending, int64 [N]; height and width: where the file does not tell them. Returns (size, map on its side, gone,
// hidden pixels, table [S, 4])
py::tuple py_paint_image(const MaskIndex& index, size_t k, const Array<int64_t>& things, size_t height, size_t width) {
    const Categories above = categories_of(things);
    py::gil_scoped_release release;
    const ImageMasks image = index.image_masks(k, above, height, width);
    const MaskSide& side = image.side;
    PaintedMasks painted = paint_masks(side.masks, side.above, image.height, image.width);
    std::vector<Segment> rows;
    for (size_t place = 0; place < side.segments.size(); ++place)
        if (!std::binary_search(painted.gone.begin(), painted.gone.end(), place)) rows.push_back(side.segments[place]);
    py::gil_scoped_acquire acquire;
    return py::make_tuple(py::make_tuple(image.height, image.width), py::cast(std::move(painted.map)), painted.gone,
                          painted.hidden, table_of(rows));
}

// category: of all segments, -1 for their own. Returns (matches, hidden pixels, masks that are gone), both of ground truth
// and prediction; None where maps have to be painted, or tell what is wrong
py::object py_match_masks(const MaskIndex& gt_index, size_t gt_k, const MaskIndex& pred_index, size_t pred_k,
                          const Array<int64_t>& things, int64_t category) {
    const Categories above = categories_of(things);
    MaskMatches found;
    bool simple = false;
    {
        py::gil_scoped_release release;
        ImageMasks gt = gt_index.image_masks(gt_k, above, 0, 0);
        ImageMasks pred = pred_index.image_masks(pred_k, above, gt.height, gt.width);
        simple = gt.height == pred.height && gt.width == pred.width && gt.side.masks.size() <= kMostMasks &&
                 pred.side.masks.size() <= kMostMasks;
        if (simple) {
            for (ImageMasks* image : {&gt, &pred})
                for (Segment& segment : image->side.segments)
                    if (category >= 0) segment.category_id = category;
            found = match_masks(gt.side, pred.side, gt.height * gt.width);
        }
    }
    if (!simple) return py::none();
    return py::make_tuple(to_array(found.matches), found.hidden, found.gone);
}

// (file name, table [S, 4])
py::tuple py_annotation(const AnnotationIndex& index, size_t k) {
    const Annotation annotation = index.annotation(k);
    return py::make_tuple(annotation.file_name, table_of(annotation.segments));
}

// Spans down the columns as 0 and 1, [H, W].
Array<uint8_t> mask_of_spans(const std::vector<Span>& spans, size_t height, size_t width) {
    Array<uint8_t> mask({height, width});
    uint8_t* out = mask.mutable_data();
    py::gil_scoped_release release;
    std::fill(out, out + height * width, 0);
    for (const Span& span : spans)
        for (size_t pixel = span.begin, x = pixel / height, y = pixel % height; pixel < span.end; ++pixel) {
            out[y * width + x] = 1;
            if (++y == height) y = 0, ++x;
        }
    return mask;
}

void require_mask_size(size_t height, size_t width) {
    require(height > 0 && width > 0 && height <= std::numeric_limits<int32_t>::max() / width, "sizes of 1 to 2^31 - 1 pixels");
}

// counts: compressed, or int64 [N]
std::vector<Span> spans_of_run_lengths(const py::object& counts, size_t pixels) {
    if (py::isinstance<py::bytes>(counts))
        return spans_of_text(std::string_view(py::reinterpret_borrow<py::bytes>(counts)), pixels);
    const auto values = py::cast<Array<int64_t>>(counts);
    require(values.ndim() == 1, "expected counts int64 [N]");
    return spans_of_counts({values.data(), values.data() + values.size()}, pixels);
}

Array<uint8_t> py_mask_of_counts(const py::object& counts, size_t height, size_t width) {
    require_mask_size(height, width);
    return mask_of_spans(spans_of_run_lengths(counts, height * width), height, width);
}

std::vector<Span> spans_of_outlines(const std::vector<Array<double>>& outlines, size_t height, size_t width) {
    OutlineMask mask(height, width);
    for (const Array<double>& xy : outlines) {
        require(xy.ndim() == 2 && xy.shape(0) > 0 && xy.shape(1) == 2, "expected outlines float64 [N, 2]");
        mask.add(xy.data(), static_cast<size_t>(xy.shape(0)));
    }
    return mask.spans();
}

Array<uint8_t> py_mask_of_outlines(const std::vector<Array<double>>& outlines, size_t height, size_t width) {
    require_mask_size(height, width);
    return mask_of_spans(spans_of_outlines(outlines, height, width), height, width);
}

// masks: counts as above, or outlines; above: uint8 [N]. Returns (the map on its side, masks that are gone, hidden pixels)
py::tuple py_paint_masks(const py::list& masks, const Array<uint8_t>& above, size_t height, size_t width) {
    require_mask_size(height, width);
    require(above.ndim() == 1 && static_cast<size_t>(above.size()) == masks.size(), "expected above uint8 [N]");
    std::vector<std::vector<Span>> spans;
    for (const py::handle& mask : masks) {
        const auto given = py::reinterpret_borrow<py::object>(mask);
        try {
            spans.push_back(py::isinstance<py::list>(given)
                                ? spans_of_outlines(py::cast<std::vector<Array<double>>>(given), height, width)
                                : spans_of_run_lengths(given, height * width));
        } catch (const BadMask& error) {
            throw BadMask(std::to_string(spans.size()) + " " + error.what());  // which one, for the caller's words
        }
    }
    const std::vector<uint8_t> upper(above.data(), above.data() + above.size());
    py::gil_scoped_release release;
    PaintedMasks painted = paint_masks(spans, upper, height, width);
    py::gil_scoped_acquire acquire;
    return py::make_tuple(py::cast(std::move(painted.map)), painted.gone, painted.hidden);
}

}  // namespace

void bind_masks(py::module_& m) {
    // annotation_index.hpp
    py::register_exception<UnusualJson>(m, "UnusualJson", PyExc_ValueError);
    py::class_<AnnotationIndex>(m, "AnnotationIndex", "Indexes where the annotations of a COCO panoptic JSON stand in it.")
        .def(py::init(&py_annotation_index), py::arg("path"), py::arg("predictions"))
        .def_property_readonly("image_ids", &py_image_ids)
        .def_property_readonly("categories", &AnnotationIndex::categories)
        .def_property_readonly("used_categories", &AnnotationIndex::used_categories)
        .def("annotation", &py_annotation, py::arg("k"));

    // mask_index.hpp
    py::class_<MaskIndex>(m, "MaskIndex", "Indexes where the masks of COCO annotations stand in a JSON.")
        .def(py::init(&py_mask_index), py::arg("path"), py::arg("predictions"))
        .def_property_readonly("lists_images", &MaskIndex::lists_images)
        .def_property_readonly("image_ids", [](const MaskIndex& index) { return listed_ids(index.image_ids()); })
        .def_property_readonly("categories", &MaskIndex::categories)
        .def_property_readonly("used_categories", &MaskIndex::used_categories)
        .def("size", &py_mask_size, py::arg("k"))
        .def("paint", &py_paint_image, py::arg("k"), py::arg("things"), py::arg("height"), py::arg("width"));
    m.def("match_masks", &py_match_masks, py::arg("gt"), py::arg("gt_k"), py::arg("pred"), py::arg("pred_k"),
          py::arg("things"), py::arg("category") = -1);

    // coco_masks.hpp
    py::register_exception<BadMask>(m, "BadMask", PyExc_ValueError);
    m.def("mask_of_counts", &py_mask_of_counts, py::arg("counts"), py::arg("height"), py::arg("width"));
    m.def("mask_of_outlines", &py_mask_of_outlines, py::arg("outlines"), py::arg("height"), py::arg("width"));
    m.def("paint_masks", &py_paint_masks, py::arg("masks"), py::arg("above"), py::arg("height"), py::arg("width"));
}

}  // namespace ldmseg
