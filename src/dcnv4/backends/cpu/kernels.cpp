// Both operators and their gradients on a CPU, as one: for every output pixel and group,
//
//     out[D] = sum_k w_k * bilinear(value; x_k, y_k)
//     x_k = origin_x + scale_x * (base_x + offset_x)
//
// A convolution is one level whose points have a base, the kernel's grid; an attention's points
// have none, its scale is the size of their level and its origin -1/2.
//
// Work. Every thread takes pieces of output pixels from a counter. For one (pixel, group) the K
// points are blocks of lanes: coordinates, corners and coefficients are computed lane by lane for a
// few groups at a time (`place`), then the D channels are summed in registers, point after point
// (`gather`). Backwards, `spread` leaves four partial sums of each dot product for `finish` to add
// lane by lane. The gradient of the value has no atomics: a thread owns some groups of an image,
// or, where there are fewer of those than threads, a band of the value's rows of one (image,
// group); it goes over the output pixels in order and adds what falls on its own. So every element
// is summed in one fixed order, and the bits do not depend on the number of threads.
//
// Memory. Value, coordinates and output are read or written once from memory and the rows of
// neighbouring points come from the first cache; the scratch of a thread is a few hundred bytes a
// point. Bands go over the coordinates a second time, skipping runs of pixels that do not reach
// them.
//
// Limits. The forward is bound by the loads of corners, 4 K rows of D a (pixel, group), and where
// D is 16 as much by `place`; the backward by as many read-modify-writes. Points at the image's
// border take a branch of their own, which a pattern that cannot be predicted makes slower.
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

template <typename T, typename From>
T bits_of(const From& from) {
    static_assert(sizeof(T) == sizeof(From), "same size");
    T to;
    std::memcpy(&to, &from, sizeof(T));
    return to;
}

float to_float(uint16_t bits, bfloat) { return bits_of<float>(uint32_t(bits) << 16); }

float to_float(uint16_t bits, half) {
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
Vector<float, N> load(const bfloat* from) {
#ifdef DCNV4_X86
    if constexpr (N == 4) {
        const auto bits = _mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)from));
        return (Vector<float, N>)_mm_slli_epi32(bits, 16);
    } else if constexpr (N == 8) {
        const auto bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
        return (Vector<float, N>)_mm256_slli_epi32(bits, 16);
    }
#ifdef __AVX512F__
    if constexpr (N == 16) {
        const auto bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
        return (Vector<float, N>)_mm512_slli_epi32(bits, 16);
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
    for (int i = 0; i < N; ++i) x[i] = to_float(from[i].bits, half());
    return load<N>(x);
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

// Points are handled in blocks of this many lanes; arrays over points are padded to whole blocks.
constexpr int64_t kBlock = 16;

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

// What is the same for every pixel and group, point by point.
template <typename A>
struct GridBlock {
    A base_x[kBlock], base_y[kBlock], scale_x[kBlock], scale_y[kBlock];
    int height[kBlock], width[kBlock];
    int64_t start[kBlock];
};

template <typename A>
struct Grid {
    Grid(const Problem& p, const Level* levels, const double* base)
        : count(p.levels * p.points), run(padded(count) / kBlock),
          batch(std::max<int64_t>(1, std::min(p.groups, 8 / run))),
          offsets_end(end_of(p, p.offsets, 2 * count)), weights_end(end_of(p, p.weights, count)),
          blocks(run) {
        for (int64_t k = 0; k < count; ++k) {
            const Level& level = levels[k / p.points];
            GridBlock<A>& block = blocks[k / kBlock];
            const int64_t lane = k % kBlock;
            block.base_x[lane] = base ? A(base[2 * k]) : A(0);
            block.base_y[lane] = base ? A(base[2 * k + 1]) : A(0);
            block.scale_x[lane] = base ? A(p.scale) : A(level.width);
            block.scale_y[lane] = base ? A(p.scale) : A(level.height);
            block.height[lane] = int(level.height);
            block.width[lane] = int(level.width);
            block.start[lane] = level.start;
        }
    }

    int64_t count, run;  // points, and blocks of them
    int64_t batch;       // groups of a pixel that are placed at a time
    int64_t offsets_end, weights_end;  // one past the last number of the tensors
    Array<GridBlock<A>> blocks;

  private:
    static int64_t end_of(const Problem& p, const View& view, int64_t numbers) {
        return view.at(p.images - 1, p.rows - 1, p.columns - 1, p.groups - 1) + numbers;
    }
};

// Points of one (pixel, group).
template <typename A>
struct Block {
    int64_t position[kBlock];    // of the top left corner in the value, in pixels
    int legal[kBlock];
    A coefficient[4][kBlock];    // 0 at illegal corners; then their gradients
    A x[kBlock], y[kBlock];      // pixels from the origin
    A weight[kBlock];            // what each point counts
    A fraction_x[kBlock], fraction_y[kBlock];
    A partial[kBlock][4][4];     // partial sums of the gradients of the coefficients
};

// A thread's scratch: a run of blocks for each group of a batch.
template <typename A>
struct Points {
    explicit Points(const Grid<A>& grid)
        : blocks(grid.run * grid.batch), raw_offsets(grid.run * kBlock * 2),
          raw_weights(grid.run * kBlock), offsets(grid.run * kBlock * 2),
          weights(grid.run * kBlock), unwanted(64) {}

    Array<Block<A>> blocks;
    Array<double> raw_offsets, raw_weights;  // of any dtype, as they are in memory
    Array<A> offsets, weights;  // of one group, or their gradients
    Array<A> unwanted;          // gradient of what is not there
};

template <typename A, typename V, typename Convert>
void convert(const V* from, int64_t count, A* to, Convert&& one) {
    for (int64_t k = 0; k < count; k += kBlock)
        for (int64_t i = k; i < k + kBlock; ++i) to[i] = one(from[i]);
}

// `count` numbers as A: where they lie in memory, if their dtype and the tensor's end allow `whole`
// of them, full blocks, to be read there, or in `to`. What follows the `count` may be anything.
template <typename A>
__attribute__((always_inline)) inline const A* read(const View& view, int64_t end, int64_t at,
                                                    int64_t count, int64_t whole, double* raw,
                                                    A* to) {
    const int64_t size = view.dtype <= 1 ? sizeof(A) : 2;
    const void* from = view.data + at * size;
    if (__builtin_expect(at + whole > end, 0)) from = std::memcpy(raw, from, count * size);
    if (view.dtype <= 1) return static_cast<const A*>(from);
    const auto words = static_cast<const uint16_t*>(from);
    if (view.dtype == 2) {
        convert(words, whole, to, [](uint16_t x) { return to_float(x, bfloat()); });
    } else {
        convert(words, whole, to, [](uint16_t x) { return to_float(x, half()); });
    }
    return to;
}

template <typename A>
void write(const View& view, int64_t at, int64_t count, double* raw, A* from) {
    const auto words = reinterpret_cast<uint16_t*>(raw);
    if (view.dtype <= 1) {
        std::memcpy(view.data + at * sizeof(A), from, count * sizeof(A));
        return;
    }
    if (view.dtype == 2) {
        convert(from, count, words, [](A x) { return from_float(float(x), bfloat()); });
    } else {
        convert(from, count, words, [](A x) { return from_float(float(x), half()); });
    }
    std::memcpy(view.data + at * 2, raw, count * 2);
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

// The sum of term(k) over the points.
template <typename A, typename F>
A sum_of(int64_t count, F&& term) {
    A sum = 0;
    for (int64_t block = 0; block < count; block += kBlock) {
#pragma omp simd reduction(+ : sum)
        for (int64_t k = block; k < block + kBlock; ++k) sum += k < count ? term(k) : A(0);
    }
    return sum;
}

// `logit` and `weight` may be the same.
template <typename A>
void softmax(const A* logit, int64_t count, A* weight) {
    A most = logit[0];
    for (int64_t block = 0; block < count; block += kBlock) {
#pragma omp simd reduction(max : most)
        for (int64_t k = block; k < block + kBlock; ++k) {
            const A one = k < count ? logit[k] : logit[0];
            most = one > most ? one : most;
        }
    }
    for (int64_t block = 0; block < count; block += kBlock) {
#pragma omp simd
        for (int64_t k = block; k < block + kBlock; ++k) weight[k] = exponential(logit[k] - most);
    }
    const A sum = sum_of<A>(count, [=](int64_t k) { return weight[k]; });
    for (int64_t k = 0; k < padded(count); ++k) weight[k] /= sum;
}

struct Pixel {
    int64_t image, row, column;
};

// Of the first `groups` runs, the legal corners whose pixel of the value lies in [first, last); the
// rest counts nothing.
template <typename A>
void restrict_to(Points<A>& s, const Grid<A>& grid, int64_t groups, int64_t first, int64_t last) {
    for (int64_t b = 0; b < groups * grid.run; ++b) {
        Block<A>& block = s.blocks[b];
        for (int64_t k = 0; k < kBlock; ++k) {
            const int64_t top = block.position[k];
            const int64_t below = top + grid.blocks[b % grid.run].width[k];
            const int64_t corner[4] = {top, top + 1, below, below + 1};
            for (int i = 0; i < 4; ++i) {
                if (corner[i] >= first && corner[i] < last) continue;
                block.legal[k] &= ~(1 << i);
                block.coefficient[i][k] = 0;
            }
        }
    }
}

// The points of groups [g, g + groups) of one pixel.
template <typename A>
__attribute__((noinline)) void place(const Problem& p, const Grid<A>& grid, const Pixel& pixel,
                                     int64_t g, int64_t groups, Points<A>& s) {
    const int64_t count = grid.count, run = grid.run;
    int64_t weights_at = p.weights.at(pixel.image, pixel.row, pixel.column, g);
    int64_t offsets_at = p.offsets.at(pixel.image, pixel.row, pixel.column, g);
    for (int64_t j = 0; j < groups; ++j) {
        const A* weights = read<A>(p.weights, grid.weights_end, weights_at, count, run * kBlock,
                                   s.raw_weights, s.weights);
        const A* offsets = read<A>(p.offsets, grid.offsets_end, offsets_at, 2 * count,
                                   2 * run * kBlock, s.raw_offsets, s.offsets);
        weights_at += p.weights.group, offsets_at += p.offsets.group;
        if (p.softmax) {
            softmax<A>(weights, count, s.weights);
            weights = s.weights;
        }
        for (int64_t b = 0; b < run; ++b) {
            const GridBlock<A>& same = grid.blocks[b];
            Block<A>& block = s.blocks[j * run + b];
#pragma omp simd
            for (int64_t k = 0; k < kBlock; ++k) {
                block.weight[k] = weights[b * kBlock + k];
                block.x[k] = same.scale_x[k] * (same.base_x[k] + offsets[2 * (b * kBlock + k)]);
                block.y[k] = same.scale_y[k] * (same.base_y[k] + offsets[2 * (b * kBlock + k) + 1]);
            }
        }
    }
    // Rounded here, not fused with the sum below: coordinates are those of geometry.py to the bit.
    asm volatile("" ::: "memory");
    const A origin_x = A(p.origin_x + p.step_x * double(pixel.column));
    const A origin_y = A(p.origin_y + p.step_y * double(pixel.row));
    const GridBlock<A>* const all = grid.blocks;
    Block<A>* to = s.blocks;
    for (int64_t j = 0; j < groups; ++j) {
        for (int64_t b = 0; b < run; ++b) {
            const GridBlock<A>& same = all[b];
            Block<A>& block = *to++;
#pragma omp simd
            for (int64_t k = 0; k < kBlock; ++k) {
                const Corners<A> c = corners(origin_x + block.x[k], origin_y + block.y[k],
                                             same.height[k], same.width[k]);
                A out[4];
                coefficients(block.weight[k], c.fraction_x, c.fraction_y, out);
                block.legal[k] = c.legal;
                block.position[k] =
                    same.start[k] + int64_t(c.row) * int64_t(same.width[k]) + c.column;
                block.fraction_x[k] = c.fraction_x;
                block.fraction_y[k] = c.fraction_y;
                block.coefficient[0][k] = c.legal & 1 ? out[0] : A(0);
                block.coefficient[1][k] = c.legal & 2 ? out[1] : A(0);
                block.coefficient[2][k] = c.legal & 4 ? out[2] : A(0);
                block.coefficient[3][k] = c.legal & 8 ? out[3] : A(0);
            }
        }
    }
    if (p.clipped) restrict_to(s, grid, groups, 0, p.pixels);
}

// What an illegal corner reads: nothing may come from a pixel that no point touches.
alignas(64) constexpr char kZeros[64 * sizeof(double)] = {};

// Channels are worked on in spans of N, each of N / L vectors.
template <typename V, int N>
struct Span {
    using A = typename Accumulator<V>::type;
    static constexpr int L = N * int(sizeof(A)) < kBytes ? N : kBytes / int(sizeof(A));
    static constexpr int count = N / L;
    using Lanes = Vector<A, L>;
};

// Call f(block, lane, grid's block) for every point of a run.
template <typename B, typename A, typename F>
void for_points(const Grid<A>& grid, B* run, F&& f) {
    const GridBlock<A>* same = grid.blocks;
    for (int64_t left = grid.count; left > 0; left -= kBlock, ++run, ++same) {
        const int64_t lanes = std::min(left, kBlock);
        for (int64_t k = 0; k < lanes; ++k) f(*run, k, *same);
    }
}

// Sum a run of points.
template <typename V, int N, typename A>
__attribute__((noinline)) void gather(const V* channels, int64_t pixel_stride, const Grid<A>& grid,
                                      const Block<A>* run, V* out) {
    using S = Span<V, N>;
    // Sums that do not wait for each other.
    constexpr int chains = S::count < 4 ? 4 / S::count : 1;
    typename S::Lanes sum[chains][S::count] = {};
    for_points(grid, run, [&](const Block<A>& block, int64_t k, const GridBlock<A>& same) {
        const V* const top = channels + block.position[k] * pixel_stride;
        const V* const bottom = top + same.width[k] * pixel_stride;
        const V* row[4] = {top, top + pixel_stride, bottom, bottom + pixel_stride};
        const int legal = block.legal[k];
        if (__builtin_expect(legal != 15, 0)) {
            if (!legal) return;
            for (int i = 0; i < 4; ++i)
                if (!(legal >> i & 1)) row[i] = reinterpret_cast<const V*>(kZeros);
        }
        for (int i = 0; i < 4; ++i) {
            const A c = block.coefficient[i][k];
            for (int v = 0; v < S::count; ++v)
                sum[i % chains][v] += c * load<S::L>(row[i] + v * S::L);
        }
    });
    for (int v = 0; v < S::count; ++v) {
        for (int i = 1; i < chains; ++i) sum[0][v] += sum[i][v];
        store<S::L>(out + v * S::L, sum[0][v]);
    }
}

// Add to the dot products of the output's gradient with each corner's row, and to the gradient of
// the corners' rows themselves: either or both.
template <typename V, int N, typename A>
__attribute__((noinline)) void spread(const V* channels, int64_t pixel_stride, A* grad_channels,
                                      int64_t grad_stride, const Grid<A>& grid, Block<A>* run,
                                      A* unwanted, const V* grad_out, bool first, bool want_dots,
                                      bool want_value) {
    using S = Span<V, N>;
    typename S::Lanes grad[S::count];
    for (int v = 0; v < S::count; ++v) grad[v] = load<S::L>(grad_out + v * S::L);
    for_points(grid, run, [&](Block<A>& block, int64_t k, const GridBlock<A>& same) {
        const auto add = [&](const V* const(&row)[4], A* const(&to)[4]) {
            if (want_dots) {
                typename S::Lanes product[4];
                for (int i = 0; i < 4; ++i) {
                    product[i] = grad[0] * load<S::L>(row[i]);
                    for (int v = 1; v < S::count; ++v)
                        product[i] += grad[v] * load<S::L>(row[i] + v * S::L);
                }
                partial_sums<S::L>(product, block.partial[k][0], first);
            }
            if (!want_value) return;
            for (int i = 0; i < 4; ++i) {
                const A c = block.coefficient[i][k];
                for (int v = 0; v < S::count; ++v)
                    store<S::L>(to[i] + v * S::L, load<S::L>(to[i] + v * S::L) + c * grad[v]);
            }
        };
        const V* const top = channels + block.position[k] * pixel_stride;
        const V* const bottom = top + same.width[k] * pixel_stride;
        A* const grad_top = grad_channels + block.position[k] * grad_stride;
        A* const grad_bottom = grad_top + same.width[k] * grad_stride;
        const int legal = block.legal[k];
        if (__builtin_expect(legal == 15, 1)) {
            add({top, top + pixel_stride, bottom, bottom + pixel_stride},
                {grad_top, grad_top + grad_stride, grad_bottom, grad_bottom + grad_stride});
        } else if (legal) {
            const V* const zeros = reinterpret_cast<const V*>(kZeros);
            add({legal & 1 ? top : zeros, legal & 2 ? top + pixel_stride : zeros,
                 legal & 4 ? bottom : zeros, legal & 8 ? bottom + pixel_stride : zeros},
                {legal & 1 ? grad_top : unwanted, legal & 2 ? grad_top + grad_stride : unwanted,
                 legal & 4 ? grad_bottom : unwanted,
                 legal & 8 ? grad_bottom + grad_stride : unwanted});
        }
    });
}

// Call f(c, N) for spans of N channels from c on that make up all of them.
template <typename V, typename F>
void for_spans(int64_t depth, F&& f) {
    int64_t c = 0;
    if constexpr (!std::is_same<V, double>::value) {
        for (; depth - c >= 32; c += 32) f(c, std::integral_constant<int, 32>());
    }
    for (; depth - c >= 16; c += 16) f(c, std::integral_constant<int, 16>());
    if (depth - c >= 8) f(c, std::integral_constant<int, 8>()), c += 8;
    if (depth - c >= 4) f(c, std::integral_constant<int, 4>()), c += 4;
    for (; c < depth; ++c) f(c, std::integral_constant<int, 1>());
}

// Gradients of offsets and weights of groups [g, g + groups) of a pixel, from the partial sums.
template <typename A>
__attribute__((noinline)) void finish(const Problem& p, const Grid<A>& grid, const Pixel& pixel,
                                      int64_t g, int64_t groups, Points<A>& s) {
    const int64_t count = grid.count;
    A *const grad_offsets = s.offsets, *const grad_weights = s.weights;
    constexpr int L = kBytes / int(sizeof(A)) < 4 ? 4 : kBytes / int(sizeof(A));
    using Lanes = std::make_integer_sequence<int, L>;
    for (int64_t b = 0; b < groups * grid.run; ++b) {
        Block<A>& block = s.blocks[b];
        for (int64_t k = 0; k < std::min(kBlock, count - b % grid.run * kBlock); k += 4) {
            for (int i = 0; i < 4; i += L / 4) {
                const auto at = [&](int64_t point) { return load<L>(block.partial[k + point][i]); };
                const Vector<A, L> sums = fold<1>(fold<2>(at(0), at(2), Lanes()),
                                                  fold<2>(at(1), at(3), Lanes()), Lanes());
                for (int corner = 0; corner < L / 4; ++corner)
                    std::memcpy(&block.coefficient[i + corner][k],
                                reinterpret_cast<const A*>(&sums) + 4 * corner, 4 * sizeof(A));
            }
        }
    }
    for (int64_t j = 0; j < groups; ++j) {
        const Block<A>* const run = s.blocks + j * grid.run;
        for (int64_t b = 0; b < grid.run; ++b) {
            const GridBlock<A>& same = grid.blocks[b];
            const Block<A>& block = run[b];
            A *const offsets = grad_offsets + 2 * b * kBlock;
            A *const weights = grad_weights + b * kBlock;
#pragma omp simd
            for (int64_t k = 0; k < kBlock; ++k) {
                // At an illegal corner the sum is none: 0 times an infinite gradient is no 0.
                const int legal = block.legal[k];
                const A(&sum)[4][kBlock] = block.coefficient;
                const A dot[4] = {legal & 1 ? sum[0][k] : A(0), legal & 2 ? sum[1][k] : A(0),
                                  legal & 4 ? sum[2][k] : A(0), legal & 8 ? sum[3][k] : A(0)};
                const PointGradient<A> grad = coefficients_backward(
                    dot, block.weight[k], block.fraction_x[k], block.fraction_y[k]);
                offsets[2 * k] = legal ? grad.x * same.scale_x[k] : A(0);
                offsets[2 * k + 1] = legal ? grad.y * same.scale_y[k] : A(0);
                weights[k] = grad.weight;
            }
        }
        if (p.softmax) {
            const A mean = sum_of<A>(count, [=](int64_t k) {
                return grad_weights[k] * run[k / kBlock].weight[k % kBlock];
            });
            for (int64_t k = 0; k < grid.run * kBlock; ++k)
                grad_weights[k] =
                    softmax_backward(grad_weights[k], run[k / kBlock].weight[k % kBlock], mean);
        }
        write(p.grad_offsets, p.grad_offsets.at(pixel.image, pixel.row, pixel.column, g + j),
              2 * count, s.raw_offsets, grad_offsets);
        write(p.grad_weights, p.grad_weights.at(pixel.image, pixel.row, pixel.column, g + j),
              count, s.raw_weights, grad_weights);
    }
}

// Run f(task, scratch) for every task. One thread never touches OpenMP; a forked child must not use
// the pool of its parent, which it did not inherit.
template <typename A, typename F>
void parallel(const Problem& p, int64_t threads, int64_t tasks, const Grid<A>& grid, F&& f) {
    std::atomic<int64_t> next{0};
    std::vector<Points<A>> scratch;
    threads = std::max<int64_t>(1, threads);
    scratch.reserve(threads);
    for (int64_t i = 0; i < threads; ++i) scratch.emplace_back(grid);
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

// Call f(g, n) for batches of n groups from g on that make up [first, last).
template <typename A, typename F>
void for_groups(const Grid<A>& grid, int64_t first, int64_t last, F&& f) {
    for (int64_t g = first; g < last; g += grid.batch) f(g, std::min(grid.batch, last - g));
}

// Visit output pixels [first, last) of one image, in order.
template <typename F>
void for_pixels(const Problem& p, int64_t image, int64_t first, int64_t last, F&& f) {
    Pixel pixel{image, first / p.columns, first % p.columns};
    for (int64_t i = first; i < last; ++i) {
        f(pixel);
        if (++pixel.column == p.columns) pixel.column = 0, ++pixel.row;
    }
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
    parallel<A>(p, threads, p.images * pieces, grid, [&](int64_t task, Points<A>& s) {
        const int64_t image = task / pieces, first = task % pieces * size;
        for_pixels(p, image, first, std::min(first + size, per_image), [&](const Pixel& at) {
            for_groups(grid, 0, p.groups, [&](int64_t g, int64_t groups) {
                place(p, grid, at, g, groups, s);
                const V* value = (const V*)p.value.data + p.value.at(image, 0, 0, g);
                V* out = (V*)p.output.data + p.output.at(image, at.row, at.column, g);
                for (int64_t j = 0; j < groups; ++j) {
                    for_spans<V>(p.depth, [&](int64_t c, auto n) {
                        gather<V, decltype(n)::value>(value + c, p.value.column, grid,
                                                      s.blocks + j * grid.run, out + c);
                    });
                    value += p.value.group, out += p.output.group;
                }
            });
        });
    });
}

template <typename V, typename A>
void backward_placed(const Problem& p, const Grid<A>& grid, const Pixel& at, int64_t g,
                     int64_t groups, Points<A>& s, bool want_dots, bool want_value) {
    A* const unwanted = s.unwanted;
    for (int64_t j = 0; j < groups; ++j) {
        const V* const value = (const V*)p.value.data + p.value.at(at.image, 0, 0, g + j);
        const V* const grad_out =
            (const V*)p.output.data + p.output.at(at.image, at.row, at.column, g + j);
        A* const grad_value =
            (A*)p.grad_value.data + p.grad_value.at(at.image, 0, 0, g + j);
        for_spans<V>(p.depth, [&](int64_t c, auto n) {
            spread<V, decltype(n)::value>(value + c, p.value.column, grad_value + c,
                                          p.grad_value.column, grid, s.blocks + j * grid.run,
                                          unwanted, grad_out + c, c == 0, want_dots, want_value);
        });
    }
    if (want_dots) finish(p, grid, at, g, groups, s);
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
    const int64_t owners = p.images * p.groups;
    if (owners * per_image == 0) return;
    if (owners >= 3 * threads || owners % threads == 0) {
        // Neighbouring groups share cache lines and pages: a task takes as many as leave every
        // thread busy.
        const int64_t wanted = threads == 1 ? 1 : (2 * threads + p.images - 1) / p.images;
        const int64_t blocks = std::min(p.groups, wanted);
        parallel<A>(p, threads, p.images * blocks, grid, [&](int64_t task, Points<A>& s) {
            const int64_t first = p.groups * (task % blocks) / blocks;
            const int64_t last = p.groups * (task % blocks + 1) / blocks;
            for_pixels(p, task / blocks, 0, per_image, [&](const Pixel& at) {
                for_groups(grid, first, last, [&](int64_t g, int64_t groups) {
                    place(p, grid, at, g, groups, s);
                    backward_placed<V>(p, grid, at, g, groups, s, true, true);
                });
            });
        });
        return;
    }

    // Too few owners: first everything but the value's gradient, noting what each run of pixels
    // reaches; then the value's gradient in bands, each going over the runs that reach it.
    const int64_t run = std::max<int64_t>(8, std::min<int64_t>(p.columns, 64));
    const int64_t runs = (per_image + run - 1) / run;
    std::vector<Reach> reach(owners * runs * p.levels);
    parallel<A>(p, threads, p.images * runs, grid, [&](int64_t task, Points<A>& s) {
        const int64_t image = task / runs, first = task % runs * run;
        const auto of = [&](int64_t g) {
            return &reach[((image * p.groups + g) * runs + task % runs) * p.levels];
        };
        for (int64_t g = 0; g < p.groups; ++g)
            for (int64_t l = 0; l < p.levels; ++l) of(g)[l] = {INT64_MAX, INT64_MIN};
        for_pixels(p, image, first, std::min(first + run, per_image), [&](const Pixel& at) {
            for_groups(grid, 0, p.groups, [&](int64_t g, int64_t groups) {
                place(p, grid, at, g, groups, s);
                for (int64_t j = 0; j < groups; ++j) {
                    for (int64_t k = 0; k < grid.count; ++k) {
                        const Block<A>& block = s.blocks[j * grid.run + k / kBlock];
                        if (!block.legal[k % kBlock]) continue;
                        Reach& level = of(g + j)[k / p.points];
                        const int64_t position = block.position[k % kBlock];
                        const int64_t width = grid.blocks[k / kBlock].width[k % kBlock];
                        level.first = std::min(level.first, position);
                        level.last = std::max(level.last, position + width + 1);
                    }
                }
                backward_placed<V>(p, grid, at, g, groups, s, true, false);
            });
        });
    });
    const int64_t bands = std::min(p.pixels, (4 * threads + owners - 1) / owners);
    parallel<A>(p, threads, owners * bands, grid, [&](int64_t task, Points<A>& s) {
        const int64_t owner = task / bands, band = task % bands;
        const int64_t image = owner / p.groups, g = owner % p.groups;
        const int64_t low = p.pixels * band / bands, high = p.pixels * (band + 1) / bands;
        for (int64_t i = 0; i < runs; ++i) {
            const Reach* const touched = &reach[(owner * runs + i) * p.levels];
            if (std::none_of(touched, touched + p.levels,
                             [&](const Reach& r) { return r.first < high && r.last >= low; }))
                continue;
            for_pixels(p, image, i * run, std::min((i + 1) * run, per_image),
                       [&](const Pixel& at) {
                           place(p, grid, at, g, 1, s);
                           restrict_to(s, grid, 1, low, high);
                           backward_placed<V>(p, grid, at, g, 1, s, false, true);
                       });
        }
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
