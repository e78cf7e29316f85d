// How many entries a step unmasks: one copy for the C++ and CUDA backends (scoring.step_quota in
// Python).
//
//   quota <- min(target(min(step + 1, T)) - active, capacity), at least 0; 0 if found_inf
#pragma once
#include "core/types.h"

namespace sparse_optim {

// Cumulative target after a step: of a table, or of a formula, whose length is negative (the
// pieces; sparse_optim/backends/targets.py has the arithmetic).
SPARSE_OPTIM_INLINE int64_t target_at(const int64_t* targets, int64_t length, int64_t step) {
  if (step < 0) step = 0;
  if (length > 0) return targets[step < length ? step : length - 1];
  const int64_t pieces = -length;
  for (int64_t i = pieces - 1; i >= 0; --i) {
    const int64_t* piece = targets + 4 * i;
    if (step < piece[0]) continue;
    const int64_t target = piece[1], gain = piece[2], u = step - piece[0];
    const int64_t n = i + 1 < pieces ? piece[4] - piece[0] : 1;
    if (n <= 0) return target;
    return piece[3] == 2 ? target + gain * u * (2 * n - u) / (n * n) : target + gain * u / n;
  }
  return 0;
}

// progress: applied steps, active entries, skipped steps.
SPARSE_OPTIM_INLINE int64_t step_quota(const int64_t* targets, int64_t length,
                                       const int64_t* progress, float found_inf, int64_t capacity) {
  const int64_t step = progress[0] < INT32_MAX ? progress[0] + 1 : INT32_MAX;
  const int64_t missing = target_at(targets, length, step) - progress[1];
  if (missing <= 0 || found_inf != 0.f) return 0;
  return missing < capacity ? missing : capacity;
}

}  // namespace sparse_optim
