// exchange: value[e] <-> the parameter at position[e], bit by bit; gather: value[e] <- it.
//
// Bytes: 12 an entry streamed (gather: 8), and one cache line of the parameter each way (gather:
// one way), which takes the time.
#include "cpu/support.h"

namespace sparse_optim::cpu {
namespace {

constexpr int64_t kPerTask = 4096;  // small enough to spread the gathers over the cores evenly
constexpr int64_t kPrefetchEntries = 64;  // as in update.cpp

struct Task {
  int64_t tensor, first, last;
};

SPARSE_OPTIM_VECTORIZED bool all_inside(int64_t count, const int32_t* position, int64_t numel) {
  uint32_t most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < count; ++i) most = std::max(most, uint32_t(position[i]));
  return int64_t(most) < numel;
}

template <bool kWrites, class Word>
void visit_task(Word* param, const int32_t* position, int64_t count, int32_t* value) {
  for (int64_t i = 0; i < count; ++i) {
    if (i + kPrefetchEntries < count)
      __builtin_prefetch(param + position[i + kPrefetchEntries], kWrites);
    const Word before = param[position[i]];
    if constexpr (kWrites) param[position[i]] = Word(value[i]);
    value[i] = int32_t(before);
  }
}

template <bool kWrites>
bool visit(const Threads& threads, const std::vector<PoolTensor>& pool, const int32_t* position,
           const int64_t* offsets, int32_t* value) {
  std::vector<Task> tasks;
  for (size_t t = 0; t < pool.size(); ++t) {
    for (int64_t first = offsets[t]; first < offsets[t + 1]; first += kPerTask)
      tasks.push_back({int64_t(t), first, std::min(first + kPerTask, offsets[t + 1])});
  }
  std::atomic<bool> inside{true};
  for_each(threads, int64_t(tasks.size()), [&](int64_t i) {
    const Task& task = tasks[i];
    if (!all_inside(task.last - task.first, position + task.first, pool[task.tensor].numel))
      inside = false;
  });
  if (!inside) return false;  // before anything is written
  for_each(threads, int64_t(tasks.size()), [&](int64_t i) {
    const Task& task = tasks[i];
    const PoolTensor& tensor = pool[task.tensor];
    const int64_t count = task.last - task.first;
    if (bytes_of(tensor.param_dtype) == 4)
      visit_task<kWrites>(static_cast<uint32_t*>(tensor.param), position + task.first, count,
                          value + task.first);
    else
      visit_task<kWrites>(static_cast<uint16_t*>(tensor.param), position + task.first, count,
                          value + task.first);
  });
  return true;
}

}  // namespace

bool exchange(const Threads& threads, const std::vector<PoolTensor>& pool, const int32_t* position,
              const int64_t* offsets, int32_t* value) {
  return visit<true>(threads, pool, position, offsets, value);
}

bool gather(const Threads& threads, const std::vector<PoolTensor>& pool, const int32_t* position,
            const int64_t* offsets, int32_t* value) {
  return visit<false>(threads, pool, position, offsets, value);
}

}  // namespace sparse_optim::cpu
