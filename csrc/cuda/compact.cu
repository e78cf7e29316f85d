#include "cuda/compact.h"

namespace sparse_optim::cuda {
namespace {

constexpr int kEach = kChunk / kThreads;  // consecutive tiles of a thread, bits of its mask

__device__ inline uint32_t reaching(const int32_t* bound, int64_t num_tiles, int32_t limit) {
  const int64_t first = blockIdx.x * kChunk + threadIdx.x * kEach;
  uint32_t bits = 0;
  for (int i = 0; i < kEach; ++i)
    if (first + i < num_tiles && bound[first + i] >= limit) bits |= 1u << i;
  return bits;
}

__global__ void __launch_bounds__(kThreads, kResident)
    count_chunks_kernel(const int32_t* bound, int64_t num_tiles, Selection* state, int32_t* chunk) {
  if (state->passes == 0) return;
  const int64_t count = __popc(reaching(bound, num_tiles, state->limit));
  const int64_t total = block_prefix(count).total;
  if (threadIdx.x == 0) chunk[blockIdx.x] = int32_t(total);
  if (!is_last_block(&state->arrived)) return;
  int64_t before = 0;
  for (int64_t first = 0; first < gridDim.x; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    const Prefix prefix = block_prefix(i < gridDim.x ? __ldcg(&chunk[i]) : 0);
    if (i < gridDim.x) chunk[i] = int32_t(before + prefix.before);
    before += prefix.total;
  }
  if (threadIdx.x == 0) state->num_listed = before;
}

__global__ void __launch_bounds__(kThreads, kResident)
    list_kernel(const int32_t* bound, int64_t num_tiles, const Selection* state,
                const int32_t* chunk, int32_t* list) {
  if (state->passes == 0) return;
  uint32_t bits = reaching(bound, num_tiles, state->limit);
  int64_t out = chunk[blockIdx.x] + block_prefix(__popc(bits)).before;
  for (; bits; bits &= bits - 1)
    list[out++] = int32_t(blockIdx.x * kChunk + threadIdx.x * kEach + __ffs(int(bits)) - 1);
}

}  // namespace

void compact(const int32_t* bound, int64_t num_tiles, Selection* state, int32_t* chunk,
             int32_t* list, cudaStream_t stream) {
  const int64_t blocks = num_chunks(num_tiles);
  SPARSE_OPTIM_LAUNCH(count_chunks_kernel, blocks, kThreads, stream, bound, num_tiles, state,
                      chunk);
  SPARSE_OPTIM_LAUNCH(list_kernel, blocks, kThreads, stream, bound, num_tiles, state, chunk, list);
}

}  // namespace sparse_optim::cuda
