#include "json_scanner.hpp"

#include <fcntl.h>
#include <locale.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace ldmseg {
namespace {

constexpr uint64_t kBufferSize = 1 << 16;
constexpr uint64_t kLongestPart = 1 << 20;
constexpr int kDeepest = 32;
constexpr size_t kLongestText = 4096;

locale_t c_locale() {  // numbers have points, whatever the process' language
    static const locale_t locale = newlocale(LC_ALL_MASK, "C", nullptr);
    return locale;
}

bool is_digit(int character) { return character >= '0' && character <= '9'; }

}  // namespace

JsonFile::JsonFile(const std::string& path) {
    require(path.find('\0') == std::string::npos);
    file_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe must not keep it waiting
    require(file_ >= 0);
    struct stat status;
    if (fstat(file_, &status) != 0 || !S_ISREG(status.st_mode)) {
        close(file_);
        throw UnusualJson();
    }
    size_ = static_cast<uint64_t>(status.st_size);
}

JsonFile::~JsonFile() { close(file_); }

std::string JsonFile::part(uint64_t begin, uint64_t end) const {
    require(end - begin <= kLongestPart);
    std::string text(end - begin, '\0');
    require(pread(file_, text.data(), text.size(), static_cast<off_t>(begin)) == static_cast<ssize_t>(text.size()));
    return text;
}

JsonScanner::JsonScanner(int file, uint64_t begin, uint64_t end)
    : file_(file), position_(begin), end_(end), size_(std::min(kBufferSize, end - begin)) {
    buffer_.reset(new char[size_]);
}

bool JsonScanner::fill() {
    const uint64_t wanted = std::min<uint64_t>(size_, end_ - position_);
    if (wanted == 0) return false;
    const ssize_t got = pread(file_, buffer_.get(), wanted, static_cast<off_t>(position_));
    if (got <= 0) throw UnusualJson();
    position_ += static_cast<uint64_t>(got);
    at_ = 0;
    filled_ = static_cast<size_t>(got);
    return true;
}

char JsonScanner::peek() {
    for (;;) {
        const int character = look();
        if (character < 0) return 0;
        if (character != ' ' && character != '\n' && character != '\t' && character != '\r') {
            if (character == 0) throw UnusualJson();
            return static_cast<char>(character);
        }
        ++at_;
    }
}

bool JsonScanner::accept(char wanted) {
    if (peek() != wanted) return false;
    ++at_;
    return true;
}

void JsonScanner::expect(char wanted) {
    if (!accept(wanted)) throw UnusualJson();
}

uint64_t JsonScanner::offset() {
    peek();
    return position_ - (filled_ - at_);
}

int64_t JsonScanner::integer() {
    const bool negative = accept('-');
    int64_t value = 0;
    int digits = 0;
    for (; is_digit(look()); ++digits) {
        if (digits > 17 || (digits > 0 && value == 0)) throw UnusualJson();  // too long, or a leading zero
        value = 10 * value + (next() - '0');
    }
    const int after = look();
    if (digits == 0 || (negative && value == 0) || after == '.' || after == 'e' || after == 'E') throw UnusualJson();
    return negative ? -value : value;
}

std::string JsonScanner::text() {
    expect('"');
    std::string result;
    for (;;) {
        const int character = next();
        if (character == '"') return result;
        if (character < 0x20 || character >= 0x80 || character == '\\' || result.size() >= kLongestText) throw UnusualJson();
        result.push_back(static_cast<char>(character));
    }
}

// Stops at a quote, at the end of the buffer, and at the beginning of what has anything unusual in it.
size_t JsonScanner::plain_part() {
    const char* begin = buffer_.get() + at_;
    const auto* quote = static_cast<const char*>(std::memchr(begin, '"', filled_ - at_));
    const size_t size = quote ? static_cast<size_t>(quote - begin) : filled_ - at_;
    size_t plain = 0;
    for (constexpr size_t step = 64; plain < size;) {  // without a branch inside, for the compiler to widen
        const size_t end = std::min(size, plain + step);
        uint8_t unusual = 0;  // no wider than a character, or the compiler widens those
        for (size_t k = plain; k < end; ++k) {
            const auto c = static_cast<signed char>(begin[k]);  // below 0: not ASCII
            unusual |= static_cast<uint8_t>((c < 0x20) | (c == '\\'));
        }
        if (unusual) {
            const auto is_plain = [](unsigned char c) { return c >= 0x20 && c < 0x80 && c != '\\'; };
            while (is_plain(static_cast<unsigned char>(begin[plain]))) ++plain;
            break;
        }
        plain = end;
    }
    return plain;
}

std::string JsonScanner::long_text() {
    expect('"');
    std::string result;
    for (;;) {
        if (const size_t plain = plain_part()) {
            result.append(buffer_.get() + at_, plain);
            at_ += plain;
        }
        const int character = next();
        if (character == '"') return result;
        if (character < 0x20 || character >= 0x80 || (character == '\\' && next() != '\\')) throw UnusualJson();
        result.push_back(static_cast<char>(character));
    }
}

double JsonScanner::number() {
    std::string text;
    peek();
    for (int c = look(); is_digit(c) || c == '-' || c == '+' || c == '.' || c == 'e' || c == 'E'; c = look()) {
        text.push_back(static_cast<char>(next()));
        if (text.size() > 40) throw UnusualJson();
    }
    const size_t first = text.size() > 1 && text[0] == '-';  // JSON's numbers: no leading zero, digits on both sides
    const bool plain = text.size() > first && is_digit(text[first]) &&
                       !(text[first] == '0' && text.size() > first + 1 && is_digit(text[first + 1]));
    const size_t point = text.find('.');
    if (!plain || !is_digit(text.back()) || (point != std::string::npos && !is_digit(text[point + 1]))) throw UnusualJson();
    char* end = nullptr;
    const double value = strtod_l(text.c_str(), &end, c_locale());
    if (end != text.c_str() + text.size() || !std::isfinite(value)) throw UnusualJson();
    return value;
}

std::string JsonScanner::raw_scalar() { return peek() == '"' ? '"' + text() + '"' : std::to_string(integer()); }

void JsonScanner::skip_string() {
    expect('"');
    for (;;) {
        at_ += plain_part();
        const int character = next();
        if (character == '"') return;
        if (character < 0x20 || character >= 0x80) throw UnusualJson();
        if (character != '\\') continue;
        const int escaped = next();
        if (escaped == 'u') {
            for (int k = 0; k < 4; ++k) {
                const int digit = next();
                if (!is_digit(digit) && !((digit | 32) >= 'a' && (digit | 32) <= 'f')) throw UnusualJson();
            }
        } else if (escaped < 0 || std::string("\"\\/bfnrt").find(static_cast<char>(escaped)) == std::string::npos) {
            throw UnusualJson();
        }
    }
}

void JsonScanner::skip_digits() {
    if (!is_digit(look())) throw UnusualJson();
    for (size_t digits = 0; is_digit(look()); ++at_)
        if (++digits > 300) throw UnusualJson();
}

void JsonScanner::skip_number() {
    accept('-');
    if (look() == '0')
        ++at_;
    else
        skip_digits();
    if (look() == '.') {
        ++at_;
        skip_digits();
    }
    if (look() == 'e' || look() == 'E') {
        ++at_;
        if (look() == '+' || look() == '-') ++at_;
        skip_digits();
    }
}

void JsonScanner::skip_value(int depth) {
    if (depth > kDeepest) throw UnusualJson();
    const char first = peek();
    if (first == '"') {
        skip_string();
    } else if (first == '[') {
        each_item([&] { skip_value(depth + 1); });
    } else if (first == '{') {
        expect('{');
        if (accept('}')) return;
        do {
            skip_string();
            expect(':');
            skip_value(depth + 1);
        } while (accept(','));
        expect('}');
    } else if (first == 't' || first == 'f' || first == 'n') {
        for (const char* word = first == 't' ? "true" : first == 'f' ? "false" : "null"; *word; ++word)
            if (next() != *word) throw UnusualJson();
    } else {
        skip_number();
    }
}

}  // namespace ldmseg
