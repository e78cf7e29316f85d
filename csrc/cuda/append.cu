// append: merge the new entries into the active set, which stays in ascending global order.
//
//   place[q]      = active entries before new entry q
//   new entry q   -> place[q] + q
//   active entry i -> i + (new entries with place <= i)
//
// Entries only move to the right, and two blocks cannot move in place without waiting for each
// other: arrays are moved two at a time, by way of scratch memory. 8 bytes an entry of scratch for
// six launches; all arrays at once would take 24 for two.
//
// Bytes: 96 per active entry behind the first insertion.
#include "cuda/device.h"

namespace sparse_optim::cuda {
namespace {

constexpr int kBlocksPerMultiprocessor = 8;

// Two arrays of four-byte elements, moved as bits. `second` may be null.
struct Pair {
  int32_t* first;
  int32_t* second;
};

struct Scratch {
  int64_t* place;  // (max_quota,)
  Pair saved;      // (capacity,) each
};

Scratch layout(void* scratch, int64_t capacity, int64_t max_quota) {
  Scratch at;
  at.place = static_cast<int64_t*>(scratch);
  at.saved.first = reinterpret_cast<int32_t*>(at.place + max_quota);
  at.saved.second = at.saved.first + capacity;
  return at;
}

__global__ void __launch_bounds__(kThreads, kResident)
    place_kernel(NewEntries found, const int32_t* position, const int64_t* offsets,
                 int64_t* place) {
  const int64_t count = *found.count;
  for (int64_t q = global_thread(); q < count; q += grid_threads()) {
    const int64_t tensor = found.tensor[q];
    place[q] = upper_bound(position, offsets[tensor], offsets[tensor + 1], found.position[q]);
  }
}

// Where moving begins; past the end if nothing is new.
__device__ inline int64_t first_moved(const NewEntries& found, const int64_t* place, int64_t size) {
  return *found.count ? place[0] : size;
}

__global__ void __launch_bounds__(kThreads, kResident)
    save_kernel(NewEntries found, const int64_t* place, const int64_t* progress, Pair values,
                Pair saved) {
  const int64_t size = progress[1];
  for (int64_t i = first_moved(found, place, size) + global_thread(); i < size;
       i += grid_threads()) {
    saved.first[i] = values.first[i];
    if (values.second) saved.second[i] = values.second[i];
  }
}

__global__ void __launch_bounds__(kThreads, kResident)
    move_kernel(NewEntries found, const int64_t* place, const int64_t* progress, Pair values,
                Pair saved) {
  const int64_t size = progress[1], count = *found.count;
  for (int64_t i = first_moved(found, place, size) + global_thread(); i < size;
       i += grid_threads()) {
    const int64_t to = i + upper_bound(place, 0, count, i);
    values.first[to] = saved.first[i];
    if (values.second) values.second[to] = saved.second[i];
  }
}

__global__ void __launch_bounds__(kThreads, kResident)
    insert_kernel(Pool pool, NewEntries found, const int64_t* place, Active active) {
  const int64_t count = *found.count;
  const int32_t step = int32_t(active.progress[0] + 1);
  for (int64_t q = global_thread(); q < count; q += grid_threads()) {
    const int64_t to = place[q] + q, position = found.position[q];
    const Row row = read_row(pool.table, found.tensor[q]);
    active.position[to] = int32_t(position);
    active.exp_avg[to] = 0.f;
    active.exp_avg_sq[to] = 0.f;
    active.unmask_step[to] = step;
    active.grad[to] = read(row.grad_dtype, row.grad, position);
    if (active.master) active.master[to] = read(row.param_dtype, row.param, position);
  }
}

// A separate launch: the kernels before it read what it writes.
__global__ void __launch_bounds__(kThreads, kResident)
    count_kernel(NewEntries found, int64_t num_tensors, int64_t* offsets, int64_t* progress) {
  const int64_t count = *found.count;
  for (int64_t t = threadIdx.x; t < num_tensors; t += kThreads)
    offsets[t + 1] += upper_bound(found.tensor, 0, count, t);
  if (threadIdx.x == 0) progress[1] += count;
}

template <class T>
int32_t* as_bits(T* values) {
  return reinterpret_cast<int32_t*>(values);
}

}  // namespace

int64_t append_scratch_bytes(int64_t capacity, int64_t max_quota) {
  return max_quota * int64_t(sizeof(int64_t)) + capacity * 2 * int64_t(sizeof(int32_t));
}

cudaError_t append(const Pool& pool, const NewEntries& found, const Active& active,
                   int64_t capacity, void* scratch, cudaStream_t stream) {
  if (capacity == 0 || found.capacity == 0) return cudaSuccess;
  const Scratch at = layout(scratch, capacity, found.capacity);
  const int64_t by_new = grid_for(found.capacity, kThreads, kBlocksPerMultiprocessor);
  const int64_t by_active = grid_for(capacity, kThreads, kBlocksPerMultiprocessor);
  SPARSE_OPTIM_LAUNCH(place_kernel, by_new, kThreads, stream, found, active.position,
                      active.offsets, at.place);
  const Pair pairs[] = {{active.position, active.unmask_step},
                        {as_bits(active.exp_avg), as_bits(active.exp_avg_sq)},
                        {as_bits(active.grad), as_bits(active.master)}};
  for (const Pair& pair : pairs) {
    SPARSE_OPTIM_LAUNCH(save_kernel, by_active, kThreads, stream, found, at.place, active.progress,
                        pair, at.saved);
    SPARSE_OPTIM_LAUNCH(move_kernel, by_active, kThreads, stream, found, at.place, active.progress,
                        pair, at.saved);
  }
  SPARSE_OPTIM_LAUNCH(insert_kernel, by_new, kThreads, stream, pool, found, at.place, active);
  SPARSE_OPTIM_LAUNCH(count_kernel, 1, kThreads, stream, found, pool.num_tensors, active.offsets,
                      active.progress);
  return cudaGetLastError();
}

}  // namespace sparse_optim::cuda
