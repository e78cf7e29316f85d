// The clip factor, from the squares of all gradients: one copy for the C++ and CUDA backends
// (backends/clip.py in Python).
//
//   grad_norm   <- sqrt(sum of squares) / grad_scale
//   grad_factor <- min(1, max_grad_norm / (grad_norm + 1e-6)) / grad_scale
#pragma once
#include <cmath>

#include "core/types.h"

namespace sparse_optim {

struct Clip {
  double grad_norm;
  float grad_factor;

  SPARSE_OPTIM_INLINE Clip(double sum_of_squares, float grad_scale, double max_grad_norm) {
    grad_norm = sqrt(sum_of_squares) / grad_scale;
    // fmin drops NaN: of a norm that is no number, or infinite where nothing is clipped.
    grad_factor = float(fmin(1.0, max_grad_norm / (grad_norm + 1e-6)) / grad_scale);
  }
};

}  // namespace sparse_optim
