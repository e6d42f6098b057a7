// Both operators and their gradients on a CPU, as one: for every output pixel and group,
//
//     out[D] = sum_k w_k * bilinear(value; x_k, y_k)
//     x_k = origin_x + scale_x * (base_x + offset_x) + shift
//
// A convolution is one level whose points have a base, the kernel's grid, and an origin, the pixel
// at the centre of the window: an integer that only the floor of the rest is added to, so that no
// precision is lost where it is large. An attention's points have neither; their scale is the size
// of their level and their shift -1/2, or both come from the query's reference point.
//
// Work. Every thread takes pieces of output pixels from a counter. A slice, one (pixel, group), has
// K points; those of a batch of slices lie one after another in the lanes of vectors, so that few
// lanes are idle: coordinates, corners and coefficients are computed lane by lane (`place`), then
// the D channels are summed in registers, point after point (`gather`). A batch with a corner
// outside the image reads zeros there, by other code than one without. Backwards,
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
#include <cstdint>
#include <new>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>

#include "points.h"
#include "vectors.h"

namespace dcnv4 {
namespace {

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

// Sum the points of each of the first slices; `whole` where all their corners are legal.
template <bool whole, typename S, typename A>
__attribute__((noinline)) void gather(const Work& p, const Grid<A>& grid, const Points<A>& s,
                                      int64_t slices, const S span) {
    using V = typename S::V;
    const auto zeros = reinterpret_cast<const V*>(kZeros);
    const V* const value = (const V*)p.call.value + span.first;
    V* const output = (V*)p.call.output + span.first;
    const Slice *const first = s.slices, *const last = first + slices;
    const int64_t* position = s.position;
    const int* legal = s.legal;
    const A* coefficient = s.coefficient;
    const int64_t* const grid_below = grid.below;
    const int64_t stride = p.value.column, count = grid.count;
    // Sums that do not wait for each other.
    constexpr int chains = S::count < 4 ? 4 / S::count : 1;
    for (const Slice* at = first; at < last; ++at) {
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
__attribute__((noinline)) void spread(const Work& p, const Grid<A>& grid, Points<A>& s,
                                      int64_t slices, const Sums<A>* sums, bool want_dots,
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
    for (int64_t u = 0; u < slices; ++u) {
        const Slice& at = s.slices[u];
        const V* const channels = (const V*)p.call.value + at.value + span.first;
        const V* const grad_out = (const V*)p.call.output + at.output + span.first;
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

// Gradients of offsets and weights of the first slices, from the partial sums.
template <typename A>
__attribute__((noinline)) void finish(const Work& p, const Grid<A>& grid, int64_t image,
                                      int64_t slices, Points<A>& s) {
    const int64_t count = grid.count, points = slices * count;
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
    const A *const weight = s.weight;
    const A* const scale = p.reference_numbers ? s.scale : grid.scale;
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
    for (int64_t u = 0; u < slices; ++u) {
        const Slice& at = s.slices[u];
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
        write(p.call.grad_offsets, p.grad_offsets.dtype,
              index_of(p.grad_offsets, image, at.row, at.column, at.group),
              pairs + 2 * u * count, 2 * count, s.raw);
        write(p.call.grad_weights, p.grad_weights.dtype,
              index_of(p.grad_weights, image, at.row, at.column, at.group), grads, count, s.raw);
    }
}

// Run f(task, scratch) for every task. One thread never touches OpenMP; a forked child must not use
// the pool of its parent, which it did not inherit.
template <typename A, typename F>
void parallel(const Work& p, int64_t threads, int64_t tasks, const Grid<A>& grid,
              int64_t sums, F&& f) {
    std::atomic<int64_t> next{0};
    std::vector<Points<A>> scratch;
    threads = std::max<int64_t>(1, threads);
    scratch.reserve(threads);
    for (int64_t i = 0; i < threads; ++i) scratch.emplace_back(p, grid, sums);
    std::atomic<int64_t> arrived{0};
    const auto work = [&] {
        Points<A>& mine = scratch[arrived++];
        for (int64_t task; (task = next++) < tasks;) f(task, mine);
    };
    if (threads == 1) return work();
#ifdef _OPENMP
    if (!p.call.forked) {
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
int64_t threads_for(const Work& p, const Grid<A>& grid) {
    const double work = double(p.images) * double(p.rows) * double(p.columns) * double(p.groups) *
                        double(grid.count) * double(p.depth + 16) * 4;
    return work < kSmall ? 1 : p.call.threads;
}

template <typename V>
void forward(const Work& p, const Point* points) {
    using A = typename Accumulator<V>::type;
    const Grid<A> grid(p, points);
    const int64_t per_image = p.rows * p.columns, threads = threads_for(p, grid);
    if (p.images * per_image == 0) return;
    const int64_t wanted = (8 * threads + p.images - 1) / p.images;
    const int64_t size = std::max<int64_t>(1, (per_image + wanted - 1) / wanted);
    const int64_t pieces = (per_image + size - 1) / size;
    parallel<A>(p, threads, p.images * pieces, grid, 0, [&](int64_t task, Points<A>& s) {
        const int64_t image = task / pieces, first = task % pieces * size;
        const int64_t last = std::min(first + size, per_image);
        for_batches(p, grid, image, first, last, 0, p.groups, s, [&](int64_t slices) {
            for_spans<V>(p.depth, [&](auto span) {
                s.whole ? gather<true>(p, grid, s, slices, span)
                        : gather<false>(p, grid, s, slices, span);
            });
        });
    });
}

// Whether the sums of so many groups lie in the gradient of the value as they would in the scratch.
template <typename V, typename A>
bool is_in_place(const Work& p, int64_t groups) {
    return std::is_same<V, A>::value && spanned(p.depth) == p.depth &&
           groups * p.depth == p.grad_value.column;
}

// Call f(sums) for the zeroed sums of a block of the gradient of the value, and see that they
// become it: they are summed in the tensor where they lie there as they would in the scratch.
template <typename V, typename A, typename F>
void with_sums(const Work& p, int64_t image, Sums<A> sums, F&& f) {
    V* const to =
        (V*)p.call.grad_value + index_of(p.grad_value, image, 0, sums.low, sums.first_group);
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
void backward(const Work& p, const Point* points) {
    using A = typename Accumulator<V>::type;
    const Grid<A> grid(p, points);
    const int64_t per_image = p.rows * p.columns, threads = threads_for(p, grid);
    const int64_t owners = p.images * p.groups, depth = spanned(p.depth);
    const auto spread_all = [&](Points<A>& s, int64_t image, int64_t slices, const Sums<A>* sums,
                                bool want_dots) {
        for_spans<V>(p.depth, [&](auto span) {
            spread(p, grid, s, slices, sums, want_dots, span);
        });
        if (want_dots) finish(p, grid, image, slices, s);
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
                            [&](int64_t slices) { spread_all(s, image, slices, &sums, true); });
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
        for_batches(p, grid, image, first, last, 0, p.groups, s, [&](int64_t slices) {
            for (int64_t n = 0; n < slices * grid.count; ++n) {
                if (!s.legal[n]) continue;
                const int64_t owner = image * p.groups + s.slices[n / grid.count].group;
                const int64_t level = n % grid.count / p.points;
                Reach& touched = reach[(owner * runs + task % runs) * p.levels + level];
                touched.first = std::min(touched.first, s.position[n]);
                touched.last = std::max(touched.last, s.position[n] + grid.width[n] + 1);
            }
            spread_all(s, image, slices, nullptr, true);
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
                for_batches(p, grid, image, i * run, last, g, g + 1, s, [&](int64_t slices) {
                    restrict_to(s, grid, slices * grid.count, sums.low, sums.high);
                    spread_all(s, image, slices, &sums, false);
                });
            }
        });
    });
}

template <typename F>
int run(const Problem& problem, const Call& call, const F& f) {
    Work p{problem, call};
    // An empty value has no memory to point to, and no point reads it.
    if (p.pixels == 0) p.call.value = p.call.grad_value = const_cast<char*>(kZeros);
    try {
        f(p);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace
}  // namespace dcnv4

using namespace dcnv4;

#ifdef _WIN32
#define DCNV4_EXPORT extern "C" __declspec(dllexport)
#else
#define DCNV4_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Both return 0, or 1 where memory ran out. `points` are those of a slice.
DCNV4_EXPORT int dcnv4_forward(const Problem* problem, const Point* points, const Call* call) {
    return run(*problem, *call, [=](const Work& p) {
        switch (p.value.dtype) {
            case float64: return forward<double>(p, points);
            case float32: return forward<float>(p, points);
            case bfloat16: return forward<bfloat>(p, points);
            case float16: return forward<half>(p, points);
        }
    });
}

DCNV4_EXPORT int dcnv4_backward(const Problem* problem, const Point* points, const Call* call) {
    return run(*problem, *call, [=](const Work& p) {
        switch (p.value.dtype) {
            case float64: return backward<double>(p, points);
            case float32: return backward<float>(p, points);
            case bfloat16: return backward<bfloat>(p, points);
            case float16: return backward<half>(p, points);
        }
    });
}
