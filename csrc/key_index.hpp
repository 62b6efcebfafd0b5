// Numbers keys in the order in which they are first met.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace ldmseg {

// Open addressing over a list: a map has tens to hundreds of different keys, asked for tens of thousands of times.
class KeyIndex {
   public:
    KeyIndex() : slots_(1024, kEmpty) {}

    size_t operator[](uint64_t key) {
        if (key == last_key_ && !keys_.empty()) return last_;
        size_t slot = find(key);
        if (slots_[slot] == kEmpty) {
            if (2 * keys_.size() >= slots_.size()) {
                grow();
                slot = find(key);
            }
            slots_[slot] = static_cast<uint32_t>(keys_.size());
            keys_.push_back(key);
        }
        last_key_ = key;
        return last_ = slots_[slot];
    }

    const std::vector<uint64_t>& keys() const { return keys_; }

   private:
    static constexpr uint32_t kEmpty = ~uint32_t{0};

    size_t find(uint64_t key) const {
        size_t slot = (key * 0x9e3779b97f4a7c15u >> 20) & (slots_.size() - 1);
        while (slots_[slot] != kEmpty && keys_[slots_[slot]] != key) slot = (slot + 1) & (slots_.size() - 1);
        return slot;
    }

    void grow() {
        slots_.assign(2 * slots_.size(), kEmpty);
        for (size_t index = 0; index < keys_.size(); ++index) slots_[find(keys_[index])] = static_cast<uint32_t>(index);
    }

    std::vector<uint64_t> keys_;
    std::vector<uint32_t> slots_;
    uint64_t last_key_ = 0;
    size_t last_ = 0;
};

}  // namespace ldmseg
