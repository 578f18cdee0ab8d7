// Where conv_bn_pool keeps the 2x2 windows of a plane: one of OUT_H x OUT_W sums, pooled.
//
// Windows are numbered row by row, WINDOW_PITCH a row. Without WGMMA they follow one another. With it they are cut into
// units of UNIT_WINDOWS, whole rows. There 16 windows, four tiles of four lanes, change places among themselves, so
// that a lane writes 16 bytes of its own at a time, next to those of its neighbours. In units of TOGETHER windows,
// where window 4 t + l of the 16 is in tile t of lane l:
//
//     place                     0  1  2  3 |  4  5  6  7 |  8  9 10 11 | 12 13 14 15
//     pooled, argmax (4)        0  4  8 12 |  1  5  9 13 |  2  6 10 14 |  3  7 11 15
//     saved as half_t (2)       0  4 |  1  5 |  2  6 |  3  7 |  8 12 |  9 13 | 10 14 | 11 15
//     saved as float (1)        0 |  1 |  2 |  3 |  4 |  5 |  6 |  7 |  8 |  9 | 10 | 11 | 12 | 13 | 14 | 15
//
// UNIT_STRIDE lies between units, PLANE_STRIDE between planes. Macros: OUT_H, OUT_W, WGMMA, WINDOW_PITCH, UNITS (of a
// plane), UNIT_WINDOWS, UNIT_STRIDE, PLANE_STRIDE.
#pragma once

#define WINDOWS_H ((OUT_H + 1) / 2)
#define WINDOWS_W ((OUT_W + 1) / 2)
#define WINDOWS (WINDOWS_H * WINDOWS_W)
static_assert(
    WGMMA ? WINDOW_PITCH >= WINDOWS_W && UNIT_WINDOWS % WINDOW_PITCH == 0 : WINDOW_PITCH == WINDOWS_W,
    "rows of windows");
static_assert(
    (UNITS - 1) * UNIT_WINDOWS < WINDOWS_H * WINDOW_PITCH && WINDOWS_H * WINDOW_PITCH <= UNITS * UNIT_WINDOWS,
    "units make a plane");
static_assert(!WGMMA || (UNIT_STRIDE >= UNIT_WINDOWS && UNIT_STRIDE % 16 == 0), "windows change places 16 at a time");
static_assert(
    PLANE_STRIDE % (WGMMA ? 16 : 4) == 0 &&
        PLANE_STRIDE >= WINDOWS_H * WINDOW_PITCH + (UNITS - 1) * (WGMMA ? UNIT_STRIDE - UNIT_WINDOWS : 0),
    "a plane has room for its windows");

__device__ inline int unit_of_window(int row, int column) {
    if (UNITS == 1) return 0;
    return WGMMA ? row / (UNIT_WINDOWS / WINDOW_PITCH) : (row * WINDOW_PITCH + column) / UNIT_WINDOWS;
}

// Of values of which TOGETHER windows, 1, 2 or 4, make 16 bytes.
template <int TOGETHER> __device__ inline int place_of_window(int row, int column) {
    if (!WGMMA) return row * WINDOW_PITCH + column;
    int unit = unit_of_window(row, column), window = row * WINDOW_PITCH + column - unit * UNIT_WINDOWS;
    int lane = window & 3, tile = window >> 2 & 3;
    return unit * UNIT_STRIDE + (window & ~15) + tile / TOGETHER * (4 * TOGETHER) + lane * TOGETHER + tile % TOGETHER;
}

enum { TOGETHER_POOLED = 4 };  // and argmax, which go with them
template <class T> __device__ constexpr int together_saved() { return 4 / sizeof(T); }
