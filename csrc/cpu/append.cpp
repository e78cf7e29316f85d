// append: merge new entries into the active set, which stays in ascending global order.
//
// In place, from the end: each block between two insertion points moves once. About 32 bytes are
// moved per active entry behind the first insertion; with few new entries that is a few memmoves.
#include "cpu/support.h"

namespace sparse_optim::cpu {
namespace {

constexpr int64_t kPerTask = 256;

template <class T>
void merge(T* values, int64_t size, const std::vector<int64_t>& insert_at, const T* added) {
  int64_t end = size;
  for (int64_t i = int64_t(insert_at.size()) - 1; i >= 0; --i) {
    const int64_t begin = insert_at[i];
    std::memmove(values + begin + i + 1, values + begin, size_t(end - begin) * sizeof(T));
    values[begin + i] = added[i];
    end = begin;
  }
}

float read(DType dtype, const void* data, int64_t position) {
  float value = 0.f;
  visit_dtype(dtype, data, [&](auto* typed) { value = to_float(typed[position]); });
  return value;
}

// The first position from `at` on that is not below `position`; it is near where entries are many.
const int32_t* advance(const int32_t* at, const int32_t* end, int32_t position) {
  int64_t step = 1;
  for (; step < end - at && at[step] < position; step *= 2) at += step;
  return std::lower_bound(at, at + std::min(step + 1, int64_t(end - at)), position);
}

}  // namespace

void append(const Threads& threads, const std::vector<PoolTensor>& pool, const NewEntries& found,
            Active& active) {
  const int64_t count = *found.count, size = active.progress[1];
  if (count == 0) return;
  std::vector<int64_t> insert_at(count);
  std::vector<float> grad(count), param(count), zero(count, 0.f);
  const std::vector<int32_t> step(count, int32_t(active.progress[0] + 1));
  for_each(threads, tiles_of(count, kPerTask), [&](int64_t task) {
    const int32_t* at = active.position;
    int64_t tensor = -1;
    for (int64_t i = task * kPerTask; i < std::min(count, (task + 1) * kPerTask); ++i) {
      const int32_t position = found.position[i];
      if (found.tensor[i] != tensor) {
        tensor = found.tensor[i];
        at = active.position + active.offsets[tensor];
      }
      at = advance(at, active_end(active, tensor), position);
      insert_at[i] = at - active.position;
      grad[i] = read(pool[tensor].grad_dtype, pool[tensor].grad, position);
      if (active.master) param[i] = read(pool[tensor].param_dtype, pool[tensor].param, position);
    }
  });
  for_each(threads, active.master ? 6 : 5, [&](int64_t array) {
    switch (array) {
      case 0: return merge(active.position, size, insert_at, found.position);
      case 1: return merge(active.exp_avg, size, insert_at, zero.data());
      case 2: return merge(active.exp_avg_sq, size, insert_at, zero.data());
      case 3: return merge(active.unmask_step, size, insert_at, step.data());
      case 4: return merge(active.grad, size, insert_at, grad.data());
      case 5: return merge(active.master, size, insert_at, param.data());
    }
  });
  int64_t before = 0;
  for (size_t t = 0, i = 0; t < pool.size(); ++t) {
    for (; int64_t(i) < count && found.tensor[i] == int32_t(t); ++i) ++before;
    active.offsets[t + 1] += before;
  }
  active.progress[1] = size + count;
}

}  // namespace sparse_optim::cpu
