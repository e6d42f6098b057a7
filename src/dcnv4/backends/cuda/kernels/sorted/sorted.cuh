// Gradients of a block's slices, what they add to one pixel summed before it goes to memory.
//
// A block holds SLICES neighbouring slices of one image and group, LANES threads each. The legal
// corners of all their points are sorted by pixel, in shared memory:
//   1. every corner counts itself in the bucket of its pixel, and learns how many came before;
//   2. every bucket gets as many places in the list as it counted;
//   3. every corner writes what it counts, its pixel and its slice to its place;
//   4. LANES threads at a time walk an equal part of the list. Within a run of one pixel they hold
//      the pixel's channels and the sum of its gradient in registers, so that both cross memory
//      once a run. Each corner costs them one read of its slice's output gradient, from shared
//      memory; its dot product with the pixel takes the corner's place in the list, where
//   5. the threads that know the point find it, and make the point's gradients of it.
// Buckets are pixels modulo a few rows and columns: pixels that share one cost time, being runs
// that interrupt each other, and nothing else. So no window is cut out and no point is too far,
// sums are in float32 whatever they are of, or in integers where they shall not depend on the
// order, and what is not finite goes where it goes in `scatter`.
#pragma once

#include <common/backward.cuh>

namespace dcnv4 {

constexpr int SLICES = BLOCK_COLUMNS * BLOCK_ROWS;  // a power of two
constexpr int THREADS = SLICES * LANES;
constexpr int CHANNELS = DEPTH / LANES;  // of a thread: VECTOR neighbours, LANES * VECTOR on others

// Points are sorted in passes of MOST_ROUNDS rounds at most: a thread keeps what it knows of its
// points in registers, and where an SM shall hold more threads it has fewer of those. Every level
// that a pass has points of gets buckets of its own, up to 4.
constexpr int PASS_LEVELS = (MOST_ROUNDS * LANES * LEVELS + POINTS - 1) / POINTS;
constexpr int MOST_LEVELS = LEVELS < 4 ? LEVELS : 4;
constexpr int BUCKET_LEVELS = PASS_LEVELS < MOST_LEVELS ? PASS_LEVELS : MOST_LEVELS;
constexpr int BUCKET_ROWS = LEVELS > 1 ? 16 : 32, BUCKET_COLUMNS = 32;
constexpr int LEVEL_BUCKETS = BUCKET_ROWS * BUCKET_COLUMNS;
constexpr int BUCKETS = LEVEL_BUCKETS * BUCKET_LEVELS;

constexpr int BATCH = 2;  // corners that a thread has under way at once
// The list fits in 48 KB with all else. It ends in corners that count nothing, so that the parts
// into which it is cut are alike.
constexpr int SPARE = SLICES * BATCH, STRETCH = 64;
constexpr int OTHER_BYTES = THREADS * CHANNELS * sizeof(VALUE) + BUCKETS * 4 + (1 << 10);
constexpr int LIST = ((48 << 10) - OTHER_BYTES) / (STRETCH + 2) * STRETCH / 8;  // corners that fit
constexpr int FITTING = (LIST - SPARE) / (4 * THREADS);
constexpr int AT_ONCE = FITTING < MOST_ROUNDS ? FITTING : MOST_ROUNDS;
constexpr int PASSES = (ROUNDS + AT_ONCE - 1) / AT_ONCE, PASS = (ROUNDS + PASSES - 1) / PASSES;
constexpr int CORNERS = PASS * 4 * THREADS + SPARE;

static_assert((SLICES & (SLICES - 1)) == 0 && THREADS % 32 == 0, "whole warps, keys by shifts");
static_assert(CHANNELS * LANES == DEPTH && CHANNELS % VECTOR == 0, "no lane may be idle");
static_assert(AT_ONCE > 0 && BUCKETS % THREADS == 0, "as the code below assumes");

// A thread's channels of a pixel or slice, as they are stored: the first words of its vectors, then
// the second ones.
struct Held {
    static constexpr int vectors = CHANNELS / VECTOR;
    static constexpr int words = vectors * Channels::words, quads = words / 4;
    unsigned word[words];

    DCNV4_DEVICE Sum operator[](int c) const {
        Channels vector;
#pragma unroll
        for (int w = 0; w < Channels::words; ++w) vector.word[w] = word[w * vectors + c / VECTOR];
        return vector[c % VECTOR];
    }
    // `first` is the first of the thread's channels.
    static DCNV4_DEVICE Held load(const VALUE* first) {
        Held out;
#pragma unroll
        for (int v = 0; v < vectors; ++v) {
            const Channels vector = Channels::load(first + v * (LANES * VECTOR));
#pragma unroll
            for (int w = 0; w < Channels::words; ++w) out.word[w * vectors + v] = vector.word[w];
        }
        return out;
    }
};
static_assert(Held::words % 4 == 0, "whole vectors of 16 bytes");

struct alignas(8) Corner {
    Sum share;     // what it counts; once the list is walked, its dot product
    unsigned key;  // pixel * SLICES + slice
    DCNV4_DEVICE unsigned pixel() const { return key / SLICES; }
};

// Where a point's corners lie in the list, two to a word.
struct Places {
    unsigned word[2];
    DCNV4_DEVICE unsigned operator[](int i) const { return word[i / 2] >> i % 2 * 16 & 0xffff; }
};
static_assert(CORNERS < 1 << 15, "places of 16 bits");

// What a block shares.
struct Sorted {
    uint4 grad[Held::quads][THREADS];  // the output's gradient, of each thread's channels
    // In stretches, with two corners to spare lest all walk in the same banks.
    alignas(16) Corner list[(CORNERS + STRETCH - 1) / STRETCH * (STRETCH + 2)];
    unsigned bucket[BUCKETS];  // how many it holds, then where they begin
    unsigned total;

    static DCNV4_DEVICE unsigned padded(unsigned place) { return place + place / STRETCH * 2; }

    DCNV4_DEVICE void store_grad(const Held& own) {
#pragma unroll
        for (int q = 0; q < Held::quads; ++q)
            grad[q][threadIdx.x] = make_uint4(own.word[4 * q], own.word[4 * q + 1],
                                              own.word[4 * q + 2], own.word[4 * q + 3]);
    }
    DCNV4_DEVICE Held load_grad(unsigned thread) const {
        Held out;
#pragma unroll
        for (int q = 0; q < Held::quads; ++q) {
            const uint4 quad = grad[q][thread];
            out.word[4 * q] = quad.x, out.word[4 * q + 1] = quad.y;
            out.word[4 * q + 2] = quad.z, out.word[4 * q + 3] = quad.w;
        }
        return out;
    }

    // How many corners of the list the LANES threads of a slice walk.
    DCNV4_DEVICE unsigned part() const {
        return (total + SLICES * BATCH - 1) / (SLICES * BATCH) * BATCH;
    }
    // After `allocate`: ends the list in corners that count nothing, at the first pixel.
    DCNV4_DEVICE void fill_up() {
        const unsigned whole = SLICES * part();
        for (unsigned i = total + threadIdx.x; i < whole; i += THREADS) list[padded(i)] = {0, 0};
    }

    DCNV4_DEVICE void clear_buckets() {
#pragma unroll
        for (int i = 0; i < BUCKETS; i += THREADS) bucket[i + threadIdx.x] = 0;
    }
    // Before the first pass; the block must meet afterwards.
    DCNV4_DEVICE void clear() {
        clear_buckets();
        if (threadIdx.x == 0) total = 0;
    }

    // Gives each bucket its part of the list. Which comes first does not matter.
    DCNV4_DEVICE void allocate() {
        unsigned count[BUCKETS / THREADS], own = 0;
#pragma unroll
        for (int i = 0; i < BUCKETS / THREADS; ++i)
            own += count[i] = bucket[i * THREADS + threadIdx.x];
        unsigned upto = own;  // of this thread and those of its warp before it
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const unsigned other = __shfl_up_sync(~0u, upto, step);
            upto += lane >= step ? other : 0;
        }
        unsigned next = lane == 31 ? atomicAdd(&total, upto) : 0;
        next = __shfl_sync(~0u, next, 31) + upto - own;
#pragma unroll
        for (int i = 0; i < BUCKETS / THREADS; ++i) {
            bucket[i * THREADS + threadIdx.x] = next;
            next += count[i];
        }
    }
};

// The buckets of a point's corners.
struct Buckets {
    int bucket[4];

    DCNV4_DEVICE Buckets(const Place& place, int level) {
        const int first = level % BUCKET_LEVELS * LEVEL_BUCKETS;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            bucket[i] = first | (place.corners.row + i / 2) * BUCKET_COLUMNS & (LEVEL_BUCKETS - 1) |
                        place.corners.column + i % 2 & (BUCKET_COLUMNS - 1);
    }
    DCNV4_DEVICE int operator[](int i) const { return bucket[i]; }
};

// The dot products of a pixel's channels with those of output gradients.
//
// Where four threads hold 32 halves, tensor cores multiply the 8 output gradients of a warp by its
// 8 pixels. Of these products the diagonal is wanted: the first four threads have the first two,
// and so on. Elsewhere a thread multiplies its own channels, and the sums over LANES threads are
// made for the whole batch at once: every step halves the numbers that a thread still sums, if
// there are two.
struct Dots {
    static constexpr bool matrix = Number<VALUE>::packed && LANES == 4;
    static constexpr int kept = matrix || LANES > BATCH ? 1 : BATCH / LANES;
    Sum dot[BATCH];

    template <typename T = VALUE>
    DCNV4_DEVICE void multiply(int j, const Held& pixel, const Held& grad) {
        if constexpr (matrix) {
            // The upper rows hold one half of a slice's channels, the lower ones the other.
            float upper[4] = {0, 0, 0, 0}, lower[4] = {0, 0, 0, 0};
            Number<T>::mma_m16n8k16(upper, grad.word, pixel.word[0], pixel.word[2]);
            Number<T>::mma_m16n8k16(lower, grad.word, pixel.word[1], pixel.word[3]);
            dot[j] = threadIdx.x / LANES % 2 ? upper[1] + lower[3] : upper[0] + lower[2];
        } else {
            dot[j] = 0;
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c) dot[j] += pixel[c] * grad[c];
        }
    }
    DCNV4_DEVICE void store(Corner* list, int lane) {
        if constexpr (matrix) {
#pragma unroll
            for (int j = 0; j < BATCH; ++j)
                if (lane == threadIdx.x % 32 / (2 * LANES)) list[j].share = dot[j];
            return;
        }
        int summed = BATCH;
#pragma unroll
        for (int step = 1; step < LANES; step *= 2) {
            if (summed == 1) {
                dot[0] += __shfl_xor_sync(~0u, dot[0], step);
                continue;
            }
            summed /= 2;
#pragma unroll
            for (int i = 0; i < BATCH / 2; ++i) {
                if (i >= summed) break;
                const bool odd = lane & step;
                const Sum kept = odd ? dot[2 * i + 1] : dot[2 * i];
                const Sum given = odd ? dot[2 * i] : dot[2 * i + 1];
                dot[i] = kept + __shfl_xor_sync(~0u, given, step);
            }
        }
#pragma unroll
        for (int i = 0; i < kept; ++i)
            if (lane < BATCH) list[i * LANES + lane].share = dot[i];
    }
};

// Corners that a thread has under way: they are read, and the pixels where runs begin, while it
// still computes with those before.
struct Batch {
    Corner corner[BATCH];
    Held fresh[BATCH];
    bool begins[BATCH];

    static_assert(BATCH % 2 == 0 && STRETCH % BATCH == 0, "two corners are read at once");

    // `pixel` is that of the corner before.
    DCNV4_DEVICE void load(const Corner* list, unsigned pixel, const VALUE* value, Index bytes) {
#pragma unroll
        for (int j = 0; j < BATCH; j += 2) {
            const uint4 two = *(const uint4*)(list + j);
            corner[j] = {__uint_as_float(two.x), two.y};
            corner[j + 1] = {__uint_as_float(two.z), two.w};
        }
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
            begins[j] = corner[j].pixel() != (j ? corner[j - 1].pixel() : pixel);
            if (begins[j]) fresh[j] = Held::load(at(value, corner[j].pixel(), bytes));
        }
    }
};

// Step 4. `value` and `sums` are the first of a thread's channels at the first pixel.
DCNV4_DEVICE void walk(Sorted& shared, const VALUE* value, Index pixel_bytes, Total* sums,
                       int lane) {
    const unsigned part = shared.part(), first = threadIdx.x / LANES * part;
    if (part == 0) return;
    const auto finish_run = [&](unsigned pixel, const Total(&sum)[CHANNELS]) {
        Total* to = at(sums, pixel, Operands::sums_bytes);
#pragma unroll
        for (int c = 0; c < CHANNELS; c += VECTOR) {
            Total term[VECTOR];
#pragma unroll
            for (int v = 0; v < VECTOR; ++v) term[v] = sum[c + v];
            red_add(to + c * LANES, term);
        }
    };
    Corner* list = shared.list + Sorted::padded(first);
    unsigned pixel = list->pixel();
    Held held = Held::load(at(value, pixel, pixel_bytes));
    Total sum[CHANNELS];
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) sum[c] = 0;
    Batch batch;
    batch.load(list, pixel, value, pixel_bytes);
#pragma unroll 1
    for (unsigned place = first; place < first + part; place += BATCH) {
        Held grad[BATCH];
        unsigned run[BATCH];
        Sum share[BATCH];
        bool begins[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
            const unsigned slice = batch.corner[j].key % SLICES;
            run[j] = batch.corner[j].pixel(), share[j] = batch.corner[j].share;
            begins[j] = batch.begins[j];
            grad[j] = shared.load_grad(slice * LANES + lane);
        }
        Dots dots;
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
#pragma unroll
            for (int w = 0; w < Held::words; ++w)
                held.word[w] = begins[j] ? batch.fresh[j].word[w] : held.word[w];
            dots.multiply(j, held, grad[j]);
        }
        Corner* done = list;  // The last batch is read again, for nothing: cheaper than a branch.
        list = shared.list + Sorted::padded(min(place + BATCH, first + part - BATCH));
        batch.load(list, run[BATCH - 1], value, pixel_bytes);
        __syncwarp();  // all lanes have read these corners
        dots.store(done, lane);
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
            if (begins[j]) finish_run(pixel, sum);
            pixel = run[j];
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c) {
                const Total before = begins[j] ? Total(0) : sum[c];
                const Total after = before + rounded<Total>(share[j] * grad[j][c]);
                sum[c] = share[j] != 0 ? after : before;  // 0 * inf is not added.
            }
        }
    }
    finish_run(pixel, sum);
}

// Calls `visit(r, k)` for a lane's points of a pass, which begins with round `first`.
template <typename Visit>
DCNV4_DEVICE void each_point(int first, int lane, const Visit& visit) {
#pragma unroll
    for (int r = 0; r < PASS; ++r)
        if (first + r < ROUNDS) visit(r, (first + r) * LANES + lane);
}

// As `scatter`, for all slices of a block at once: all its threads must come here.
template <typename Points>
DCNV4_DEVICE void scatter_sorted(const Arguments& a, Sorted& shared, const Points& points,
                                 const Slice& slice) {
    const Operands& o = points.operands;
    const Weights<Points> weights(points, slice.lane);
    const Sum fixed_point_scale = scale_of_sums(a, o.image, weights.share);
    const Index pixel_bytes = a.pixel_bytes;
    const int own = threadIdx.x / LANES, channel = slice.lane * VECTOR;
    shared.store_grad(Held::load(o.grad + channel));
    Sum slope[ROUNDS], mean = 0;
#pragma unroll
    for (int first = 0; first < ROUNDS; first += PASS) {
        Place at[PASS];
        unsigned before[PASS][4];
        Places places[PASS];
        each_point(first, slice.lane, [&](int r, int k) {
            at[r] = points.locate(k < POINTS ? k : POINTS - 1);
            if (!(slice.active && k < POINTS)) at[r].corners.legal = 0;
            const Buckets buckets(at[r], points.level(k));
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (at[r].corners.legal >> i & 1)
                    before[r][i] = atomicAdd(&shared.bucket[buckets[i]], 1u);
        });
        __syncthreads();
        shared.allocate();
        __syncthreads();
        shared.fill_up();
        each_point(first, slice.lane, [&](int r, int k) {
            const Corners<Sum>& c = at[r].corners;
            Sum share[4];
            coefficients(weights[k < POINTS ? k : POINTS - 1] * fixed_point_scale, c.fraction_x,
                         c.fraction_y, share);
            const Buckets buckets(at[r], points.level(k));
            const unsigned key = (at[r].first + c.row * at[r].width + c.column) * SLICES + own;
            unsigned place[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                place[i] = Sorted::padded(shared.bucket[buckets[i]] + before[r][i]);
                if (c.legal >> i & 1)
                    shared.list[place[i]] = {share[i],
                                             key + (i % 2 + i / 2 * at[r].width) * SLICES};
            }
            places[r] = {place[0] & 0xffff | place[1] << 16, place[2] & 0xffff | place[3] << 16};
        });
        __syncthreads();
        shared.clear_buckets();
        ptx::griddepcontrol_wait();  // for zeros to add to
        walk(shared, o.value + channel, pixel_bytes, o.sums + channel, slice.lane);
        __syncthreads();
        if (threadIdx.x == 0) shared.total = 0;
        each_point(first, slice.lane, [&](int r, int k) {
            if (!(slice.active && k < POINTS)) return;
            Sum dot[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                dot[i] = at[r].corners.legal >> i & 1 ? shared.list[places[r][i]].share : Sum(0);
            point_gradients(points, k, at[r], weights[k], dot, slope[first + r], mean);
        });
    }
    logit_gradients(points, weights, slope, mean, slice);
}

}  // namespace dcnv4
