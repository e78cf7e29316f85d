// scan: read every gradient once.
//
//   tile_max[j]    = max over the frozen entries of tile j of the bits of |grad|
//   active_grad    = grad at the active entries
//   norms[i]       = sqrt(sum of grad^2) of gradient i, the dense ones after the pool's
//   found_inf      = 1 where any gradient is infinite or NaN
//
// Bytes: one read of the gradient (4 N in float32, 2 N in bfloat16), 12 per tile of 4096 and 12 per
// active entry. 7B in bfloat16 (N = 6.74e9, B = 3.5e6 active, 1.65e6 tiles): 13.5 GB. Predicted:
// bytes / bandwidth = 6.8 ms on A100 (2.0 TB/s), 18 on A6000 (0.77), 4.0 on H100 (3.35), 2.8 on
// H200 (4.8). The maxima are exact integers, equal to the reference; squares are summed in float32
// in a tile, float64 above, in an order that depends on neither the device nor the grid nor the
// other tensors: one that is scanned alone has the same norm, bit for bit.
#include "cuda/device.h"

namespace sparse_optim::cuda {
namespace {

// 16-byte loads that a lane has in flight. At 32 resident warps a multiprocessor that is 64 KB,
// more than the 25 KB that 4.8 TB/s at 700 ns of latency ask of each of 132.
constexpr int kLoads = 4;
// Blocks a multiprocessor: its tiles are dealt out evenly, all blocks resident at once.
constexpr int kBlocksPerMultiprocessor = 4;
// Of one dense gradient at most: two a multiprocessor of the largest GPUs, 32 KB in flight on each.
constexpr int kDenseBlocks = 256;
constexpr int kDensePerLaunch = 96;                 // what fits in 4 KB of kernel arguments
constexpr int kBitmapWords = kMaxTile / kWarp + 1;  // one more: entries of a load may straddle two

// What the warp has seen of a tile, lane by lane until `reduce`. kMasked: the tile has active
// entries; in one that has none, a single maximum serves for all and for frozen entries.
struct Peak {
  int32_t all = 0;     // largest |grad| as bits
  int32_t frozen = 0;  // among frozen entries
  float squares = 0.f;

  template <bool kMasked>
  __device__ void add(float grad, bool active) {
    const int32_t bits = magnitude_bits(grad);
    all = max(all, bits);
    if (kMasked) frozen = max(frozen, active ? 0 : bits);
    squares = fmaf(grad, grad, squares);
  }
  template <bool kMasked>
  __device__ void reduce() {
    all = __reduce_max_sync(kAllLanes, all);
    frozen = kMasked ? __reduce_max_sync(kAllLanes, frozen) : all;
    squares = warp_sum(squares);
  }
};

// 32 bits of a bitmap, from any bit on.
__device__ inline uint32_t bits_from(const uint32_t* words, int bit) {
  const uint64_t both = uint64_t(words[bit / 32 + 1]) << 32 | words[bit / 32];
  return uint32_t(both >> (bit % 32));
}

// The entries of one 16-byte load; bit i of `active` tells of entry i.
template <bool kMasked>
__device__ inline void add_load(Peak& peak, const uint4& load, const float*, uint32_t active) {
  const uint32_t words[4] = {load.x, load.y, load.z, load.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) peak.add<kMasked>(from_bits(int32_t(words[i])), active >> i & 1u);
}
template <bool kMasked, class T>
__device__ inline void add_load(Peak& peak, const uint4& load, const T*, uint32_t active) {
  const uint32_t words[4] = {load.x, load.y, load.z, load.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const T entry{uint16_t(words[i / 2] >> (i % 2 ? 16 : 0))};
    peak.add<kMasked>(to_float(entry), active >> i & 1u);
  }
}

// A tile's gradients as one warp reads them. They may start anywhere: entries before the first
// 16-byte boundary and after the last whole load are read one by one.
template <class T>
struct TileReader {
  static constexpr int kEntries = 16 / sizeof(T);

  const T* grad;
  int count, head, loads;
  const uint4* body;

  __device__ TileReader(const T* grad, int count) : grad(grad), count(count) {
    const int misaligned = int(reinterpret_cast<uintptr_t>(grad) % 16);
    head = min(count, misaligned ? (16 - misaligned) / int(sizeof(T)) : 0);
    loads = (count - head) / kEntries;
    body = reinterpret_cast<const uint4*>(grad + head);
  }
  __device__ bool has_all(int i) const { return i + (kLoads - 1) * kWarp < loads; }
  __device__ void load(int i, uint4 (&out)[kLoads]) const {
#pragma unroll
    for (int k = 0; k < kLoads; ++k) out[k] = __ldcs(body + i + k * kWarp);
  }
  // Of the whole tile. `first` are the loads of has_all(lane()), issued before it was known which
  // entries are active; `active` marks these, or is null where there are none.
  template <bool kMasked>
  __device__ Peak peak(uint4 (&first)[kLoads], const uint32_t* active) const {
    Peak peak;
    auto single = [&](int i) {
      peak.add<kMasked>(to_float(grad[i]), kMasked && (active[i / 32] >> (i % 32) & 1u));
    };
    auto add = [&](const uint4& load, int i) {
      add_load<kMasked>(peak, load, grad, kMasked ? bits_from(active, head + i * kEntries) : 0u);
    };
    if (lane() < head) single(lane());
    int i = lane();
    for (; has_all(i); i += kLoads * kWarp) {
      if (i != lane()) load(i, first);
#pragma unroll
      for (int k = 0; k < kLoads; ++k) add(first[k], i + k * kWarp);
    }
    for (; i < loads; i += kWarp) add(__ldcs(body + i), i);
    const int tail = head + loads * kEntries + lane();
    if (tail < count) single(tail);
    peak.reduce<kMasked>();
    return peak;
  }
};

// Marks the tile's active entries and gathers their gradients; false if it has none. The warp reads
// them from memory ahead of the tile, which then finds those cache lines in L2.
template <class T>
__device__ inline bool mark_active(const T* grad, const Tile& tile, const int32_t* position,
                                   const int64_t* offsets, float* active_grad, uint32_t* marks) {
  const int64_t end = offsets[tile.tensor + 1], last = tile.first + tile.count;
  int64_t next = warp_first_near(position, offsets[tile.tensor], end, tile.first);
  bool any = false;
  for (bool more = true; more; next += kWarp) {
    const int64_t i = next + lane();
    const bool before = i < end && position[i] < last;
    const bool inside = before && position[i] >= tile.first;
    more = __ballot_sync(kAllLanes, before) == kAllLanes;
    if (__ballot_sync(kAllLanes, inside) && !any) {
      for (int w = lane(); w < kBitmapWords; w += kWarp) marks[w] = 0;
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

struct ScanInput {
  const int32_t* position;
  const int64_t* offsets;
};

// Each block has a run of consecutive tiles, of which its warps take one each in turn: a warp needs
// no barrier, and a block reads 128 KB of consecutive memory at a time.
// The active entries of a tile are masked while it is read, so that no tile is read twice.
template <class Locate>
__device__ inline void scan_share(int64_t num_tiles, Locate&& locate, const ScanInput& in,
                                  const ScanOutput& out, float* tile_squares) {
  __shared__ uint32_t marks[kWarps][kBitmapWords];
  const int64_t end = num_tiles * (blockIdx.x + 1) / gridDim.x;
  for (int64_t index = num_tiles * blockIdx.x / gridDim.x + warp(); index < end; index += kWarps) {
    const Tile tile = locate(index);
    Peak peak;
    if (tile.row.grad) {
      visit_dtype(tile.row.grad_dtype, tile.row.grad, [&](auto* grad) {
        const TileReader reader(grad + tile.first, tile.count);
        uint4 first[kLoads] = {};
        if (reader.has_all(lane())) reader.load(lane(), first);
        if (mark_active(grad, tile, in.position, in.offsets, out.active_grad, marks[warp()]))
          peak = reader.template peak<true>(first, marks[warp()]);
        else peak = reader.template peak<false>(first, nullptr);
      });
    }
    __syncwarp();  // the marks have been read
    if (lane() != 0) continue;
    out.tile_max[index] = peak.frozen;
    tile_squares[index] = peak.squares;
    if (peak.all >= kInfinityBits) *out.found_inf = 1.f;  // every writer writes the same
  }
}

// The root of the sum of what a tensor's tiles or blocks left; every thread of the block calls it.
template <class T>
__device__ inline double norm_of(const T* squares, int64_t first, int64_t last) {
  double sum = 0.0;
#pragma unroll 16
  for (int64_t i = first + threadIdx.x; i < last; i += kThreads) sum += double(__ldcg(&squares[i]));
  return sqrt(block_sum(sum));
}

__global__ void __launch_bounds__(kThreads, kResident)
    scan_kernel(Pool pool, ScanInput in, ScanOutput out, float* tile_squares) {
  int64_t tensor = -1;
  auto locate = [&](int64_t index) {
    if (tensor < 0) tensor = tensor_of_tile(pool, index);
    while (pool.tile_offsets[tensor + 1] <= index) ++tensor;
    return locate_tile(pool, tensor, index);
  };
  scan_share(pool.num_tiles, locate, in, out, tile_squares);
}

// One block a tensor: the partition is the tensor's own, whatever else is scanned with it. The
// largest of a 7B model has 32,000 tiles, 128 KB that `scan_kernel` has left in L2: 8 rounds of
// 16 loads in flight a thread, for the sake of one launch less for each tensor scanned alone.
__global__ void __launch_bounds__(kThreads, kResident)
    norms_kernel(Pool pool, const float* tile_squares, double* norms) {
  const int64_t* first = pool.tile_offsets + blockIdx.x;
  const double norm = norm_of(tile_squares, first[0], first[1]);
  if (threadIdx.x == 0) norms[blockIdx.x] = norm;
}

// A row of the table that comes with the launch.
struct PackedRow {
  int64_t grad, param, numel, dtypes;
};

// One tensor alone, whose row is written, too; the last block adds up the norm.
__global__ void __launch_bounds__(kThreads, kResident)
    scan_one_kernel(Row row, PackedRow packed, int64_t* table, int64_t num_tiles, int64_t tile_size,
                    ScanInput in, ScanOutput out, float* tile_squares, unsigned* arrived) {
  if (global_thread() == 0) {
    table[kGrad] = packed.grad;
    table[kParam] = packed.param;
    table[kNumel] = packed.numel;
    table[kDTypes] = packed.dtypes;
  }
  auto locate = [&](int64_t index) {
    const int64_t first = index * tile_size, left = row.numel - first;
    return Tile{row, 0, first, int(left < tile_size ? left : tile_size)};
  };
  scan_share(num_tiles, locate, in, out, tile_squares);
  if (!is_last_block(arrived)) return;
  const double norm = norm_of(tile_squares, 0, num_tiles);
  if (threadIdx.x == 0) *out.norms = norm;
}

// Gradients trained densely, handed over by value. Blocks first_block[g] on read gradient g; how
// many depends on its size alone.
struct DenseGrads {
  DenseGrad grads[kDensePerLaunch];
  int first_block[kDensePerLaunch + 1];
  int count;

  void add(const DenseGrad& grad) {
    const int64_t tiles = (grad.numel + kMaxTile - 1) / kMaxTile;
    const int64_t blocks = std::min<int64_t>((tiles + kWarps - 1) / kWarps, kDenseBlocks);
    grads[count] = grad;
    first_block[count + 1] = first_block[count] + int(blocks);
    ++count;
  }
  int blocks() const { return first_block[count]; }
};

// A block's warps take tiles of its gradient in turn with those of the gradient's other blocks.
__global__ void __launch_bounds__(kThreads, kResident)
    scan_dense_kernel(DenseGrads dense, double* block_squares, float* found_inf) {
  const int64_t g = upper_bound(dense.first_block, 0, dense.count + 1, blockIdx.x) - 1;
  const DenseGrad& tensor = dense.grads[g];
  const int64_t step = int64_t(dense.first_block[g + 1] - dense.first_block[g]) * kWarps * kMaxTile;
  int64_t first = (int64_t(blockIdx.x - dense.first_block[g]) * kWarps + warp()) * kMaxTile;
  double sum = 0.0;
  for (; first < tensor.numel; first += step) {
    const int64_t left = tensor.numel - first;
    Peak peak;
    visit_dtype(tensor.dtype, tensor.grad, [&](auto* grad) {
      const TileReader reader(grad + first, int(left < kMaxTile ? left : kMaxTile));
      uint4 loads[kLoads] = {};
      if (reader.has_all(lane())) reader.load(lane(), loads);
      peak = reader.template peak<false>(loads, nullptr);
    });
    sum += double(peak.squares);
    if (lane() == 0 && peak.all >= kInfinityBits) *found_inf = 1.f;
  }
  const double total = block_sum(lane() == 0 ? sum : 0.0);
  if (threadIdx.x == 0) block_squares[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads, kResident)
    dense_norms_kernel(DenseGrads dense, const double* block_squares, double* norms) {
  const int g = int(blockIdx.x);
  const double norm = norm_of(block_squares, dense.first_block[g], dense.first_block[g + 1]);
  if (threadIdx.x == 0) norms[g] = norm;
}

struct Scratch {
  double* block_squares;  // (kDensePerLaunch * kDenseBlocks,)
  float* tile_squares;    // (num_tiles,)
};

Scratch layout(void* scratch) {
  double* block_squares = static_cast<double*>(scratch);
  return {block_squares, reinterpret_cast<float*>(block_squares + kDensePerLaunch * kDenseBlocks)};
}

void scan_dense(const std::vector<DenseGrad>& grads, double* block_squares, double* norms,
                float* found_inf, cudaStream_t stream) {
  for (size_t first = 0; first < grads.size(); first += kDensePerLaunch) {
    DenseGrads part{};
    for (size_t i = first; i < grads.size() && part.count < kDensePerLaunch; ++i)
      part.add(grads[i]);
    if (part.blocks()) {
      SPARSE_OPTIM_LAUNCH(scan_dense_kernel, part.blocks(), kThreads, stream, part, block_squares,
                          found_inf);
    }
    SPARSE_OPTIM_LAUNCH(dense_norms_kernel, part.count, kThreads, stream, part, block_squares,
                        norms + first);
  }
}

}  // namespace

int64_t scan_scratch_bytes(int64_t num_tiles) {
  return kDensePerLaunch * kDenseBlocks * int64_t(sizeof(double)) +
         num_tiles * int64_t(sizeof(float));
}

cudaError_t scan(const Pool& pool, const std::vector<DenseGrad>& dense, const int32_t* position,
                 const int64_t* offsets, const ScanOutput& out, void* scratch,
                 cudaStream_t stream) {
  const Scratch at = layout(scratch);
  if (pool.num_tiles) {
    const int64_t blocks = grid_for(pool.num_tiles, kWarps, kBlocksPerMultiprocessor);
    const ScanInput in{position, offsets};
    SPARSE_OPTIM_LAUNCH(scan_kernel, blocks, kThreads, stream, pool, in, out, at.tile_squares);
  }
  if (pool.num_tensors) {
    SPARSE_OPTIM_LAUNCH(norms_kernel, pool.num_tensors, kThreads, stream, pool, at.tile_squares,
                        out.norms);
  }
  scan_dense(dense, at.block_squares, out.norms + pool.num_tensors, out.found_inf, stream);
  return cudaGetLastError();
}

cudaError_t scan_one(const Row& row, int64_t* table, int64_t num_tiles, int64_t tile,
                     const int32_t* position, const int64_t* offsets, const ScanOutput& out,
                     unsigned* arrived, void* scratch, cudaStream_t stream) {
  const int64_t blocks =
      std::max<int64_t>(1, grid_for(num_tiles, kWarps, kBlocksPerMultiprocessor));
  int64_t values[kColumns];
  write_row(values, row);
  const PackedRow packed{values[kGrad], values[kParam], values[kNumel], values[kDTypes]};
  const ScanInput in{position, offsets};
  SPARSE_OPTIM_LAUNCH(scan_one_kernel, blocks, kThreads, stream, row, packed, table, num_tiles,
                      tile, in, out, layout(scratch).tile_squares, arrived);
  return cudaGetLastError();
}

}  // namespace sparse_optim::cuda
