// How many entries a step unmasks: one copy for the C++ and CUDA backends (scoring.step_quota in
// Python).
//
//   quota <- min(targets[min(step + 1, T)] - active, capacity), at least 0; 0 if found_inf
#pragma once
#include "core/types.h"

namespace sparse_optim {

// targets: T + 1 cumulative targets. progress: applied steps, active entries, skipped steps.
SPARSE_OPTIM_INLINE int64_t step_quota(const int64_t* targets, int64_t num_targets,
                                       const int64_t* progress, float found_inf, int64_t capacity) {
  const int64_t last = num_targets - 1, next = progress[0] < last ? progress[0] + 1 : last;
  const int64_t missing = targets[next > 0 ? next : 0] - progress[1];
  if (missing <= 0 || found_inf != 0.f) return 0;
  return missing < capacity ? missing : capacity;
}

}  // namespace sparse_optim
