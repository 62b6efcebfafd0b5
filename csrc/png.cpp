#include "png.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <memory>

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

// Each row's filter byte and what is left of its pixels, with the margins that undoing the filters needs; the buffer is the
// thread's own.
const uint8_t* inflated_rows(const uint8_t* content, size_t size, const PngHeader& header) {
    Scratch& mine = scratch();
    uint8_t* stream = mine.stream.at_least(size + Inflater::kInputSlack);
    const size_t joined = image_data(content, size, stream);
    std::memset(stream + joined, 0, Inflater::kInputSlack);
    const size_t rows_size = header.height * (1 + header.channels * header.width);
    uint8_t* rows = kUnfilterMargin + mine.rows.at_least(kUnfilterMargin + rows_size + Inflater::kOutputSlack);
    if (!mine.inflater.run(stream, joined, rows, rows_size))
        throw UnreadablePng("the pixel data is damaged, or not of the size that the header says");
    return rows;
}

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

RunMap read_png(const uint8_t* content, size_t size, size_t max_pixels) {
    const PngHeader header = read_png_header(content, size, max_pixels);
    if (header.channels != 3) throw UnreadablePng("not an 8-bit RGB PNG");
    const uint8_t* rows = inflated_rows(content, size, header);
    RunMap map(header.height, header.width);
    if (!unfilter(rows, map)) throw UnreadablePng("unknown filter");
    trim_scratch();
    return map;
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
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
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
