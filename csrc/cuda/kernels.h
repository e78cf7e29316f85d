// The operations on a GPU: launchers on raw pointers and a stream, no torch headers. ops_cuda.cpp
// checks the arguments.
//
// All counts (quota, new entries, active entries, applied steps) are read on the device and nothing
// is copied to the host, so that a whole step can be captured in a CUDA graph. Kernels whose work
// is such a count run on a fixed grid and stride over it. Every launcher returns the launches'
// error, and every result is the same in every run: no float is added atomically.
//
// Never run on a GPU so far: compiled for sm_80 to sm_120, and run by the emulator of
// tests/support/cuda_emulator, which can show neither races between blocks nor speed.
#pragma once
#include <algorithm>
#include <vector>

#include "core/pool.h"
#include "cuda/launch.h"

namespace sparse_optim::cuda {

constexpr int kThreads = 256;  // of every block: eight warps
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
// Blocks a multiprocessor must have room for: up to 64 registers a thread. Without it ptxas spills
// a few bytes to come down to 32 or 40.
constexpr int kResident = 4;

// The pool's tensors as the device sees them.
struct Pool {
  const int64_t* table;         // (num_tensors, kColumns)
  const int64_t* tile_offsets;  // (num_tensors + 1,)
  int64_t num_tensors;
  int64_t num_tiles;
  int64_t tile;
};

struct ScanOutput {
  int32_t* tile_max;
  float* active_grad;
  double* norms;
  float* found_inf;
};

// What `cut` is asked for. param_bound is null unless exp < 0; noise is null unless entries are
// sampled, and then exp is 0.
struct CutInput {
  const int32_t* tile_max;
  const float* param_bound;
  const int64_t* targets;
  int64_t num_targets;  // negative: pieces of a formula
  const int64_t* progress;
  const float* found_inf;
  double exp;
  float eps;
  const int64_t* noise;  // seed and step
};

// Groups whose hyper-parameters fit in a block's shared memory.
constexpr int64_t kMaxGroups = 512;

// Bytes of scratch memory that each operation needs; they may share it, being run in turn.
int64_t scan_scratch_bytes(int64_t num_tiles);
int64_t cut_scratch_bytes(int64_t num_tiles);
int64_t append_scratch_bytes(int64_t capacity, int64_t max_quota);

inline int64_t scratch_bytes(int64_t num_tiles, int64_t capacity, int64_t max_quota) {
  return std::max({scan_scratch_bytes(num_tiles), cut_scratch_bytes(num_tiles),
                   append_scratch_bytes(capacity, max_quota)});
}

cudaError_t write_table(const std::vector<Row>& rows, int64_t* table, cudaStream_t stream);

cudaError_t scan(const Pool& pool, const std::vector<DenseGrad>& dense, const int32_t* position,
                 const int64_t* offsets, const ScanOutput& out, void* scratch, cudaStream_t stream);

// The same of one tensor alone, in one launch, and its row, which is written to the table.
// `arrived` counts blocks: 0 before and after.
cudaError_t scan_one(const Row& row, int64_t* table, int64_t num_tiles, int64_t tile,
                     const int32_t* position, const int64_t* offsets, const ScanOutput& out,
                     unsigned* arrived, void* scratch, cudaStream_t stream);

cudaError_t clip(const double* norms, int64_t num_norms, const float* grad_scale,
                 double max_grad_norm, double* grad_norm, float* grad_factor, cudaStream_t stream);

cudaError_t rank(const Pool& pool, const int32_t* position, const int64_t* offsets,
                 const int64_t* noise, int32_t* tile_max, cudaStream_t stream);

cudaError_t cut(const Pool& pool, const int32_t* position, const int64_t* offsets,
                const CutInput& in, const NewEntries& found, float* threshold, void* scratch,
                cudaStream_t stream);

// Entries that are collected tensor by tensor. `collected` holds them, collected_bytes(max_quota)
// long; max_quota is the same in all calls, and found.capacity at most as much. tile_max and
// param_bound are of the pool given, whose tensors are first_tensor, first_tensor + 1, ... With
// `scored`, the pool's gradients are scores, and its parameters the gradients.
struct CollectInput {
  const int64_t* targets;
  int64_t num_targets;
  const int64_t* progress;
};
int64_t collected_bytes(int64_t max_quota);
cudaError_t collect_begin(const CollectInput& in, int64_t max_quota, void* collected,
                          cudaStream_t stream);
cudaError_t collect(const Pool& pool, const int32_t* position, const int64_t* offsets,
                    const int32_t* tile_max, const float* param_bound, double exp, float eps,
                    bool scored, int64_t first_tensor, int64_t max_quota, void* collected,
                    void* scratch, cudaStream_t stream);
cudaError_t collect_end(const float* found_inf, const NewEntries& found, float* threshold,
                        float* grad, int64_t max_quota, void* collected, cudaStream_t stream);

cudaError_t append(const Pool& pool, const NewEntries& found, const Active& active,
                   int64_t capacity, void* scratch, cudaStream_t stream);

// `arrived`: as in scan_one.
cudaError_t update(const Pool& pool, const Active& active, int64_t capacity,
                   const float* grad_factor, const float* found_inf, const Hyper* hyper,
                   int64_t num_groups, const int32_t* group_index, bool entry_age,
                   unsigned* arrived, cudaStream_t stream);

// position = outer column * inner.columns + inner column; entries elsewhere keep their value.
// Scratch memory of any size will do; that of sampled_grad_scratch_bytes lets more chunks of tokens
// run at once.
int64_t sampled_grad_scratch_bytes(int64_t tokens, int64_t count);
cudaError_t sampled_grad(const Matrix& outer, const Matrix& inner, const int32_t* position,
                         int64_t count, float* out, void* scratch, int64_t scratch_bytes,
                         cudaStream_t stream);

// Values beyond offsets[num_tensors] are left as they are.
cudaError_t gather(const Pool& pool, const int32_t* position, const int64_t* offsets,
                   int64_t capacity, int32_t* value, cudaStream_t stream);
cudaError_t exchange(const Pool& pool, const int32_t* position, const int64_t* offsets,
                     int64_t capacity, int32_t* value, cudaStream_t stream);

}  // namespace sparse_optim::cuda
