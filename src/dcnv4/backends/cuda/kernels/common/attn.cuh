// Where the points of ms_deform_attn lie: the mirror of `attn_points` and `levels` in geometry.py.
#pragma once

#include <common/slices.cuh>

namespace dcnv4 {

// The levels' sizes and first rows in the value, shared by a block. A level without pixels, or one
// that does not fit in the value, gets sizes of -1: no point lies inside it.
struct Levels {
    int height[LEVELS], width[LEVELS];
    Index first[LEVELS];

    DCNV4_DEVICE void fill(const Arguments& a) {
        const long long* shapes = a.shapes;
        for (int level = threadIdx.x; level < LEVELS; level += blockDim.x) {
            long long start = 0, rows, columns;
            for (int l = 0;; ++l) {
                rows = shapes ? shapes[2 * l] : a.sizes[2 * l];
                columns = shapes ? shapes[2 * l + 1] : a.sizes[2 * l + 1];
                if (l == level) break;
                start += rows * columns;
            }
            const bool fits = rows > 0 && columns > 0 && start >= 0 && rows <= a.length &&
                              columns <= a.length && start + rows * columns <= a.length;
            height[level] = fits ? int(rows) : -1;
            width[level] = fits ? int(columns) : -1;
            first[level] = fits ? Index(start) : 0;
        }
        __syncthreads();
    }
};

// Those of a slice.
struct AttnPoints {
    const Levels& levels;
    const LOCATIONS* locations;  // [L, P, 2]
    const WEIGHTS* weights;      // [L, P]
    LOCATIONS* grad_locations;
    WEIGHTS* grad_weights;

    DCNV4_DEVICE int level(int k) const { return k / LEVEL_POINTS; }
    DCNV4_DEVICE Place locate(int k) const {
        const int level = this->level(k);
        const int height = levels.height[level], width = levels.width[level];
        const Vector<LOCATIONS, LOCATION_VECTOR> low =
            Vector<LOCATIONS, LOCATION_VECTOR>::load(locations + 2 * k);
        const Sum u = low[0], v = LOCATION_VECTOR == 2 ? low[1] : load(locations + 2 * k + 1);
        return {corners(u * Sum(width) - Sum(0.5), v * Sum(height) - Sum(0.5), height, width),
                levels.first[level], width};
    }
    DCNV4_DEVICE Sum logit(int k) const { return load(weights + k); }

    DCNV4_DEVICE void store_gradient(int k, Sum grad_x, Sum grad_y) const {
        const int level = this->level(k);
        store(grad_locations + 2 * k, grad_x * levels.width[level]);
        store(grad_locations + 2 * k + 1, grad_y * levels.height[level]);
    }
    DCNV4_DEVICE void store_weight_gradient(int k, Sum grad) const {
        store(grad_weights + k, grad);
    }
};

}  // namespace dcnv4
