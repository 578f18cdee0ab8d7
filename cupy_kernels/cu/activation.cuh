// The activation between batch norm and max pooling in the fused chain. The macro ACTIVATION names its struct; each has
// a header.
//
//     Activation(float parameter)    the launch's, 0 where the activation has none
//     float of(float v)              the activation of v; no v is a denormal, which -ftz=true makes 0
//     float slope(float y)           its derivative where its value is y
//
// It must never decrease: then it can follow max pooling. Pooling here takes the first of the largest v, PyTorch the
// first of the largest activations. These are two places only where different v have one activation: in the flat parts,
// where the slope, and with it what the place would get, is 0; or where rounding makes neighbours equal.
#pragma once
#include "activation_leaky_relu.cuh"
#include "activation_tanh.cuh"

typedef ACTIVATION Activation;
