// What `collect` keeps on the device from call to call.
#pragma once
#include "cuda/select.h"

namespace sparse_optim::cuda {

struct CollectState {
  Selection selection;  // num_candidates: of all calls so far
  int64_t before;       // candidates before the running call
  int64_t found;        // of the last call that took several passes
  int32_t floor;        // what an entry must reach to be among the best
  float threshold;      // of a call's best: written, not read
};

struct Collected {
  CollectState* state;
  uint64_t* place;  // (kCollected,) each; see Candidates
  int32_t* key;
  float* grad;
};

}  // namespace sparse_optim::cuda
