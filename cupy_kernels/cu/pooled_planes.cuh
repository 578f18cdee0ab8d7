// Where conv_bn_pool keeps the 2x2 windows of a plane: one of OUT_H x OUT_W sums, pooled.
//
// Windows are numbered row by row, WINDOW_PITCH a row, and cut into units of UNIT_WINDOWS, each with room for UNIT_STRIDE. In it they follow one
// another, but with WGMMA the 4 x 4 windows of 4 tiles and 4 lanes are transposed, so that a lane writes its own together.
//
// PLANE_STRIDE lies between planes. Macros: OUT_H, OUT_W, WGMMA, WINDOW_PITCH, UNIT_WINDOWS, UNIT_STRIDE, PLANE_STRIDE.
#pragma once

#define PLANE_UNITS (((OUT_H + 1) / 2 * WINDOW_PITCH + UNIT_WINDOWS - 1) / UNIT_WINDOWS)

__device__ inline int unit_of_window(int row, int column) { return PLANE_UNITS == 1 ? 0 : (row * WINDOW_PITCH + column) / UNIT_WINDOWS; }

__device__ inline int place_of_window(int row, int column) {
    int unit = unit_of_window(row, column), window = row * WINDOW_PITCH + column - unit * UNIT_WINDOWS;
    return unit * UNIT_STRIDE + (WGMMA ? window & ~15 | (window & 3) << 2 | window >> 2 & 3 : window);
}
