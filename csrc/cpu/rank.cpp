// rank: read dense scores once.
//
//   tile_max[j] = max over the frozen entries of tile j of the bits of |score| (/ sqrt(E))
//
// Bytes: one read of the scores, 4 per tile. With noise it is bound by arithmetic: ten rounds of
// Philox for four entries, a logarithm, a root and two divisions for each.
#include "cpu/open_tile.h"

namespace sparse_optim::cpu {

void rank(const Problem& problem, int32_t* tile_max) {
  constexpr int64_t kTilesPerTask = 32;
  for_each(problem.threads, tiles_of(problem.num_tiles, kTilesPerTask), [&](int64_t task) {
    int32_t keys[kMaxTile + 16];
    const int64_t end = std::min(problem.num_tiles, (task + 1) * kTilesPerTask);
    for (int64_t i = task * kTilesPerTask; i < end; ++i)
      tile_max[i] = largest(keys, open_tile(problem, i, keys).count);
  });
}

}  // namespace sparse_optim::cpu
