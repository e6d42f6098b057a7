// As much of CUDA as the kernels use, on a CPU: for a compiler of C++ that includes it first.
//
// Blocks run one after another, and the threads of one as fibers, each until it meets the others of
// its warp or block. There, threads must arrive at the same place: a warp whose threads disagree,
// or wait for ones that have ended, is an error, as is a block that waits for ended threads. What
// one thread writes and another reads without meeting in between is read too early or too late,
// depending on the order in which fibers run: `backwards` reverses it.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __CUDA_ARCH__ 900
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __constant__ static
#define __shared__ static
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

using std::abs;
using std::exp;
using std::max;
using std::min;

struct uint2 {
    unsigned x, y;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <typename To, typename From>
To emulated_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "as many bits");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline float __uint_as_float(unsigned bits) { return emulated_bits<float>(bits); }
inline unsigned __float_as_uint(float number) { return emulated_bits<unsigned>(number); }
inline double __hiloint2double(int high, int low) {
    return emulated_bits<double>((unsigned long long)(unsigned)high << 32 | (unsigned)low);
}
inline int __double2loint(double number) { return int(emulated_bits<unsigned long long>(number)); }
inline int __double2hiint(double number) {
    return int(emulated_bits<unsigned long long>(number) >> 32);
}
inline int __float2int_rd(float number) { return int(std::floor(number)); }
inline int __double2int_rd(double number) { return int(std::floor(number)); }
inline float __int2float_rd(int number) {
    const float nearest = float(number);
    return nearest > double(number) ? std::nextafter(nearest, -INFINITY) : nearest;
}
inline float __int2float_ru(int number) { return -__int2float_rd(-number); }
inline long long __float2ll_rn(float number) { return std::llrint(number); }
inline float __ll2float_rn(long long number) { return float(number); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
    return unsigned(((unsigned long long)high << 32 | low) >> (by & 31));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
    return unsigned(((unsigned long long)high << 32 | low) << (by & 31) >> 32);
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
template <typename T>
T __ldg(const T* at) {
    if ((size_t)at % sizeof(T)) {
        std::fprintf(stderr, "emulator: an address that %zu does not divide\n", sizeof(T));
        std::abort();
    }
    return *at;
}

namespace emulated {

struct Fiber {
    std::vector<char> stack;
    ucontext_t start;
    jmp_buf here;
    bool started, ended;
    bool waited;        // for the launch before
    bool fenced;        // what it writes to shared memory, for what reads that asynchronously
    int products;       // of its warpgroup, which it took part in
    const void* place;  // where it waits, null while it can run
    bool for_block;     // whether it waits for the block or its warp
    unsigned long long given[2][8];
    int turn;  // of the two
};

struct Index {
    unsigned x;
};

inline std::vector<Fiber> fibers;
inline int current;
inline bool backwards, early;  // early: whether the launch before may not have ended
inline jmp_buf scheduler;
inline Index thread_index, block_index, block_size, grid_size;
inline void (*body)();
inline char* dynamic;  // the shared memory that a launch asks for

inline void fail(const char* what) {
    std::fprintf(stderr, "emulator: %s, block %u, thread %d\n", what, block_index.x, current);
    std::abort();
}

inline Fiber& self() { return fibers[current]; }

// Let others run until all of the warp, or of the block, have come here.
inline void meet(const void* place, bool for_block) {
    Fiber& fiber = self();
    fiber.place = place, fiber.for_block = for_block;
    if (!_setjmp(fiber.here)) _longjmp(scheduler, 1);
}

// Every lane gives words and gets those of all lanes.
template <typename T>
struct Exchange {
    int first, turn;
    Exchange(const void* place, const T& given) {
        static_assert(sizeof(T) <= sizeof(Fiber::given[0]), "too much");
        Fiber& fiber = self();
        turn = fiber.turn ^= 1;
        first = current & ~31;
        std::memcpy(fiber.given[turn], &given, sizeof given);
        meet(place, false);
    }
    T operator[](int lane) const {
        T out;
        std::memcpy(&out, fibers[first + lane].given[turn], sizeof out);
        return out;
    }
};

inline void enter() {
    body();
    self().ended = true;
    _longjmp(scheduler, 1);
}

// Wake the waiting threads of [first, last) if they are all there.
inline bool release(int first, int last, bool for_block) {
    const void* place = nullptr;
    int waiting = 0, ended = 0;
    for (int i = first; i < last; ++i) {
        if (fibers[i].ended) {
            ++ended;
            continue;
        }
        if (!fibers[i].place || fibers[i].for_block != for_block) return false;
        if (!for_block && place && place != fibers[i].place) {
            current = i;
            fail("threads of a warp meet in different places");
        }
        place = fibers[i].place;
        ++waiting;
    }
    if (!waiting) return false;
    if (ended) fail(for_block ? "a block waits for ended threads" : "a warp waits for ended ones");
    for (int i = first; i < last; ++i) fibers[i].place = nullptr;
    return true;
}

inline void run_block(unsigned threads) {
    const int count = int(threads);
    for (Fiber& fiber : fibers)
        fiber.started = fiber.ended = fiber.waited = fiber.fenced = fiber.products = 0,
        fiber.place = nullptr;
    for (;;) {
        bool progress = false, all_ended = true;
        static int next;  // not in a register: longjmp comes back here
        for (next = 0; next < count; ++next) {
            current = backwards ? count - 1 - next : next;
            Fiber& fiber = self();
            if (fiber.ended) continue;
            all_ended = false;
            if (fiber.place) continue;
            progress = true;
            thread_index.x = unsigned(current);
            if (_setjmp(scheduler)) continue;
            if (fiber.started) _longjmp(fiber.here, 1);
            fiber.started = true;
            setcontext(&fiber.start);
        }
        if (all_ended) return;
        for (int warp = 0; warp < count; warp += 32)
            progress |= release(warp, std::min(warp + 32, count), false);
        progress |= release(0, count, true);
        if (!progress) fail("threads wait for each other for ever");
    }
}

inline void run(void (*kernel)(), unsigned blocks, unsigned threads) {
    constexpr size_t stack = 1 << 16;
    body = kernel;
    block_size.x = threads, grid_size.x = blocks;
    for (block_index.x = 0; block_index.x < blocks; ++block_index.x) {
        fibers.resize(threads);
        for (Fiber& fiber : fibers) {
            fiber.stack.resize(stack);
            getcontext(&fiber.start);
            fiber.start.uc_stack.ss_sp = fiber.stack.data();
            fiber.start.uc_stack.ss_size = stack;
            fiber.start.uc_link = nullptr;
            makecontext(&fiber.start, enter, 0);
        }
        run_block(threads);
        for (unsigned i = 0; i < threads; ++i)
            if (fibers[i].products != fibers[i & ~127].products)
                fail("a warpgroup whose warps do not all multiply");
    }
}

}  // namespace emulated

#define threadIdx emulated::thread_index
#define blockIdx emulated::block_index
#define blockDim emulated::block_size
#define gridDim emulated::grid_size

// A different address wherever it is written.
#define EMULATED_PLACE         \
    ([]() -> const void* {     \
        static const char at = 0; \
        return &at;            \
    }())

template <typename T>
T emulated_shuffle(const void* place, T number, int source, int width) {
    const int lane = emulated::current & 31;
    const emulated::Exchange<T> all(place, number);
    return all[(lane & ~(width - 1)) | (source & (width - 1))];
}
template <typename T, typename Combine>
T emulated_reduce(const void* place, T number, Combine combine) {
    const emulated::Exchange<T> all(place, number);
    T out = all[0];
    for (int lane = 1; lane < 32; ++lane) out = combine(out, all[lane]);
    return out;
}
template <typename T>
T __shfl_sync(unsigned, T number, int source, int width = 32) {
    return emulated_shuffle(EMULATED_PLACE, number, source, width);
}
template <typename T>
T __shfl_xor_sync(unsigned, T number, int with) {
    return emulated_shuffle(EMULATED_PLACE, number, (emulated::current & 31) ^ with, 32);
}
template <typename T>
T __shfl_up_sync(unsigned, T number, int by) {
    const int lane = emulated::current & 31;
    return emulated_shuffle(EMULATED_PLACE, number, lane < by ? lane : lane - by, 32);
}
inline int __reduce_max_sync(unsigned, int number) {
    return emulated_reduce(EMULATED_PLACE, number, [](int a, int b) { return max(a, b); });
}
inline int __reduce_add_sync(unsigned, int number) {
    return emulated_reduce(EMULATED_PLACE, number, [](int a, int b) { return a + b; });
}
inline int __any_sync(unsigned, int number) {
    return emulated_reduce(EMULATED_PLACE, int(number != 0), [](int a, int b) { return a | b; });
}
inline unsigned __ballot_sync(unsigned, int number) {
    const int lane = emulated::current & 31;
    const unsigned own = number ? 1u << lane : 0;
    return emulated_reduce(EMULATED_PLACE, own, [](unsigned a, unsigned b) { return a | b; });
}
template <typename T>
T atomicAdd(T* at, T number) {
    const T before = *at;
    *at += number;
    return before;
}
template <typename T>
T atomicMax(T* at, T number) {
    const T before = *at;
    *at = max(before, number);
    return before;
}
inline void __threadfence() {}
inline void __syncwarp() { emulated::meet(EMULATED_PLACE, false); }
inline void __syncthreads() { emulated::meet(EMULATED_PLACE, true); }
inline int __syncthreads_or(int number) {
    static int any[2], turn, arrived;
    if (arrived++ == 0) any[turn ^= 1] = 0;
    const int mine = turn;
    any[mine] |= number;
    if (arrived == int(emulated::block_size.x)) arrived = 0;
    emulated::meet(EMULATED_PLACE, true);
    return any[mine] != 0;
}
