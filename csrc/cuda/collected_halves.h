// What `collect` keeps from call to call where quotas are large: candidates in one of two halves of
// a buffer. Those that stay are moved to the other, in any order.
#pragma once
#include "cuda/candidates.h"
#include "cuda/entry_rank.h"

namespace sparse_optim::cuda {

// Entries that a half has room for, at least.
#if defined(SPARSE_OPTIM_EMULATED)
constexpr int64_t kHalf = 48;
#else
constexpr int64_t kHalf = 1 << 16;
#endif

// Between calls the selection's bins hold the first digits of all candidates, num_candidates of
// them, and nothing is under way.
struct ManyState {
  Selection selection;
  EntryRank cut;      // digits of the quota-th best so far, then zeros
  Limit floor;        // what an entry must reach to be among the best
  PlaceBits bits;     // of all calls so far
  int64_t room;       // candidates at most
  int64_t kept;       // candidates before the running call, or of this one if nothing is under way
  int64_t enough;     // the cut is fine enough if no more reach it
  int64_t reaching;   // entries that reach the cut
  int32_t half;       // where the candidates are
  int32_t selecting;  // the cut is to get more digits
  int32_t moving;     // those that reach the cut are to be moved
};

struct Halves {
  ManyState* state;
  uint64_t* place;  // (2 * size,) each; see Candidates
  int32_t* key;
  float* grad;
  int64_t size;

  __device__ Candidates of(int half) const {
    const int64_t first = half ? size : 0;
    return {place + first, key + first, grad + first, state->room};
  }
};

inline int64_t half_size(int64_t max_quota) {
  return std::max(kHalf, 2 * max_quota);
}

inline Halves halves_of(void* buffer, int64_t max_quota) {
  Halves at;
  at.size = half_size(max_quota);
  at.state = static_cast<ManyState*>(buffer);
  at.place = reinterpret_cast<uint64_t*>(at.state + 1);
  at.key = reinterpret_cast<int32_t*>(at.place + 2 * at.size);
  at.grad = reinterpret_cast<float*>(at.key + 2 * at.size);
  return at;
}

// Writes the candidates as new entries in global order, with their gradients.
void write_in_order(const Halves& halves, const NewEntries& found, float* threshold, float* grad,
                    cudaStream_t stream);

}  // namespace sparse_optim::cuda
