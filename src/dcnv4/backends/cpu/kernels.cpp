// Both operators and their gradients on a CPU, as one: for every output pixel and group,
//
//     out[D] = sum_k w_k * bilinear(value; x_k, y_k)
//     x_k = origin_x + scale_x * (base_x + offset_x)
//
// A convolution is one level whose points have a base, the kernel's grid; an attention's points
// have none, its scale is the size of their level and its origin -1/2.
//
// Work. Every thread takes pieces of output pixels from a counter. The K points of one (pixel,
// group) are a unit; the points of a batch of units lie one after another in the lanes of vectors,
// so that few lanes are idle: coordinates, corners and coefficients are computed lane by lane
// (`place`), then the D channels are summed in registers, point after point (`gather`). A batch
// with a corner outside the image reads zeros there, by other code than one without. Backwards,
// `spread` leaves four partial sums of each dot product for `finish` to add lane by lane. The
// gradient of the value has no atomics: a thread owns some groups of an image, or, where there are
// fewer of those than threads, a band of the value's rows of one (image, group); it goes over the
// output pixels in order and adds what falls on its own to sums that no other thread's cache lines
// hold. So every element is summed in one fixed order, and the bits do not depend on the number of
// threads.
//
// Memory. Value, coordinates and output are read or written once from memory and the rows of
// neighbouring points come from the caches; the scratch of a thread is a few hundred bytes a point
// of a batch, and backwards the sums of what it owns, where those are no part of the gradient's own
// memory. Bands go over the coordinates a second time, skipping runs of pixels that do not reach
// them.
//
// Limits. The forward is bound half by `place`, half by the loads of corners and coefficients, 4 K
// rows of D and 4 K numbers a (pixel, group); the backward by as many read-modify-writes. Corners
// outside the image take no branch in the forward, where it would often be mispredicted, but a few
// more instructions; backwards a branch costs less.
//
// Numbers. NaN and infinities are legal data: no flag that assumes them away. Sums are made in A:
// double for double, float for everything else; half precision is converted in registers.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX2__) && defined(__F16C__)
#define DCNV4_X86 1
#include <immintrin.h>
#if defined(__AVX512BW__) && defined(__AVX512VL__)
#define DCNV4_AVX512 1
#endif
#endif

#include "../include/sampling.h"

using namespace dcnv4;

namespace {

struct half {
    uint16_t bits;
};
struct bfloat {
    uint16_t bits;
};

// The arguments, as `_plan` in __init__.py packs them, and as `_run` does what differs from call to
// call. Strides are in elements.
struct View {
    char* data;
    int64_t dtype;  // 0 float64, 1 float32, 2 bfloat16, 3 float16
    int64_t image, row, column, group;

    int64_t at(int64_t b, int64_t y, int64_t x, int64_t g) const {
        return b * image + y * row + x * column + g * group;
    }
};

struct Level {
    int64_t height, width, start;  // start: its first pixel in the value
};

struct Problem {
    View value, offsets, weights, output, grad_value, grad_offsets, grad_weights;
    int64_t images, rows, columns, groups, depth, pixels;  // pixels of one image of the value
    int64_t levels, points;                                // points of each level
    int64_t softmax, clipped, threads, forked;             // clipped: levels may leave the value
    double origin_x, origin_y, step_x, step_y;             // of output column 0 and row 0
    double scale;                                          // of points with a base
};

// Channels in registers: N of them as vectors of the machine's width.
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
    if constexpr (std::is_floating_point<V>::value) {
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
    if constexpr (!std::is_floating_point<V>::value) {
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

// Loops over points take this many lanes at a time; arrays over points are padded to whole blocks.
constexpr int64_t kBlock = 16;
// A batch is so many points, or one unit's where it has more: they stay in the first cache.
constexpr int64_t kBatch = 64;

int64_t padded(int64_t count) { return (count + kBlock - 1) / kBlock * kBlock; }

// A zeroed array that starts on a cache line of its own.
template <typename T>
class Array {
  public:
    explicit Array(int64_t count)
        : memory_(new char[count * sizeof(T) + 64]()),
          first_(reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) &
                                      ~uintptr_t(63))) {}
    operator T*() const { return first_; }

  private:
    std::unique_ptr<char[]> memory_;
    T* first_;
};

template <typename A>
using Integer = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;

// What is the same for every batch, point by point: as the units' points repeat, so does this.
template <typename A>
struct Grid {
    Grid(const Problem& p, const Level* levels, const double* points)
        : count(p.levels * p.points), units(std::max<int64_t>(1, kBatch / count)),
          size(padded(units * count) + kBlock),
          offsets_end(end_of(p, p.offsets, 2 * count)), weights_end(end_of(p, p.weights, count)),
          base(2 * size), scale(2 * size), height(size), width(size), start(size),
          below(size) {
        for (int64_t n = 0; n < size; ++n) {
            const int64_t k = n % count;
            const Level& level = levels[k / p.points];
            base[2 * n] = points ? A(points[2 * k]) : A(0);
            base[2 * n + 1] = points ? A(points[2 * k + 1]) : A(0);
            scale[2 * n] = points ? A(p.scale) : A(level.width);
            scale[2 * n + 1] = points ? A(p.scale) : A(level.height);
            height[n] = int(level.height);
            width[n] = int(level.width);
            start[n] = level.start;
            below[n] = level.width * p.value.column;
        }
    }

    int64_t count, units;  // points of a unit, units of a batch
    int64_t size;          // points of a batch, and a block more: a unit's last block may end there
    int64_t offsets_end, weights_end;  // one past the last number of the tensors
    Array<A> base, scale;              // x and y in turn
    Array<int> height, width;
    Array<int64_t> start;
    Array<int64_t> below;  // from a row of the value to the next, in elements

  private:
    static int64_t end_of(const Problem& p, const View& view, int64_t numbers) {
        return view.at(p.images - 1, p.rows - 1, p.columns - 1, p.groups - 1) + numbers;
    }
};

// An output pixel's group: K points, which follow those of the unit before.
template <typename A>
struct Unit {
    int64_t row, column, group;
    int64_t value, offsets, weights, output;  // its first element in these; of the image in value
    A x, y;                                   // where its window is
};

// A thread's scratch: the points of a batch.
template <typename A>
struct Points {
    explicit Points(const Grid<A>& grid, int64_t sums)
        : units(grid.units), pairs(2 * grid.size), weight(grid.size), fraction_x(grid.size),
          fraction_y(grid.size), position(grid.size), legal(grid.size),
          coefficient(4 * grid.size), partial(16 * grid.size), grad_weight(grid.size),
          raw(2 * padded(2 * grid.count)), numbers(padded(2 * grid.count)), sums(sums),
          unwanted(64) {
        for (auto& sum : dot) sum = Array<A>(grid.size);
    }

    Array<Unit<A>> units;
    Array<A> pairs;              // pixels, x and y in turn; then their gradients
    Array<A> weight;             // what each point counts
    Array<A> fraction_x, fraction_y;
    Array<int64_t> position;     // of the top left corner in the value, in pixels
    Array<int> legal;
    bool whole;                  // whether all corners are
    Array<A> coefficient;        // [4]; 0 at illegal corners
    Array<A> partial;            // [4][4]: partial sums of the gradients of the coefficients
    Array<A> dot[4] = {Array<A>(0), Array<A>(0), Array<A>(0), Array<A>(0)};  // the sums
    Array<A> grad_weight;
    Array<double> raw;           // of any dtype, as they are in memory
    Array<A> numbers;            // of one unit
    Array<A> sums;               // a block of the gradient of the value
    Array<A> unwanted;           // gradient of what is not there
};

template <typename T>
void copy(const T* from, int64_t count, T* to) {
    for (; count >= 16; count -= 16, from += 16, to += 16) std::memcpy(to, from, 16 * sizeof(T));
    if (count & 8) std::memcpy(to, from, 8 * sizeof(T)), from += 8, to += 8;
    if (count & 4) std::memcpy(to, from, 4 * sizeof(T)), from += 4, to += 4;
    if (count & 2) std::memcpy(to, from, 2 * sizeof(T)), from += 2, to += 2;
    if (count & 1) *to = *from;
}

// Whole blocks from one dtype to the other.
template <typename A, typename B>
void convert(const A* from, int64_t count, B* to) {
    constexpr int L = kBytes / int(sizeof(float));
    for (int64_t k = 0; k < padded(count); k += L) store<L>(to + k, load<L>(from + k));
}

// `count` numbers as A: where they lie in memory, if their dtype and the tensor's end allow whole
// blocks of them to be read there, or in `to`. What follows the `count` may be anything.
template <typename A>
__attribute__((always_inline)) inline const A* read(const View& view, int64_t end, int64_t at,
                                                    int64_t count, double* raw, A* to) {
    const int64_t size = view.dtype <= 1 ? sizeof(A) : 2;
    const void* from = view.data + at * size;
    if (__builtin_expect(at + padded(count) > end, 0)) from = std::memcpy(raw, from, count * size);
    if constexpr (std::is_same<A, float>::value) {
        if (view.dtype == 2) return convert(static_cast<const bfloat*>(from), count, to), to;
        if (view.dtype == 3) return convert(static_cast<const half*>(from), count, to), to;
    }
    return static_cast<const A*>(from);
}

// `from` holds whole blocks.
template <typename A>
void write(const View& view, int64_t at, const A* from, int64_t count, double* raw) {
    if (view.dtype <= 1) return copy(from, count, reinterpret_cast<A*>(view.data) + at);
    if constexpr (std::is_same<A, float>::value) {
        if (view.dtype == 2) {
            convert(from, count, reinterpret_cast<bfloat*>(raw));
        } else {
            convert(from, count, reinterpret_cast<half*>(raw));
        }
        copy(reinterpret_cast<uint16_t*>(raw), count, reinterpret_cast<uint16_t*>(view.data) + at);
    }
}

double exponential(double x) { return std::exp(x); }

// exp(x) for x <= 0, to about 1 ulp, in a form that vectorises; below 2^-126 it is 0.
float exponential(float x) {
    const float clamped = x < -87.3f ? -87.3f : x;
    const float shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
    const float n = shifted - 12582912.0f;
    const float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const uint32_t exponent = bits_of<uint32_t>(shifted) - 0x4b400000u + 127;
    const float result = p * bits_of<float>(exponent << 23);
    return x < -87.3f ? 0.0f : result;
}

// Which lanes of a block are among `count` points.
template <typename A>
Vector<Integer<A>, kBlock> among(int64_t count) {
    const auto lanes = __builtin_convertvector(kLanes, Vector<Integer<A>, kBlock>);
    return lanes < Integer<A>(std::min(count, kBlock));
}

// The sum over the points of what term(block) makes of every block of them.
template <typename A, typename F>
A sum_of(int64_t count, F&& term) {
    using Block = Vector<A, kBlock>;
    Block sums = {};
    for (int64_t block = 0; block < count; block += kBlock)
        sums += among<A>(count - block) ? term(block) : Block{};
    A sum[kBlock];
    std::memcpy(sum, &sums, sizeof(sum));
    for (int half = kBlock / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
    return sum[0];
}

// `logit` and `weight` may be the same.
template <typename A>
void softmax(const A* logit, int64_t count, A* weight) {
    using Block = Vector<A, kBlock>;
    Block mosts = Block{} + logit[0];
    for (int64_t block = 0; block < count; block += kBlock) {
        const Block here = load<kBlock>(logit + block);
        mosts = among<A>(count - block) & (here > mosts) ? here : mosts;
    }
    A most = mosts[0];
    for (int i = 1; i < kBlock; ++i) most = mosts[i] > most ? mosts[i] : most;
    for (int64_t block = 0; block < count; block += kBlock) {
#pragma omp simd
        for (int64_t k = block; k < block + kBlock; ++k) weight[k] = exponential(logit[k] - most);
    }
    const A sum = sum_of<A>(count, [=](int64_t block) { return load<kBlock>(weight + block); });
    for (int64_t k = 0; k < padded(count); ++k) weight[k] /= sum;
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

// Of the first `points`, the legal corners whose pixel of the value lies in [first, last); the rest
// counts nothing.
template <typename A>
void restrict_to(Points<A>& s, const Grid<A>& grid, int64_t points, int64_t first, int64_t last) {
    s.whole = false;
    for (int64_t n = 0; n < points; ++n) {
        const int64_t top = s.position[n], below = top + grid.width[n];
        const int64_t corner[4] = {top, top + 1, below, below + 1};
        for (int i = 0; i < 4; ++i) {
            if (corner[i] >= first && corner[i] < last) continue;
            s.legal[n] &= ~(1 << i);
            s.coefficient[4 * n + i] = 0;
        }
    }
}

// Whether all corners of the first points are legal.
bool are_whole(const int* legal, int64_t points) {
    using Lanes = Vector<int, kBlock>;
    Lanes bad = {};
    for (int64_t block = 0; block < points; block += kBlock)
        bad |= (load<kBlock>(legal + block) != 15) & (kLanes < int(points - block));
    const auto half = bits_of<Vector<int64_t, kBlock / 2>>(bad);
    int64_t any = 0;
    for (int i = 0; i < kBlock / 2; ++i) any |= half[i];
    return any == 0;
}

// The points of the first `units`.
template <typename A>
__attribute__((noinline)) void place(const Problem& p, const Grid<A>& grid, int64_t units,
                                     Points<A>& s) {
    constexpr int L = kBytes / int(sizeof(A));
    using Lanes = Vector<A, L>;
    const int64_t count = grid.count;
    const A *const base = grid.base, *const scale = grid.scale;
    A *const pairs = s.pairs, *const weight = s.weight, *const numbers = s.numbers;
    double* const raw = s.raw;
    const View offsets_view = p.offsets, weights_view = p.weights;
    const int64_t offsets_end = grid.offsets_end, weights_end = grid.weights_end;
    const Unit<A>*const first = s.units, *const last = first + units;
    Vector<Integer<A>, L> odd;
    for (int i = 0; i < L; ++i) odd[i] = -(i % 2);
    // Every unit writes whole blocks; what is beyond its points is the next unit's to overwrite.
    // Two loops and copies of what they read, so that all of it stays in registers.
    A* to = pairs;
    for (const Unit<A>* at = first; at < last; ++at, to += 2 * count) {
        const A* const offsets =
            read<A>(offsets_view, offsets_end, at->offsets, 2 * count, raw, numbers);
        const Lanes origin = odd ? Lanes{} + at->y : Lanes{} + at->x;
        // Coordinates are those of geometry.py to the bit.
        for (int64_t i = 0; i < 2 * count; i += L)
            store<L>(to + i,
                     rounded(load<L>(scale + i) * (load<L>(base + i) + load<L>(offsets + i))) +
                         origin);
    }
    to = weight;
    for (const Unit<A>* at = first; at < last; ++at, to += count) {
        const A* const weights =
            read<A>(weights_view, weights_end, at->weights, count, raw, numbers);
        if (p.softmax) {
            softmax<A>(weights, count, to);
        } else {
            for (int64_t i = 0; i < count; i += L) store<L>(to + i, load<L>(weights + i));
        }
    }
    const int *const height = grid.height, *const width = grid.width;
    const int64_t* const start = grid.start;
    A *const fraction_x = s.fraction_x, *const fraction_y = s.fraction_y;
    A* const coefficient = s.coefficient;
    int64_t* const position = s.position;
    int* const legal = s.legal;
    for (int64_t block = 0; block < units * count; block += kBlock) {
#pragma omp simd
        for (int64_t n = block; n < block + kBlock; ++n) {
            const Corners<A> c = corners(pairs[2 * n], pairs[2 * n + 1], height[n], width[n]);
            A out[4];
            coefficients(weight[n], c.fraction_x, c.fraction_y, out);
            legal[n] = c.legal;
            position[n] = start[n] + int64_t(c.row) * int64_t(width[n]) + c.column;
            fraction_x[n] = c.fraction_x;
            fraction_y[n] = c.fraction_y;
            coefficient[4 * n] = c.inside & c.left & c.top ? out[0] : A(0);
            coefficient[4 * n + 1] = c.inside & c.right & c.top ? out[1] : A(0);
            coefficient[4 * n + 2] = c.inside & c.left & c.bottom ? out[2] : A(0);
            coefficient[4 * n + 3] = c.inside & c.right & c.bottom ? out[3] : A(0);
        }
    }
    s.whole = are_whole(legal, units * count);
    if (p.clipped) restrict_to(s, grid, units * count, 0, p.pixels);
}

// Place groups [g, last_group) of output pixels [first, last) of one image, in order, a batch at a
// time, and call f(units) after each.
template <typename A, typename F>
void for_batches(const Problem& p, const Grid<A>& grid, int64_t image, int64_t first, int64_t last,
                 int64_t first_group, int64_t last_group, Points<A>& s, F&& f) {
    if (first >= last) return;
    int64_t row = first / p.columns, column = first % p.columns, group = first_group;
    for (int64_t left = (last - first) * (last_group - first_group); left > 0;) {
        const int64_t units = std::min(left, grid.units);
        for (int64_t u = 0; u < units;) {
            Unit<A> next{row, column, group, p.value.at(image, 0, 0, group),
                         p.offsets.at(image, row, column, group),
                         p.weights.at(image, row, column, group),
                         p.output.at(image, row, column, group),
                         A(p.origin_x + p.step_x * double(column)),
                         A(p.origin_y + p.step_y * double(row))};
            for (; u < units && next.group < last_group; ++next.group) {
                s.units[u++] = next;
                next.value += p.value.group;
                next.offsets += p.offsets.group;
                next.weights += p.weights.group;
                next.output += p.output.group;
            }
            group = next.group;
            if (group < last_group) continue;
            group = first_group;
            if (++column == p.columns) column = 0, ++row;
        }
        place(p, grid, units, s);
        f(units);
        left -= units;
    }
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
        return ::load<L>(from + v * L);
    }
    void store(V* to, int v, Lanes x) const {
        if constexpr (part) {
            store_part<L>(to + v * L, x, there[v]);
        } else {
            ::store<L>(to + v * L, x);
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

// Call f with the rows of a point's corners; `none` is that of an illegal one.
template <bool whole, typename T, typename F>
__attribute__((always_inline)) inline void with_rows(T* top, int64_t stride, int64_t below,
                                                     int legal, T* none, F&& f) {
    T* const bottom = top + below;
    if constexpr (whole) {
        f(top, top + stride, bottom, bottom + stride);
    } else {
        f(legal & 1 ? top : none, legal & 2 ? top + stride : none, legal & 4 ? bottom : none,
          legal & 8 ? bottom + stride : none);
    }
}

// The same with a branch: where much is done with the rows, a wrong guess costs less than choosing.
template <typename T, typename F>
__attribute__((always_inline)) inline void likely_with_rows(T* top, int64_t stride, int64_t below,
                                                            int legal, T* none, F&& f) {
    if (__builtin_expect(legal == 15, 1)) {
        with_rows<true>(top, stride, below, legal, none, f);
    } else {
        with_rows<false>(top, stride, below, legal, none, f);
    }
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

// Sum the points of each of the first units; `whole` where all their corners are legal.
template <bool whole, typename S, typename A>
__attribute__((noinline)) void gather(const Problem& p, const Grid<A>& grid, const Points<A>& s,
                                      int64_t units, const S span) {
    using V = typename S::V;
    const auto zeros = reinterpret_cast<const V*>(kZeros);
    const V* const value = (const V*)p.value.data + span.first;
    V* const output = (V*)p.output.data + span.first;
    const Unit<A>*const first = s.units, *const last = first + units;
    const int64_t* position = s.position;
    const int* legal = s.legal;
    const A* coefficient = s.coefficient;
    const int64_t* const grid_below = grid.below;
    const int64_t stride = p.value.column, count = grid.count;
    // Sums that do not wait for each other.
    constexpr int chains = S::count < 4 ? 4 / S::count : 1;
    for (const Unit<A>* at = first; at < last; ++at) {
        const V* const channels = value + at->value;
        typename S::Lanes sum[chains][S::count];
        for (auto& chain : sum)
            for (auto& lanes : chain) lanes = typename S::Lanes{};
        const int64_t* below = grid_below;
        for (const int64_t* const end = position + count; position < end;
             ++position, ++legal, ++below, coefficient += 4) {
            with_rows<whole>(channels + *position * stride, stride, *below, *legal, zeros,
                             [&](auto... rows) {
                const V* const row[4] = {rows...};
                typename S::Lanes c[4];
                // Half precision takes shuffles to convert, which are scarcer where a row is one
                // vector.
                splat<S::L, std::is_same<V, A>::value || (S::count > 1)>(coefficient, c);
                // Unrolled late, sums of a part of a vector would stay in memory.
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i)
                    for (int v = 0; v < S::count; ++v)
                        sum[i % chains][v] += c[i] * span.load(row[i], v);
            });
        }
        for (int v = 0; v < S::count; ++v) {
            for (int i = 1; i < chains; ++i) sum[0][v] += sum[i][v];
            span.store(output + at->output, v, sum[0][v]);
        }
    }
}

// A block of the gradient of the value: pixels [low, high) and some groups of one image, summed in
// memory that no other thread writes to.
template <typename A>
struct Sums {
    A* at;
    int64_t low, high, first_group, last_group, depth;  // depth: channels of a group, padded

    int64_t stride() const { return (last_group - first_group) * depth; }
};

// Add to the dot products of the output's gradient with each corner's row, and to the gradient of
// the corners' rows themselves: either or both.
template <typename S, typename A>
__attribute__((noinline)) void spread(const Problem& p, const Grid<A>& grid, Points<A>& s,
                                      int64_t units, const Sums<A>* sums, bool want_dots,
                                      const S span) {
    using V = typename S::V;
    const auto zeros = reinterpret_cast<const V*>(kZeros);
    const int64_t* const position = s.position;
    const int *const legal = s.legal, *const width = grid.width;
    const int64_t* const below = grid.below;
    const A* const coefficient = s.coefficient;
    A *const partial = s.partial, *const unwanted = s.unwanted;
    const int64_t stride = p.value.column, count = grid.count;
    const int64_t sums_stride = sums ? sums->stride() : 0, low = sums ? sums->low : 0;
    for (int64_t u = 0; u < units; ++u) {
        const Unit<A>& at = s.units[u];
        const V* const channels = (const V*)p.value.data + at.value + span.first;
        const V* const grad_out = (const V*)p.output.data + at.output + span.first;
        A* const to =
            sums ? sums->at + (at.group - sums->first_group) * sums->depth + span.first : nullptr;
        typename S::Lanes grad[S::count];
        for (int v = 0; v < S::count; ++v) grad[v] = span.load(grad_out, v);
        for (int64_t n = u * count; n < (u + 1) * count; ++n) {
            if (want_dots) {
                likely_with_rows(channels + position[n] * stride, stride, below[n], legal[n], zeros,
                                 [&](auto... rows) {
                    const V* const row[4] = {rows...};
                    typename S::Lanes product[4];
                    for (int i = 0; i < 4; ++i) {
                        product[i] = grad[0] * span.load(row[i], 0);
                        for (int v = 1; v < S::count; ++v)
                            product[i] += grad[v] * span.load(row[i], v);
                    }
                    partial_sums<S::L>(product, partial + 16 * n, span.first == 0);
                });
            }
            if (sums && legal[n]) {
                likely_with_rows(to + (position[n] - low) * sums_stride, sums_stride,
                                 width[n] * sums_stride, legal[n], unwanted, [&](auto... rows) {
                    A* const row[4] = {rows...};
                    for (int i = 0; i < 4; ++i) {
                        const A c = coefficient[4 * n + i];
                        for (int v = 0; v < S::count; ++v) {
                            A* const at = row[i] + v * S::L;
                            store<S::L>(at, load<S::L>(at) + c * grad[v]);
                        }
                    }
                });
            }
        }
    }
}

// Gradients of offsets and weights of the first units, from the partial sums.
template <typename A>
__attribute__((noinline)) void finish(const Problem& p, const Grid<A>& grid, int64_t image,
                                      int64_t units, Points<A>& s) {
    const int64_t count = grid.count, points = units * count;
    constexpr int L = kBytes / int(sizeof(A)) < 4 ? 4 : kBytes / int(sizeof(A));
    using Lanes = std::make_integer_sequence<int, L>;
    const A* const partial = s.partial;
    for (int64_t n = 0; n < points; n += 4) {
        for (int i = 0; i < 4; i += L / 4) {
            const auto at = [&](int64_t point) {
                return load<L>(partial + 16 * (n + point) + 4 * i);
            };
            const Vector<A, L> sums = fold<1>(fold<2>(at(0), at(2), Lanes()),
                                              fold<2>(at(1), at(3), Lanes()), Lanes());
            for (int corner = 0; corner < L / 4; ++corner)
                std::memcpy(s.dot[i + corner] + n, reinterpret_cast<const A*>(&sums) + 4 * corner,
                            4 * sizeof(A));
        }
    }
    const A *const dot0 = s.dot[0], *const dot1 = s.dot[1];
    const A *const dot2 = s.dot[2], *const dot3 = s.dot[3];
    const A *const fraction_x = s.fraction_x, *const fraction_y = s.fraction_y;
    const A *const weight = s.weight, *const scale = grid.scale;
    const int* const legals = s.legal;
    A *const pairs = s.pairs, *const grad_weight = s.grad_weight;
    for (int64_t block = 0; block < points; block += kBlock) {
#pragma omp simd
        for (int64_t n = block; n < block + kBlock; ++n) {
            // At an illegal corner the sum is none: 0 times an infinite gradient is no 0.
            const int legal = legals[n];
            const A all[4] = {dot0[n], dot1[n], dot2[n], dot3[n]};
            const A dot[4] = {legal & 1 ? all[0] : A(0), legal & 2 ? all[1] : A(0),
                              legal & 4 ? all[2] : A(0), legal & 8 ? all[3] : A(0)};
            const PointGradient<A> grad =
                coefficients_backward(dot, weight[n], fraction_x[n], fraction_y[n]);
            const A x = grad.x * scale[2 * n], y = grad.y * scale[2 * n + 1];
            pairs[2 * n] = legal ? x : A(0);
            pairs[2 * n + 1] = legal ? y : A(0);
            grad_weight[n] = grad.weight;
        }
    }
    for (int64_t u = 0; u < units; ++u) {
        const Unit<A>& at = s.units[u];
        const A* grads = grad_weight + u * count;
        if (p.softmax) {
            const A* const own = weight + u * count;
            const A mean = sum_of<A>(count, [=](int64_t block) {
                return load<kBlock>(grads + block) * load<kBlock>(own + block);
            });
            A* const to = s.numbers;
            for (int64_t k = 0; k < padded(count); ++k)
                to[k] = softmax_backward(grads[k], own[k], mean);
            grads = to;
        }
        write(p.grad_offsets, p.grad_offsets.at(image, at.row, at.column, at.group),
              pairs + 2 * u * count, 2 * count, s.raw);
        write(p.grad_weights, p.grad_weights.at(image, at.row, at.column, at.group), grads, count,
              s.raw);
    }
}

// Run f(task, scratch) for every task. One thread never touches OpenMP; a forked child must not use
// the pool of its parent, which it did not inherit.
template <typename A, typename F>
void parallel(const Problem& p, int64_t threads, int64_t tasks, const Grid<A>& grid,
              int64_t sums, F&& f) {
    std::atomic<int64_t> next{0};
    std::vector<Points<A>> scratch;
    threads = std::max<int64_t>(1, threads);
    scratch.reserve(threads);
    for (int64_t i = 0; i < threads; ++i) scratch.emplace_back(grid, sums);
    std::atomic<int64_t> arrived{0};
    const auto work = [&] {
        Points<A>& mine = scratch[arrived++];
        for (int64_t task; (task = next++) < tasks;) f(task, mine);
    };
    if (threads == 1) return work();
#ifdef _OPENMP
    if (!p.forked) {
#pragma omp parallel num_threads(int(threads))
        work();
        return;
    }
#endif
    std::vector<std::thread> others;
    others.reserve(threads - 1);
    try {
        for (int64_t i = 1; i < threads; ++i) others.emplace_back(work);
    } catch (const std::system_error&) {
        // The threads that did start, and this one, take all tasks.
    }
    work();
    for (std::thread& other : others) other.join();
}

// Below this many multiplications a second thread costs more than it saves.
constexpr double kSmall = 1 << 17;

template <typename A>
int64_t threads_for(const Problem& p, const Grid<A>& grid) {
    const double work = double(p.images) * double(p.rows) * double(p.columns) * double(p.groups) *
                        double(grid.count) * double(p.depth + 16) * 4;
    return work < kSmall ? 1 : p.threads;
}

template <typename V>
void forward(const Problem& p, const Level* levels, const double* base) {
    using A = typename Accumulator<V>::type;
    const Grid<A> grid(p, levels, base);
    const int64_t per_image = p.rows * p.columns, threads = threads_for(p, grid);
    if (p.images * per_image == 0) return;
    const int64_t wanted = (8 * threads + p.images - 1) / p.images;
    const int64_t size = std::max<int64_t>(1, (per_image + wanted - 1) / wanted);
    const int64_t pieces = (per_image + size - 1) / size;
    parallel<A>(p, threads, p.images * pieces, grid, 0, [&](int64_t task, Points<A>& s) {
        const int64_t image = task / pieces, first = task % pieces * size;
        const int64_t last = std::min(first + size, per_image);
        for_batches(p, grid, image, first, last, 0, p.groups, s, [&](int64_t units) {
            for_spans<V>(p.depth, [&](auto span) {
                s.whole ? gather<true>(p, grid, s, units, span)
                        : gather<false>(p, grid, s, units, span);
            });
        });
    });
}

// Whether the sums of so many groups lie in the gradient of the value as they would in the scratch.
template <typename V, typename A>
bool is_in_place(const Problem& p, int64_t groups) {
    return std::is_same<V, A>::value && spanned(p.depth) == p.depth &&
           groups * p.depth == p.grad_value.column;
}

// Call f(sums) for the zeroed sums of a block of the gradient of the value, and see that they
// become it: they are summed in the tensor where they lie there as they would in the scratch.
template <typename V, typename A, typename F>
void with_sums(const Problem& p, int64_t image, Sums<A> sums, F&& f) {
    const auto to = (V*)p.grad_value.data + p.grad_value.at(image, 0, sums.low, sums.first_group);
    const bool there = is_in_place<V, A>(p, sums.last_group - sums.first_group);
    if (there) sums.at = reinterpret_cast<A*>(to);
    std::fill_n(sums.at, (sums.high - sums.low) * sums.stride(), A(0));
    f(sums);
    if (there) return;
    for (int64_t pixel = 0; pixel < sums.high - sums.low; ++pixel) {
        for (int64_t g = 0; g < sums.last_group - sums.first_group; ++g) {
            const A* const from = sums.at + pixel * sums.stride() + g * sums.depth;
            V* const row = to + pixel * p.grad_value.column + g * p.grad_value.group;
            for_spans<V>(p.depth, [&](auto span) {
                using S = decltype(span);
                for (int v = 0; v < S::count; ++v)
                    span.store(row + span.first, v, load<S::L>(from + span.first + v * S::L));
            });
        }
    }
}

// The pixels of the value that a run of output pixels touches.
struct Reach {
    int64_t first, last;
};

template <typename V>
void backward(const Problem& p, const Level* levels, const double* base) {
    using A = typename Accumulator<V>::type;
    const Grid<A> grid(p, levels, base);
    const int64_t per_image = p.rows * p.columns, threads = threads_for(p, grid);
    const int64_t owners = p.images * p.groups, depth = spanned(p.depth);
    const auto spread_all = [&](Points<A>& s, int64_t image, int64_t units, const Sums<A>* sums,
                                bool want_dots) {
        for_spans<V>(p.depth, [&](auto span) {
            spread(p, grid, s, units, sums, want_dots, span);
        });
        if (want_dots) finish(p, grid, image, units, s);
    };
    if (p.images == 0) return;
    if (owners >= 3 * threads || owners % threads == 0) {
        // Neighbouring groups share cache lines and pages: a task takes as many as leave every
        // thread busy.
        const int64_t most = std::min(p.groups, (2 * threads + p.images - 1) / p.images);
        int64_t blocks = 1;
        while (blocks < most && (p.images * blocks % threads || p.groups % blocks)) ++blocks;
        const int64_t most_groups = (p.groups + blocks - 1) / blocks;
        const int64_t size = is_in_place<V, A>(p, most_groups) ? 0 : most_groups * depth * p.pixels;
        parallel<A>(p, threads, p.images * blocks, grid, size,
                    [&](int64_t task, Points<A>& s) {
            const int64_t image = task / blocks, block = task % blocks;
            const Sums<A> mine{s.sums, 0, p.pixels, p.groups * block / blocks,
                               p.groups * (block + 1) / blocks, depth};
            with_sums<V>(p, image, mine, [&](const Sums<A>& sums) {
                for_batches(p, grid, image, 0, per_image, sums.first_group, sums.last_group, s,
                            [&](int64_t units) { spread_all(s, image, units, &sums, true); });
            });
        });
        return;
    }

    // Too few owners: first everything but the value's gradient, noting what each run of pixels
    // reaches; then the value's gradient in bands, each going over the runs that reach it.
    const int64_t run = std::max<int64_t>(8, std::min<int64_t>(p.columns, 64));
    const int64_t runs = (per_image + run - 1) / run;
    std::vector<Reach> reach(owners * runs * p.levels, Reach{INT64_MAX, INT64_MIN});
    parallel<A>(p, threads, p.images * runs, grid, 0, [&](int64_t task, Points<A>& s) {
        const int64_t image = task / runs, first = task % runs * run;
        const int64_t last = std::min(first + run, per_image);
        for_batches(p, grid, image, first, last, 0, p.groups, s, [&](int64_t units) {
            for (int64_t n = 0; n < units * grid.count; ++n) {
                if (!s.legal[n]) continue;
                const int64_t owner = image * p.groups + s.units[n / grid.count].group;
                const int64_t level = n % grid.count / p.points;
                Reach& touched = reach[(owner * runs + task % runs) * p.levels + level];
                touched.first = std::min(touched.first, s.position[n]);
                touched.last = std::max(touched.last, s.position[n] + grid.width[n] + 1);
            }
            spread_all(s, image, units, nullptr, true);
        });
    });
    if (p.pixels == 0) return;
    const int64_t bands = std::min(p.pixels, (4 * threads + owners - 1) / owners);
    parallel<A>(p, threads, owners * bands, grid, (p.pixels / bands + 1) * depth,
                [&](int64_t task, Points<A>& s) {
        const int64_t owner = task / bands, band = task % bands;
        const int64_t image = owner / p.groups, g = owner % p.groups;
        const Sums<A> mine{s.sums, p.pixels * band / bands, p.pixels * (band + 1) / bands,
                           g, g + 1, depth};
        with_sums<V>(p, image, mine, [&](const Sums<A>& sums) {
            for (int64_t i = 0; i < runs; ++i) {
                const Reach* const touched = &reach[(owner * runs + i) * p.levels];
                if (std::none_of(touched, touched + p.levels, [&](const Reach& r) {
                        return r.first < sums.high && r.last >= sums.low;
                    }))
                    continue;
                const int64_t last = std::min((i + 1) * run, per_image);
                for_batches(p, grid, image, i * run, last, g, g + 1, s, [&](int64_t units) {
                    restrict_to(s, grid, units * grid.count, sums.low, sums.high);
                    spread_all(s, image, units, &sums, false);
                });
            }
        });
    });
}

struct Call {
    char* data[7];  // of the views
    int64_t threads, forked;
};

template <typename F>
int run(Problem p, const Call& call, const F& f) {
    View* const views[] = {&p.value,      &p.offsets,      &p.weights,     &p.output,
                           &p.grad_value, &p.grad_offsets, &p.grad_weights};
    for (int i = 0; i < 7; ++i) views[i]->data = call.data[i];
    p.threads = call.threads;
    p.forked = call.forked;
    // An empty value has no memory to point to, and no point reads it.
    if (p.pixels == 0) p.value.data = p.grad_value.data = const_cast<char*>(kZeros);
    try {
        f(p);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace

#ifdef _WIN32
#define DCNV4_EXPORT extern "C" __declspec(dllexport)
#else
#define DCNV4_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Both return 0, or 1 where memory ran out. `base` is (x, y) of every point, or null.
DCNV4_EXPORT int dcnv4_forward(const Problem* problem, const Level* levels, const double* base,
                               const Call* call) {
    return run(*problem, *call, [=](const Problem& p) {
        switch (p.value.dtype) {
            case 0: return forward<double>(p, levels, base);
            case 1: return forward<float>(p, levels, base);
            case 2: return forward<bfloat>(p, levels, base);
            default: return forward<half>(p, levels, base);
        }
    });
}

DCNV4_EXPORT int dcnv4_backward(const Problem* problem, const Level* levels, const double* base,
                                const Call* call) {
    return run(*problem, *call, [=](const Problem& p) {
        switch (p.value.dtype) {
            case 0: return backward<double>(p, levels, base);
            case 1: return backward<float>(p, levels, base);
            case 2: return backward<bfloat>(p, levels, base);
            default: return backward<half>(p, levels, base);
        }
    });
}
