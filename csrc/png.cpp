#include "png.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "inflate.hpp"
#include "unfilter.hpp"
#include "unfilter_pixels.hpp"

namespace ldmseg {
namespace {

constexpr size_t kKeptBytes = size_t{1} << 25;  // of a thread's buffer, from one image to the next
constexpr size_t kLargestFile = size_t{1} << 30;

// Eight bytes at a time by eight tables.
class Crc32 {
   public:
    Crc32() {
        for (uint32_t k = 0; k < 256; ++k) {
            uint32_t value = k;
            for (int bit = 0; bit < 8; ++bit) value = value >> 1 ^ (value & 1 ? 0xedb88320u : 0);
            tables_[0][k] = value;
        }
        for (size_t t = 1; t < 8; ++t)
            for (size_t k = 0; k < 256; ++k) tables_[t][k] = tables_[t - 1][k] >> 8 ^ tables_[0][tables_[t - 1][k] & 255];
    }

    uint32_t operator()(const uint8_t* bytes, size_t size) const {
        uint32_t crc = ~uint32_t{0};
        for (; size >= 8; bytes += 8, size -= 8) {
            uint32_t low, high;
            std::memcpy(&low, bytes, 4);
            std::memcpy(&high, bytes + 4, 4);
            low ^= crc;
            crc = tables_[7][low & 255] ^ tables_[6][low >> 8 & 255] ^ tables_[5][low >> 16 & 255] ^ tables_[4][low >> 24] ^
                  tables_[3][high & 255] ^ tables_[2][high >> 8 & 255] ^ tables_[1][high >> 16 & 255] ^ tables_[0][high >> 24];
        }
        for (; size > 0; ++bytes, --size) crc = crc >> 8 ^ tables_[0][(crc ^ *bytes) & 255];
        return ~crc;
    }

   private:
    std::array<std::array<uint32_t, 256>, 8> tables_;
};

class Buffer {  // contents are lost when it grows
   public:
    uint8_t* at_least(size_t size) {
        if (size > size_) {
            bytes_.reset();
            bytes_.reset(new uint8_t[size]);
            size_ = size;
        }
        return bytes_.get();
    }
    void trim() {
        if (size_ > kKeptBytes) *this = Buffer();
    }

   private:
    std::unique_ptr<uint8_t[]> bytes_;
    size_t size_ = 0;
};

struct Scratch {
    Inflater inflater;
    Buffer file, stream, rows, pixels;
};

Scratch& scratch() {
    static thread_local Scratch mine;
    return mine;
}

uint32_t big_endian(const uint8_t* bytes) {
    return uint32_t{bytes[0]} << 24 | uint32_t{bytes[1]} << 16 | uint32_t{bytes[2]} << 8 | bytes[3];
}

bool is_kind(const uint8_t* chunk, const char* kind) { return std::memcmp(chunk + 4, kind, 4) == 0; }

// The joined IDAT chunks, copied to `stream`; their size.
size_t image_data(const uint8_t* content, size_t size, uint8_t* stream) {
    static const Crc32 crc32;
    size_t joined = 0;
    for (size_t at = 8;;) {
        if (size - at < 12) throw UnreadablePng("the file ends before its IEND chunk");
        const uint8_t* chunk = content + at;
        const size_t length = big_endian(chunk);
        if (length > size - at - 12) throw UnreadablePng("the file ends inside a chunk");
        const bool pixels = is_kind(chunk, "IDAT");
        if ((pixels || is_kind(chunk, "IHDR")) && crc32(chunk + 4, length + 4) != big_endian(chunk + 8 + length))
            throw UnreadablePng("the checksum of a chunk does not match");
        if (pixels) {
            std::memcpy(stream + joined, chunk + 8, length);
            joined += length;
        }
        if (is_kind(chunk, "IEND")) return joined;
        at += 12 + length;
    }
}

// Joins the IDAT chunks in the thread's own buffer; their size.
size_t join_stream(const uint8_t* content, size_t size) {
    uint8_t* stream = scratch().stream.at_least(size + Inflater::kInputSlack);
    const size_t joined = image_data(content, size, stream);
    std::memset(stream + joined, 0, Inflater::kInputSlack);
    return joined;
}

[[noreturn]] void throw_damaged() {
    throw UnreadablePng("the pixel data is damaged, or not of the size that the header says");
}

// Each row's filter byte and what is left of its pixels, with the margins that undoing the filters needs; the buffer is the
// thread's own.
const uint8_t* inflated_rows(const uint8_t* content, size_t size, const PngHeader& header) {
    Scratch& mine = scratch();
    const size_t joined = join_stream(content, size);
    const size_t rows_size = header.height * (1 + header.channels * header.width);
    uint8_t* rows = kUnfilterMargin + mine.rows.at_least(kUnfilterMargin + rows_size + Inflater::kOutputSlack);
    if (!mine.inflater.run(mine.stream.at_least(0), joined, rows, rows_size)) throw_damaged();
    return rows;
}

// The same rows one after the other, in a buffer that holds few of them at a time.
class InflatedRows {
   public:
    InflatedRows(const uint8_t* content, size_t size, const PngHeader& header, size_t piece)
        : row_(1 + header.channels * header.width), left_(header.height * row_) {
        const size_t joined = join_stream(content, size);
        const size_t room = std::min(left_, Inflater::kWindow + 2 * row_ + piece);
        begin_ = kUnfilterMargin + mine_.rows.at_least(kUnfilterMargin + room + Inflater::kOutputSlack);
        end_ = begin_ + room;
        at_ = begin_;
        if (!mine_.inflater.start(mine_.stream.at_least(0), joined, begin_)) throw_damaged();
    }

    // Valid until it is called again.
    const uint8_t* next() {
        if (static_cast<size_t>(mine_.inflater.output() - at_) < row_) fill();
        at_ += row_;
        left_ -= row_;
        return at_ - row_;
    }

    // To be called after the last row: nothing may follow it.
    void finish() {
        if (!ended_) inflate(at_);
    }

   private:
    void fill() {
        uint8_t* const out = mine_.inflater.output();
        uint8_t* const kept = std::min(at_, std::max(begin_, out - std::min<ptrdiff_t>(Inflater::kWindow, out - begin_)));
        std::memmove(begin_, kept, static_cast<size_t>(out - kept));
        at_ -= kept - begin_;
        mine_.inflater.move_to(begin_, out - (kept - begin_));
        inflate(static_cast<size_t>(end_ - at_) < left_ ? end_ : at_ + left_);
        if (static_cast<size_t>(mine_.inflater.output() - at_) < row_) throw_damaged();
    }

    void inflate(uint8_t* limit) {
        const Inflater::Status status = mine_.inflater.go_on(limit);
        ended_ = status == Inflater::Status::ended;
        const bool all = static_cast<size_t>(mine_.inflater.output() - at_) == left_;  // and not a byte more
        const bool last = static_cast<size_t>(limit - at_) == left_;
        if (status == Inflater::Status::damaged || (ended_ && !all) || (last && !ended_)) throw_damaged();
    }

    Scratch& mine_ = scratch();
    size_t row_, left_;  // bytes of a row, and of all that have not been given out
    uint8_t *begin_, *end_, *at_;
    bool ended_ = false;
};

void trim_scratch() {
    scratch().rows.trim();
    scratch().stream.trim();
    scratch().pixels.trim();
}

}  // namespace

PngHeader read_png_header(const uint8_t* content, size_t size, size_t max_pixels) {
    static const uint8_t signature[16] = {0x89, 'P', 'N', 'G', 13, 10, 26, 10, 0, 0, 0, 13, 'I', 'H', 'D', 'R'};
    static const uint8_t grey[5] = {8, 0, 0, 0, 0}, rgb[5] = {8, 2, 0, 0, 0};  // depth, colours, ..., interlacing
    if (size < 29 || std::memcmp(content, signature, 16) != 0) throw UnreadablePng("not a PNG");
    const bool is_grey = std::memcmp(content + 24, grey, 5) == 0;
    if (!is_grey && std::memcmp(content + 24, rgb, 5) != 0) throw UnreadablePng("not an 8-bit RGB or grey PNG");
    const size_t width = big_endian(content + 16), height = big_endian(content + 20);
    if (width == 0 || height == 0 || height > max_pixels / width) throw UnreadablePng("the size is out of bounds");
    return {height, width, is_grey ? size_t{1} : size_t{3}};
}

PngHeader read_map_header(const uint8_t* content, size_t size, size_t max_pixels) {
    const PngHeader header = read_png_header(content, size, max_pixels);
    if (header.channels != 3) throw UnreadablePng("not an 8-bit RGB PNG");
    if (std::max(header.height, header.width) > kLongestSide) throw UnreadablePng("the size is out of bounds");
    return header;
}

RunMap read_png(const uint8_t* content, size_t size, size_t max_pixels, size_t piece) {
    const PngHeader header = read_map_header(content, size, max_pixels);
    InflatedRows rows(content, size, header, piece);
    RowFilters filters(header.width);
    const Run zeros[2] = {{0, 0}, {static_cast<int32_t>(header.width), kEndOfRow}};
    RunMap map(header.height, header.width);
    for (size_t y = 0; y < header.height; ++y) {
        Run* end = map.start_row();
        if (!filters.undo(rows.next(), y > 0 ? map.row(y - 1) : zeros, end)) throw UnreadablePng("unknown filter");
        map.end_row(end);
        if (map.runs() > kMostRuns + size)
            throw TooManyRuns("the id changes at over " + std::to_string(kMostRuns) + " places, which is noise and no map");
    }
    rows.finish();
    trim_scratch();
    return map;
}

void read_png_ids(const uint8_t* content, size_t size, const PngHeader& header, int32_t* ids, size_t piece) {
    InflatedRows rows(content, size, header, piece);
    RowFilters filters(header.width);
    const auto width = static_cast<int32_t>(header.width);
    std::vector<Run> above{{0, kEndOfRow}, {0, 0}, {width, kEndOfRow}}, row(header.width + 3, Run{0, kEndOfRow});
    above.resize(header.width + 3);
    for (size_t y = 0; y < header.height; ++y, ids += header.width) {
        Run* end = row.data() + 1;
        if (!filters.undo(rows.next(), above.data() + 1, end)) throw UnreadablePng("unknown filter");
        *end = {width, kEndOfRow};
        paint_row(row.data() + 1, header.width, ids);
        std::swap(above, row);
    }
    rows.finish();
    trim_scratch();
}

void read_png_picture(const uint8_t* content, size_t size, const PngHeader& header, uint8_t* rgb) {
    const size_t count = header.height * header.width;
    const uint8_t* rows = inflated_rows(content, size, header);
    uint8_t* pixels = header.channels == 3 ? rgb : scratch().pixels.at_least(count);
    if (!unfilter_pixels(rows, header.height, header.width, header.channels, pixels)) throw UnreadablePng("unknown filter");
    for (size_t k = 0; header.channels == 1 && k < count; ++k) std::memset(rgb + 3 * k, pixels[k], 3);
    trim_scratch();
}

RunMap read_png_file(const std::string& path, size_t max_pixels) {
    if (path.find('\0') != std::string::npos) throw UnreadablePng("no file has such a name");
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe must not keep it waiting
    if (file < 0) throw UnreadablePng("cannot be opened");
    struct stat status;
    const bool regular = fstat(file, &status) == 0 && S_ISREG(status.st_mode);
    const auto size = regular ? static_cast<size_t>(status.st_size) : 0;
    size_t done = 0;
    uint8_t* content = nullptr;
    if (regular && size <= kLargestFile) {
        content = scratch().file.at_least(size + 1);
        for (ssize_t got = 1; done < size && got > 0; done += static_cast<size_t>(got > 0 ? got : 0))
            got = read(file, content + done, size - done);
    }
    close(file);
    if (content == nullptr || done < size) throw UnreadablePng("cannot be read");
    RunMap map = read_png(content, size, max_pixels);
    scratch().file.trim();
    return map;
}

void filter_ids(const int32_t* ids, size_t height, size_t width, uint8_t* rows) {
    const uint32_t* pixels = reinterpret_cast<const uint32_t*>(ids);
    for (size_t y = 0; y < height; ++y, pixels += width) {
        *rows++ = y == 0 ? 1 : 2;
        for (size_t x = 0; x < width; ++x, rows += 3) {
            const uint32_t before = y > 0 ? pixels[x - width] : x > 0 ? pixels[x - 1] : 0;
            const uint32_t delta = sub_bytes(pixels[x], before);
            rows[0] = delta & 255;
            rows[1] = delta >> 8 & 255;
            rows[2] = delta >> 16 & 255;
        }
    }
}

}  // namespace ldmseg
