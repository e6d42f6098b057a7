// The points of a batch of slices, one after another in the lanes of vectors: what is the same for
// every batch (`Grid`), where the points lie and what their corners count (`place`), and which
// slices make up a batch (`for_batches`). A slice is one (pixel, group).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

#include "../include/sampling.h"
#include "records.h"
#include "vectors.h"

namespace dcnv4 {
namespace {

// A problem of one call. Both operators are the same one: they differ in where their points lie.
struct Work : Problem {
    Call call;
};

// The first number of a slice in a tensor, or of a pixel of the value.
int64_t index_of(const View& view, int64_t image, int64_t row, int64_t column, int64_t group) {
    return image * view.image + row * view.row + column * view.column + group * view.group;
}

// The numbers of a tensor that are read as slices.
struct Numbers {
    Numbers(const Work& p, const View& view, const char* data, int64_t of_slice)
        : data(data), dtype(view.dtype),
          end(of_slice + index_of(view, p.images - 1, p.rows - 1, p.columns - 1, p.groups - 1)) {}

    const char* data;
    Dtype dtype;
    int64_t end;  // one past the last
};

// Loops over points take this many lanes at a time; arrays over points are padded to whole blocks.
constexpr int64_t kBlock = 16;
// A batch is so many points, or one slice's where it has more: they stay in the first cache.
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

// What is the same for every batch, point by point: as the slices' points repeat, so does this.
template <typename A>
struct Grid {
    Grid(const Work& p, const Point* points)
        : count(p.levels * p.points), slices(std::max<int64_t>(1, kBatch / count)),
          size(padded(slices * count) + kBlock),
          offsets(p, p.offsets, p.call.offsets, 2 * count),
          weights(p, p.weights, p.call.weights, count), base(2 * size), scale(2 * size),
          shift(2 * size), height(size), width(size), start(size), below(size) {
        for (int64_t n = 0; n < size; ++n) {
            const Point& point = points[n % count];
            base[2 * n] = A(point.x);
            base[2 * n + 1] = A(point.y);
            scale[2 * n] = A(point.scale_x);
            scale[2 * n + 1] = A(point.scale_y);
            shift[2 * n] = shift[2 * n + 1] = A(p.shift);
            height[n] = int(point.height);
            width[n] = int(point.width);
            start[n] = point.start;
            below[n] = point.width * p.value.column;
        }
    }

    int64_t count, slices;  // points of a slice, slices of a batch
    int64_t size;  // points of a batch, and a block more: a slice's last block may end there
    Numbers offsets, weights;
    Array<A> base, scale, shift;  // x and y in turn
    Array<int> height, width;
    Array<int64_t> start;
    Array<int64_t> below;  // from a row of the value to the next, in elements
};

// An output pixel's group: K points, which follow those of the slice before.
struct Slice {
    int64_t row, column, group;
    int64_t value, offsets, weights, output;  // its first element in these; of the image in value
};

// A thread's scratch: the points of a batch.
template <typename A>
struct Points {
    explicit Points(const Work& p, const Grid<A>& grid, int64_t sums)
        : slices(grid.slices), pairs(2 * grid.size), scale(p.reference_numbers ? 2 * grid.size : 0),
          shift(p.reference_numbers ? 2 * grid.size : 0), origin_x(grid.size), origin_y(grid.size),
          weight(grid.size), fraction_x(grid.size), fraction_y(grid.size), position(grid.size),
          legal(grid.size), coefficient(4 * grid.size), partial(16 * grid.size),
          grad_weight(grid.size), raw(2 * padded(2 * grid.count)),
          numbers(padded(2 * grid.count)), sums(sums), unwanted(64) {
        for (auto& sum : dot) sum = Array<A>(grid.size);
    }

    Array<Slice> slices;
    Array<A> pairs;  // pixels from the origin, x and y in turn; then their gradients
    Array<A> scale, shift;  // as of the grid, where they are the slices' own
    Array<int> origin_x, origin_y;  // pixel of the value at the centre of its slice; 0 for queries
    Array<A> weight;                // what each point counts
    Array<A> fraction_x, fraction_y;
    Array<int64_t> position;  // of the top left corner in the value, in pixels
    Array<int> legal;
    bool whole;            // whether all corners are
    Array<A> coefficient;  // [4]; 0 at illegal corners
    Array<A> partial;      // [4][4]: partial sums of the gradients of the coefficients
    Array<A> dot[4] = {Array<A>(0), Array<A>(0), Array<A>(0), Array<A>(0)};  // the sums
    Array<A> grad_weight;
    Array<double> raw;  // of any dtype, as they are in memory
    Array<A> numbers;   // of one slice
    Array<A> sums;      // a block of the gradient of the value
    Array<A> unwanted;  // gradient of what is not there
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
__attribute__((always_inline)) inline const A* read(const Numbers& numbers, int64_t at,
                                                    int64_t count, double* raw, A* to) {
    const bool is_half = numbers.dtype == bfloat16 || numbers.dtype == float16;
    const int64_t size = is_half ? 2 : sizeof(A);
    const void* from = numbers.data + at * size;
    const bool at_end = __builtin_expect(at + padded(count) > numbers.end, 0);
    if (at_end) from = std::memcpy(raw, from, count * size);
    if constexpr (std::is_same<A, float>::value) {
        if (numbers.dtype == bfloat16)
            return convert(static_cast<const bfloat*>(from), count, to), to;
        if (numbers.dtype == float16) return convert(static_cast<const half*>(from), count, to), to;
    }
    return static_cast<const A*>(from);
}

// `from` holds whole blocks.
template <typename A>
void write(char* to, Dtype dtype, int64_t at, const A* from, int64_t count, double* raw) {
    if (dtype != bfloat16 && dtype != float16)
        return copy(from, count, reinterpret_cast<A*>(to) + at);
    if constexpr (std::is_same<A, float>::value) {
        if (dtype == bfloat16) {
            convert(from, count, reinterpret_cast<bfloat*>(raw));
        } else {
            convert(from, count, reinterpret_cast<half*>(raw));
        }
        copy(reinterpret_cast<uint16_t*>(raw), count, reinterpret_cast<uint16_t*>(to) + at);
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

// Scale and shift of the points of the first `slices`, which start from their query's reference.
template <typename A>
__attribute__((noinline)) void refer(const Work& p, const Grid<A>& grid, int64_t image,
                                     int64_t slices, Points<A>& s) {
    const bool boxes = p.reference_numbers == 4;
    const int64_t numbers = 2 * grid.count;
    A *scale = s.scale, *shift = s.shift;
    for (int64_t u = 0; u < slices; ++u, scale += numbers, shift += numbers) {
        const Slice& at = s.slices[u];
        if (u > 0 && at.column == s.slices[u - 1].column) {
            copy(scale - numbers, numbers, scale);
            copy(shift - numbers, numbers, shift);
            continue;
        }
        const A* from = reinterpret_cast<const A*>(p.call.reference) +
                        index_of(p.reference, image, at.row, at.column, 0);
        for (int64_t n = 0; n < grid.count; ++n) {
            if (n > 0 && n % p.points == 0) from += p.reference.group;
            const A size[2] = {A(grid.width[n]), A(grid.height[n])};
            for (int axis = 0; axis < 2; ++axis) {
                const int64_t i = 2 * n + axis;
                scale[i] = boxes ? grid.scale[i] * from[2 + axis] : grid.scale[i];
                shift[i] = rounded(from[axis] * size[axis]) + grid.shift[i];
            }
        }
    }
}

// The points of the first `slices` of an image.
template <typename A>
__attribute__((noinline)) void place(const Work& p, const Grid<A>& grid, int64_t image,
                                     int64_t slices, Points<A>& s) {
    constexpr int L = kBytes / int(sizeof(A));
    const int64_t count = grid.count;
    const bool refers = p.reference_numbers != 0;
    if (refers) refer(p, grid, image, slices, s);
    const A* const base = grid.base;
    const A *scale = refers ? s.scale : grid.scale, *shift = refers ? s.shift : grid.shift;
    const int64_t step = refers ? 2 * count : 0;  // from a slice's to the next one's
    A *const pairs = s.pairs, *const weight = s.weight, *const numbers = s.numbers;
    double* const raw = s.raw;
    const Numbers all_offsets = grid.offsets, all_weights = grid.weights;
    const Slice *const first = s.slices, *const last = first + slices;
    // Every slice writes whole blocks; what is beyond its points is the next slice's to overwrite.
    // Two loops and copies of what they read, so that all of it stays in registers.
    A* to = pairs;
    for (const Slice* at = first; at < last;
         ++at, to += 2 * count, scale += step, shift += step) {
        const A* const offsets = read<A>(all_offsets, at->offsets, 2 * count, raw, numbers);
        // Coordinates are those of geometry.py to the bit.
        for (int64_t i = 0; i < 2 * count; i += L)
            store<L>(to + i,
                     rounded(load<L>(scale + i) * (load<L>(base + i) + load<L>(offsets + i))) +
                         load<L>(shift + i));
    }
    to = weight;
    for (const Slice* at = first; at < last; ++at, to += count) {
        const A* const weights = read<A>(all_weights, at->weights, count, raw, numbers);
        if (p.softmax) {
            softmax<A>(weights, count, to);
        } else {
            for (int64_t i = 0; i < count; i += L) store<L>(to + i, load<L>(weights + i));
        }
    }
    const int *const height = grid.height, *const width = grid.width;
    const int *const origin_x = s.origin_x, *const origin_y = s.origin_y;
    const int64_t* const start = grid.start;
    A *const fraction_x = s.fraction_x, *const fraction_y = s.fraction_y;
    A* const coefficient = s.coefficient;
    int64_t* const position = s.position;
    int* const legal = s.legal;
    for (int64_t block = 0; block < slices * count; block += kBlock) {
#pragma omp simd
        for (int64_t n = block; n < block + kBlock; ++n) {
            const Corners<A> c = corners(origin_x[n], origin_y[n], pairs[2 * n],
                                         pairs[2 * n + 1], height[n], width[n]);
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
    s.whole = are_whole(legal, slices * count);
}

// Place groups [first_group, last_group) of output pixels [first, last) of one image, in order, a
// batch at a time, and call f(slices) after each.
template <typename A, typename F>
void for_batches(const Work& p, const Grid<A>& grid, int64_t image, int64_t first, int64_t last,
                 int64_t first_group, int64_t last_group, Points<A>& s, F&& f) {
    if (first >= last) return;
    using Pixels = Vector<int, kBlock>;
    const int64_t count = grid.count;
    const auto first_slice = [&](int64_t row, int64_t column) {
        return Slice{row, column, first_group, index_of(p.value, image, 0, 0, first_group),
                     index_of(p.offsets, image, row, column, first_group),
                     index_of(p.weights, image, row, column, first_group),
                     index_of(p.output, image, row, column, first_group)};
    };
    Slice next = first_slice(first / p.columns, first % p.columns);
    for (int64_t left = (last - first) * (last_group - first_group); left > 0;) {
        const int64_t slices = std::min(left, grid.slices);
        int *origin_x = s.origin_x, *origin_y = s.origin_y;
        for (int64_t u = 0; u < slices;) {
            const int64_t before = u;
            for (; u < slices && next.group < last_group; ++next.group) {
                s.slices[u++] = next;
                next.value += p.value.group;
                next.offsets += p.offsets.group;
                next.weights += p.weights.group;
                next.output += p.output.group;
            }
            if (p.step_x != 0) {
                const auto x = Pixels{} + int(p.origin_x + p.step_x * next.column);
                const auto y = Pixels{} + int(p.origin_y + p.step_y * next.row);
                const int64_t points = (u - before) * count;
                for (int64_t n = 0; n < points; n += kBlock) {
                    store<kBlock>(origin_x + n, x);
                    store<kBlock>(origin_y + n, y);
                }
                origin_x += points;
                origin_y += points;
            }
            if (next.group < last_group) continue;
            const bool ends = next.column + 1 == p.columns;
            next = first_slice(next.row + ends, ends ? 0 : next.column + 1);
        }
        place(p, grid, image, slices, s);
        f(slices);
        left -= slices;
    }
}

}  // namespace
}  // namespace dcnv4
