#include "cpu/open_tile.h"

#include "core/importance.h"
#include "cpu/noise.h"

namespace sparse_optim::cpu {
namespace {

template <class T>
SPARSE_OPTIM_INLINE void load_of(const T* in, int64_t count, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(in[i]);
}
SPARSE_OPTIM_VECTORIZED void load(const float* in, int64_t n, float* out) {
  load_of(in, n, out);
}
SPARSE_OPTIM_VECTORIZED void load(const BFloat16* in, int64_t n, float* out) {
  load_of(in, n, out);
}
SPARSE_OPTIM_VECTORIZED void load(const Float16* in, int64_t n, float* out) {
  load_of(in, n, out);
}

template <class Importance>
SPARSE_OPTIM_INLINE void keys_of(Importance importance, const float* grad, const float* param,
                                 int64_t count, int32_t* keys) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) keys[i] = importance_key(importance(grad[i], param[i]));
}
#define SPARSE_OPTIM_KEYS(Importance)                                                             \
  SPARSE_OPTIM_VECTORIZED void keys(Importance importance, const float* grad, const float* param, \
                                    int64_t n, int32_t* out) {                                    \
    keys_of(importance, grad, param, n, out);                                                     \
  }
SPARSE_OPTIM_KEYS(Exp0)
SPARSE_OPTIM_KEYS(Exp1)
SPARSE_OPTIM_KEYS(Exp2)
SPARSE_OPTIM_KEYS(ExpHalf)
SPARSE_OPTIM_KEYS(ExpMinus1)
SPARSE_OPTIM_KEYS(ExpMinusHalf)
#undef SPARSE_OPTIM_KEYS
void keys(ExpAny importance, const float* grad, const float* param, int64_t n, int32_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = importance_key(importance(grad[i], param[i]));
}

int64_t tensor_of(const Problem& problem, int64_t tile_index) {
  auto after = std::upper_bound(
      problem.pool.begin(), problem.pool.end(), tile_index,
      [](int64_t index, const PoolTensor& tensor) { return index < tensor.first_tile; });
  return after - problem.pool.begin() - 1;  // tensors without tiles share their successor's first
}

}  // namespace

Opened open_tile(const Problem& problem, int64_t tile_index, int32_t* out) {
  const int64_t t = tensor_of(problem, tile_index);
  const PoolTensor& tensor = problem.pool[t];
  const int64_t first = (tile_index - tensor.first_tile) * problem.tile;
  const int64_t count = std::min(problem.tile, tensor.numel - first);
  if (!tensor.grad) {
    std::fill_n(out, (count + 15) / 16 * 16, 0);
    return {t, first, count};
  }
  float grad[kMaxTile], param[kMaxTile];
  visit_dtype(tensor.grad_dtype, tensor.grad, [&](auto* data) { load(data + first, count, grad); });
  if (problem.noise.on) perturb(problem.noise, t, first, count, grad);
  if (problem.exp != 0.0) {
    visit_dtype(tensor.param_dtype, tensor.param,
                [&](auto* data) { load(data + first, count, param); });
  }
  importance_keys(problem.exp, problem.eps, grad, problem.exp != 0.0 ? param : grad, count, out);
  const int32_t* next = active_from(problem.active, t, first);
  const int32_t* end = active_end(problem.active, t);
  for (; next != end && *next < first + count; ++next) out[*next - first] = 0;
  std::fill(out + count, out + (count + 15) / 16 * 16, 0);
  return {t, first, count};
}

void prefetch_tile(const Problem& problem, int64_t tile_index) {
  const PoolTensor& tensor = problem.pool[tensor_of(problem, tile_index)];
  const int64_t first = (tile_index - tensor.first_tile) * problem.tile;
  const int64_t count = std::min(problem.tile, tensor.numel - first);
  auto fetch = [&](const void* data, DType dtype) {
    const char* begin = static_cast<const char*>(data) + first * bytes_of(dtype);
    for (int64_t byte = 0; byte < count * bytes_of(dtype); byte += 64) {
      __builtin_prefetch(begin + byte, 0, 2);  // to read, into L2
    }
  };
  if (tensor.grad) fetch(tensor.grad, tensor.grad_dtype);
  if (tensor.grad && problem.exp != 0.0) fetch(tensor.param, tensor.param_dtype);
}

void importance_keys(double exp, float eps, const float* grad, const float* param, int64_t count,
                     int32_t* out) {
  visit_importance(exp, eps, [&](auto importance) { keys(importance, grad, param, count, out); });
}

SPARSE_OPTIM_VECTORIZED int32_t largest(const int32_t* values, int64_t count) {
  int32_t most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < count; ++i) most = values[i] > most ? values[i] : most;
  return most;
}

// The largest of each run of 16 values.
SPARSE_OPTIM_VECTORIZED void block_maxima(const int32_t* values, int64_t count, int32_t* maxima) {
  const int64_t whole = count / 16;
  for (int64_t b = 0; b < whole; ++b) {
    int32_t most = 0;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < 16; ++i) most = values[16 * b + i] > most ? values[16 * b + i] : most;
    maxima[b] = most;
  }
  if (whole * 16 < count) maxima[whole] = largest(values + 16 * whole, count - 16 * whole);
}

SPARSE_OPTIM_VECTORIZED void count_reaching(const int32_t* values, int64_t blocks, int32_t limit,
                                            int32_t* counts) {
  for (int64_t b = 0; b < blocks; ++b) {
    int32_t count = 0;
#pragma omp simd reduction(+ : count)
    for (int64_t i = 0; i < 16; ++i) count += values[16 * b + i] >= limit;
    counts[b] = count;
  }
}

}  // namespace sparse_optim::cpu
