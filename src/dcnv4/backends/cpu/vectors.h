// Channels in registers: vectors of the machine's width, their loads and stores, and conversions of
// half precision. Sums are made in A: double for double, float for everything else.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__) && defined(__F16C__)
#define DCNV4_X86 1
#include <immintrin.h>
#if defined(__AVX512BW__) && defined(__AVX512VL__)
#define DCNV4_AVX512 1
#endif
#endif

namespace dcnv4 {
namespace {

struct half {
    uint16_t bits;
};
struct bfloat {
    uint16_t bits;
};

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <typename T, int N>
struct VectorOf {
    typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <typename T, int N>
using Vector = typename VectorOf<T, N>::type;

constexpr Vector<int, 16> kLanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

template <typename T, typename From>
T bits_of(const From& from) {
    static_assert(sizeof(T) == sizeof(From), "same size");
    T to;
    std::memcpy(&to, &from, sizeof(T));
    return to;
}

float to_float(uint16_t bits) {
    // Exponent and mantissa moved into place are short of a factor 2^112, which also mends the
    // subnormals; what had the largest exponent is infinite or NaN.
    const uint32_t magnitude = uint32_t(bits & 0x7fff) << 13;
    const float scaled = bits_of<float>(magnitude) * bits_of<float>(0x77800000u);
    const uint32_t special = magnitude | 0x7f800000u;
    const uint32_t result = (bits & 0x7c00) == 0x7c00 ? special : bits_of<uint32_t>(scaled);
    return bits_of<float>(result | uint32_t(bits & 0x8000) << 16);
}

uint16_t from_float(float x, bfloat) {
    const uint32_t bits = bits_of<uint32_t>(x);
    return x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint16_t from_float(float x, half) {
    const uint32_t bits = bits_of<uint32_t>(x), magnitude = bits & 0x7fffffff;
    const uint32_t sign = bits >> 16 & 0x8000;
    // Below 2^-14 the sum with 1/2 rounds to the subnormals' step.
    const uint32_t small = bits_of<uint32_t>(bits_of<float>(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13;
    const uint32_t large = magnitude > 0x7f800000u ? 0x7e00 : 0x7c00;
    return uint16_t(sign | (magnitude >= 0x477ff000u ? large
                            : magnitude < 0x38800000u ? small : normal));
}

template <typename V>
struct Accumulator {
    using type = float;
};
template <>
struct Accumulator<double> {
    using type = double;
};

// N channels from or to memory, which may be unaligned; N is at most one machine vector.
template <int N>
Vector<double, N> load(const double* from) {
    Vector<double, N> x;
    std::memcpy(&x, from, sizeof(x));
    return x;
}

template <int N>
Vector<float, N> load(const float* from) {
    Vector<float, N> x;
    std::memcpy(&x, from, sizeof(x));
    return x;
}

template <int N>
Vector<int, N> load(const int* from) {
    Vector<int, N> x;
    std::memcpy(&x, from, sizeof(x));
    return x;
}

template <int N>
Vector<float, N> load(const bfloat* from) {
#ifdef DCNV4_X86
    if constexpr (N == 4) {
        const auto bits = _mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)from));
        return (Vector<float, N>)_mm_slli_epi32(bits, 16);
    } else if constexpr (N == 8) {
        const auto bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
        return (Vector<float, N>)_mm256_slli_epi32(bits, 16);
    }
#ifdef DCNV4_AVX512
    if constexpr (N == 16) {
        // Every word to the upper half of its lane, in one shuffle.
        const auto source = kLanes * 0x10001;
        const auto words = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)from));
        return (Vector<float, N>)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, (__m512i)source, words);
    }
#endif
#endif
    Vector<uint16_t, N> x;
    std::memcpy(&x, from, sizeof(x));
    return (Vector<float, N>)(__builtin_convertvector(x, Vector<uint32_t, N>) << 16);
}

template <int N>
Vector<float, N> load(const half* from) {
#ifdef DCNV4_X86
    if constexpr (N == 4) {
        return (Vector<float, N>)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)from));
    } else if constexpr (N == 8) {
        return (Vector<float, N>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
    }
#ifdef __AVX512F__
    if constexpr (N == 16) {
        return (Vector<float, N>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
    }
#endif
#endif
    float x[N];
    for (int i = 0; i < N; ++i) x[i] = to_float(from[i].bits);
    return load<N>(x);
}

// The first `count` of N channels; the others are 0, and are not read.
template <int N, typename V>
Vector<typename Accumulator<V>::type, N> load_part(const V* from, int count) {
#ifdef DCNV4_AVX512
    const auto there = (uint32_t(1) << count) - 1;
    if constexpr (std::is_same<V, double>::value && N == 8) {
        return (Vector<double, N>)_mm512_maskz_loadu_pd(__mmask8(there), from);
    } else if constexpr (std::is_same<V, float>::value && N == 16) {
        return (Vector<float, N>)_mm512_maskz_loadu_ps(__mmask16(there), from);
    } else if constexpr (std::is_same<V, float>::value && N == 8) {
        return (Vector<float, N>)_mm256_maskz_loadu_ps(__mmask8(there), from);
    } else if constexpr (sizeof(V) == 2 && N == 16) {
        const auto words = _mm256_maskz_loadu_epi16(__mmask16(there), from);
        return load<N>(reinterpret_cast<const V*>(&words));
    } else if constexpr (sizeof(V) == 2 && N == 8) {
        const auto words = _mm_maskz_loadu_epi16(__mmask8(there), from);
        return load<N>(reinterpret_cast<const V*>(&words));
    }
#elif defined(DCNV4_X86)
    if constexpr (std::is_same<V, float>::value && N == 8) {
        const Vector<int, N> lanes = {0, 1, 2, 3, 4, 5, 6, 7};
        return (Vector<float, N>)_mm256_maskload_ps(from, (__m256i)(lanes < count));
    }
#endif
    V part[N] = {};
    for (int i = 0; i < count; ++i) part[i] = from[i];
    return load<N>(part);
}

template <int N, typename V, typename X>
void store(V* to, X x) {
    if constexpr (std::is_arithmetic<V>::value) {
        std::memcpy(to, &x, sizeof(x));
        return;
    }
#ifdef DCNV4_X86
    if constexpr (N == 8 && std::is_same<V, half>::value) {
        _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)x, 0));
        return;
    }
#ifdef __AVX512F__
    if constexpr (N == 16 && std::is_same<V, half>::value) {
        _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)x, 0));
        return;
    } else if constexpr (N == 16) {
        const auto bits = (Vector<uint32_t, N>)x, nan = (Vector<uint32_t, N>)(x != x);
        const auto rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        const auto words = (nan & 0x7fc0) | (~nan & rounded);
        _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)words));
        return;
    }
#endif
#endif
    if constexpr (!std::is_arithmetic<V>::value) {
        for (int i = 0; i < N; ++i) to[i].bits = from_float(x[i], V());
    }
}

template <int N, typename V, typename X>
void store_part(V* to, X x, int count) {
#ifdef DCNV4_AVX512
    const auto there = (uint32_t(1) << count) - 1;
    if constexpr (std::is_same<V, float>::value && N == 16)
        return _mm512_mask_storeu_ps(to, __mmask16(there), (__m512)x);
    if constexpr (std::is_same<V, float>::value && N == 8)
        return _mm256_mask_storeu_ps(to, __mmask8(there), (__m256)x);
#endif
    V all[N];
    store<N>(all, x);
    for (int i = 0; i < count; ++i) to[i] = all[i];
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define DCNV4_SHUFFLE 1
#endif
#endif

// Of a and b side by side as runs of 2H lanes: the sums of a run's halves, those of a's runs in the
// first half of a run and those of b's in the second.
template <int H, typename X, int... I>
X fold(X a, X b, std::integer_sequence<int, I...>) {
#ifdef DCNV4_SHUFFLE
    constexpr int n = sizeof...(I);
    return __builtin_shufflevector(a, b, (I / H % 2 * n + I)...) +
           __builtin_shufflevector(a, b, (I / H % 2 ? n + I - H : I + H)...);
#else
    X sum = a;
    ((sum[I] = I / H % 2 ? b[I] + b[I - H] : a[I] + a[I + H]), ...);
    return sum;
#endif
}

// Channels of four products, [4][N], as four partial sums of each, [4][4], to `out`.
template <int N, typename T>
void partial_sums(const Vector<T, N> (&x)[4], T* out, bool first) {
    const auto put = [&](int at, auto sums) {
        constexpr int n = sizeof(sums) / sizeof(T);
        store<n>(out + at, first ? sums : load<n>(out + at) + sums);
    };
    using Lanes = std::make_integer_sequence<int, N>;
    if constexpr (N == 16) {
        put(0, fold<4>(fold<8>(x[0], x[2], Lanes()), fold<8>(x[1], x[3], Lanes()), Lanes()));
    } else if constexpr (N == 8) {
        put(0, fold<4>(x[0], x[1], Lanes()));
        put(8, fold<4>(x[2], x[3], Lanes()));
    } else {
        for (int i = 0; i < 4; ++i) {
            Vector<T, 4> sums = {};
            for (int lane = 0; lane < N; ++lane) sums[lane % 4] += x[i][lane];
            put(4 * i, sums);
        }
    }
}

// The value itself, so that what was multiplied is rounded, not fused with a sum that follows.
template <typename X>
X rounded(X x) {
#ifdef DCNV4_X86
    asm("" : "+v"(x));
#else
    asm("" : "+m"(x));
#endif
    return x;
}

// Four numbers, each in all lanes of a vector: by one load and shuffles where loads are scarcer.
template <int N, bool shuffle, typename T>
__attribute__((always_inline)) inline void splat(const T* four, Vector<T, N> (&out)[4]) {
#ifdef DCNV4_AVX512
    if constexpr (N == 16 && shuffle) {
        const __m512 runs = _mm512_broadcast_f32x4(_mm_loadu_ps(four));
        out[0] = (Vector<T, N>)_mm512_permute_ps(runs, 0x00);
        out[1] = (Vector<T, N>)_mm512_permute_ps(runs, 0x55);
        out[2] = (Vector<T, N>)_mm512_permute_ps(runs, 0xaa);
        out[3] = (Vector<T, N>)_mm512_permute_ps(runs, 0xff);
        return;
    }
#endif
    for (int i = 0; i < 4; ++i) out[i] = four[i] - Vector<T, N>{};
}

// What an illegal corner reads: nothing may come from a pixel that no point touches.
alignas(64) constexpr char kZeros[64 * sizeof(double)] = {};

// N channels from `first` on, as vectors; of a part only some of them are there.
template <typename T, int N, bool part>
struct Span {
    using V = T;
    using A = typename Accumulator<V>::type;
    static constexpr int L = N * int(sizeof(A)) < kBytes ? N : kBytes / int(sizeof(A));
    static constexpr int count = N / L;
    using Lanes = Vector<A, L>;

    Lanes load(const V* from, int v) const {
        if constexpr (part) return load_part<L>(from + v * L, there[v]);
        return dcnv4::load<L>(from + v * L);
    }
    void store(V* to, int v, Lanes x) const {
        if constexpr (part) {
            store_part<L>(to + v * L, x, there[v]);
        } else {
            dcnv4::store<L>(to + v * L, x);
        }
    }

    Span(int64_t from, int64_t channels) : first(from) {
        for (int v = 0; v < count; ++v)
            there[v] = int(std::max<int64_t>(0, std::min<int64_t>(L, channels - v * L)));
    }

    int64_t first;
    int there[count];  // of each vector's channels, so many
};

// Call f(span) for spans that make up all channels.
template <typename V, typename F>
void for_spans(int64_t depth, F&& f) {
    int64_t c = 0;
    if constexpr (!std::is_same<V, double>::value) {
        for (; depth - c >= 32; c += 32) f(Span<V, 32, false>(c, 32));
    }
    for (; depth - c >= 16; c += 16) f(Span<V, 16, false>(c, 16));
    if (depth - c > 8) {
        f(Span<V, 16, true>(c, depth - c));
    } else if (depth - c > 0) {
        f(Span<V, 8, true>(c, depth - c));
    }
}

// Channels of whole spans.
int64_t spanned(int64_t depth) { return (depth + 7) / 8 * 8; }

}  // namespace
}  // namespace dcnv4
