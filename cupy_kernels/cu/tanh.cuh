// tanh and its derivative, as every kernel that applies it computes them.
#pragma once

// tanhf under -ftz=true flushes denormals; there tanh(v) = v to the last bit, and a select moves the bits unharmed.
__device__ inline acc_t tanh_of(acc_t v) { return fabs(v) < (acc_t)1.17549435e-38f ? v : tanh(v); }

// d tanh(v) / dv, from y = tanh(v).
__device__ inline acc_t tanh_slope(acc_t y) { return (acc_t)1 - y * y; }
