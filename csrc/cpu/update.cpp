// update: one AdamW step on the active entries alone.
//
//   param      <- (1 - lr * weight_decay) * param
//   exp_avg    <- beta1 * exp_avg + (1 - beta1) * grad    (as torch.lerp)
//   exp_avg_sq <- beta2 * exp_avg_sq + (1 - beta2) * grad^2
//   param      <- param - lr / bias_correction1 * exp_avg
//                         / (sqrt(exp_avg_sq) / sqrt(bias_correction2) + eps)
//
// Bytes: 28 per active entry streamed, and one cache line of the parameter each way per entry (the
// gathers are what takes the time). float32 throughout; equal to the reference up to rounding.
#include <atomic>
#include <cmath>
#include <type_traits>

#include "core/adamw.h"
#include "cpu/support.h"

namespace sparse_optim::cpu {
namespace {

constexpr int64_t kBlock = 256;     // entries worked on at once, on the stack
constexpr int64_t kPerTask = 4096;  // small enough to spread the gathers over the cores evenly
// Entries ahead whose parameter is fetched: 160K entries in 110M took 1.44 ms instead of 2.51,
// 1.75M took 9.0 ms instead of 18.4 (16 ahead: 2.17 and 15.3; 32 ahead: 1.44 and 11.4).
constexpr int64_t kPrefetchEntries = 64;

// Above this many active entries per applied step the oldest of them is not looked for, and the
// table of bias corrections goes back to the first step. A first guess: with 160K entries at step
// 500, three interleaved pairs of processes took 0.50 to 0.65 ms so and 0.64 to 1.29 looking, but a
// session on a busier machine showed no gain.
constexpr int64_t kEntriesPerAge = 64;

// Bias corrections by age, as the update needs them. Rows end where both are 1 in float32.
struct BiasTable {
  std::vector<float> step_size;              // lr / bias_correction1
  std::vector<float> sqrt_bias_correction2;  // sqrt(bias_correction2)

  BiasTable(const Hyper& hyper, int64_t oldest) {
    double power1 = 1.0, power2 = 1.0;
    for (int64_t age = 1; age <= std::max<int64_t>(oldest, 1); ++age) {
      power1 *= hyper.beta1;
      power2 *= hyper.beta2;
      step_size.push_back(float(hyper.lr / (1.0 - power1)));
      sqrt_bias_correction2.push_back(float(std::sqrt(1.0 - power2)));
      if (power1 < 1e-9 && power2 < 1e-9) break;
    }
  }

  // Of any age: one that no entry can have must not read beyond the table.
  int64_t row(int64_t age) const {
    return std::clamp<int64_t>(age, 1, int64_t(step_size.size())) - 1;
  }
};

SPARSE_OPTIM_VECTORIZED void adamw(int64_t count, float* value, float* exp_avg, float* exp_avg_sq,
                                   const float* grad, const float* step_size,
                                   const float* sqrt_bias_correction2, AdamW step) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    step(value[i], exp_avg[i], exp_avg_sq[i], grad[i], step_size[i], sqrt_bias_correction2[i]);
}

// Whether no position is beyond the tensor: a damaged one must not be written to. Its time was
// within the noise at 320K entries; clamping each position took 0.15 ms of 1.0 in bf16.
SPARSE_OPTIM_VECTORIZED bool all_inside(int64_t count, const int32_t* position, int64_t numel) {
  uint32_t most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < count; ++i) most = std::max(most, uint32_t(position[i]));
  return int64_t(most) < numel;
}

struct Task {
  int64_t tensor, first, last;
};

// Stops before a position that is beyond the tensor, and returns false.
template <class T>
bool update_task(T* param, int64_t numel, const Active& active, int64_t first, int64_t last,
                 const BiasTable& table, const AdamW& step_of_entry, bool entry_age) {
  const int64_t step = active.progress[0] + 1;
  float value[kBlock], step_size[kBlock], sqrt_bias_correction2[kBlock];
  for (int64_t begin = first; begin < last; begin += kBlock) {
    const int64_t count = std::min(kBlock, last - begin);
    const int32_t* position = active.position + begin;
    if (!all_inside(count, position, numel)) return false;
    for (int64_t i = 0; i < count; ++i) {
      if (begin + i + kPrefetchEntries < last)
        __builtin_prefetch(param + position[i + kPrefetchEntries], 1);
      const int64_t age = entry_age ? step - active.unmask_step[begin + i] + 1 : step;
      const int64_t row = table.row(age);
      step_size[i] = table.step_size[row];
      sqrt_bias_correction2[i] = table.sqrt_bias_correction2[row];
      if (!active.master) value[i] = to_float(param[position[i]]);
    }
    float* values = active.master ? active.master + begin : value;
    adamw(count, values, active.exp_avg + begin, active.exp_avg_sq + begin, active.grad + begin,
          step_size, sqrt_bias_correction2, step_of_entry);
    for (int64_t i = 0; i < count; ++i) store(param[position[i]], values[i]);
  }
  return true;
}

}  // namespace

bool update(const Threads& threads, const std::vector<PoolTensor>& pool, Active& active,
            const Hyper* hyper, const int32_t* group_index, bool entry_age, float grad_factor) {
  const int64_t size = active.progress[1], step = active.progress[0] + 1;
  int64_t oldest = step;
  if (entry_age && size && step > size / kEntriesPerAge) {
    const int32_t first = *std::min_element(active.unmask_step, active.unmask_step + size);
    oldest = step - first + 1;
  }
  std::vector<Task> tasks;
  int32_t num_groups = 0;
  for (size_t t = 0; t < pool.size(); ++t) {
    num_groups = std::max(num_groups, group_index[t] + 1);
    if (!pool[t].grad) continue;
    for (int64_t first = active.offsets[t]; first < active.offsets[t + 1]; first += kPerTask)
      tasks.push_back({int64_t(t), first, std::min(first + kPerTask, active.offsets[t + 1])});
  }
  std::vector<BiasTable> tables;
  std::vector<AdamW> steps;
  for (int32_t g = 0; g < num_groups; ++g) {
    tables.emplace_back(hyper[g], oldest);
    steps.emplace_back(hyper[g], grad_factor);
  }
  std::atomic<bool> inside{true};
  for_each(threads, int64_t(tasks.size()), [&](int64_t i) {
    const Task& task = tasks[i];
    const int32_t group = group_index[task.tensor];
    visit_dtype(pool[task.tensor].param_dtype, pool[task.tensor].param, [&](auto* param) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(param)>>;
      if (!update_task(const_cast<T*>(param), pool[task.tensor].numel, active, task.first,
                       task.last, tables[group], steps[group], entry_age))
        inside = false;
    });
  });
  return inside;
}

}  // namespace sparse_optim::cpu
