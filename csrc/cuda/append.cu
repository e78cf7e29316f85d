// append: merge the new entries into the active set, which stays in ascending global order.
//
//   place[q]       = active entries before new entry q
//   new entry q    -> place[q] + q
//   active entry i -> i + (new entries with place <= i)
//
// Entries only move to the right, by at most the number of new ones. Each block moves chunks from
// their ends to their beginnings; what a chunk before would overwrite, the first entries of each
// chunk, has been saved by the launch before. If as many entries are new as a chunk holds, all are
// saved: then two arrays at a time, for 8 bytes an entry of scratch.
//
// Bytes: 48 per active entry behind the first insertion, and 48 per entry saved: one in nine at a
// quota of 466. Of B = 3.5e6, all moved: 187 MB. Predicted: bytes / bandwidth = 0.09 ms on A100
// (2.0 TB/s), 0.24 on A6000 (0.77), 0.06 on H100 (3.35), 0.04 on H200 (4.8); twice that where all
// are saved. Two launches, the last block of the second being the one that inserts; or seven.
#include "cuda/device.h"

namespace sparse_optim::cuda {
namespace {

#if defined(SPARSE_OPTIM_EMULATED)  // small, so that small cases have several
constexpr int64_t kChunk = 64;
#else
constexpr int64_t kChunk = 4096;
#endif
constexpr int kBlocksPerMultiprocessor = 8;

// Arrays of the active set as bits; the last may be null.
template <int kArrays>
struct Words {
  int32_t* array[kArrays];
};

struct Scratch {
  int64_t* place;     // (max_quota,)
  unsigned* arrived;  // blocks of insert_kernel
  int32_t* saved;     // (chunks, arrays, heads)
};

Scratch layout(void* scratch, int64_t max_quota) {
  Scratch at;
  at.place = static_cast<int64_t*>(scratch);
  at.arrived = reinterpret_cast<unsigned*>(at.place + max_quota);
  at.saved = reinterpret_cast<int32_t*>(at.arrived + 2);
  return at;
}

struct Chunks {
  int64_t count;  // new entries
  int64_t size;   // active entries
  int64_t heads;  // how many of a chunk's first entries are saved

  __device__ Chunks(const NewEntries& found, const int64_t* progress)
      : count(*found.count), size(progress[1]), heads(min(count, kChunk)) {}
  __device__ int64_t number() const { return (size + kChunk - 1) / kChunk; }
};

// The first launch also finds the places, in positions that none has moved yet.
template <int kArrays>
__global__ void __launch_bounds__(kThreads, kResident)
    save_kernel(NewEntries found, const int32_t* position, const int64_t* offsets,
                const int64_t* progress, bool is_first, Words<kArrays> words, Scratch at) {
  if (is_first && global_thread() == 0) *at.arrived = 0;
  const int64_t to_find = is_first ? *found.count : 0;
  for (int64_t q = global_thread(); q < to_find; q += grid_threads()) {
    const int64_t tensor = found.tensor[q];
    at.place[q] = upper_bound(position, offsets[tensor], offsets[tensor + 1], found.position[q]);
  }
  const Chunks chunks(found, progress);
  for (int64_t i = global_thread(); i < chunks.number() * chunks.heads; i += grid_threads()) {
    const int64_t chunk = i / chunks.heads, k = i % chunks.heads, from = chunk * kChunk + k;
    if (from >= chunks.size) continue;
    int32_t* to = at.saved + chunk * kArrays * chunks.heads + k;
#pragma unroll
    for (int a = 0; a < kArrays; ++a)
      if (words.array[a]) to[a * chunks.heads] = words.array[a][from];
  }
}

// By runs of one entry a thread, from the right: all are read before any is written, and what is
// written lies to the right of all that is still to be read.
template <int kArrays>
__device__ inline void move_entries(const Chunks& chunks, const Words<kArrays>& words,
                                    const Scratch& at) {
  for (int64_t chunk = blockIdx.x; chunk < chunks.number(); chunk += gridDim.x) {
    const int64_t begin = chunk * kChunk, end = min(begin + kChunk, chunks.size);
    if (end <= at.place[0]) continue;
    const int32_t* saved = at.saved + chunk * kArrays * chunks.heads;
    for (int64_t k = (end - begin - 1) / kThreads * kThreads + threadIdx.x; k >= 0; k -= kThreads) {
      const int64_t i = begin + k, shift = upper_bound(at.place, 0, chunks.count, i);
      const bool moves = i < end && shift > 0;
      int32_t entry[kArrays] = {};
#pragma unroll
      for (int a = 0; a < kArrays; ++a) {
        if (!moves || !words.array[a]) continue;
        entry[a] = k < chunks.heads ? saved[a * chunks.heads + k] : words.array[a][i];
      }
      __syncthreads();
#pragma unroll
      for (int a = 0; a < kArrays; ++a)
        if (moves && words.array[a]) words.array[a][i + shift] = entry[a];
    }
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

__device__ inline void insert_share(const Pool& pool, const NewEntries& found, const Active& active,
                                    const Scratch& at, Share share) {
  const int64_t count = *found.count, step = share.blocks * kThreads;
  for (int64_t q = share.block * kThreads + threadIdx.x; q < count; q += step)
    insert(pool, found, active, q, at.place[q] + q);
}

// By the last block: adds up the counts, which the others read.
__device__ inline void count_new(const Pool& pool, const NewEntries& found, const Active& active) {
  const int64_t count = *found.count;
  for (int64_t t = threadIdx.x; t < pool.num_tensors; t += kThreads)
    active.offsets[t + 1] += upper_bound(found.tensor, 0, count, t);
  if (threadIdx.x == 0) active.progress[1] += count;
}

template <int kArrays>
__global__ void __launch_bounds__(kThreads, kResident)
    move_kernel(NewEntries found, const int64_t* progress, Words<kArrays> words, Scratch at) {
  const Chunks chunks(found, progress);
  if (chunks.count) move_entries(chunks, words, at);
}

// New entries go where others have been moved from: few of them, by the last block.
template <int kArrays>
__global__ void __launch_bounds__(kThreads, kResident)
    move_and_insert_kernel(Pool pool, NewEntries found, Active active, Words<kArrays> words,
                           Scratch at) {
  const Chunks chunks(found, active.progress);
  if (chunks.count == 0) return;
  move_entries(chunks, words, at);
  if (!is_last_block(at.arrived)) return;
  insert_share(pool, found, active, at, {0, 1});
  count_new(pool, found, active);
}

__global__ void __launch_bounds__(kThreads, kResident)
    insert_kernel(Pool pool, NewEntries found, Active active, Scratch at) {
  insert_share(pool, found, active, at, Share::of_grid());
  if (is_last_block(at.arrived)) count_new(pool, found, active);
}

template <class T>
int32_t* as_bits(T* values) {
  return reinterpret_cast<int32_t*>(values);
}

template <int kArrays>
void save(const NewEntries& found, const Active& active, int64_t capacity, bool is_first,
          const Words<kArrays>& words, const Scratch& at, cudaStream_t stream) {
  const int64_t by_chunk = grid_for(capacity, kChunk, kBlocksPerMultiprocessor);
  const int64_t by_new = grid_for(found.capacity, kThreads, kBlocksPerMultiprocessor);
  SPARSE_OPTIM_LAUNCH(save_kernel<kArrays>, std::max(by_chunk, by_new), kThreads, stream, found,
                      active.position, active.offsets, active.progress, is_first, words, at);
}

// Whether hardly anything is saved, so that all arrays can be at once.
bool saves_little(int64_t max_quota) {
  return max_quota <= kChunk / 2;
}

}  // namespace

int64_t append_scratch_bytes(int64_t capacity, int64_t max_quota) {
  const int64_t arrays = saves_little(max_quota) ? 6 : 2;
  const int64_t saved = (capacity + kChunk - 1) / kChunk * std::min(max_quota, kChunk);
  return max_quota * int64_t(sizeof(int64_t)) + 2 * int64_t(sizeof(unsigned)) +
         saved * arrays * int64_t(sizeof(int32_t));
}

cudaError_t append(const Pool& pool, const NewEntries& found, const Active& active,
                   int64_t capacity, void* scratch, cudaStream_t stream) {
  if (capacity == 0 || found.capacity == 0) return cudaSuccess;
  const Scratch at = layout(scratch, found.capacity);
  const int64_t by_chunk = grid_for(capacity, kChunk, kBlocksPerMultiprocessor);
  int32_t* const arrays[] = {active.position,         active.unmask_step,
                             as_bits(active.exp_avg), as_bits(active.exp_avg_sq),
                             as_bits(active.grad),    as_bits(active.master)};
  if (saves_little(found.capacity)) {
    const Words<6> all{{arrays[0], arrays[1], arrays[2], arrays[3], arrays[4], arrays[5]}};
    save(found, active, capacity, true, all, at, stream);
    SPARSE_OPTIM_LAUNCH(move_and_insert_kernel<6>, by_chunk, kThreads, stream, pool, found, active,
                        all, at);
    return cudaGetLastError();
  }
  for (int a = 0; a < 6; a += 2) {
    const Words<2> two{{arrays[a], arrays[a + 1]}};
    save(found, active, capacity, a == 0, two, at, stream);
    SPARSE_OPTIM_LAUNCH(move_kernel<2>, by_chunk, kThreads, stream, found, active.progress, two,
                        at);
  }
  const int64_t by_new = grid_for(found.capacity, kThreads, kBlocksPerMultiprocessor);
  SPARSE_OPTIM_LAUNCH(insert_kernel, by_new, kThreads, stream, pool, found, active, at);
  return cudaGetLastError();
}

}  // namespace sparse_optim::cuda
