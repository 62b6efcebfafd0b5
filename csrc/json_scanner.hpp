// Reads JSON strictly from a part of a file, one value at a time, in constant memory.
//
// Why not a library: those as fast as this one hold the contents of the file, and their Python values need the GIL. This
// reader checks the file on the way and keeps what AnnotationIndex asks for. `python benchmarks/bench_evaluation.py`
// measures what the index holds beside the size of the JSON ("growth, of it the index").
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

namespace ldmseg {

// Not what this reader knows: broken, or rare (escapes in names, numbers beyond 18 digits, other encodings, NaN, deep
// nesting). Python's reader then decides.
struct UnusualJson : std::runtime_error {
    UnusualJson() : std::runtime_error("unusual JSON") {}
};

inline void require(bool condition) {
    if (!condition) throw UnusualJson();
}

// A key is there for the first time; Python keeps the last of several.
inline void once(bool& seen) {
    require(!seen);
    seen = true;
}

// A regular file, open as long as this lives. Throws UnusualJson for anything else.
class JsonFile {
   public:
    explicit JsonFile(const std::string& path);
    ~JsonFile();
    JsonFile(const JsonFile&) = delete;
    JsonFile& operator=(const JsonFile&) = delete;

    int descriptor() const { return file_; }
    uint64_t size() const { return size_; }
    std::string part(uint64_t begin, uint64_t end) const;  // at most a megabyte

   private:
    int file_;
    uint64_t size_ = 0;
};

class JsonScanner {
   public:
    JsonScanner(int file, uint64_t begin, uint64_t end);

    // The next character after white space, which is not consumed; 0 at the end.
    char peek();
    bool accept(char wanted);  // consumes it if it is the next one
    void expect(char wanted);
    uint64_t offset();  // of the next character in the file, after white space

    int64_t integer();
    std::string text();  // without escapes; ASCII only
    std::string long_text();    // of any length, in which a backslash may be escaped: the counts of a mask
    double number();
    std::string raw_scalar();  // an integer or a text as it is written, quotes included
    void skip_value(int depth = 0);

    // function(key) for each entry of an object, and function() for each of a list; they must consume the value.
    template <typename Function>
    void each_entry(const Function& function) {
        expect('{');
        if (accept('}')) return;
        do {
            if (peek() != '"') throw UnusualJson();
            const std::string key = text();
            expect(':');
            function(key);
        } while (accept(','));
        expect('}');
    }

    template <typename Function>
    void each_item(const Function& function) {
        expect('[');
        if (accept(']')) return;
        do function();
        while (accept(','));
        expect(']');
    }

   private:
    int look() { return at_ < filled_ || fill() ? static_cast<unsigned char>(buffer_[at_]) : -1; }
    int next() {
        const int character = look();
        at_ += character >= 0;
        return character;
    }
    bool fill();
    size_t plain_part();  // characters from here that a text may hold as they are
    void skip_string();
    void skip_number();
    void skip_digits();

    int file_;
    uint64_t position_, end_;  // in the file, of what comes after the buffer
    std::unique_ptr<char[]> buffer_;
    size_t size_, at_ = 0, filled_ = 0;
};

}  // namespace ldmseg
