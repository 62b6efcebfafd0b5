#include "inflate.hpp"

#include <algorithm>
#include <cstring>

namespace ldmseg {
namespace {

// Kinds of a table's entry beyond a number of extra bits (at most 13).
constexpr uint8_t kLiteral = 32, kEndOfBlock = 33, kSecondTable = 34, kInvalid = 35;

constexpr uint16_t kLengthBase[29] = {3,  4,  5,  6,  7,  8,  9,  10, 11,  13,  15,  17,  19,  23, 27,
                                      31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
constexpr uint8_t kLengthExtra[29] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
constexpr uint8_t kOrder[19] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};

uint32_t reversed(uint32_t code, int bits) {
    uint32_t result = 0;
    for (; bits > 0; --bits, code >>= 1) result = result << 1 | (code & 1);
    return result;
}

// Repeats what lies `distance` bytes back; writes up to 31 bytes too many.
inline void copy_match(uint8_t* out, size_t distance, size_t length) {
    const uint8_t* from = out - distance;
    uint8_t* const end = out + length;
    if (distance >= 32) {
        do {
            std::memcpy(out, from, 32);
            out += 32;
            from += 32;
        } while (out < end);
        return;
    }
    uint8_t pattern[32];
    if (distance == 1) {
        std::memset(pattern, *from, 32);
        for (; out < end; out += 32) std::memcpy(out, pattern, 32);
        return;
    }
    for (size_t k = 0, first = std::min<size_t>(length, 32); k < first; ++k) out[k] = from[k];
    std::memcpy(pattern, out, 32);
    const size_t period = 32 - 32 % distance;  // whole repetitions
    for (out += period; out < end; out += period) std::memcpy(out, pattern, 32);
}

}  // namespace

// Canonical codes, packed with their first bit lowest. A code that leaves patterns unused is only allowed when it has no
// symbol at all, or one of one bit, as zlib has it.
template <size_t Size>
bool Inflater::build(const uint8_t* lengths, size_t count, const Entry* symbols, int bits, std::array<Entry, Size>& table) {
    uint16_t of_length[16] = {};
    for (size_t symbol = 0; symbol < count; ++symbol) ++of_length[lengths[symbol]];
    const size_t used = count - of_length[0];
    of_length[0] = 0;
    uint32_t next_code[16] = {};
    uint32_t code = 0;
    int longest = 0;
    for (int length = 1; length < 16; ++length) {
        code = (code + of_length[length - 1]) << 1;
        next_code[length] = code;
        if (code + of_length[length] > 1u << length) return false;
        if (of_length[length]) longest = length;
    }
    const bool complete = longest > 0 && next_code[longest] + of_length[longest] == 1u << longest;
    if (!complete && used != 0 && !(used == 1 && longest == 1)) return false;
    const size_t first_size = size_t{1} << bits;
    if (!complete) std::fill(table.begin(), table.begin() + first_size, Entry{0, kInvalid, 1});
    if (longest > bits) std::fill(table.begin(), table.begin() + first_size, Entry{0, kInvalid, 0});

    const int second_bits = std::max(longest - bits, 0);
    size_t end = first_size;
    for (size_t symbol = 0; symbol < count; ++symbol) {
        const int length = lengths[symbol];
        if (length == 0) continue;
        const uint32_t pattern = reversed(next_code[length]++, length);
        Entry entry = symbols[symbol];
        if (length <= bits) {
            entry.code_bits = static_cast<uint8_t>(length);
            for (size_t k = pattern; k < first_size; k += size_t{1} << length) table[k] = entry;
            continue;
        }
        Entry& link = table[pattern & (first_size - 1)];
        if (link.kind != kSecondTable) {
            link = {static_cast<uint16_t>(end), kSecondTable, static_cast<uint8_t>(second_bits)};
            end += size_t{1} << second_bits;
        }
        entry.code_bits = static_cast<uint8_t>(length - bits);
        for (size_t k = pattern >> bits; k < size_t{1} << second_bits; k += size_t{1} << (length - bits))
            table[link.value + k] = entry;
    }
    return true;
}

inline void Inflater::Bits::refill() {
    uint64_t ahead;
    std::memcpy(&ahead, next, 8);
    word |= ahead << count;
    next += (63 - count) >> 3;
    count |= 56;
}

inline uint32_t Inflater::Bits::take(int bits) {
    const auto value = static_cast<uint32_t>(word & ((uint64_t{1} << bits) - 1));
    word >>= bits;
    count -= bits;
    return value;
}

inline Inflater::Entry Inflater::Bits::decode(const Entry* table, int table_bits) {
    Entry entry = table[word & ((uint64_t{1} << table_bits) - 1)];
    if (entry.kind == kSecondTable) {
        take(table_bits);
        entry = table[entry.value + (word & ((uint64_t{1} << entry.code_bits) - 1))];
    }
    take(entry.code_bits);
    return entry;
}

bool Inflater::set_codes(const uint8_t* lengths, size_t literals, size_t distances) {
    Entry symbols[288];
    for (uint16_t k = 0; k < 256; ++k) symbols[k] = {k, kLiteral, 0};
    symbols[256] = {0, kEndOfBlock, 0};
    for (size_t k = 0; k < 29; ++k) symbols[257 + k] = {kLengthBase[k], kLengthExtra[k], 0};
    symbols[286] = symbols[287] = {0, kInvalid, 0};
    if (!build(lengths, literals, symbols, kLiteralBits, literals_)) return false;
    for (size_t k = 0; k < 30; ++k) {
        const size_t extra = k < 4 ? 0 : k / 2 - 1;
        const size_t base = k < 4 ? k + 1 : ((2 + k % 2) << extra) + 1;
        symbols[k] = {static_cast<uint16_t>(base), static_cast<uint8_t>(extra), 0};
    }
    symbols[30] = symbols[31] = {0, kInvalid, 0};
    return build(lengths + literals, distances, symbols, kDistanceBits, distances_);
}

// RFC 1951, 3.2.6
bool Inflater::set_fixed_codes() {
    uint8_t lengths[288 + 32];
    std::fill(lengths, lengths + 144, 8);
    std::fill(lengths + 144, lengths + 256, 9);
    std::fill(lengths + 256, lengths + 280, 7);
    std::fill(lengths + 280, lengths + 288, 8);
    std::fill(lengths + 288, lengths + 320, 5);
    return set_codes(lengths, 288, 32);
}

// The two codes that a block begins with.
bool Inflater::read_codes() {
    bits_.refill();
    const size_t literals = 257 + bits_.take(5), distances = 1 + bits_.take(5), count = 4 + bits_.take(4);
    if (literals > 286 || distances > 30) return false;
    uint8_t lengths[19] = {};
    for (size_t k = 0; k < count; ++k) {
        if (k % 16 == 0) bits_.refill();
        lengths[kOrder[k]] = static_cast<uint8_t>(bits_.take(3));
    }
    Entry symbols[19];
    for (uint16_t k = 0; k < 19; ++k) symbols[k] = {k, kLiteral, 0};
    std::array<Entry, 128> table;
    if (!build(lengths, 19, symbols, 7, table)) return false;

    uint8_t all[286 + 30 + 138];
    for (size_t k = 0; k < literals + distances;) {
        bits_.refill();
        if (bits_.ended()) return false;
        const Entry entry = bits_.decode(table.data(), 7);
        if (entry.kind != kLiteral) return false;
        if (entry.value < 16) {
            all[k++] = static_cast<uint8_t>(entry.value);
            continue;
        }
        if (entry.value == 16 && k == 0) return false;
        const uint8_t repeated = entry.value == 16 ? all[k - 1] : 0;
        const size_t times = entry.value == 16 ? 3 + bits_.take(2) : entry.value == 17 ? 3 + bits_.take(3) : 11 + bits_.take(7);
        std::memset(all + k, repeated, times);
        k += times;
        if (k > literals + distances) return false;
    }
    return set_codes(all, literals, distances);
}

// From the next whole byte on.
bool Inflater::begin_stored_block() {
    const uint8_t* in = bits_.next - (bits_.count >> 3);
    if (in > bits_.end || bits_.end - in < 4) return false;
    const size_t length = in[0] | in[1] << 8, inverse = in[2] | in[3] << 8;
    in += 4;
    if ((length ^ inverse) != 0xffff || length > static_cast<size_t>(bits_.end - in)) return false;
    bits_ = {in, bits_.end, 0, 0};
    stored_left_ = length;
    return true;
}

Inflater::Status Inflater::stored_block() {
    const size_t size = std::min(stored_left_, static_cast<size_t>(std::max<ptrdiff_t>(limit_ - out_, 0)));
    std::memcpy(out_, bits_.next, size);
    bits_.next += size;
    out_ += size;
    stored_left_ -= size;
    return stored_left_ > 0 ? Status::more : Status::ended;
}

Inflater::Status Inflater::coded_block() {
    Bits bits = bits_;  // locals stay in registers
    uint8_t* out = out_;
    while (out <= limit_) {
        if (bits.ended()) return Status::damaged;
        bits.refill();
        Entry entry = bits.decode(literals_.data(), kLiteralBits);
        for (int k = 0; k < 2 && entry.kind == kLiteral; ++k) {  // three codes have at most 45 bits
            *out++ = static_cast<uint8_t>(entry.value);
            entry = bits.decode(literals_.data(), kLiteralBits);
        }
        if (entry.kind == kLiteral) {
            *out++ = static_cast<uint8_t>(entry.value);
            continue;
        }
        if (entry.kind >= kEndOfBlock) {
            bits_ = bits;
            out_ = out;
            return entry.kind == kEndOfBlock ? Status::ended : Status::damaged;
        }
        bits.refill();
        const size_t length = entry.value + bits.take(entry.kind);
        entry = bits.decode(distances_.data(), kDistanceBits);
        if (entry.kind >= kLiteral) return Status::damaged;
        const size_t distance = entry.value + bits.take(entry.kind);
        if (distance > static_cast<size_t>(out - begin_)) return Status::damaged;
        copy_match(out, distance, length);
        out += length;
    }
    bits_ = bits;
    out_ = out;
    return Status::more;
}

bool Inflater::begin_block() {
    bits_.refill();
    if (bits_.ended()) return false;
    last_ = bits_.take(1) != 0;
    const uint32_t kind = bits_.take(2);
    block_ = kind == 0 ? Block::stored : Block::coded;
    return kind == 0   ? begin_stored_block()
           : kind == 1 ? set_fixed_codes()
           : kind == 2 ? read_codes()
                       : false;
}

bool Inflater::start(const uint8_t* input, size_t input_size, uint8_t* output) {
    if (input_size < 2 || (input[0] & 15) != 8 || input[0] >> 4 > 7 || (input[0] << 8 | input[1]) % 31 != 0 || input[1] & 32)
        return false;
    bits_ = {input + 2, input + input_size, 0, 0};
    begin_ = out_ = output;
    block_ = Block::none;
    last_ = false;
    return true;
}

Inflater::Status Inflater::go_on(uint8_t* limit) {
    limit_ = limit;
    for (;;) {
        if (block_ == Block::none) {
            if (last_) return bits_.next - (bits_.count >> 3) <= bits_.end ? Status::ended : Status::damaged;
            if (!begin_block()) return Status::damaged;
        }
        const Status status = block_ == Block::stored ? stored_block() : coded_block();
        if (status != Status::ended) return status;
        block_ = Block::none;
    }
}

bool Inflater::run(const uint8_t* input, size_t input_size, uint8_t* output, size_t output_size) {
    return start(input, input_size, output) && go_on(output + output_size) == Status::ended && out_ == output + output_size;
}

}  // namespace ldmseg
