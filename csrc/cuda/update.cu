// update: one AdamW step on the active entries alone (core/adamw.h), then count the step.
//
//   bias_correctionN = 1 - betaN^age = -expm1(age * log(betaN))
//
// Bytes: 28 per active entry streamed, 8 more of a master value, and one 32-byte sector of the
// parameter each way. B = 3.5e6 with master values: 350 MB. Predicted: bytes / bandwidth = 0.18 ms
// on A100 (2.0 TB/s), 0.46 on A6000 (0.77), 0.10 on H100 (3.35), 0.07 on H200 (4.8). float32
// throughout; equal to the reference up to rounding.
#include "core/adamw.h"
#include "cuda/device.h"

namespace sparse_optim::cuda {
namespace {

constexpr int kBlocksPerMultiprocessor = 8;
constexpr int kFewGroups = 8;

// A row of `hyper`, worked out once a block. Logarithms are float64, so that their product with the
// age is right to the last bit of float32; expm1 of it needs no more than float32.
struct Group {
  AdamW step;
  float lr;
  double log_beta1, log_beta2;
};

// Reads of all entries' state come first, to have them in flight together.
__device__ inline void update_entry(const Row& row, const Active& active, int64_t i,
                                    const Group& group, float age) {
  const int64_t position = active.position[i];
  float exp_avg = active.exp_avg[i], exp_avg_sq = active.exp_avg_sq[i];
  float value = active.master ? active.master[i] : read(row.param_dtype, row.param, position);
  const float bias_correction1 = -expm1f(float(age * group.log_beta1));
  const float bias_correction2 = -expm1f(float(age * group.log_beta2));
  group.step(value, exp_avg, exp_avg_sq, active.grad[i], group.lr / bias_correction1,
             sqrtf(bias_correction2));
  active.exp_avg[i] = exp_avg;
  active.exp_avg_sq[i] = exp_avg_sq;
  if (active.master) active.master[i] = value;
  visit_dtype(row.param_dtype, row.param, [&](auto* param) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(param)>>;
    store(const_cast<T*>(param)[position], value);
  });
}

// kGroups: how many groups shared memory has room for; a few take next to none of it. The last
// block counts the step, which the others read.
template <int kGroups>
__global__ void __launch_bounds__(kThreads, kResident)
    update_kernel(Pool pool, Active active, const float* grad_factor, const float* found_inf,
                  const Hyper* hyper, int64_t num_groups, const int32_t* group_index,
                  bool entry_age, unsigned* arrived) {
  __shared__ Group groups[kGroups];
  const bool skipped = *found_inf != 0.f;
  for (int g = int(threadIdx.x); g < num_groups; g += kThreads)
    groups[g] = {AdamW(hyper[g], *grad_factor), float(hyper[g].lr), log(hyper[g].beta1),
                 log(hyper[g].beta2)};
  __syncthreads();
  const int64_t step = active.progress[0] + 1, size = active.progress[1];
  for (int64_t i = global_thread(); i < size && !skipped; i += grid_threads()) {
    const int64_t tensor = upper_bound(active.offsets, 0, pool.num_tensors + 1, i) - 1;
    const Row row = read_row(pool.table, tensor);
    if (!row.grad) continue;
    const int64_t age = entry_age ? step - active.unmask_step[i] + 1 : step;
    update_entry(row, active, i, groups[group_index[tensor]], float(age));
  }
  if (is_last_block(arrived) && threadIdx.x == 0) ++active.progress[skipped ? 2 : 0];
}

}  // namespace

cudaError_t update(const Pool& pool, const Active& active, int64_t capacity,
                   const float* grad_factor, const float* found_inf, const Hyper* hyper,
                   int64_t num_groups, const int32_t* group_index, bool entry_age,
                   unsigned* arrived, cudaStream_t stream) {
  const int64_t blocks =
      std::max<int64_t>(1, grid_for(capacity, kThreads, kBlocksPerMultiprocessor));
  auto* kernel = num_groups <= kFewGroups ? update_kernel<kFewGroups> : update_kernel<kMaxGroups>;
  SPARSE_OPTIM_LAUNCH(kernel, blocks, kThreads, stream, pool, active, grad_factor, found_inf, hyper,
                      num_groups, group_index, entry_age, arrived);
  return cudaGetLastError();
}

}  // namespace sparse_optim::cuda
