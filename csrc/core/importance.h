// The importance of an entry, one copy for all compiled backends (scoring.py is the specification).
//
//   importance = |grad| / (|param| + eps)^exp,  float32
//
// Only correctly rounded operations, so that every backend gets the same bits; compile without
// contraction to fused multiply-add. Each of them is monotone, so the importance of (largest
// |grad|, extreme |param|) bounds that of every entry between, without a margin. `pow` is neither
// exact nor monotone: general exponents get a margin and promise no equality across backends.
#pragma once
#include <cmath>

#include "core/types.h"

namespace sparse_optim {

struct Exp0 {
  float eps;
  SPARSE_OPTIM_INLINE float operator()(float grad, float) const { return fabsf(grad); }
};
struct Exp1 {
  float eps;
  SPARSE_OPTIM_INLINE float operator()(float grad, float param) const {
    return fabsf(grad) / (fabsf(param) + eps);
  }
};
struct Exp2 {
  float eps;
  SPARSE_OPTIM_INLINE float operator()(float grad, float param) const {
    const float base = fabsf(param) + eps;
    return fabsf(grad) / (base * base);
  }
};
struct ExpHalf {
  float eps;
  SPARSE_OPTIM_INLINE float operator()(float grad, float param) const {
    return fabsf(grad) / sqrtf(fabsf(param) + eps);
  }
};
struct ExpMinus1 {
  float eps;
  SPARSE_OPTIM_INLINE float operator()(float grad, float param) const {
    return fabsf(grad) * (fabsf(param) + eps);
  }
};
struct ExpMinusHalf {
  float eps;
  SPARSE_OPTIM_INLINE float operator()(float grad, float param) const {
    return fabsf(grad) * sqrtf(fabsf(param) + eps);
  }
};
struct ExpAny {
  float eps, exp;
  SPARSE_OPTIM_INLINE float operator()(float grad, float param) const {
    return fabsf(grad) / powf(fabsf(param) + eps, exp);
  }
};

// Calls visit(functor) with the functor of this exponent.
template <class Visit>
void visit_importance(double exp, float eps, Visit&& visit) {
  if (exp == 0.0) visit(Exp0{eps});
  else if (exp == 1.0) visit(Exp1{eps});
  else if (exp == 2.0) visit(Exp2{eps});
  else if (exp == 0.5) visit(ExpHalf{eps});
  else if (exp == -1.0) visit(ExpMinus1{eps});
  else if (exp == -0.5) visit(ExpMinusHalf{eps});
  else visit(ExpAny{eps, float(exp)});
}

// Scores as integers of the same order; 0 (never unmasked) for scores of 0 and NaN.
SPARSE_OPTIM_INLINE int32_t importance_key(float score) {
  return score > 0.f ? to_bits(score) : 0;
}

// Units in the last place that a bound through pow is raised by.
constexpr int32_t kPowMargin = 16;

SPARSE_OPTIM_INLINE int32_t raised_by_margin(int32_t key) {
  return key < kInfinityBits - kPowMargin ? key + kPowMargin : kInfinityBits;
}

// The key of a tile's largest |grad| with the param that favours it most. No entry of the tile
// has a greater key.
template <class Importance>
SPARSE_OPTIM_INLINE int32_t bound_key(Importance importance, float grad, float param) {
  return importance_key(importance(grad, param));
}
SPARSE_OPTIM_INLINE int32_t bound_key(ExpAny importance, float grad, float param) {
  return grad > 0.f ? raised_by_margin(importance_key(importance(grad, param))) : 0;
}

}  // namespace sparse_optim
