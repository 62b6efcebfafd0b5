// Inflates zlib streams (RFC 1950 and 1951), whole or piece by piece.
//
// Why not a library: zlib is many times slower on label maps, and no package on PyPI brings libdeflate's headers to link
// against (the `deflate` wheel, which writes our maps, does not). A copy of libdeflate would be more lines than this file
// and hardly faster. Most of a map's speed comes from elsewhere: its pixels are never made, only its runs (unfilter.hpp).
// `python benchmarks/bench_evaluation.py` times files beside libdeflate, which inflates the same PNGs and does no more.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>

namespace ldmseg {

class Inflater {
   public:
    static constexpr size_t kInputSlack = 16, kOutputSlack = 320;  // bytes beyond the ends that may be read and written
    static constexpr size_t kWindow = 32768;  // bytes before the output that are looked back at

    // False unless `input` begins with a zlib stream of exactly `output_size` bytes. Its Adler checksum is not looked at:
    // the PNG chunks that the stream comes from have a CRC each, and it covers the same bytes.
    bool run(const uint8_t* input, size_t input_size, uint8_t* output, size_t output_size);

    // The same in pieces. `start` is false where there is no zlib stream; `go_on` writes until it is past `limit` (by at
    // most kOutputSlack bytes) or the stream ends. Between two calls, what was written may be moved, the last kWindow bytes
    // at least, if `move_to` is told where it begins now, and where it ends.
    enum class Status { more, ended, damaged };
    bool start(const uint8_t* input, size_t input_size, uint8_t* output);
    Status go_on(uint8_t* limit);
    uint8_t* output() const { return out_; }  // where the next byte goes
    void move_to(uint8_t* begin, uint8_t* out) {
        begin_ = begin;
        out_ = out;
    }

   private:
    static constexpr int kLiteralBits = 11, kDistanceBits = 8;  // of the first table; longer codes go on in a second

    struct Entry {
        uint16_t value;     // a literal, the base of a length or distance, or where a second table begins
        uint8_t kind;       // number of extra bits, or one of the kinds of inflate.cpp
        uint8_t code_bits;  // to be consumed; of a link to a second table: how many bits choose in it
    };

    struct Bits {  // read ahead of what has been consumed
        const uint8_t *next, *end;
        uint64_t word;
        int count;

        inline void refill();  // to at least 56
        inline uint32_t take(int bits);
        inline Entry decode(const Entry* table, int table_bits);  // consumes the code, not the extra bits
        inline bool ended() const { return next > end + 8; }
    };

    template <size_t Size>
    static bool build(const uint8_t* lengths, size_t count, const Entry* symbols, int bits, std::array<Entry, Size>& table);

    bool set_codes(const uint8_t* lengths, size_t literals, size_t distances);
    bool set_fixed_codes();
    bool read_codes();
    bool begin_block();
    bool begin_stored_block();
    Status stored_block();
    Status coded_block();

    // Each symbol could need a second table of its own.
    std::array<Entry, (1 << kLiteralBits) + 288 * (1 << (15 - kLiteralBits))> literals_;
    std::array<Entry, (1 << kDistanceBits) + 32 * (1 << (15 - kDistanceBits))> distances_;
    Bits bits_;
    uint8_t *begin_, *out_, *limit_;
    enum class Block { none, stored, coded } block_;  // the one in progress
    bool last_;                                       // whether it is the last one
    size_t stored_left_;
};

}  // namespace ldmseg
