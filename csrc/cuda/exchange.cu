// exchange: value[e] <-> the parameter at position[e], bit by bit; gather: value[e] <- it.
//
// Entries of all tensors in one launch. Bytes: 12 an entry streamed (position, value each way), and
// one 32-byte sector of the parameter each way; gather: 8 and one sector. An exchange of 3.5e6
// entries: 266 MB. Predicted, not measured: bytes / bandwidth = 0.13 ms on A100 (2.0 TB/s), 0.35 on
// A6000 (0.77), 0.08 on H100 (3.35), 0.06 on H200 (4.8). The searches for an entry's tensor read
// offsets from L1. No arithmetic: results are those of the reference.
#include "cuda/device.h"

namespace sparse_optim::cuda {
namespace {

constexpr int kBlocksPerMultiprocessor = 8;

template <bool kWrites, class Word>
__device__ inline void visit_entry(void* param, int64_t position, int32_t* value) {
  Word* place = static_cast<Word*>(param) + position;
  const Word before = *place;
  if constexpr (kWrites) *place = Word(*value);
  *value = int32_t(before);
}

// Entries whose position is outside of their tensor are left as they are.
template <bool kWrites>
__global__ void __launch_bounds__(kThreads, kResident)
    exchange_kernel(Pool pool, const int32_t* position, const int64_t* offsets, int64_t capacity,
                    int32_t* value) {
  const int64_t held = offsets[pool.num_tensors];
  const int64_t size = held < capacity ? held : capacity;
  for (int64_t i = global_thread(); i < size; i += grid_threads()) {
    const int64_t tensor = upper_bound(offsets, 0, pool.num_tensors + 1, i) - 1;
    const Row row = read_row(pool.table, tensor);
    const int64_t at = position[i];
    if (at < 0 || at >= row.numel) continue;
    if (row.param_dtype == DType::kFloat32)
      visit_entry<kWrites, uint32_t>(row.param, at, value + i);
    else visit_entry<kWrites, uint16_t>(row.param, at, value + i);
  }
}

template <bool kWrites>
cudaError_t launch(const Pool& pool, const int32_t* position, const int64_t* offsets,
                   int64_t capacity, int32_t* value, cudaStream_t stream) {
  const int64_t blocks = grid_for(capacity, kThreads, kBlocksPerMultiprocessor);
  if (!blocks || !pool.num_tensors) return cudaSuccess;
  SPARSE_OPTIM_LAUNCH(exchange_kernel<kWrites>, blocks, kThreads, stream, pool, position, offsets,
                      capacity, value);
  return cudaGetLastError();
}

}  // namespace

cudaError_t gather(const Pool& pool, const int32_t* position, const int64_t* offsets,
                   int64_t capacity, int32_t* value, cudaStream_t stream) {
  return launch<false>(pool, position, offsets, capacity, value, stream);
}

cudaError_t exchange(const Pool& pool, const int32_t* position, const int64_t* offsets,
                     int64_t capacity, int32_t* value, cudaStream_t stream) {
  return launch<true>(pool, position, offsets, capacity, value, stream);
}

}  // namespace sparse_optim::cuda
