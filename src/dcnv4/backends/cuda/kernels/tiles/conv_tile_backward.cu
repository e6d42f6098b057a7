// Gradients of deform_conv by tiles: see tile.cuh.
//
// Work: a warp a strip of a group. The value's gradient in a window is added to memory when the
// window has left its row; with up to 16 channels it waits in registers until then, otherwise it is
// added tile after tile.
// Memory: as the forward and the output's gradient once; WINDOW_W / TILE_W vectors of float32
// additions for every pixel and channel.
// Limit: registers, which leave 12 warps an SM to hide latency; then L2.
#include <common/backward.cuh>
#include <tiles/points.cuh>

using namespace dcnv4;

// V T' at the pixels' patches: a number for every row, column and pixel. A quad's lanes write
// columns two apart, of eight pixels: to different banks.
struct Products {
    static constexpr int OF_ROW = TILE_W * 4, COLUMN = 36 * 4;
    static constexpr int ROW = (PAIRS > 4 ? 2 * PAIRS : 8) * COLUMN;
    unsigned char bytes[PATCH_H * ROW];

    static DCNV4_DEVICE int at(int c, int r) { return c * 4 + r * OF_ROW; }

    // The gradients of the near points of pixel (g, t).
    DCNV4_DEVICE void point_gradients(const OwnPixel& own, int g, int t,
                                      PointGradient<Sum> (&gradient)[POINTS]) const {
        const unsigned char* own_products = bytes + at(g, t) + g % 2 * COLUMN;
#pragma unroll
        for (int k = 0; k < POINTS; ++k) {
            const int i = column_of(k), j = row_of(k);
            const Sum x = own.x(k), y = own.y(k);
            const int whole_x = integer_below(x), whole_y = integer_below(y);
            const Sum fraction_x = x - whole_x, fraction_y = y - whole_y;
            const unsigned char* from = own_products + (j + REACH + whole_y) * ROW +
                                        (i + REACH + whole_x) * COLUMN;
            const Sum dot[4] = {*(const float*)from, *(const float*)(from + COLUMN),
                                *(const float*)(from + ROW), *(const float*)(from + ROW + COLUMN)};
            gradient[k] = coefficients_backward(dot, own.weight(k), fraction_x, fraction_y);
        }
    }
};

// What a warp keeps in shared memory.
using ValueWindow = HaloWindow<DEPTH>;
struct __align__(128) Shared {
    ValueWindow window;
    union {
        Spread spread;
        Products products;
        StagedPoints gradients;
    };
    StagedPoints staged;
};

constexpr int MOST_FAR = 48;
constexpr int CHUNKS = DEPTH / 16;  // of channels, as many as a product sums at once
static_assert(WARPS == 1, "a warp has its own window");

// The value's gradient at a row of the window, [positions, 16 channels] in fragments.
using Row = float[2][4];
constexpr int KEPT = CHUNKS == 1 ? WINDOW_H - TILE_H : 0;  // rows that the next tile adds to

extern "C" __global__ void __launch_bounds__(32, DEPTH == 16 ? 12 : 8)
    conv_tile_backward(Arguments a) {
    __shared__ Shared shared;
    Tile tile(a, from_last(blockIdx.x, gridDim.x));
    const int lane = tile.lane, g = lane / 4, t = lane % 4, group = tile.part;
    const VALUE* image = a.value + tile.image * a.value_image + group * DEPTH;
    const VALUE* grad_output = a.grad + tile.image * a.grad_image + group * DEPTH + 4 * t;
    Total* grad_image = a.grad_value +
                        (long long)tile.image * a.height * a.width * (GROUPS * DEPTH) +
                        group * DEPTH + 4 * t;
    OFFSET_MASK* grad_offset_mask = a.grad_offset_mask + (long long)tile.image * a.out_height *
                                                             a.out_width * a.grad_offset_mask_pixel;
    const int left = tile.column - LEFT;
    // What the lane copies first of the next tile.
    StagedPoints::Source source(tile, group, a.offset_mask + tile.image * a.offset_mask_image,
                                a.offset_mask_pixel);
    const char* window = ValueWindow::first(left, tile.row - ABOVE, a.width, image, a.pixel_bytes);
    const Sum fixed_point_scale = scale_of_sums(a, tile.image);
    // Adds to row y of the value's gradient; the lane's positions are 8 columns apart.
    const int x = left + g;
    const long long line = a.width * (long long)(GROUPS * DEPTH);
    Total* const first_position = grad_image + x * (long long)(GROUPS * DEPTH);
    const bool legal[2] = {x >= 0 && x < a.width, x + 8 >= 0 && x + 8 < a.width};
    const auto add_to = [&](int y, int chunk, const Row& row) {
        Total* to = first_position + y * line + 16 * chunk;
        const bool there = y >= 0 && y < a.height;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            Sum term[4] = {row[0][2 * half], row[0][2 * half + 1], row[1][2 * half],
                           row[1][2 * half + 1]};
            red_add_if(there && legal[half], to + half * (8 * GROUPS * DEPTH), term,
                       fixed_point_scale);
        }
    };
    int first = 0;  // where the window begins in the ring
    Row kept[KEPT ? KEPT : 1] = {};

    shared.staged.load(tile, source, a.offset_mask_pixel);
    ptx::cp_async_commit();
    shared.window.load<WINDOW_H>(0, 0, left, tile.row - ABOVE, a.height, a.width, window,
                                 a.pixel_bytes);
    ptx::cp_async_commit();
#pragma unroll 1
    for (; tile.row < tile.last; tile.row += TILE_H) {
        // The output's gradient, of the pixels of column g: channels 16i + 4t and 3 more.
        unsigned grad[TILE_H][CHUNKS][2];
        const VALUE* from = grad_output + (long long)tile.pixel(g, 0) * a.grad_pixel;
#pragma unroll
        for (int r = 0; r < TILE_H; ++r) {
#pragma unroll
            for (int i = 0; i < CHUNKS; ++i) {
                grad[r][i][0] = grad[r][i][1] = 0;
                if (tile.has(g, r))
#pragma unroll
                    for (int j = 0; j < 2; ++j)  // one by one: into registers as products want them
                        grad[r][i][j] = Vector<VALUE, 2>::load(from + 16 * i + 2 * j).word[0];
            }
            from += tile.width * a.grad_pixel;
        }
        ptx::cp_async_wait<1>();
        __syncwarp();
        const OwnPixel own(shared.staged, lane, group);
        if (!own.fits || own.count > MOST_FAR) break;

        __syncwarp();
        Tile next = tile;
        next.row += TILE_H;
        // Far points are read again below.
        if (next.row < next.last && !own.count)
            shared.staged.load(next, source, a.offset_mask_pixel);
        ptx::cp_async_commit();

        // The value's gradient, S T.
        build(shared.spread, own, lane);
        bool odd = false;
#pragma unroll
        for (int r = 0; r < TILE_H; ++r)
#pragma unroll
            for (int i = 0; i < CHUNKS; ++i) {
                ptx::hold(grad[r][i]);  // lest it be waited for earlier
                odd |= not_finite(grad[r][i]);
            }
        if (__any_sync(~0u, odd)) break;
        ptx::cp_async_wait<1>();
        __syncwarp();
        ptx::griddepcontrol_wait();  // for zeros to add to
        const int top = tile.row - ABOVE;
        int first_share = Spread::first(lane);
        ptx::hold(first_share);
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            unsigned turned[TILE_H][2];
#pragma unroll
            for (int r = 0; r < TILE_H; ++r)
#pragma unroll
                for (int j = 0; j < 2; ++j) turned[r][j] = ptx::movmatrix(grad[r][chunk][j]);
#pragma unroll
            for (int row = 0; row < WINDOW_H; ++row) {
                Row sum = {};
#pragma unroll
                for (int i = 0; i < 8; ++i)
                    sum[i / 4][i % 4] = row < KEPT ? kept[row < KEPT ? row : 0][i / 4][i % 4] : 0;
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    if (!reaches(row, m)) continue;
                    unsigned shares[4];
                    shared.spread.read(first_share, row, m, lane, shares);
#pragma unroll
                    for (int j = 0; j < 2; ++j)
                        Number<VALUE>::mma_m16n8k16(sum[j], shares, turned[2 * m][j],
                                                    turned[2 * m + 1][j]);
                }
                if (row < WINDOW_H - KEPT)
                    add_to(top + row, chunk, sum);
                else
#pragma unroll
                    for (int i = 0; i < 8; ++i)
                        kept[row < TILE_H ? 0 : row - TILE_H][i / 4][i % 4] = sum[i / 4][i % 4];
            }
        }
        __syncwarp();

        // What the gradients of offsets and weights need, V T'.
        // Of four pairs of columns, a lane has one, in the window's first or second half.
        const bool in_first = t >= g / 2;
        unsigned char* lane_products =
            shared.products.bytes + Products::at(g, 0) + (t - g / 2 & 3) * (2 * Products::COLUMN);
        const unsigned char* values[2][CHUNKS];
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < CHUNKS; ++i)
                values[half][i] =
                    shared.window.bytes + t % 2 * 8 + ValueWindow::at(8 * half + g, 2 * i + t / 2);
#pragma unroll
        for (int row = 0; row < WINDOW_H; ++row) {
            float dot[2][2][4] = {};
            const int at_row = ValueWindow::row(first, row);
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int i = 0; i < CHUNKS; ++i) {
                    const uint2 four = *(const uint2*)(values[half][i] + at_row);
#pragma unroll
                    for (int m = 0; m < 2; ++m) {
                        if (!reaches(row, m)) continue;
                        const unsigned pixels[4] = {grad[2 * m][i][0], grad[2 * m + 1][i][0],
                                                    grad[2 * m][i][1], grad[2 * m + 1][i][1]};
                        Number<VALUE>::mma_m16n8k16(dot[m][half], pixels, four.x, four.y);
                    }
                }
#pragma unroll
            for (int r = 0; r < TILE_H; ++r) {
                if (row < r || row >= r + PATCH_H) continue;
                const float (&products)[2][4] = dot[r / 2];
                unsigned char* to =
                    lane_products + (row - r) * Products::ROW + r * Products::OF_ROW;
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    *(float*)(to + i * Products::COLUMN) =
                        in_first ? products[0][r % 2 * 2 + i] : products[1][r % 2 * 2 + i];
                    if (PAIRS > 4 && t == g / 2)
                        *(float*)(to + (8 + i) * Products::COLUMN) = products[1][r % 2 * 2 + i];
                }
            }
        }
        __syncwarp();
        first = ValueWindow::row(first, TILE_H);
        if (next.row < next.last)
            shared.window.load<TILE_H>(first, WINDOW_H - TILE_H, left, top + WINDOW_H, a.height,
                                       a.width, window, a.pixel_bytes);
        ptx::cp_async_commit();

        // The gradients of offsets and weights.
        PointGradient<Sum> gradient[POINTS];
        shared.products.point_gradients(own, g, t, gradient);
        // At the centre of a pixel just outside the image a point is outside, though not all of its
        // corners are.
        if (left < 0 || top < 0)
#pragma unroll
            for (int k = 0; k < POINTS; ++k) {
                const Sum x = own.x(k), y = own.y(k);
                if (left + g + column_of(k) + REACH + x == -1 ||
                    top + t + row_of(k) + REACH + y == -1)
                    gradient[k] = {0, 0, 0};
            }
        // A far point's gradients, and what it adds to the value's.
        const auto visit = [&](bool some, int r, int k, Sum weight, const Corners<Sum>& at) {
            Sum share[4], dot[4] = {0, 0, 0, 0};
            legal_coefficients(at, weight, share);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const bool legal = some && at.legal >> i & 1;
                if (!DETERMINISTIC && !legal) continue;  // integers are added by all lanes at once
                const int where = (at.row + i / 2) * a.width + at.column + i % 2;
                const VALUE* corner = dcnv4::at(image + 4 * t, legal ? where : 0, a.pixel_bytes);
                Total* to = grad_image + (long long)where * (GROUPS * DEPTH);
#pragma unroll
                for (int chunk = 0; chunk < CHUNKS; ++chunk) {
                    const auto four = Vector<VALUE, 4>::load(corner + 16 * chunk);
                    unsigned here[2] = {grad[0][chunk][0], grad[0][chunk][1]};
#pragma unroll
                    for (int row = 1; row < TILE_H; ++row)
                        if (r == row) here[0] = grad[row][chunk][0], here[1] = grad[row][chunk][1];
                    Sum term[4];
#pragma unroll
                    for (int v = 0; v < 4; ++v) {
                        const Sum number = Number<VALUE>::get(here, v);
                        dot[i] += legal ? number * four[v] : Sum(0);
                        term[v] = share[i] * number;
                    }
                    red_add_if(legal, to + 16 * chunk, term, fixed_point_scale);
                }
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                dot[i] += __shfl_xor_sync(~0u, dot[i], 1);
                dot[i] += __shfl_xor_sync(~0u, dot[i], 2);
            }
            const PointGradient<Sum> found =
                coefficients_backward(dot, weight, at.fraction_x, at.fraction_y);
#pragma unroll
            for (int own_k = 0; own_k < POINTS; ++own_k)
                if (some && r == t && k == own_k) gradient[own_k] = found;
        };
        if (own.count) each_far(a, own, tile, group, shared.staged, visit);
        if constexpr (SOFTMAX) {
            Sum mean = 0;
#pragma unroll
            for (int k = 0; k < POINTS; ++k) mean += gradient[k].weight * own.weight(k);
#pragma unroll
            for (int k = 0; k < POINTS; ++k)
                gradient[k].weight = softmax_backward(gradient[k].weight, own.weight(k), mean);
        }
        unsigned words[StagedPoints::WORDS];
#pragma unroll
        for (int k = 0; k < POINTS; ++k) {
            Number<OFFSET_MASK>::set(words, 2 * k, SCALE * gradient[k].x);
            Number<OFFSET_MASK>::set(words, 2 * k + 1, SCALE * gradient[k].y);
        }
#pragma unroll
        for (int k = 0; k < POINTS; ++k)
            Number<OFFSET_MASK>::set(words, 2 * POINTS + k, gradient[k].weight);
        __syncwarp();
        if (next.row < next.last && own.count) {
            shared.staged.load(next, source, a.offset_mask_pixel);
            ptx::cp_async_commit();
            ptx::cp_async_wait<0>();
        }
        shared.gradients.store(tile, group, words, grad_offset_mask, a.grad_offset_mask_pixel);
        if (group == GROUPS - 1 && tile.has(g, t))  // channels that no group owns
            for (long long i = 3 * GROUPS * POINTS; i < a.offset_mask_channels; ++i)
                store(grad_offset_mask + tile.pixel(g, t) * a.grad_offset_mask_pixel + i, Sum(0));
        __syncwarp();
    }
    ptx::griddepcontrol_wait();
    tile.leave(a, tile.row);
    if constexpr (KEPT != 0)
#pragma unroll
        for (int row = 0; row < KEPT; ++row) add_to(tile.row - ABOVE + row, 0, kept[row]);
    ptx::cp_async_wait<0>();
    ptx::griddepcontrol_launch_dependents();
}
