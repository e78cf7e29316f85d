// Variants of the scan, to be timed side by side: what each of them changes is a constant of its
// own struct, all else is as in Plain. tile_max and active_grad are equal in all of them.
//
// The text of `scan` is repeated here, so that the variants stay comparable when `scan` changes.
#pragma once
#include <type_traits>

#include "cuda/device.h"
#include "kernels_alone/optimizer.h"

namespace alone {

using namespace sparse_optim;
using namespace sparse_optim::cuda;

struct Plain {
  static constexpr bool kEarly = false;       // issue a tile's first loads before the active lookup
  static constexpr bool kRare = false;        // no masks for a load without active entries
  static constexpr bool kOneMaximum = false;  // one maximum for entries that are known as frozen
  static constexpr int kLoads = 4;            // 16-byte loads in flight for each lane
  static constexpr int kBlocks = 4;           // resident on a multiprocessor
  static constexpr int kRun = 0;              // tiles of a warp; 0: an even share of all tiles
};
struct OneMaximum : Plain {
  static constexpr bool kOneMaximum = true;
};
struct Rare : Plain {
  static constexpr bool kRare = true;
};
struct Early : Plain {
  static constexpr bool kEarly = true;
};
struct EarlyOneMaximum : Early {
  static constexpr bool kOneMaximum = true;
};
struct EarlyRare : Early {
  static constexpr bool kRare = true, kOneMaximum = true;
  static constexpr int kBlocks = 3;
};
struct EarlyEight : Early {
  static constexpr int kLoads = 8, kBlocks = 3;
};
struct EarlyRunsOf1 : Early {
  static constexpr int kRun = 1;
};
struct EarlyRunsOf8 : Early {
  static constexpr int kRun = 8;
};
struct RunsOf8 : Plain {
  static constexpr int kRun = 8;
};

constexpr int kMarkWords = kMaxTile / kWarp + 1;  // one more: entries of a load may straddle two

template <class Variant>
struct Maxima {
  int32_t frozen = 0;
  int32_t other = 0;  // among all entries; with kOneMaximum among those that may be active
  float squares = 0.f;

  template <bool kMasked>
  __device__ void add(float grad, bool active) {
    const int32_t bits = magnitude_bits(grad);
    frozen = max(frozen, kMasked && active ? 0 : bits);
    if (kMasked || !Variant::kOneMaximum) other = max(other, bits);
    squares = fmaf(grad, grad, squares);
  }
  __device__ void reduce() {
    frozen = __reduce_max_sync(kAllLanes, frozen);
    other = max(frozen, __reduce_max_sync(kAllLanes, other));
    squares = warp_sum(squares);
  }
};

template <bool kMasked, class Variant, class T>
__device__ inline void add_entries(Maxima<Variant>& seen, const uint4& load, const T*,
                                   uint32_t active) {
  const uint32_t words[4] = {load.x, load.y, load.z, load.w};
#pragma unroll
  for (int i = 0; i < int(16 / sizeof(T)); ++i) {
    const bool is_active = active >> i & 1u;
    if constexpr (sizeof(T) == 4) {
      seen.template add<kMasked>(from_bits(int32_t(words[i])), is_active);
    } else {
      const T entry{uint16_t(words[i / 2] >> (i % 2 ? 16 : 0))};
      seen.template add<kMasked>(to_float(entry), is_active);
    }
  }
}

template <bool kMasked, class Variant, class T>
__device__ inline void add_load(Maxima<Variant>& seen, const uint4& load, const T* type,
                                uint32_t active) {
  constexpr uint32_t kEntries = (1u << (16 / sizeof(T))) - 1;
  if (kMasked && (!Variant::kRare || (active & kEntries)))
    add_entries<true>(seen, load, type, active);
  else add_entries<false>(seen, load, type, 0u);
}

// Sets the bits of the tile's active entries and gathers their gradients; false if it has none.
template <class T>
__device__ inline bool set_marks(const T* grad, const Tile& tile, const int32_t* position,
                                 const int64_t* offsets, float* active_grad, uint32_t* marks) {
  const int64_t end = offsets[tile.tensor + 1], last = tile.first + tile.count;
  int64_t next = warp_lower_bound(position, offsets[tile.tensor], end, tile.first);
  bool any = false;
  for (unsigned found = kAllLanes; found == kAllLanes; next += kWarp) {
    const int64_t i = next + lane();
    const bool inside = i < end && position[i] < last;
    found = __ballot_sync(kAllLanes, inside);
    if (found && !any) {
      for (int w = lane(); w < kMarkWords; w += kWarp) marks[w] = 0;
      __syncwarp();
      any = true;
    }
    if (inside) {
      const int at = int(position[i] - tile.first);
      atomicOr(&marks[at / 32], 1u << (at % 32));
      active_grad[i] = to_float(grad[position[i]]);
    }
  }
  __syncwarp();
  return any;
}

// 32 bits of a bitmap, from any bit on.
__device__ inline uint32_t bits_at(const uint32_t* words, int bit) {
  const uint64_t both = uint64_t(words[bit / 32 + 1]) << 32 | words[bit / 32];
  return uint32_t(both >> (bit % 32));
}

// One warp reads a tile: entries before the first 16-byte boundary, whole loads, the rest.
template <class Variant, class T>
__device__ inline Maxima<Variant> scan_tile(const T* tensor, const Tile& tile,
                                            const int32_t* position, const int64_t* offsets,
                                            float* active_grad, uint32_t* marks) {
  constexpr int kEntries = 16 / sizeof(T), kLoads = Variant::kLoads;
  const T* grad = tensor + tile.first;
  const int misaligned = int(reinterpret_cast<uintptr_t>(grad) % 16);
  const int head = min(tile.count, misaligned ? (16 - misaligned) / int(sizeof(T)) : 0);
  const int loads = (tile.count - head) / kEntries;
  const uint4* body = reinterpret_cast<const uint4*>(grad + head);
  uint4 load[kLoads];
  const bool early = Variant::kEarly && lane() + (kLoads - 1) * kWarp < loads;
  if (early) {
#pragma unroll
    for (int k = 0; k < kLoads; ++k) load[k] = __ldcs(body + lane() + k * kWarp);
  }
  const bool any_active = set_marks(tensor, tile, position, offsets, active_grad, marks);
  Maxima<Variant> seen;
  auto read = [&](auto masked) {
    constexpr bool kMasked = decltype(masked)::value;
    auto add = [&](int i, const uint4& entries) {
      const uint32_t active = kMasked ? bits_at(marks, head + i * kEntries) : 0u;
      add_load<kMasked>(seen, entries, grad, active);
    };
    auto single = [&](int i) {
      const bool active = kMasked && (marks[i / 32] >> (i % 32) & 1u);
      seen.template add<kMasked>(to_float(grad[i]), active);
    };
    if (lane() < head) single(lane());
    int i = lane();
    if (early) {
#pragma unroll
      for (int k = 0; k < kLoads; ++k) add(i + k * kWarp, load[k]);
      i += kLoads * kWarp;
    }
    for (; i + (kLoads - 1) * kWarp < loads; i += kLoads * kWarp) {
#pragma unroll
      for (int k = 0; k < kLoads; ++k) load[k] = __ldcs(body + i + k * kWarp);
#pragma unroll
      for (int k = 0; k < kLoads; ++k) add(i + k * kWarp, load[k]);
    }
    for (; i < loads; i += kWarp) add(i, __ldcs(body + i));
    const int tail = head + loads * kEntries + lane();
    if (tail < tile.count) single(tail);
  };
  if (any_active) read(std::true_type{});
  else read(std::false_type{});
  seen.reduce();
  return seen;
}

template <class Variant>
__global__ void __launch_bounds__(kThreads, Variant::kBlocks)
    scan_variant_kernel(Pool pool, const int32_t* position, const int64_t* offsets,
                        int32_t* tile_max, float* active_grad, float* tile_squares,
                        float* found_inf) {
  __shared__ uint32_t marks[kWarps][kMarkWords];
  constexpr int64_t kEach = int64_t(Variant::kRun) * kWarps;
  const int64_t begin = kEach ? blockIdx.x * kEach : pool.num_tiles * blockIdx.x / gridDim.x;
  const int64_t share = kEach ? begin + kEach : pool.num_tiles * (blockIdx.x + 1) / gridDim.x;
  const int64_t end = share < pool.num_tiles ? share : pool.num_tiles;
  int64_t index = begin + warp();
  int64_t tensor = index < end ? tensor_of_tile(pool, index) : 0;
  for (; index < end; index += kWarps) {
    while (pool.tile_offsets[tensor + 1] <= index) ++tensor;
    const Tile tile = locate_tile(pool, tensor, index);
    Maxima<Variant> seen;
    if (tile.row.grad) {
      visit_dtype(tile.row.grad_dtype, tile.row.grad, [&](auto* grad) {
        seen = scan_tile<Variant>(grad, tile, position, offsets, active_grad, marks[warp()]);
      });
    }
    __syncwarp();  // the marks have been read
    if (lane() != 0) continue;
    tile_max[index] = seen.frozen;
    tile_squares[index] = seen.squares;
    if (seen.other >= kInfinityBits) *found_inf = 1.f;
  }
}

// Runs a variant in place of the optimizer's own scan. `squares`: one for each tile.
template <class Kernel>
void launch_variant(Kernel kernel, int64_t blocks, const Optimizer& optimizer,
                    const DeviceArray<float>& squares) {
  const Pool pool = optimizer.pool;
  const int32_t* position = optimizer.position.get();
  const int64_t* offsets = optimizer.offsets.get();
  int32_t* tile_max = optimizer.tile_max.get();
  float *active_grad = optimizer.active_grad.get(), *sums = squares.get();
  float* found_inf = optimizer.found_inf.get();
  SPARSE_OPTIM_LAUNCH(kernel, blocks, kThreads, nullptr, pool, position, offsets, tile_max,
                      active_grad, sums, found_inf);
  MUST(cudaGetLastError());
}

// Calls visit(name, kernel, blocks of its grid) for every variant.
template <class Visit>
void each_scan_variant(int64_t num_tiles, Visit&& visit) {
  auto take = [&](const char* name, auto variant) {
    using Variant = decltype(variant);
    const int64_t each = std::max(Variant::kRun, 1) * kWarps;
    const int64_t blocks = (num_tiles + each - 1) / each;
    const int64_t resident = int64_t(multiprocessors()) * Variant::kBlocks;
    visit(name, scan_variant_kernel<Variant>, Variant::kRun ? blocks : std::min(blocks, resident));
  };
  take("plain", Plain{});
  take("one maximum", OneMaximum{});
  take("rare", Rare{});
  take("early", Early{});
  take("early, one maximum", EarlyOneMaximum{});
  take("early, rare, one maximum, 3 blocks", EarlyRare{});
  take("early, 8 loads, 3 blocks", EarlyEight{});
  take("early, runs of 1", EarlyRunsOf1{});
  take("early, runs of 8", EarlyRunsOf8{});
  take("runs of 8", RunsOf8{});
}

}  // namespace alone
