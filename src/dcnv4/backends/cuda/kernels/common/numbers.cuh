// The four number types, in vectors of N neighbouring channels. Needs no header of CUDA's.
//
// A vector lies in 32-bit words, two halves to a word, and moves in one instruction of up to 16
// bytes. `Sum` is the type that sums are made in.
#pragma once

#include <common/ptx.cuh>

namespace dcnv4 {

struct float16 {
    unsigned short bits;
};
struct bfloat16 {
    unsigned short bits;
};

template <typename T>
struct Number {  // float
    using Sum = float;
    static constexpr bool packed = false;
    static DCNV4_DEVICE float get(const unsigned* words, int i) {
        return __uint_as_float(words[i]);
    }
    static DCNV4_DEVICE void set(unsigned* words, int i, float number) {
        words[i] = __float_as_uint(number);
    }
};

template <>
struct Number<double> {
    using Sum = double;
    static constexpr bool packed = false;
    static DCNV4_DEVICE double get(const unsigned* words, int i) {
        return __hiloint2double(words[2 * i + 1], words[2 * i]);
    }
    static DCNV4_DEVICE void set(unsigned* words, int i, double number) {
        words[2 * i] = __double2loint(number);
        words[2 * i + 1] = __double2hiint(number);
    }
};

// `packed`: `mul` and `fma` work on both halves of a word at once. `mma_m16n8k16` is the tensor
// cores' c += a b, `as_f16` and `of_f16` convert a pair; `exponents` are the bits that are
// set where a half of a word is not finite.
template <>
struct Number<float16> {
    using Sum = float;
    static constexpr bool packed = true;
    static constexpr unsigned exponents = 0x7c007c00u;
    static DCNV4_DEVICE void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                          unsigned b1) {
        ptx::mma_m16n8k16_f16(c, a, b0, b1);
    }
    template <typename A>
    static DCNV4_DEVICE void wgmma_m64n64k16(float (&c)[32], const A& a, const void* b) {
        ptx::wgmma_m64n64k16_f16(c, a, b);
    }
    static DCNV4_DEVICE unsigned as_f16(unsigned pair) { return pair; }
    static DCNV4_DEVICE unsigned of_f16(unsigned pair) { return pair; }
    static DCNV4_DEVICE float get(const unsigned* words, int i) {
        return ptx::cvt_f32_f16((unsigned short)(words[i / 2] >> i % 2 * 16));
    }
    static DCNV4_DEVICE unsigned short round(float number) { return ptx::cvt_f16_f32(number); }
    static DCNV4_DEVICE unsigned round(float lower, float upper) {
        return ptx::cvt_f16x2_f32(lower, upper);
    }
    static DCNV4_DEVICE unsigned mul(unsigned a, unsigned b) { return ptx::mul_f16x2(a, b); }
    static DCNV4_DEVICE unsigned fma(unsigned a, unsigned b, unsigned c) {
        return ptx::fma_f16x2(a, b, c);
    }
    static DCNV4_DEVICE void set(unsigned* words, int i, float number) {
        const unsigned bits = round(number);
        words[i / 2] = i % 2 ? words[i / 2] | bits << 16 : bits;
    }
};

template <>
struct Number<bfloat16> {
    using Sum = float;
    static constexpr bool packed = __CUDA_ARCH__ >= 800;
    static constexpr unsigned exponents = 0x7f807f80u;
    static DCNV4_DEVICE void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                          unsigned b1) {
        ptx::mma_m16n8k16_bf16(c, a, b0, b1);
    }
    template <typename A>
    static DCNV4_DEVICE void wgmma_m64n64k16(float (&c)[32], const A& a, const void* b) {
        ptx::wgmma_m64n64k16_bf16(c, a, b);
    }
    static DCNV4_DEVICE unsigned as_f16(unsigned pair) {
        return ptx::cvt_f16x2_f32(get(&pair, 0), get(&pair, 1));
    }
    static DCNV4_DEVICE unsigned of_f16(unsigned pair) {
        return ptx::cvt_bf16x2_f32(Number<float16>::get(&pair, 0), Number<float16>::get(&pair, 1));
    }
    static DCNV4_DEVICE float get(const unsigned* words, int i) {
        const unsigned word = words[i / 2];
        return __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
    }
    static DCNV4_DEVICE unsigned short round(float number) {
#if __CUDA_ARCH__ >= 800
        return ptx::cvt_bf16_f32(number);
#else
        const unsigned bits = __float_as_uint(number);
        if (number != number) return 0x7fff;
        return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
#endif
    }
    static DCNV4_DEVICE unsigned round(float lower, float upper) {
        return ptx::cvt_bf16x2_f32(lower, upper);
    }
    static DCNV4_DEVICE unsigned mul(unsigned a, unsigned b) { return fma(a, b, 0x80008000u); }
    static DCNV4_DEVICE unsigned fma(unsigned a, unsigned b, unsigned c) {
        return ptx::fma_bf16x2(a, b, c);
    }
    static DCNV4_DEVICE void set(unsigned* words, int i, float number) {
        const unsigned bits = round(number);
        words[i / 2] = i % 2 ? words[i / 2] | bits << 16 : bits;
    }
};

// N numbers at an address that their size divides.
template <typename T, int N>
struct Vector {
    using Sum = typename Number<T>::Sum;
    static constexpr int bytes = N * sizeof(T), words = (bytes + 3) / 4;
    unsigned word[words];

    DCNV4_DEVICE Sum operator[](int i) const { return Number<T>::get(word, i); }
    DCNV4_DEVICE void set(int i, Sum number) { Number<T>::set(word, i, number); }

    // From memory that no kernel writes meanwhile.
    static DCNV4_DEVICE Vector load(const void* at) {
        Vector out;
        if constexpr (bytes == 16) {
            const uint4 w = __ldg((const uint4*)at);
            out.word[0] = w.x, out.word[1] = w.y, out.word[2] = w.z, out.word[3] = w.w;
        } else if constexpr (bytes == 8) {
            const uint2 w = __ldg((const uint2*)at);
            out.word[0] = w.x, out.word[1] = w.y;
        } else if constexpr (bytes == 4) {
            out.word[0] = __ldg((const unsigned*)at);
        } else {
            out.word[0] = __ldg((const unsigned short*)at);
        }
        return out;
    }
    DCNV4_DEVICE void store(void* at) const {
        if constexpr (bytes == 16) {
            *(uint4*)at = make_uint4(word[0], word[1], word[2], word[3]);
        } else if constexpr (bytes == 8) {
            *(uint2*)at = make_uint2(word[0], word[1]);
        } else if constexpr (bytes == 4) {
            *(unsigned*)at = word[0];
        } else {
            *(unsigned short*)at = (unsigned short)word[0];
        }
    }
};

template <typename T>
DCNV4_DEVICE typename Number<T>::Sum load(const T* at) {
    return Vector<T, 1>::load(at)[0];
}

template <typename T>
DCNV4_DEVICE void store(T* at, typename Number<T>::Sum number) {
    Vector<T, 1> out;
    out.set(0, number);
    out.store(at);
}

// Adds to memory that other threads add to.
template <typename T, int N>
DCNV4_DEVICE void red_add(T* at, const T (&terms)[N]) {
#if __CUDA_ARCH__ >= 900
    if constexpr (sizeof(T) == 4 && N % 4 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 4)
            ptx::red_add(at + i, terms[i], terms[i + 1], terms[i + 2], terms[i + 3]);
        return;
    } else if constexpr (sizeof(T) == 4 && N == 2) {
        ptx::red_add(at, terms[0], terms[1]);
        return;
    }
#endif
#pragma unroll
    for (int i = 0; i < N; ++i) ptx::red_add(at + i, terms[i]);
}

// A term of a sum. Sums of integers have the same bits in any order.
template <typename Total, typename Sum>
DCNV4_DEVICE Total rounded(Sum term) {
    if constexpr (sizeof(Total) == sizeof(Sum))
        return term;
    else
        return __float2ll_rn(term);
}
template <int N>
DCNV4_DEVICE void red_add(long long* at, const float (&terms)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) ptx::red_add(at + i, rounded<long long>(terms[i]));
}

// Four terms of each lane of a quad, transposed: lane t gets the t-th of every lane's.
DCNV4_DEVICE void transpose_quad(float (&terms)[4]) {
    const int lane = threadIdx.x % 4;
#pragma unroll
    for (int step = 1; step < 4; step *= 2)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & step) continue;
            const bool upper = lane & step;
            const float given = upper ? terms[i] : terms[i | step];
            const float got = __shfl_xor_sync(~0u, given, step);
            terms[i] = upper ? got : terms[i];
            terms[i | step] = upper ? terms[i | step] : got;
        }
}

// Four neighbouring numbers, times `scale` where sums are integers, or none. All lanes come here.
DCNV4_DEVICE void red_add_if(bool wanted, float* at, const float (&terms)[4], float) {
    const bool any = terms[0] != 0 || terms[1] != 0 || terms[2] != 0 || terms[3] != 0;
    ptx::red_add_if(wanted && any, at, terms);
}
// The lanes of a quad add to 16 neighbours, and want them or do not; each has one of every lane's
// four, so that the quad adds to a whole sector at once.
DCNV4_DEVICE void red_add_if(bool wanted, long long* at, float (&terms)[4], float scale) {
    const int lane = threadIdx.x % 4;
    transpose_quad(terms);
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (wanted && terms[i] != 0)
            ptx::red_add(at + 4 * (i - lane) + lane, rounded<long long>(terms[i] * scale));
}

}  // namespace dcnv4
