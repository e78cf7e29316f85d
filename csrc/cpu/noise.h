// The noise of runs of entries, for the CPU.
#pragma once
#include "core/noise.h"
#include "core/pool.h"

namespace sparse_optim::cpu {

// scores[i] <- scores[i] / sqrt(E) for the entries first..first + count - 1 of a pool tensor.
void perturb(const Noise& noise, int64_t tensor, int64_t first, int64_t count, float* scores);

}  // namespace sparse_optim::cpu
