// The Python face of the C++ helpers. Arguments are C-contiguous numpy arrays; every function releases the GIL.
#include "bindings.hpp"

#include <algorithm>
#include <array>
#include <limits>

#include "matching.hpp"
#include "outlines.hpp"
#include "panoptic_head.hpp"
#include "png.hpp"
#include "run_map.hpp"
#include "segments.hpp"
#include "training_map.hpp"

using namespace ldmseg;

namespace {

std::pair<size_t, size_t> map_size(const Array<int32_t>& ids) {
    require(ids.ndim() == 2 && ids.size() > 0, "expected ids int32 [H, W]");
    require(ids.size() <= std::numeric_limits<int32_t>::max(), "over 2^31 - 1 pixels");
    return {ids.shape(0), ids.shape(1)};
}

std::vector<Segment> segments(const Array<int64_t>& table) {
    require(table.ndim() == 2 && table.shape(1) == 4, "expected a segment table int64 [S, 4]");
    std::vector<Segment> rows;
    for (py::ssize_t row = 0; row < table.shape(0); ++row)
        rows.push_back({table.at(row, 0), table.at(row, 1), table.at(row, 2), table.at(row, 3)});
    return rows;
}

RunMap py_run_map(const Array<int32_t>& ids) {
    const auto [height, width] = map_size(ids);
    const int32_t* in = ids.data();
    py::gil_scoped_release release;
    return RunMap(in, height, width);
}

Array<int32_t> py_paint(const RunMap& map) {
    Array<int32_t> ids({map.height, map.width});
    int32_t* out = ids.mutable_data();
    py::gil_scoped_release release;
    map.paint(out);
    return ids;
}

RunMap py_read_png(const py::buffer& buffer, size_t max_pixels, size_t piece) {
    const py::buffer_info info = buffer.request();
    require(info.ndim == 1 && info.itemsize == 1, "expected the bytes of a PNG");
    py::gil_scoped_release release;
    return read_png(static_cast<const uint8_t*>(info.ptr), static_cast<size_t>(info.size), max_pixels, piece);
}

Array<int32_t> py_read_png_ids(const py::buffer& buffer, size_t max_pixels, size_t piece) {
    const py::buffer_info info = buffer.request();
    require(info.ndim == 1 && info.itemsize == 1, "expected the bytes of a PNG");
    const auto* content = static_cast<const uint8_t*>(info.ptr);
    const auto size = static_cast<size_t>(info.size);
    const PngHeader header = read_map_header(content, size, max_pixels);
    Array<int32_t> ids({header.height, header.width});
    int32_t* out = ids.mutable_data();
    py::gil_scoped_release release;
    read_png_ids(content, size, header, out, piece);
    return ids;
}

Array<uint8_t> py_read_png_picture(const py::buffer& buffer, size_t max_pixels) {
    const py::buffer_info info = buffer.request();
    require(info.ndim == 1 && info.itemsize == 1, "expected the bytes of a PNG");
    const auto* content = static_cast<const uint8_t*>(info.ptr);
    const auto size = static_cast<size_t>(info.size);
    const PngHeader header = read_png_header(content, size, max_pixels);
    Array<uint8_t> rgb({header.height, header.width, size_t{3}});
    uint8_t* out = rgb.mutable_data();
    py::gil_scoped_release release;
    read_png_picture(content, size, header, out);
    return rgb;
}

py::array py_filter_ids(const Array<int32_t>& ids) {
    const auto [height, width] = map_size(ids);
    Array<uint8_t> rows(static_cast<py::ssize_t>(height * (1 + 3 * width)));
    const int32_t* in = ids.data();
    uint8_t* out = rows.mutable_data();
    py::gil_scoped_release release;
    filter_ids(in, height, width, out);
    return std::move(rows);
}

Array<Overlap> py_joint_histogram(const RunMap& gt, const RunMap& pred) {
    std::vector<Overlap> overlaps;
    {
        py::gil_scoped_release release;
        overlaps = joint_histogram(gt, pred);
    }
    return to_array(overlaps);
}

Array<Match> py_match_segments(const RunMap& gt, const Array<int64_t>& gt_segments, const RunMap& pred,
                               const Array<int64_t>& pred_segments, size_t boundary_distance, size_t most_pairs) {
    const std::vector<Segment> gt_rows = segments(gt_segments), pred_rows = segments(pred_segments);
    std::vector<Match> matches;
    {
        py::gil_scoped_release release;
        matches = match_segments(gt, gt_rows, pred, pred_rows, boundary_distance, most_pairs);
    }
    return to_array(matches);
}

Array<Match> py_match_files(const std::string& gt_path, const Array<int64_t>& gt_segments, const std::string& pred_path,
                            const Array<int64_t>& pred_segments, bool boundary, size_t max_pixels) {
    const std::vector<Segment> gt_rows = segments(gt_segments), pred_rows = segments(pred_segments);
    std::vector<Match> matches;
    {
        py::gil_scoped_release release;
        const RunMap gt = read_png_file(gt_path, max_pixels), pred = read_png_file(pred_path, max_pixels);
        const size_t distance = boundary ? boundary_distance(gt.height, gt.width) : 0;
        matches = match_segments(gt, gt_rows, pred, pred_rows, distance, kMostPairs);
    }
    return to_array(matches);
}

Array<uint8_t> py_boundary_mask(const RunMap& map, size_t distance) {
    require(distance > 0, "distance must be at least 1 pixel");
    Array<uint8_t> mask({map.height, map.width});
    uint8_t* out = mask.mutable_data();
    {
        py::gil_scoped_release release;
        const BitRows boundary = boundary_rows(map, distance);
        for (size_t y = 0; y < map.height; ++y)
            for (size_t x = 0; x < map.width; ++x) *out++ = boundary.row(y)[x / 64] >> (x % 64) & 1;
    }
    return mask;
}

Array<uint8_t> py_dense_ids(const RunMap& map, const std::vector<int32_t>& segment_ids, const std::vector<uint8_t>& dropped,
                            int64_t min_area) {
    Array<uint8_t> dense({map.height, map.width});
    uint8_t* out = dense.mutable_data();
    py::gil_scoped_release release;
    dense_ids(map, segment_ids, dropped, min_area, out);
    return dense;
}

// (map, number of segments); the map given where nothing changes
py::tuple py_compact_ids(const Array<uint8_t>& dense, size_t max_segments) {
    const auto pixels = static_cast<size_t>(dense.size());
    const uint8_t* in = dense.data();
    Numbering numbering;
    {
        py::gil_scoped_release release;
        numbering = compact_numbers(in, pixels, max_segments);
    }
    if (!numbering.changes) return py::make_tuple(dense, numbering.count);
    Array<uint8_t> compact(std::vector<py::ssize_t>(dense.shape(), dense.shape() + dense.ndim()));
    std::transform(in, in + pixels, compact.mutable_data(), [&](uint8_t id) { return numbering.of[id]; });
    return py::make_tuple(compact, numbering.count);
}

// (ids [S], areas [S], boxes [S, 4], compressed counts [S])
py::tuple py_segment_shapes(const Array<int32_t>& ids, bool rle) {
    const auto [height, width] = map_size(ids);
    const int32_t* in = ids.data();
    std::vector<SegmentShape> shapes;
    {
        py::gil_scoped_release release;
        shapes = segment_shapes(in, height, width, rle);
    }
    Array<int32_t> segment_ids(shapes.size()), boxes({shapes.size(), size_t{4}});
    Array<int64_t> areas(shapes.size());
    py::list counts;
    for (size_t k = 0; k < shapes.size(); ++k) {
        const SegmentShape& shape = shapes[k];
        segment_ids.mutable_at(k) = shape.id;
        areas.mutable_at(k) = shape.area;
        boxes.mutable_at(k, 0) = shape.left;
        boxes.mutable_at(k, 1) = shape.top;
        boxes.mutable_at(k, 2) = shape.right - shape.left + 1;
        boxes.mutable_at(k, 3) = shape.bottom - shape.top + 1;
        if (rle) counts.append(py::bytes(shape.rle));
    }
    return py::make_tuple(segment_ids, areas, boxes, counts);
}

// (ids [H, W], segments [P])
py::tuple py_split_segments(const Array<int32_t>& ids, int64_t least) {
    const auto [height, width] = map_size(ids);
    Array<int32_t> split({height, width});
    const int32_t* in = ids.data();
    int32_t* out = split.mutable_data();
    std::vector<int32_t> sources;
    {
        py::gil_scoped_release release;
        std::copy(in, in + height * width, out);
        sources = split_segments(out, height, width, least);
    }
    return py::make_tuple(split, to_array(sources));
}

// (points [N, 2], ends [R], ids [R], pieces [R])
py::tuple py_outlines(const Array<int32_t>& ids) {
    const auto [height, width] = map_size(ids);
    const int32_t* in = ids.data();
    Outlines found;
    {
        py::gil_scoped_release release;
        found = outlines(in, height, width);
    }
    Array<int32_t> points({found.points.size() / 2, size_t{2}});
    std::copy(found.points.begin(), found.points.end(), points.mutable_data());
    return py::make_tuple(points, to_array(found.ends), to_array(found.ids), to_array(found.pieces));
}

py::tuple py_panoptic_head(const Array<float>& logits, std::array<size_t, 2> network, std::array<size_t, 2> target,
                           float mask_threshold, int64_t count_threshold, double overlap_threshold, size_t threads,
                           int simd) {
    require(logits.ndim() == 4 && logits.size() > 0, "expected mask logits float32 [B, Q, h, w]");
    require(network[0] > 0 && network[1] > 0 && target[0] > 0 && target[1] > 0, "sizes must be at least 1x1");
    for (const auto& size : {network, target})
        require(size[0] <= std::numeric_limits<int32_t>::max() / size[1], "sizes over 2^31 - 1 pixels");
    const size_t batch = logits.shape(0), slots = logits.shape(1), height = target[0], width = target[1];
    const Size source{static_cast<size_t>(logits.shape(2)), static_cast<size_t>(logits.shape(3))};
    Array<int32_t> segmentation({batch, height, width}), area({batch, slots}), box({batch, slots, size_t{4}});
    Array<float> probability({batch, height, width}), score({batch, slots});
    const float* in = logits.data();
    const HeadOutput first{segmentation.mutable_data(), probability.mutable_data(), area.mutable_data(), box.mutable_data(),
                           score.mutable_data()};
    {
        py::gil_scoped_release release;
        for (size_t b = 0; b < batch; ++b) {
            const HeadOutput output{first.segmentation + b * height * width, first.probability + b * height * width,
                                    first.area + b * slots, first.box + 4 * b * slots, first.score + b * slots};
            panoptic_head(in + b * slots * source.height * source.width, slots, source, {network[0], network[1]},
                          {height, width}, {mask_threshold, count_threshold, overlap_threshold}, threads,
                          static_cast<Simd>(simd), output);
        }
    }
    return py::make_tuple(segmentation, probability, area, box, score);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "native helpers of ldmseg_fast; each has a twin in numpy or torch beside its caller";

    // run_map.hpp, with what training_map.hpp makes of a map
    py::class_<RunMap>(m, "RunMap", "Holds a map [H, W] as the runs of its rows, on which matching works.")
        .def(py::init(&py_run_map), py::arg("ids").noconvert())
        .def("ids", &py_paint)
        .def("dense_ids", &py_dense_ids, py::arg("segment_ids"), py::arg("dropped"), py::arg("min_area"))
        .def_property_readonly("shape", [](const RunMap& map) { return py::make_tuple(map.height, map.width); });

    // png.hpp
    const auto& unreadable = py::register_exception<UnreadablePng>(m, "UnreadablePng", PyExc_ValueError);
    py::register_exception<TooManyRuns>(m, "TooManyRuns", unreadable);
    m.attr("LONGEST_SIDE") = kLongestSide;
    m.def("read_png", &py_read_png, py::arg("content"), py::arg("max_pixels"), py::arg("piece") = kPiece);
    m.def("read_png_ids", &py_read_png_ids, py::arg("content"), py::arg("max_pixels"), py::arg("piece") = kPiece);
    m.def("read_png_picture", &py_read_png_picture, py::arg("content"), py::arg("max_pixels"));
    m.def("filter_ids", &py_filter_ids, py::arg("ids").noconvert());

    // matching.hpp
    PYBIND11_NUMPY_DTYPE(Match, image, category_id, outcome, gt_id, pred_id, area, iou, boundary_iou);
    PYBIND11_NUMPY_DTYPE(Overlap, gt_id, pred_id, pixels);
    py::register_exception<Inconsistent>(m, "Inconsistent", PyExc_ValueError);
    m.def("joint_histogram", &py_joint_histogram, py::arg("gt"), py::arg("pred"));
    m.def("match_segments", &py_match_segments, py::arg("gt"), py::arg("gt_segments").noconvert(), py::arg("pred"),
          py::arg("pred_segments").noconvert(), py::arg("boundary_distance") = 0,
          py::arg("most_pairs") = std::numeric_limits<size_t>::max());
    m.attr("MOST_PAIRS") = kMostPairs;
    m.def("match_files", &py_match_files, py::arg("gt_path"), py::arg("gt_segments").noconvert(), py::arg("pred_path"),
          py::arg("pred_segments").noconvert(), py::arg("boundary"), py::arg("max_pixels"));
    m.def("boundary_mask", &py_boundary_mask, py::arg("map"), py::arg("distance"));

    bind_masks(m);

    // training_map.hpp
    m.def("compact_ids", &py_compact_ids, py::arg("dense").noconvert(), py::arg("max_segments"));

    // segments.hpp
    m.def("segment_shapes", &py_segment_shapes, py::arg("ids").noconvert(), py::arg("rle"));
    m.def("split_segments", &py_split_segments, py::arg("ids").noconvert(), py::arg("least"));

    // outlines.hpp
    m.def("outlines", &py_outlines, py::arg("ids").noconvert());

    // panoptic_head.hpp
    m.def("panoptic_head", &py_panoptic_head, py::arg("mask_logits").noconvert(), py::arg("network_size"),
          py::arg("target_size"), py::arg("mask_threshold"), py::arg("count_threshold"), py::arg("overlap_threshold"),
          py::arg("threads") = 0, py::arg("simd") = 2);
}
