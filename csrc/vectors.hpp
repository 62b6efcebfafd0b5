// Vectors of N floats in the compilers' own extension: each instruction set gets its natural N.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu.hpp"

// Vectors are passed by value between always-inlined functions only, so their calling convention does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace ldmseg {

template <int N>
struct VectorTypes;  // spelled out: gcc drops a vector_size that depends on a template argument

template <>
struct VectorTypes<4> {
    typedef float Floats __attribute__((vector_size(16)));
    typedef int32_t Ints __attribute__((vector_size(16)));
};

template <>
struct VectorTypes<8> {
    typedef float Floats __attribute__((vector_size(32)));
    typedef int32_t Ints __attribute__((vector_size(32)));
};

template <>
struct VectorTypes<16> {
    typedef float Floats __attribute__((vector_size(64)));
    typedef int32_t Ints __attribute__((vector_size(64)));
};

template <int N>
struct Vectors {
    using Floats = typename VectorTypes<N>::Floats;
    using Ints = typename VectorTypes<N>::Ints;

    template <typename Vector>
    static ALWAYS_INLINE Vector load(const void* from) {
        Vector vector;
        std::memcpy(&vector, from, sizeof(vector));
        return vector;
    }

    template <typename Vector>
    static ALWAYS_INLINE void store(void* to, const Vector& vector) {
        std::memcpy(to, &vector, sizeof(vector));
    }

    static ALWAYS_INLINE float largest(const Floats& v) {
        return reduce<N / 2>(v, [](const Floats& a, const Floats& b) __attribute__((always_inline)) { return a > b ? a : b; });
    }

    static ALWAYS_INLINE float total(const Floats& v) {
        return reduce<N / 2>(v, [](const Floats& a, const Floats& b) __attribute__((always_inline)) { return a + b; });
    }

    // e^x for x <= 0 within 2 units in the last place (Cephes' polynomial); below -87 it stays at e^-87.
    static ALWAYS_INLINE Floats exponential(const Floats& given) {
        const Floats lowest = Floats{} - 87.0f;
        const Floats x = given > lowest ? given : lowest;
        const Floats n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: rounds to an integer
        const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;               // ln 2 in two parts
        Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
        p = p * r + 8.3334519073e-3f;
        p = p * r + 4.1665795894e-2f;
        p = p * r + 1.6666665459e-1f;
        p = p * r + 5.0000001201e-1f;
        p = p * r * r + r + 1.0f;
        const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
        return p * load<Floats>(&power);
    }

   private:
    template <int Half, int... Lane>
    static ALWAYS_INLINE Floats swap(const Floats& v, std::integer_sequence<int, Lane...>) {
#if defined(__clang__)
        return __builtin_shufflevector(v, v, (Lane ^ Half)...);
#else
        return __builtin_shuffle(v, Ints{(Lane ^ Half)...});
#endif
    }

    // Folds halves onto each other until one lane holds all.
    template <int Half, typename Fold>
    static ALWAYS_INLINE float reduce(const Floats& v, const Fold& fold) {
        const Floats folded = fold(v, swap<Half>(v, std::make_integer_sequence<int, N>()));
        if constexpr (Half > 1)
            return reduce<Half / 2>(folded, fold);
        else
            return folded[0];
    }
};

}  // namespace ldmseg
