// A loop over a few threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace ldmseg {

// 0: OMP_NUM_THREADS where it is set, otherwise one per core this process may use, at most 16.
inline size_t thread_count(size_t asked) {
    constexpr size_t most = 256;
    if (asked > 0) return std::min(asked, most);
    const char* text = std::getenv("OMP_NUM_THREADS");
    const long wanted = text ? std::strtol(text, nullptr, 10) : 0;
    if (wanted > 0) return std::min(static_cast<size_t>(wanted), most);
    return std::clamp<size_t>(std::thread::hardware_concurrency(), 1, 16);
}

// Calls function(k) for k < count, each once. Where threads cannot be started, those that run do the work, at least this
// one. The first exception is thrown here after all threads have ended.
template <typename Function>
void parallel_for(size_t count, size_t threads, const Function& function) {
    std::atomic<size_t> next{0};
    std::exception_ptr error;
    std::mutex mutex;
    const auto work = [&] {
        try {
            for (size_t k; (k = next++) < count;) function(k);
        } catch (...) {
            const std::lock_guard<std::mutex> lock(mutex);
            if (!error) error = std::current_exception();
            next = count;
        }
    };
    std::vector<std::thread> others;
    others.reserve(std::min(threads, count));  // nothing may be thrown between a start and its join
    try {
        while (others.size() + 1 < std::min(threads, count)) others.emplace_back(work);
    } catch (const std::system_error&) {
    } catch (const std::bad_alloc&) {
    }
    work();
    for (std::thread& other : others) other.join();
    if (error) std::rethrow_exception(error);
}

}  // namespace ldmseg
