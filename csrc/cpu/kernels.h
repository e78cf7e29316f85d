// The operations on the CPU, on raw pointers: no torch headers. ops.cpp checks the arguments.
#pragma once
#include <cstdint>
#include <vector>

#include "core/noise.h"
#include "core/pool.h"

namespace sparse_optim::cpu {

// A tensor of the pool. grad is null where the gradient is missing in this step.
struct PoolTensor {
  const void* grad;
  void* param;
  int64_t numel;
  int64_t first_tile;
  DType grad_dtype;
  DType param_dtype;
};

// Runs worker(i, context) for i in 0..workers-1, concurrently where it can.
struct Threads {
  int workers;
  void (*spawn)(int workers, void (*worker)(int, void*), void* context);
};

// What `rank` and `cut` are asked for.
struct Problem {
  const Threads& threads;
  const std::vector<PoolTensor>& pool;
  const Active& active;
  int64_t num_tiles;
  int64_t quota;
  double exp;
  float eps;
  Noise noise;
  int64_t tile;
};

// Whether all gradients are finite. norms: of the pool's, then of the dense ones.
bool scan(const Threads& threads, const std::vector<PoolTensor>& pool,
          const std::vector<DenseGrad>& dense, const Active& active, int64_t tile,
          int32_t* tile_max, double* norms);

void rank(const Problem& problem, int32_t* tile_max);

// Returns the threshold's key, 0 if nothing was unmasked.
int32_t cut(const Problem& problem, const int32_t* tile_max, const float* param_bound,
            NewEntries& found);

void append(const Threads& threads, const std::vector<PoolTensor>& pool, const NewEntries& found,
            Active& active);

bool update(const Threads& threads, const std::vector<PoolTensor>& pool, Active& active,
            const Hyper* hyper, const int32_t* group_index, bool entry_age, float grad_factor);

// position = outer column * inner.columns + inner column. False if positions do not ascend within
// the weight; out is then unchanged.
bool sampled_grad(const Threads& threads, const Matrix& outer, const Matrix& inner,
                  const int32_t* position, int64_t count, float* out);

// False if a position is outside of its tensor; nothing is written then.
bool gather(const Threads& threads, const std::vector<PoolTensor>& pool, const int32_t* position,
            const int64_t* offsets, int32_t* value);
bool exchange(const Threads& threads, const std::vector<PoolTensor>& pool, const int32_t* position,
              const int64_t* offsets, int32_t* value);

}  // namespace sparse_optim::cpu
