// append: merge new entries into the active set, which stays in ascending global order.
//
// In place, from the end: each block between two insertion points moves once. About 32 bytes are
// moved per active entry behind the first insertion; with few new entries that is a few memmoves.
#include "cpu/support.h"

namespace sparse_optim::cpu {
namespace {

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

}  // namespace

void append(const Threads& threads, const std::vector<PoolTensor>& pool, const NewEntries& found,
            Active& active) {
  const int64_t count = *found.count, size = active.progress[1];
  if (count == 0) return;
  std::vector<int64_t> insert_at(count);
  std::vector<float> grad(count), param(count), zero(count, 0.f);
  const std::vector<int32_t> step(count, int32_t(active.progress[0] + 1));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t t = found.tensor[i];
    insert_at[i] = active_from(active, t, found.position[i]) - active.position;
    grad[i] = read(pool[t].grad_dtype, pool[t].grad, found.position[i]);
    if (active.master) param[i] = read(pool[t].param_dtype, pool[t].param, found.position[i]);
  }
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
