// Gradients of deform_conv by tiles: see tile.cuh.
#include "conv_backward.cuh"
#include "conv_tile.cuh"

using namespace dcnv4;

// V T' at the pixels' patches: for every row, pair of columns and pixel two numbers, whichever
// lanes of a quad read and write.
struct Products {
    static constexpr int ROW = 4 * PIXELS * 8;
    unsigned char bytes[PATCH_H * ROW];

    static DCNV4_DEVICE int at(int c, int r, int pair) {
        return pair * (PIXELS * 8) + (4 * c + (r ^ pair)) * 8;
    }
};

// What a warp keeps in shared memory.
struct __align__(128) Shared {
    Window<DEPTH> window;
    union {
        Patches patches;
        Products products;
        Sum far[PIXELS][POINTS][3];  // gradients of x, y and weight of far points
    };
    Fields fields;  // offsets and weights, later their gradients
};

extern "C" __global__ void __launch_bounds__(TILE_THREADS) conv_tile_backward(Arguments a) {
    __shared__ Shared all[TILE_THREADS / 32];
    const Index index = blockIdx.x * (TILE_THREADS / 32) + threadIdx.x / 32;
    if (index >= a.c.tiles) return;
    Shared& shared = all[threadIdx.x / 32];
    const Convolution& c = a.c;
    const Tile tile(index, c.out_height, c.out_width);
    const int lane = tile.lane, g = lane / 4, t = lane % 4;
    const VALUE* image = a.value + tile.image * c.value_image + tile.group * DEPTH;
    Sum* grad_image = a.grad_value + (long long)tile.image * c.height * c.width * (GROUPS * DEPTH) +
                      tile.group * DEPTH;
    FIELDS* grad_fields =
        a.grad_fields + (long long)tile.image * c.out_height * c.out_width * a.channels;

    shared.fields.load(tile, c.out_width, a.fields + tile.image * c.fields_image, c.fields_pixel);
    // The output's gradient, of the pixels of column g: channels 16i + 4t and 3 more.
    unsigned out[TILE_H][CHUNKS][2];
    bool odd = false;
#pragma unroll
    for (int r = 0; r < TILE_H; ++r) {
        const VALUE* grad = a.grad + tile.image * a.grad_image + tile.group * DEPTH + 4 * t +
                            (long long)tile.pixel(g, r, c.out_width) * a.grad_pixel;
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) {
            out[r][i][0] = out[r][i][1] = 0;
            if (tile.has(g, r)) {
                const auto four = Vector<VALUE, 4>::load(grad + 16 * i);
                out[r][i][0] = four.word[0], out[r][i][1] = four.word[1];
            }
            odd |= not_finite(out[r][i]);
        }
    }
    ptx::wait_for_copies();
    __syncwarp();
    const Own own(shared.fields, tile);
    if (__any_sync(~0u, odd | own.odd) || __reduce_add_sync(~0u, __popc(own.far)) > MOST_FAR) {
        compute_directly(a, tile);
        return;
    }
    const int left = tile.column - PADDING_W - REACH, top = tile.row - PADDING_H - REACH;
    shared.window.load(left, top, c.height, c.width, lane, image, c.stride);
    if (tile.group == GROUPS - 1 && tile.has(g, t))  // channels that no group owns
        for (long long i = 3 * GROUPS * POINTS; i < a.channels; ++i)
            store(grad_fields + tile.pixel(g, t, c.out_width) * a.channels + i, Sum(0));

    each_far(own, tile, shared.fields, [&](int r, int k, Sum weight) {
        Sum dot[4] = {0, 0, 0, 0};
        Corners<Sum> at;
        if (r >= 0) {
            at = locate(c, tile, shared.fields.of(tile, g, r), g, r, k);
            Sum share[4];
            legal_coefficients(at, weight, share);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (!(at.legal >> i & 1)) continue;
                const int where = (at.row + i / 2) * c.width + at.column + i % 2;
                const VALUE* corner = dcnv4::at(image + 4 * t, where, c.stride);
                Sum* to = grad_image + (long long)where * (GROUPS * DEPTH) + 4 * t;
#pragma unroll
                for (int chunk = 0; chunk < CHUNKS; ++chunk) {
                    const auto four = Vector<VALUE, 4>::load(corner + 16 * chunk);
                    unsigned here[2] = {out[0][chunk][0], out[0][chunk][1]};
#pragma unroll
                    for (int row = 1; row < TILE_H; ++row)
                        if (r == row) here[0] = out[row][chunk][0], here[1] = out[row][chunk][1];
                    Sum term[4];
#pragma unroll
                    for (int v = 0; v < 4; ++v) {
                        const Sum grad = Number<VALUE>::get(here, v);
                        dot[i] += grad * four[v];
                        term[v] = share[i] * grad;
                    }
                    add(to + 16 * chunk, term);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            dot[i] += __shfl_xor_sync(~0u, dot[i], 1);
            dot[i] += __shfl_xor_sync(~0u, dot[i], 2);
        }
        if (r >= 0 && t == 0) {
            const PointGradient<Sum> gradient =
                coefficients_backward(dot, weight, at.fraction_x, at.fraction_y);
            Sum(&to)[3] = shared.far[4 * g + r][k];
            to[0] = gradient.x, to[1] = gradient.y, to[2] = gradient.weight;
        }
    });
    __syncwarp();
    FIELDS* gradients = shared.fields.of(tile, g, t);
    Sum slope[SOFTMAX ? POINTS : 1], mean = 0;
    const auto keep = [&](int k, const PointGradient<Sum>& gradient) {
        store(gradients + 2 * k, gradient.x);
        store(gradients + 2 * k + 1, gradient.y);
        if constexpr (SOFTMAX)
            slope[k] = gradient.weight;
        else
            store(gradients + 2 * POINTS + k, gradient.weight);
    };
#pragma unroll
    for (int k = 0; k < POINTS; ++k) {
        if (!(own.far >> k & 1)) continue;
        const Sum(&from)[3] = shared.far[lane][k];
        keep(k, {from[0], from[1], from[2]});
    }
    __syncwarp();

    // The value's gradient, S T.
    build(shared.patches, own, lane);
    __syncwarp();
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        unsigned turned[TILE_H][2];
#pragma unroll
        for (int r = 0; r < TILE_H; ++r)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                unsigned word = out[r][0][j];
#pragma unroll
                for (int i = 1; i < CHUNKS; ++i) word = chunk == i ? out[r][i][j] : word;
                turned[r][j] = ptx::transpose(word);
            }
#pragma unroll
        for (int row = 0; row < WINDOW_H; ++row) {
            float sum[2][4] = {};
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                if (!Patches::reaches(row, m)) continue;
                unsigned shares[4];
                shared.patches.read<true>(row, m, lane, shares);
#pragma unroll
                for (int j = 0; j < 2; ++j)
                    Number<VALUE>::mma(sum[j], shares, turned[2 * m][j], turned[2 * m + 1][j]);
            }
            const int y = top + row;
            if (y < 0 || y >= c.height) continue;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int x = left + 8 * half + g;
                const Sum term[4] = {sum[0][2 * half] * own.unit, sum[0][2 * half + 1] * own.unit,
                                     sum[1][2 * half] * own.unit, sum[1][2 * half + 1] * own.unit};
                const bool any = term[0] != 0 || term[1] != 0 || term[2] != 0 || term[3] != 0;
                if (any && x >= 0 && x < c.width)
                    add(grad_image + (long long)(y * c.width + x) * (GROUPS * DEPTH) + 16 * chunk +
                            4 * t,
                        term);
            }
        }
    }
    ptx::wait_for_copies();
    __syncwarp();

    // Those of offsets and weights, from V T'.
#pragma unroll
    for (int row = 0; row < WINDOW_H; ++row) {
        float dot[2][2][4] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < CHUNKS; ++i) {
                const uint2 four = *(const uint2*)(shared.window.bytes +
                                                   row * Window<DEPTH>::ROW + t % 2 * 8 +
                                                   Window<DEPTH>::at(8 * half + g, 2 * i + t / 2));
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    if (!Patches::reaches(row, m)) continue;
                    const unsigned pixels[4] = {out[2 * m][i][0], out[2 * m + 1][i][0],
                                                out[2 * m][i][1], out[2 * m + 1][i][1]};
                    Number<VALUE>::mma(dot[m][half], pixels, four.x, four.y);
                }
            }
        // Of the two halves of a row of the window, a pair of columns of the patch lies in one.
        const bool first = t >= g / 2;
        const int pair = (t - g / 2) & 3;
#pragma unroll
        for (int r = 0; r < TILE_H; ++r) {
            if (row < r || row >= r + PATCH_H) continue;
            const float(&products)[2][4] = dot[r / 2];
            *(float2*)(shared.products.bytes + (row - r) * Products::ROW + Products::at(g, r, pair)) =
                make_float2(first ? products[0][r % 2 * 2] : products[1][r % 2 * 2],
                            first ? products[0][r % 2 * 2 + 1] : products[1][r % 2 * 2 + 1]);
        }
    }
    __syncwarp();
    constexpr int removed = REMOVE_CENTER ? KERNEL_W / 2 * KERNEL_H + KERNEL_H / 2 : POINTS;
#pragma unroll
    for (int k = 0; k < POINTS; ++k) {
        if (own.far >> k & 1) continue;
        const int cell = k + (k >= removed), i = cell / KERNEL_H, j = cell % KERNEL_H;
        const Sum x = Number<float16>::get(&own.offsets[k], 0);
        const Sum y = Number<float16>::get(&own.offsets[k], 1);
        const int floor_x = __float2int_rd(x), floor_y = __float2int_rd(y);
        const Sum fraction_x = x - floor_x, fraction_y = y - floor_y;
        const int column = g % 2 + i + REACH + floor_x;
        const unsigned char* from = shared.products.bytes + (j + REACH + floor_y) * Products::ROW;
        const int at_left = Products::at(g, t, column / 2) + column % 2 * 4;
        const int at_right = Products::at(g, t, (column + 1) / 2) + (column + 1) % 2 * 4;
        const Sum dot[4] = {*(const float*)(from + at_left), *(const float*)(from + at_right),
                            *(const float*)(from + Products::ROW + at_left),
                            *(const float*)(from + Products::ROW + at_right)};
        PointGradient<Sum> gradient =
            coefficients_backward(dot, own.weight(k), fraction_x, fraction_y);
        // At the centre of a pixel just outside a point is outside, though one corner is not.
        if ((fraction_x == 0 && left + g + i + REACH + floor_x == -1) ||
            (fraction_y == 0 && top + t + j + REACH + floor_y == -1))
            gradient = {0, 0, 0};
        keep(k, gradient);
    }
    if constexpr (SOFTMAX) {
#pragma unroll
        for (int k = 0; k < POINTS; ++k) mean += slope[k] * own.weight(k);
#pragma unroll
        for (int k = 0; k < POINTS; ++k)
            store(gradients + 2 * POINTS + k, softmax_backward(slope[k], own.weight(k), mean));
    }
    __syncwarp();
    shared.fields.store(tile, c.out_width, grad_fields, a.channels);
}
