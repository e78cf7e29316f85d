// append: merge the new entries into the active set, which stays in ascending global order.
//
//   place[q]       = active entries before new entry q
//   new entry q    -> place[q] + q
//   active entry i -> i + (new entries with place <= i)
//
// Entries only move to the right, by at most the number of new ones. Each block moves chunks from
// their ends to their beginnings; what the chunk before would overwrite, the first entries of each
// chunk, has been saved by the launch before. Chunks are three times as long, so that at most a
// third is saved: 8 bytes an entry of scratch. (All entries saved would take 24.)
//
// Bytes: 48 per active entry behind the first insertion, and 48 per entry saved: one in nine at a
// quota of 466. Of B = 3.5e6, all moved: 187 MB. Predicted: bytes / bandwidth = 0.09 ms on A100
// (2.0 TB/s), 0.24 on A6000 (0.77), 0.06 on H100 (3.35), 0.04 on H200 (4.8). Two launches.
#include "cuda/device.h"

namespace sparse_optim::cuda {
namespace {

#if defined(SPARSE_OPTIM_EMULATED)  // small, so that small cases have several
constexpr int64_t kLeastChunk = 64;
#else
constexpr int64_t kLeastChunk = 4096;
#endif
constexpr int kBlocksPerMultiprocessor = 8;
constexpr int kArrays = 6;

// The arrays of the active set as bits; the last may be null.
struct Words {
  int32_t* array[kArrays];
};

struct Scratch {
  int64_t* place;     // (max_quota,)
  unsigned* arrived;  // blocks of merge_kernel
  int32_t* saved;     // (chunks, kArrays, heads)
};

Scratch layout(void* scratch, int64_t max_quota) {
  Scratch at;
  at.place = static_cast<int64_t*>(scratch);
  at.arrived = reinterpret_cast<unsigned*>(at.place + max_quota);
  at.saved = reinterpret_cast<int32_t*>(at.arrived + 2);
  return at;
}

// The chunks of a step: from the first entry to the place behind the last, where new ones may go.
struct Chunks {
  int64_t count;   // new entries
  int64_t size;    // active entries
  int64_t length;  // of a chunk
  int64_t heads;   // how many of a chunk's first entries are saved, if it has so many

  __device__ Chunks(const NewEntries& found, const int64_t* progress)
      : count(*found.count),
        size(progress[1]),
        length(max(3 * count, kLeastChunk)),
        heads(min(count, size)) {}
  __device__ int64_t number() const { return size / length + 1; }
  __device__ int64_t end(int64_t chunk) const { return min((chunk + 1) * length, size); }
  __device__ int64_t saved(int64_t chunk) const { return chunk * kArrays * heads; }
};

__global__ void __launch_bounds__(kThreads, kResident)
    save_kernel(NewEntries found, const int32_t* position, const int64_t* offsets,
                const int64_t* progress, Words words, Scratch at) {
  if (global_thread() == 0) *at.arrived = 0;
  const Chunks chunks(found, progress);
  for (int64_t q = global_thread(); q < chunks.count; q += grid_threads()) {
    const int64_t tensor = found.tensor[q];
    at.place[q] = upper_bound(position, offsets[tensor], offsets[tensor + 1], found.position[q]);
  }
  for (int64_t i = global_thread(); i < chunks.number() * chunks.heads; i += grid_threads()) {
    const int64_t chunk = i / chunks.heads, k = i % chunks.heads;
    const int64_t from = chunk * chunks.length + k;
    if (from >= chunks.size) continue;
    int32_t* to = at.saved + chunks.saved(chunk) + k;
    for (int a = 0; a < kArrays; ++a)
      if (words.array[a]) to[a * chunks.heads] = words.array[a][from];
  }
}

__device__ inline void insert(const Pool& pool, const NewEntries& found, const Active& active,
                              int64_t q, int64_t to) {
  const int64_t position = found.position[q];
  const Row row = read_row(pool.table, found.tensor[q]);
  active.position[to] = int32_t(position);
  active.exp_avg[to] = 0.f;
  active.exp_avg_sq[to] = 0.f;
  active.unmask_step[to] = int32_t(active.progress[0] + 1);
  active.grad[to] = read(row.grad_dtype, row.grad, position);
  if (active.master) active.master[to] = read(row.param_dtype, row.param, position);
}

// The counts; by the last block, as the others read them.
__device__ inline void add_counts(const NewEntries& found, int64_t num_tensors, int64_t* offsets,
                                  int64_t* progress) {
  const int64_t count = *found.count;
  for (int64_t t = threadIdx.x; t < num_tensors; t += kThreads)
    offsets[t + 1] += upper_bound(found.tensor, 0, count, t);
  if (threadIdx.x == 0) progress[1] += count;
}

// By runs of one entry a thread, from the right: all are read before any is written, and what is
// written lies to the right of all that is still to be read.
__global__ void __launch_bounds__(kThreads, kResident)
    merge_kernel(Pool pool, NewEntries found, Words words, Active active, Scratch at) {
  const Chunks chunks(found, active.progress);
  if (chunks.count == 0) return;
  for (int64_t chunk = blockIdx.x; chunk < chunks.number(); chunk += gridDim.x) {
    const int64_t begin = chunk * chunks.length, end = chunks.end(chunk);
    const bool is_last = chunk == chunks.number() - 1;
    if (end <= at.place[0] && !is_last) continue;
    const int32_t* saved = at.saved + chunks.saved(chunk);
    const int64_t runs = (end - begin + is_last + kThreads - 1) / kThreads;
    for (int64_t run = runs - 1; run >= 0; --run) {
      const int64_t first = begin + run * kThreads, i = first + threadIdx.x, k = i - begin;
      const int64_t before = upper_bound(at.place, 0, chunks.count, i);
      const bool moves = i < end && before > 0;
      int32_t entry[kArrays] = {};
#pragma unroll
      for (int a = 0; a < kArrays; ++a) {
        if (!moves || !words.array[a]) continue;
        entry[a] = k < chunks.heads ? saved[a * chunks.heads + k] : words.array[a][i];
      }
      __syncthreads();
#pragma unroll
      for (int a = 0; a < kArrays; ++a)
        if (moves && words.array[a]) words.array[a][i + before] = entry[a];
      // New entries between those of this run; behind the last entry if its place is in it.
      const int64_t past =
          is_last && run == runs - 1 ? chunks.size : min(first + kThreads, end) - 1;
      const int64_t last_new = upper_bound(at.place, 0, chunks.count, past);
      int64_t q = upper_bound(at.place, 0, chunks.count, first - 1) + threadIdx.x;
      for (; q < last_new; q += kThreads) insert(pool, found, active, q, at.place[q] + q);
    }
  }
  if (is_last_block(at.arrived))
    add_counts(found, pool.num_tensors, active.offsets, active.progress);
}

template <class T>
int32_t* as_bits(T* values) {
  return reinterpret_cast<int32_t*>(values);
}

}  // namespace

// What is saved, of a step with c new entries and s active ones: min(c, s) of each of
// s / max(3 c, kLeastChunk) + 1 chunks, where c <= max_quota and c + s <= capacity.
int64_t append_scratch_bytes(int64_t capacity, int64_t max_quota) {
  const int64_t heads = std::min(max_quota, (capacity + 1) / 2);
  const int64_t saved = heads + std::min(capacity / 3, capacity / kLeastChunk * max_quota);
  return max_quota * int64_t(sizeof(int64_t)) + 2 * int64_t(sizeof(unsigned)) +
         saved * kArrays * int64_t(sizeof(int32_t));
}

cudaError_t append(const Pool& pool, const NewEntries& found, const Active& active,
                   int64_t capacity, void* scratch, cudaStream_t stream) {
  if (capacity == 0 || found.capacity == 0) return cudaSuccess;
  const Scratch at = layout(scratch, found.capacity);
  const Words words{{active.position, active.unmask_step, as_bits(active.exp_avg),
                     as_bits(active.exp_avg_sq), as_bits(active.grad), as_bits(active.master)}};
  const int64_t by_new = grid_for(found.capacity, kThreads, kBlocksPerMultiprocessor);
  const int64_t by_chunk = grid_for(capacity + 1, kLeastChunk, kBlocksPerMultiprocessor);
  SPARSE_OPTIM_LAUNCH(save_kernel, std::max(by_new, by_chunk), kThreads, stream, found,
                      active.position, active.offsets, active.progress, words, at);
  SPARSE_OPTIM_LAUNCH(merge_kernel, by_chunk, kThreads, stream, pool, found, words, active, at);
  return cudaGetLastError();
}

}  // namespace sparse_optim::cuda
