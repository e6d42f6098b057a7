// What src/dcnv4/backends/cuda/kernels/common/ptx.cuh offers, for the emulator.
#pragma once

#define DCNV4_DEVICE inline

namespace dcnv4 {
namespace ptx {

inline unsigned lower_twice(unsigned pair) { return (pair & 0xffff) * 0x10001u; }
inline unsigned upper_twice(unsigned pair) { return (pair >> 16) * 0x10001u; }

inline float cvt_f32_f16(unsigned short bits) { return emulated_bits<_Float16>(bits); }
inline unsigned short cvt_f16_f32(double number) {
    return emulated_bits<unsigned short>((_Float16)number);
}
inline float cvt_f32_bf16(unsigned short bits) { return __uint_as_float((unsigned)bits << 16); }
inline unsigned short cvt_bf16_f32(float number) {
    const unsigned bits = __float_as_uint(number);
    if (number != number) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

template <typename Half>
unsigned each_half(Half half) {
    return unsigned(half(0)) | unsigned(half(16)) << 16;
}
inline unsigned mul_f16x2(unsigned a, unsigned b) {
    return each_half([=](int shift) {
        return cvt_f16_f32(double(cvt_f32_f16(a >> shift)) * cvt_f32_f16(b >> shift));
    });
}
inline unsigned add_f16x2(unsigned a, unsigned b) {
    return each_half([=](int shift) {
        return cvt_f16_f32(double(cvt_f32_f16(a >> shift)) + cvt_f32_f16(b >> shift));
    });
}
inline unsigned fma_f16x2(unsigned a, unsigned b, unsigned c) {
    return each_half([=](int shift) {
        return cvt_f16_f32(double(cvt_f32_f16(a >> shift)) * cvt_f32_f16(b >> shift) +
                           cvt_f32_f16(c >> shift));
    });
}
inline unsigned cvt_f16x2_f32(float lower, float upper) {
    return cvt_f16_f32(lower) | unsigned(cvt_f16_f32(upper)) << 16;
}
inline unsigned cvt_bf16x2_f32(float lower, float upper) {
    return cvt_bf16_f32(lower) | unsigned(cvt_bf16_f32(upper)) << 16;
}
inline float ex2(float x) { return std::exp2(x); }
inline unsigned hat_f16x2(unsigned center, unsigned x) {
    return each_half([=](int shift) {
        const float from = cvt_f32_f16(
            cvt_f16_f32(double(cvt_f32_f16(center >> shift)) - cvt_f32_f16(x >> shift)));
        const float hat = 1 - std::abs(from);
        return cvt_f16_f32(hat > 0 ? hat : 0);
    });
}
inline unsigned max_abs_f16x2(unsigned a, unsigned b) {
    return each_half([=](int shift) {
        const int x = a >> shift & 0x7fff, y = b >> shift & 0x7fff, most = max(x, y);
        return (unsigned short)(most > 0x7c00 ? 0x7fff : most);
    });
}
inline unsigned short fma_bf16(unsigned short a, unsigned short b, unsigned short c) {
    return cvt_bf16_f32(float(double(cvt_f32_bf16(a)) * cvt_f32_bf16(b) + cvt_f32_bf16(c)));
}
inline unsigned fma_bf16x2(unsigned a, unsigned b, unsigned c) {
    return each_half([=](int shift) { return fma_bf16(a >> shift, b >> shift, c >> shift); });
}

inline void adds() {
    if (emulated::early && !emulated::self().waited)
        emulated::fail("a thread adds before it has waited for the launch before");
}
inline void red_add(float* at, float a) { adds(), *at += a; }
inline void red_add(double* at, double a) { adds(), *at += a; }
inline void red_add(long long* at, long long a) {
    adds(), *(unsigned long long*)at += (unsigned long long)a;
}
inline void aligned(const void* at, size_t bytes) {
    if ((size_t)at % bytes) emulated::fail("a vector of additions is not aligned");
}
inline void red_add(float* at, float a, float b) { adds(), aligned(at, 8), at[0] += a, at[1] += b; }
inline void red_add(float* at, float a, float b, float c, float d) {
    adds(), aligned(at, 16), at[0] += a, at[1] += b, at[2] += c, at[3] += d;
}

inline void red_add_if(bool wanted, float* at, const float (&terms)[4]) {
    if (wanted) red_add(at, terms[0], terms[1], terms[2], terms[3]);
}

inline void st_if(bool wanted, void* at, unsigned word) {
    if (wanted) aligned(at, 4), *(unsigned*)at = word;
}

inline void griddepcontrol_launch_dependents() {}
inline void griddepcontrol_wait() { emulated::self().waited = true; }

template <typename T>
void hold(T&) {}

// The fragments of mma.m16n8k16, as the PTX manual lays them out.
struct Fragments {
    unsigned a[4], b[2];
};
template <typename Convert>
void mma(const void* place, float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
         Convert convert) {
    const emulated::Exchange<Fragments> all(place, {{a[0], a[1], a[2], a[3]}, {b0, b1}});
    const int lane = emulated::current & 31;
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = 0;
        for (int k = 0; k < 16; ++k) {
            const unsigned left = all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2];
            const unsigned right = all[column * 4 + k % 8 / 2].b[k / 8];
            sum += convert(left >> k % 2 * 16) * convert(right >> k % 2 * 16);
        }
        c[i] += sum;
    }
}
inline void mma_m16n8k16_f16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    mma(EMULATED_PLACE, c, a, b0, b1, cvt_f32_f16);
}
inline void mma_m16n8k16_bf16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    mma(EMULATED_PLACE, c, a, b0, b1, cvt_f32_bf16);
}

inline unsigned movmatrix(unsigned word) {
    const emulated::Exchange<unsigned> all(EMULATED_PLACE, word);
    const int lane = emulated::current & 31, row = lane / 4, column = lane % 4 * 2;
    return each_half([&](int shift) {
        return (unsigned short)(all[(column + shift / 16) * 4 + row / 2] >> row % 2 * 16);
    });
}

template <bool TRANSPOSED>
void ldmatrix(unsigned (&out)[4], const void* own) {
    const emulated::Exchange<const unsigned short*> rows(EMULATED_PLACE,
                                                         (const unsigned short*)own);
    aligned(own, 16);
    const int lane = emulated::current & 31, row = lane / 4, column = lane % 4 * 2;
    for (int block = 0; block < 4; ++block)
        out[block] = each_half([&](int shift) {
            const int c = column + shift / 16;
            return TRANSPOSED ? rows[8 * block + c][row] : rows[8 * block + row][c];
        });
    emulated::meet(EMULATED_PLACE, false);  // others may write there only now
}

inline void* dynamic_shared() { return emulated::dynamic; }

inline void fence_proxy_async() { emulated::self().fenced = true; }
inline void wgmma_fence(float (&)[32]) {}
inline void wgmma_commit() {}
inline void wgmma_wait() { emulated::meet(EMULATED_PLACE, false); }
inline void wgmma_hold(float (&)[32]) {}
// A half of a matrix whose lines of 128 bytes are in shared memory.
inline unsigned in_line(const void* matrix, int line, int k) {
    size_t at = (size_t)matrix + line * 128 + k * 2;
    at ^= (at >> 7 & 7) << 4;
    return *(const unsigned short*)at;
}
// Its fragments of c and a are those of mma.m16n8k16, side by side; `left(row, k)` of 16 rows.
template <typename Left, typename Convert>
void wgmma(float (&c)[32], const Left& left, const void* b, Convert convert) {
    if (!emulated::self().fenced) emulated::fail("what it multiplies with may not be there");
    ++emulated::self().products;
    const int lane = emulated::current & 31;
    for (int i = 0; i < 32; ++i) {
        const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += convert(left(row, k)) * convert(in_line(b, column, k));
        c[i] += sum;
    }
}
template <typename Convert>
void wgmma(const void* place, float (&c)[32], const unsigned (&a)[4], const void* b, Convert convert) {
    const emulated::Exchange<Fragments> all(place, {{a[0], a[1], a[2], a[3]}, {}});
    const auto left = [&](int row, int k) {
        return all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2] >> k % 2 * 16;
    };
    wgmma(c, left, b, convert);
}
template <typename Convert>
void wgmma(const void*, float (&c)[32], const void* a, const void* b, Convert convert) {
    const int warp = emulated::current / 32 % 4 * 16;
    wgmma(c, [&](int row, int k) { return in_line(a, warp + row, k); }, b, convert);
}
template <typename A>
void wgmma_m64n64k16_f16(float (&c)[32], const A& a, const void* b) {
    wgmma(EMULATED_PLACE, c, a, b, cvt_f32_f16);
}
template <typename A>
void wgmma_m64n64k16_bf16(float (&c)[32], const A& a, const void* b) {
    wgmma(EMULATED_PLACE, c, a, b, cvt_f32_bf16);
}

// Nothing arrives before the lane waits for it.
struct Copy {
    void* to;
    const void* from;
    size_t bytes;
};
inline std::vector<std::vector<Copy>> groups[1024];  // of each lane; the last is not ended
template <int BYTES>
void cp_async(void* to, const void* from, bool there) {
    aligned(to, BYTES);
    if (there) aligned(from, BYTES);
    std::memset(to, 0xff, BYTES);
    auto& own = groups[emulated::current];
    if (own.empty()) own.resize(1);
    own.back().push_back({to, there ? from : nullptr, BYTES});
}
inline void cp_async_commit() {
    auto& own = groups[emulated::current];
    own.resize(own.empty() ? 2 : own.size() + 1);
}
template <int LATER>
void cp_async_wait() {
    auto& own = groups[emulated::current];
    while (own.size() > LATER + 1) {
        for (const Copy& copy : own.front())
            copy.from ? std::memcpy(copy.to, copy.from, copy.bytes)
                      : std::memset(copy.to, 0, copy.bytes);
        own.erase(own.begin());
    }
}

}  // namespace ptx
}  // namespace dcnv4
