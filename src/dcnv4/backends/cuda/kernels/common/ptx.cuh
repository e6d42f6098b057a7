// The instructions of PTX that the kernels use and CUDA C++ has no name for, a function each.
//
// Halves are their 16 bits; a pair of them is a word. Needs no header of CUDA's.
#pragma once

#define DCNV4_DEVICE __device__ __forceinline__

namespace dcnv4 {
namespace ptx {

// Both halves of the result are the lower, or the upper, half of `pair`.
DCNV4_DEVICE unsigned lower_twice(unsigned pair) {
    unsigned out;
    asm("{.reg .b16 lower, upper; mov.b32 {lower, upper}, %1; mov.b32 %0, {lower, lower};}"
        : "=r"(out)
        : "r"(pair));
    return out;
}
DCNV4_DEVICE unsigned upper_twice(unsigned pair) {
    unsigned out;
    asm("{.reg .b16 lower, upper; mov.b32 {lower, upper}, %1; mov.b32 %0, {upper, upper};}"
        : "=r"(out)
        : "r"(pair));
    return out;
}

DCNV4_DEVICE float cvt_f32_f16(unsigned short bits) {
    float number;
    asm("cvt.f32.f16 %0, %1;" : "=f"(number) : "h"(bits));
    return number;
}
DCNV4_DEVICE unsigned short cvt_f16_f32(float number) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(number));
    return bits;
}
DCNV4_DEVICE unsigned mul_f16x2(unsigned a, unsigned b) {
    unsigned product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}
DCNV4_DEVICE unsigned fma_f16x2(unsigned a, unsigned b, unsigned c) {
    unsigned sum;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
    return sum;
}
DCNV4_DEVICE unsigned add_f16x2(unsigned a, unsigned b) {
    unsigned sum;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
    return sum;
}
DCNV4_DEVICE unsigned cvt_f16x2_f32(float lower, float upper) {
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(upper), "f"(lower));
    return pair;
}
// 2 to the power of x.
DCNV4_DEVICE float ex2(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}
// max(0, 1 - |center - x|), of two halves.
DCNV4_DEVICE unsigned hat_f16x2(unsigned center, unsigned x) {
    unsigned hat;
    asm("{.reg .b32 from; sub.f16x2 from, %1, %2; abs.f16x2 from, from; sub.sat.f16x2 %0, %3, "
        "from;}"
        : "=r"(hat)
        : "r"(center), "r"(x), "r"(0x3c003c00u));
    return hat;
}

// sm_80 on.

// The larger magnitude of each half, or NaN.
DCNV4_DEVICE unsigned max_abs_f16x2(unsigned a, unsigned b) {
    unsigned most;
    asm("{.reg .b32 x, y; abs.f16x2 x, %1; abs.f16x2 y, %2; max.NaN.f16x2 %0, x, y;}"
        : "=r"(most)
        : "r"(a), "r"(b));
    return most;
}
DCNV4_DEVICE unsigned cvt_bf16x2_f32(float lower, float upper) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(upper), "f"(lower));
    return pair;
}
DCNV4_DEVICE unsigned short cvt_bf16_f32(float number) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(number));
    return bits;
}
DCNV4_DEVICE unsigned fma_bf16x2(unsigned a, unsigned b, unsigned c) {
    unsigned sum;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
    return sum;
}

// Additions to memory that other threads add to. Relaxed: they order nothing and return nothing.
DCNV4_DEVICE void red_add(float* at, float a) {
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(at), "f"(a));
}
DCNV4_DEVICE void red_add(double* at, double a) {
    asm volatile("red.relaxed.gpu.global.add.f64 [%0], %1;" ::"l"(at), "d"(a));
}
DCNV4_DEVICE void red_add(long long* at, long long a) {
    asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(at), "l"(a));
}
// sm_90 on.
DCNV4_DEVICE void red_add(float* at, float a, float b) {
    asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(at), "f"(a), "f"(b));
}
DCNV4_DEVICE void red_add(float* at, float a, float b, float c, float d) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(at), "f"(a),
                 "f"(b), "f"(c), "f"(d));
}

// Four of them, or none.
DCNV4_DEVICE void red_add_if(bool wanted, float* at, const float (&terms)[4]) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{.reg .pred p; setp.ne.s32 p, %5, 0; "
        "@p red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};}" ::"l"(at),
        "f"(terms[0]), "f"(terms[1]), "f"(terms[2]), "f"(terms[3]), "r"(int(wanted)));
#else
    if (wanted)
        for (int i = 0; i < 4; ++i) red_add(at + i, terms[i]);
#endif
}

DCNV4_DEVICE void st_if(bool wanted, void* at, unsigned word) {
    asm volatile("{.reg .pred p; setp.ne.s32 p, %2, 0; @p st.global.b32 [%0], %1;}" ::"l"(at),
                 "r"(word), "r"(int(wanted))
                 : "memory");
}

// The launch after this one may begin, if it was told that it may, as soon as every block has come
// here; it must wait before it uses what this one writes. sm_90 on, nothing before.
DCNV4_DEVICE void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DCNV4_DEVICE void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The pointer in one register pair, lest its parts be added anew at every use.
template <typename T>
DCNV4_DEVICE void hold(T*& pointer) {
    asm("" : "+l"(pointer));
}
// A number that is not computed anew at every use, or two words that nothing uses before here.
DCNV4_DEVICE void hold(int& number) { asm volatile("" : "+r"(number)); }
DCNV4_DEVICE void hold(unsigned (&words)[2]) { asm volatile("" : "+r"(words[0]), "+r"(words[1])); }

// c += a b, of [16, 16] and [16, 8] halves, in fragments: sm_80 on.
DCNV4_DEVICE void mma_m16n8k16_f16(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                   unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DCNV4_DEVICE void mma_m16n8k16_bf16(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                    unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// An 8 x 8 block of halves that a warp holds, a word a lane, transposed.
DCNV4_DEVICE unsigned movmatrix(unsigned word) {
    unsigned out;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(word));
    return out;
}

// Four such blocks from shared memory, lane 8i + r naming row r of block i.
template <bool TRANSPOSED>
DCNV4_DEVICE void ldmatrix(unsigned (&out)[4], const void* row) {
    const unsigned at = (unsigned)__cvta_generic_to_shared(row);
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                     : "r"(at)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                     : "r"(at)
                     : "memory");
}

// The shared memory that a launch asks for.
DCNV4_DEVICE void* dynamic_shared() {
    extern __shared__ __align__(1024) uint4 dynamic[];
    return dynamic;
}

// sm_90a: products of a warpgroup, asynchronous.

// What is written to shared memory is seen by those that read it asynchronously, after they met.
DCNV4_DEVICE void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Where a matrix lies in shared memory: lines of 128 bytes, in each of which the 16 bytes at c are
// at c ^ line % 8. `at` is in the first of 8 lines, whose address 1024 divides.
DCNV4_DEVICE unsigned long long matrix_descriptor(const void* at) {
    const unsigned shared = (unsigned)__cvta_generic_to_shared(at);
    return shared >> 4 & 0x3fff | 1ull << 16 | (1024ull >> 4) << 32 | 1ull << 62;
}

#define DCNV4_32_FLOATS(c)                                                                       \
    "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]),          \
        "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]),  \
        "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]),            \
        "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), "+f"(c[24]), "+f"(c[25]),            \
        "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31])

// Before the first of several that add to c.
DCNV4_DEVICE void wgmma_fence(float (&c)[32]) {
    asm volatile("wgmma.fence.sync.aligned;" : DCNV4_32_FLOATS(c) : : "memory");
}
// c += a b, of [64, 16] and [16, 64] halves: 16 rows a warp, in fragments as those of
// `mma_m16n8k16`; b's columns are lines in shared memory.
DCNV4_DEVICE void wgmma_m64n64k16_f16(float (&c)[32], const unsigned (&a)[4], const void* b) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, 1, 0; "
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, "
        "%9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, "
        "%27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;}"
        : DCNV4_32_FLOATS(c)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(matrix_descriptor(b)));
}
DCNV4_DEVICE void wgmma_m64n64k16_bf16(float (&c)[32], const unsigned (&a)[4], const void* b) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, 1, 0; "
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, "
        "%9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, "
        "%27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;}"
        : DCNV4_32_FLOATS(c)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(matrix_descriptor(b)));
}
// The same, of [64, 16] in lines in shared memory, too.
DCNV4_DEVICE void wgmma_m64n64k16_f16(float (&c)[32], const void* a, const void* b) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, 1, 0; "
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, "
        "%9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, "
        "%27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 0;}"
        : DCNV4_32_FLOATS(c)
        : "l"(matrix_descriptor(a)), "l"(matrix_descriptor(b)));
}
DCNV4_DEVICE void wgmma_m64n64k16_bf16(float (&c)[32], const void* a, const void* b) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, 1, 0; "
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, "
        "%9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, "
        "%27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 0;}"
        : DCNV4_32_FLOATS(c)
        : "l"(matrix_descriptor(a)), "l"(matrix_descriptor(b)));
}
// So far, they are begun.
DCNV4_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all that are begun are done.
DCNV4_DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
// Behind it, c is read.
DCNV4_DEVICE void wgmma_hold(float (&c)[32]) {
    asm volatile("" : DCNV4_32_FLOATS(c) : : "memory");
}

// BYTES from global to shared memory, or as many zeros, meanwhile: sm_80 on. 16 bypass L1. L2 gets
// whole lines, whose other sectors are wanted next.
template <int BYTES>
DCNV4_DEVICE void cp_async(void* to, const void* from, bool there) {
    const unsigned shared = __cvta_generic_to_shared(to), wanted = there ? BYTES : 0;
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared),
                     "l"(from), "r"(wanted)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], %2, %3;" ::"r"(shared),
                     "l"(from), "n"(BYTES), "r"(wanted)
                     : "memory");
}
// What the lane has copied since the last time is a group.
DCNV4_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait for the lane's own groups but the last LATER; others see them after they met.
template <int LATER>
DCNV4_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory");
}

}  // namespace ptx
}  // namespace dcnv4
