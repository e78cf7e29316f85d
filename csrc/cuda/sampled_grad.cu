// sampled_grad: the gradient of a weight at its active entries alone.
//
//   out[e] += sum over tokens t of grad_output[t, row(e)] * input[t, column(e)]
//
// A position is a column of `outer` times the width of `inner`, plus a column of `inner`. Positions
// ascend: consecutive entries share few columns of outer, while those of inner are scattered. A
// thread that reads inner[t, column] by itself moves a sector of 32 bytes for 2 of them. So a block
// takes up to 4096 consecutive entries and a chunk of 64 tokens, and brings four tokens of inner at
// a time into shared memory, read in rows of 16-byte loads and turned so that the four values of a
// column lie together: one shared load of 8 bytes (16 of float32) serves four tokens of an entry.
// Pieces of 16 bytes without an entry of the block are not read. Values of outer come straight from
// L1, where the 32 consecutive entries of a warp find theirs in one or two sectors.
//
// Predicted, not measured, for 3.5M entries of a 7B model in bfloat16 (0.05%), 4096 tokens, an H100
// of 132 multiprocessors at 1.7 GHz with 5 TB/s from L2; 1.4e10 products of an entry and a token:
//
//   inner from L2, 2 * width / entries of a block (3000 to 4000): 3 bytes a product    43 GB
//   outer from L2, two sectors for 32 products: 2 bytes                                29 GB, 14 ms
//   shared memory and L1: 4 wavefronts for 32 products                                 8 ms
//   instructions: 15 for 32 products                                                   7 ms
//
// H200 has the same chip. By multiprocessors times clock, A100 (108 at 1.41 GHz) and A6000 (84 at
// 1.8) take 1.5 times as long. (The last two rows count a pass over all entries of a block for each
// tile of 4096 columns, 2048 of float32: 1.4 on average.) So 15 to 20 ms if these overlap in part,
// against 90 ms for the dense products, which are faster from a density of some 0.3% on. Not taken:
// inner read entry by entry (32 bytes a product, 460 GB, 90 ms); both matrices transposed in memory
// first (20 GB read and 20 written, then 3 to 4 bytes a product, 25 ms, and scratch memory of their
// size).
//
// An entry's sum runs over four tokens, by fused multiply-adds, then over the fours of a chunk,
// over 16 chunks, and over these, each in turn and from zero, as long sums of float32 lose digits.
// The order is the same for every layout and device, and however many tokens of zero gradient
// follow. Chunks go to different blocks, so that few entries fill a device; a second kernel adds
// the sums that they leave in scratch memory. Entries whose position is outside of the weight are
// left as they are.
#include "cuda/device.h"

namespace sparse_optim::cuda {
namespace {

constexpr int kEntries = 16;  // of a thread: registers for their sums and places
constexpr int64_t kEntriesPerBlock = kThreads * kEntries;
// Two blocks of 41 KB of shared memory and at most 128 registers a thread fit on every device; more
// where these allow it.
constexpr int kSampledResident = 2;
constexpr int kBatch = 4;     // entries of a thread whose loads are in flight at once
constexpr int kStage = 4;     // tokens in shared memory at a time
constexpr int kChunk = 64;    // tokens that are summed at once: 4096 of them make 64 blocks
constexpr int kGroup = 16;    // chunks whose sums are, in turn
constexpr int kPieces = 512;  // of 16 bytes of a row, in shared memory
// Four tokens of a piece and 16 bytes, so that eight threads that store theirs meet no bank twice.
constexpr int kPieceBytes = kStage * 16 + 16;
constexpr int64_t kScratchBytes = 32 << 20;  // for sums of chunks, at most

// Columns in 16 bytes, and in all pieces.
template <class T>
constexpr int kPieceColumns = 16 / int(sizeof(T));
template <class T>
constexpr int kTileColumns = kPieces * kPieceColumns<T>;

template <class T>
struct alignas(16) Piece {
  T column[kPieceColumns<T>];
};
template <class T>
struct alignas(kStage * sizeof(T)) Column {
  T token[kStage];
};

struct Problem {
  Matrix outer, inner;
  const int32_t* position;
  int64_t count;
  int64_t blocks;  // that share the entries; grids are a multiple of them
  int64_t slots;   // chunks that are summed at once
  float* sums;     // (slots, count); null with one slot, whose sums go to `out`
  float* out;
};

// The entries and the chunk of a block.
struct Share {
  int64_t first, last;
  int64_t slot;

  __device__ int64_t entry(int k) const { return first + k * kThreads + threadIdx.x; }
};

template <class T>
__device__ inline const T* at(const Matrix& matrix, int64_t row, int64_t column) {
  return static_cast<const T*>(matrix.data) + row * matrix.row_stride +
         column * matrix.column_stride;
}

__device__ inline void put(const Problem& problem, int64_t slot, int64_t entry, float sum) {
  if (problem.sums) problem.sums[slot * problem.count + entry] = sum;
  else problem.out[entry] += sum;
}

// Where a thread's entries are: offsets in shared memory and columns of outer. Those that are not
// in this tile of inner's columns multiply what is at (0, 0), and their sums are dropped.
struct Places {
  int inner[kEntries];
  uint32_t outer[kEntries];
  uint32_t in_tile = 0;  // bit k: entry k is
};

// Finds the entries of a tile of columns and marks the pieces that they need.
template <class T>
__device__ inline Places locate(const Problem& problem, const Share& share, int64_t first_column,
                                uint32_t* needed) {
  const int64_t size = problem.outer.columns * problem.inner.columns;  // below 2^31
  const uint32_t width = uint32_t(problem.inner.columns);
  Places places;
#pragma unroll
  for (int k = 0; k < kEntries; ++k) {
    places.inner[k] = 0;
    places.outer[k] = 0;
    const int64_t entry = share.entry(k);
    if (entry >= share.last) continue;
    const int32_t position = problem.position[entry];
    if (position < 0 || position >= size) {
      if (first_column == 0) put(problem, share.slot, entry, 0.f);
      continue;
    }
    const uint32_t outer = uint32_t(position) / width;
    const int64_t column = int64_t(uint32_t(position) - outer * width) - first_column;
    if (column < 0 || column >= kTileColumns<T>) continue;
    const int piece = int(column) / kPieceColumns<T>;
    const int in_piece = int(column) % kPieceColumns<T>;
    places.inner[k] = piece * kPieceBytes + in_piece * int(sizeof(Column<T>));
    places.outer[k] = outer;
    places.in_tile |= 1u << k;
    atomicOr(&needed[piece / 32], 1u << (piece % 32));
  }
  return places;
}

// Four tokens of a piece, turned: whole 16-byte loads.
template <class T>
__device__ inline void turn(const Matrix& inner, int64_t token, int64_t column, Column<T>* out) {
  Piece<T> rows[kStage];
#pragma unroll
  for (int t = 0; t < kStage; ++t)
    rows[t] = *reinterpret_cast<const Piece<T>*>(at<T>(inner, token + t, column));
#pragma unroll
  for (int c = 0; c < kPieceColumns<T>; ++c) {
    Column<T> turned;
#pragma unroll
    for (int t = 0; t < kStage; ++t) turned.token[t] = rows[t].column[c];
    out[c] = turned;
  }
}

// Element by element, with zeros beyond the last token and column.
template <class T>
__device__ inline void turn_any(const Matrix& inner, int64_t token, int tokens, int64_t column,
                                Column<T>* out) {
#pragma unroll 1
  for (int c = 0; c < kPieceColumns<T>; ++c) {
    Column<T> turned{};
    for (int t = 0; t < kStage; ++t) {
      if (t < tokens && column + c < inner.columns)
        turned.token[t] = *at<T>(inner, token + t, column + c);
    }
    out[c] = turned;
  }
}

// Brings the pieces that are needed into shared memory.
template <class T>
__device__ inline void stage(const Matrix& inner, int64_t first_column, int64_t token, int tokens,
                             bool aligned, const uint32_t* needed, unsigned char* shared) {
  for (int p = int(threadIdx.x); p < kPieces; p += kThreads) {
    if (!(needed[p / 32] >> (p % 32) & 1u)) continue;
    const int64_t column = first_column + p * kPieceColumns<T>;
    Column<T>* out = reinterpret_cast<Column<T>*>(shared + p * kPieceBytes);
    if (aligned && tokens == kStage && column + kPieceColumns<T> <= inner.columns)
      turn(inner, token, column, out);
    else turn_any(inner, token, tokens, column, out);
  }
}

// sum[k] += over four tokens. Without branches within a batch, so that all its loads are in flight
// at once. Offsets in a row of outer have 32 bits.
template <class Inner, class Outer>
__device__ inline void accumulate(const Matrix& outer, int64_t token, int64_t entries,
                                  const Places& places, const unsigned char* shared, float* sum) {
  const uint32_t stride = uint32_t(outer.column_stride);
#pragma unroll
  for (int first = 0; first < kEntries; first += kBatch) {
    if (first * kThreads >= entries) return;
    Outer value[kBatch][kStage];
#pragma unroll
    for (int t = 0; t < kStage; ++t) {
      const Outer* row = at<Outer>(outer, token + t, 0);
#pragma unroll
      for (int k = 0; k < kBatch; ++k) value[k][t] = row[places.outer[first + k] * stride];
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const auto column = *reinterpret_cast<const Column<Inner>*>(shared + places.inner[first + k]);
      float part = 0.f;
#pragma unroll
      for (int t = 0; t < kStage; ++t)
        part = fmaf(to_float(column.token[t]), to_float(value[k][t]), part);
      sum[first + k] += part;
    }
  }
}

// The same for the last tokens and for rows of outer that take longer offsets.
template <class Inner, class Outer>
__device__ inline void accumulate_any(const Matrix& outer, int64_t token, int tokens,
                                      const Places& places, const unsigned char* shared,
                                      float* sum) {
#pragma unroll
  for (int k = 0; k < kEntries; ++k) {
    const auto* column = reinterpret_cast<const Column<Inner>*>(shared + places.inner[k]);
    const Outer* value = at<Outer>(outer, token, places.outer[k]);
    float part = 0.f;
#pragma unroll 1
    for (int t = 0; t < tokens; ++t, value += outer.row_stride)
      part = fmaf(to_float(column->token[t]), to_float(*value), part);
    sum[k] += part;
  }
}

// Block b has share b % blocks of the entries, in every slots-th chunk.
template <class Inner, class Outer>
__global__ void __launch_bounds__(kThreads, kSampledResident)
    sampled_grad_kernel(Problem problem, int64_t first_chunk, int64_t last_chunk) {
  alignas(16) __shared__ unsigned char shared[kPieces * kPieceBytes];
  __shared__ uint32_t needed[kPieces / 32];
  const Matrix &inner = problem.inner, &outer = problem.outer;
  const int64_t block = blockIdx.x % problem.blocks;
  const Share share{problem.count * block / problem.blocks,
                    problem.count * (block + 1) / problem.blocks, blockIdx.x / problem.blocks};
  const int64_t entries = share.last - share.first;
  const bool aligned = inner.column_stride == 1 &&
                       reinterpret_cast<uintptr_t>(inner.data) % 16 == 0 &&
                       inner.row_stride % kPieceColumns<Inner> == 0;
  const bool narrow = (outer.columns - 1) * outer.column_stride < int64_t(1) << 32;
  for (int64_t chunk = first_chunk + share.slot; chunk < last_chunk; chunk += problem.slots) {
    const int64_t begin = chunk * kChunk, end = min(begin + kChunk, inner.rows);
    for (int64_t column = 0; column < inner.columns; column += kTileColumns<Inner>) {
      if (threadIdx.x < kPieces / 32) needed[threadIdx.x] = 0;
      __syncthreads();
      const Places places = locate<Inner>(problem, share, column, needed);
      __syncthreads();
      float sum[kEntries] = {};
      for (int64_t token = begin; token < end; token += kStage) {
        const int tokens = int(min(int64_t(kStage), end - token));
        stage<Inner>(inner, column, token, tokens, aligned, needed, shared);
        __syncthreads();
        if (narrow && tokens == kStage)
          accumulate<Inner, Outer>(outer, token, entries, places, shared, sum);
        else accumulate_any<Inner, Outer>(outer, token, tokens, places, shared, sum);
        __syncthreads();
      }
#pragma unroll
      for (int k = 0; k < kEntries; ++k)
        if (places.in_tile >> k & 1u) put(problem, share.slot, share.entry(k), sum[k]);
    }
  }
}

// out += the sums of so many chunks, added up 16 at a time.
__global__ void __launch_bounds__(kThreads, kResident)
    add_chunks_kernel(const float* sums, int64_t chunks, int64_t count, float* out) {
  const int64_t e = global_thread();
  if (e >= count) return;
  float total = out[e];
  for (int64_t c = 0; c < chunks;) {
    const int64_t end = min(c + kGroup, chunks);
    float group = 0.f;
    for (; c < end; ++c) group += sums[c * count + e];
    total += group;
  }
  out[e] = total;
}

template <class Visit>
void visit_element(DType dtype, Visit&& visit) {
  switch (dtype) {
    case DType::kFloat32: return visit(float{});
    case DType::kBFloat16: return visit(BFloat16{});
    case DType::kFloat16: return visit(Float16{});
  }
}

int64_t chunks_of(int64_t tokens) {
  return (tokens + kChunk - 1) / kChunk;
}

// Chunks that are summed at once, of those for whose sums there is room.
int64_t slots_of(int64_t chunks, int64_t count, int64_t scratch_bytes) {
  const int64_t room = scratch_bytes / int64_t(sizeof(float)) / count;
  return std::max<int64_t>(std::min(room, chunks), 1);
}

}  // namespace

int64_t sampled_grad_scratch_bytes(int64_t tokens, int64_t count) {
  if (!count) return 0;
  const int64_t slots = slots_of(chunks_of(tokens), count, kScratchBytes);
  return slots > 1 ? slots * count * int64_t(sizeof(float)) : 0;
}

cudaError_t sampled_grad(const Matrix& outer, const Matrix& inner, const int32_t* position,
                         int64_t count, float* out, void* scratch, int64_t scratch_bytes,
                         cudaStream_t stream) {
  const int64_t chunks = chunks_of(inner.rows);
  if (!count || !chunks || !outer.columns || !inner.columns) return cudaSuccess;
  const int64_t slots = slots_of(chunks, count, scratch_bytes);
  const int64_t blocks = (count + kEntriesPerBlock - 1) / kEntriesPerBlock;
  float* sums = slots > 1 ? static_cast<float*>(scratch) : nullptr;
  const Problem problem{outer, inner, position, count, blocks, slots, sums, out};
  // With one slot its blocks add chunk after chunk to `out`; else each block has one chunk.
  const int64_t at_once = slots > 1 ? slots : chunks;
  for (int64_t first = 0; first < chunks; first += at_once) {
    const int64_t last = std::min(first + at_once, chunks);
    const int64_t grid = blocks * std::min(slots, last - first);
    visit_element(inner.dtype, [&](auto inner_value) {
      visit_element(outer.dtype, [&](auto outer_value) {
        const auto kernel = sampled_grad_kernel<decltype(inner_value), decltype(outer_value)>;
        SPARSE_OPTIM_LAUNCH(kernel, grid, kThreads, stream, problem, first, last);
      });
    });
    if (!sums) continue;
    SPARSE_OPTIM_LAUNCH(add_chunks_kernel, (count + kThreads - 1) / kThreads, kThreads, stream,
                        sums, last - first, count, out);
  }
  return cudaGetLastError();
}

}  // namespace sparse_optim::cuda
