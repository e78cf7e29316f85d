// The importances as the kernels that open tiles take them.
//
// Exponents with exact scores are told apart at run time: few entries are looked at, and code of
// its own for each would take minutes to compile.
#pragma once
#include "core/importance.h"

namespace sparse_optim::cuda {

struct ExpExact {
  float eps, exp;

  __device__ float operator()(float grad, float param) const {
    if (exp == 1.f) return Exp1{eps}(grad, param);
    if (exp == 2.f) return Exp2{eps}(grad, param);
    if (exp == 0.5f) return ExpHalf{eps}(grad, param);
    if (exp == -1.f) return ExpMinus1{eps}(grad, param);
    return ExpMinusHalf{eps}(grad, param);
  }
};

// Calls visit(functor) with the functor of this exponent.
template <class Visit>
void visit_exponent(double exp, float eps, Visit&& visit) {
  if (exp == 0.0) visit(Exp0{eps});
  else if (exp == 1.0 || exp == 2.0 || exp == 0.5 || exp == -1.0 || exp == -0.5)
    visit(ExpExact{eps, float(exp)});
  else visit(ExpAny{eps, float(exp)});
}

}  // namespace sparse_optim::cuda
