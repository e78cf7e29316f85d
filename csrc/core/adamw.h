// AdamW for one entry, in float32: one copy for all compiled backends (reference.update in Python).
//
//   param      <- (1 - lr * weight_decay) * param
//   exp_avg    <- beta1 * exp_avg + (1 - beta1) * grad    (as torch.lerp)
//   exp_avg_sq <- beta2 * exp_avg_sq + (1 - beta2) * grad^2
//   param      <- param - lr / bias_correction1 * exp_avg
//                         / (sqrt(exp_avg_sq) / sqrt(bias_correction2) + eps)
#pragma once
#include <cmath>

#include "core/pool.h"

namespace sparse_optim {

// A row of `hyper` as the arithmetic needs it. `factor` is the sign and what scales the gradient.
struct AdamW {
  float decay, keep1, beta2, keep2, eps, factor;

  AdamW() = default;
  SPARSE_OPTIM_INLINE AdamW(const Hyper& hyper, float grad_factor)
      : decay(float(1.0 - hyper.lr * hyper.weight_decay)),
        keep1(float(1.0 - hyper.beta1)),
        beta2(float(hyper.beta2)),
        keep2(float(1.0 - hyper.beta2)),
        eps(float(hyper.eps)),
        factor(float(hyper.sign) * grad_factor) {}

  // step_size = lr / bias_correction1
  SPARSE_OPTIM_INLINE void operator()(float& param, float& exp_avg, float& exp_avg_sq, float grad,
                                      float step_size, float sqrt_bias_correction2) const {
    const float g = grad * factor;
    const float gap = g - exp_avg;
    // As torch.lerp: from the nearer end. From exp_avg alone, a gradient that is far smaller than
    // it would be lost where beta1 is small.
    const float m = keep1 < 0.5f ? exp_avg + keep1 * gap : g - (1.f - keep1) * gap;
    const float v = exp_avg_sq * beta2 + keep2 * (g * g);
    exp_avg = m;
    exp_avg_sq = v;
    const float denominator = sqrtf(v) / sqrt_bias_correction2 + eps;
    param = param * decay - step_size * (m / denominator);
  }
};

}  // namespace sparse_optim
