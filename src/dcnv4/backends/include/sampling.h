// Where a point lies between pixels and what its four corners count: the mirror of `corners`,
// `coefficients` and `softmax_backward` in geometry.py, for C++ and CUDA (NVRTC) alike.
//
// T is the type that sums are made in, float or double. Corners are numbered as in geometry.py:
// 0 top left, 1 top right, 2 bottom left, 3 bottom right. Nothing here branches, so that a loop
// over points vectorises and a warp does not diverge.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define DCNV4_HD __host__ __device__ __forceinline__
#else
#define DCNV4_HD inline
#endif

namespace dcnv4 {

template <typename T>
struct Corners {
    int legal;        // bit i is set where corner i lies in the image; 0 for a point outside it
    int column, row;  // of the top left corner, from -1; 0 for a point outside
    T fraction_x, fraction_y;  // of a pixel, from the left and from the top corners
    bool inside;                    // whether the point is, and of a point inside whether
    bool left, right, top, bottom;  // these columns and rows of corners are
};

// The largest integer that is not above x, which an int must hold.
template <typename T>
DCNV4_HD int integer_below(T x) {
#ifdef __CUDA_ARCH__
    if (sizeof(T) == sizeof(float)) return __float2int_rd(float(x));
    return __double2int_rd(double(x));
#else
    const int towards_zero = int(x);
    return towards_zero - (x < T(towards_zero));
#endif
}

// The corners around pixel (origin_x + x, origin_y + y), which lies in (-1, W) x (-1, H) or not.
template <typename T>
DCNV4_HD Corners<T> corners(bool inside, int origin_x, int origin_y, T x, T y, int height,
                            int width) {
    x = inside ? x : T(0);
    y = inside ? y : T(0);
    const int below_x = integer_below(x), below_y = integer_below(y);
    const int column = below_x + (inside ? origin_x : 0), row = below_y + (inside ? origin_y : 0);
    const bool left = column >= 0, right = column < width - 1;
    const bool top = row >= 0, bottom = row < height - 1;
    const int legal = -int(inside) & (left * 5 | right * 10) & (top * 3 | bottom * 12);
    return {legal, column, row, x - T(below_x), y - T(below_y), inside, left, right, top, bottom};
}

// The corners around pixel (x, y) of a height x width image. A point outside (-1, W) x (-1, H), or
// at NaN, has no legal corner. Both sizes must be below 2^31.
template <typename T>
DCNV4_HD Corners<T> corners(T x, T y, int height, int width) {
    const bool inside = (x > T(-1)) & (x < T(width)) & (y > T(-1)) & (y < T(height));
    return corners(inside, 0, 0, x, y, height, width);
}

// The largest integer that is not above x, which an int must hold, and the rest of x, in [0, 1].
template <typename T>
struct Floor {
    int whole;
    T fraction;  // 1 where x is below 0 by less than T tells from 1
};

template <typename T>
DCNV4_HD Floor<T> floor_of(T x) {
#ifdef __CUDA_ARCH__
    const int whole = integer_below(x);
    return {whole, x - T(whole)};
#else
    const bool single = sizeof(T) == sizeof(float);
    const T whole = single ? T(__builtin_floorf(float(x))) : T(__builtin_floor(double(x)));
    return {int(whole), x - whole};
#endif
}

// The corners around pixel (origin_x + x, origin_y + y) of a height x width image. No precision is
// lost where an origin is large, as its sum with x or y is not made in T. A point outside (-1, W) x
// (-1, H), or at NaN, has no legal corner. Sizes, and sizes less an origin, must be below 2^31.
template <typename T>
DCNV4_HD Corners<T> corners(int origin_x, int origin_y, T x, T y, int height, int width) {
    // What an int does not hold is outside whatever the origin, and so is -2^31.
    const T most = T(2147483648.0);
    const Floor<T> at_x = floor_of((x < most) & (x > -most) ? x : -most);
    const Floor<T> at_y = floor_of((y < most) & (y > -most) ? y : -most);
    // Unsigned sums wrap around: one above 2^31 becomes negative, one below -2^31 at least W or H.
    const int column = int(unsigned(origin_x) + unsigned(at_x.whole));
    const int row = int(unsigned(origin_y) + unsigned(at_y.whole));
    // In column or row -1 a point is inside if a fraction leads on to 0.
    const bool inside = (column >= -int(at_x.fraction > 0)) & (column < width) &
                        (row >= -int(at_y.fraction > 0)) & (row < height);
    const bool left = column >= 0, right = column < width - 1;
    const bool top = row >= 0, bottom = row < height - 1;
    // Bits and no choices, which the compiler of the CPU's loop would make of 64-bit integers.
    const int mask = -int(inside);
    const int legal = mask & (left * 5 | right * 10) & (top * 3 | bottom * 12);
    return {legal, column & mask, row & mask, at_x.fraction, at_y.fraction, inside, left, right,
            top, bottom};
}

// What each corner counts: its bilinear share of the weight. Not zero at an illegal corner.
template <typename T>
DCNV4_HD void coefficients(T weight, T fraction_x, T fraction_y, T (&out)[4]) {
    const T bottom = weight * fraction_y, top = weight * (T(1) - fraction_y);
    const T left = T(1) - fraction_x;
    out[0] = top * left;
    out[1] = top * fraction_x;
    out[2] = bottom * left;
    out[3] = bottom * fraction_x;
}

template <typename T>
struct PointGradient {
    T x, y, weight;
};

// From the gradients of the four coefficients, which must be 0 at an illegal corner.
template <typename T>
DCNV4_HD PointGradient<T> coefficients_backward(const T (&grad)[4], T weight, T fraction_x,
                                                T fraction_y) {
    const T slope_top = grad[1] - grad[0], slope_bottom = grad[3] - grad[2];
    const T top = grad[0] + fraction_x * slope_top;
    const T bottom = grad[2] + fraction_x * slope_bottom;
    return {weight * (slope_top + fraction_y * (slope_bottom - slope_top)),
            weight * (bottom - top), top + fraction_y * (bottom - top)};
}

// Gradient of one logit: `weight` is its softmax, `grad` that of the weight, and `mean` the sum
// over all weights of grad * weight.
template <typename T>
DCNV4_HD T softmax_backward(T grad, T weight, T mean) {
    return weight * (grad - mean);
}

}  // namespace dcnv4
