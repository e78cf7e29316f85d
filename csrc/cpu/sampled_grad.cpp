// sampled_grad: the gradient of a weight at its active entries alone.
//
//   out[e] += sum over tokens t of grad_output[t, row(e)] * input[t, column(e)]
//
// A sampled dense-dense product. Tokens are strided in memory, so blocks of them are transposed: a
// block of the narrower matrix stays in L2, of the other one 16 columns at a time stay in L1, and
// each entry is a dot product of two runs of tokens. Columns without an active entry are not read.
// Nothing of the size of the matrices is written to memory.
//
// Bytes: both matrices once. Operations: 2 per entry and token, and one load and store per element
// for the transposes, which take most of the time at densities of 1% and below. 0.37% of a float32
// weight of 3072 x 768, 1024 tokens, 2 cores with AVX-512: 1.6 ms, the dense product 24.3; at 20%
// both take the same. One core, plain / AVX2 / AVX-512: 3.3 / 3.2 / 2.6 ms; squares of 16 x 16
// shuffled as vectors of 16 took 4.7 / 9.5 / 2.4, since compilers split what is wider than the
// machine's vectors element by element.
//
// An entry's sum runs over 16 lanes (token mod 16), then over the lanes, then over the blocks: the
// same order for every number of threads, every instruction set, and however many tokens of zero
// gradient follow. float32 throughout.
#include <algorithm>
#include <cstring>

#include "cpu/support.h"

namespace sparse_optim::cpu {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kMaxTokens = 256;  // in a block
constexpr int64_t kMinTokens = 32;
constexpr int64_t kResidentBytes = 384 << 10;  // of the block that stays in L2
constexpr int64_t kBlocksPerRound = 64;        // whose partial sums are kept at once

typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourIndices __attribute__((vector_size(16)));

// Rows of four values each, as columns.
SPARSE_OPTIM_INLINE void transpose(Four* row) {
  constexpr FourIndices kFirst = {0, 4, 1, 5}, kLast = {2, 6, 3, 7};
  constexpr FourIndices kLow = {0, 1, 4, 5}, kHigh = {2, 3, 6, 7};
  const Four a = __builtin_shuffle(row[0], row[1], kFirst);
  const Four b = __builtin_shuffle(row[0], row[1], kLast);
  const Four c = __builtin_shuffle(row[2], row[3], kFirst);
  const Four d = __builtin_shuffle(row[2], row[3], kLast);
  row[0] = __builtin_shuffle(a, c, kLow);
  row[1] = __builtin_shuffle(a, c, kHigh);
  row[2] = __builtin_shuffle(b, d, kLow);
  row[3] = __builtin_shuffle(b, d, kHigh);
}

// Columns 0..15 of tokens 0..15: in[t * stride + c] -> out[c * out_stride + t].
template <class T>
SPARSE_OPTIM_INLINE void transpose_square(const T* in, int64_t stride, float* out,
                                          int64_t out_stride) {
  float values[kLanes][kLanes];
  for (int64_t t = 0; t < kLanes; ++t) {
#pragma omp simd
    for (int64_t c = 0; c < kLanes; ++c) values[t][c] = to_float(in[t * stride + c]);
  }
  for (int64_t c = 0; c < kLanes; c += 4) {
    for (int64_t t = 0; t < kLanes; t += 4) {
      Four row[4];
      for (int i = 0; i < 4; ++i) std::memcpy(&row[i], &values[t + i][c], sizeof row[i]);
      transpose(row);
      for (int i = 0; i < 4; ++i)
        std::memcpy(out + (c + i) * out_stride + t, &row[i], sizeof row[i]);
    }
  }
}

template <class T>
SPARSE_OPTIM_INLINE void transpose_columns(const T* in, int64_t stride, int64_t tokens, float* out,
                                           int64_t out_stride) {
  for (int64_t t = 0; t < tokens; t += kLanes)
    transpose_square(in + t * stride, stride, out + t, out_stride);
}

SPARSE_OPTIM_VECTORIZED void transpose_of(const float* in, int64_t stride, int64_t tokens,
                                          float* out, int64_t out_stride) {
  transpose_columns(in, stride, tokens, out, out_stride);
}
SPARSE_OPTIM_VECTORIZED void transpose_of(const BFloat16* in, int64_t stride, int64_t tokens,
                                          float* out, int64_t out_stride) {
  transpose_columns(in, stride, tokens, out, out_stride);
}
SPARSE_OPTIM_VECTORIZED void transpose_of(const Float16* in, int64_t stride, int64_t tokens,
                                          float* out, int64_t out_stride) {
  transpose_columns(in, stride, tokens, out, out_stride);
}

SPARSE_OPTIM_INLINE float sum_of(const float* lanes) {
  float half[8], quarter[4];
  for (int i = 0; i < 8; ++i) half[i] = lanes[i] + lanes[i + 8];
  for (int i = 0; i < 4; ++i) quarter[i] = half[i] + half[i + 4];
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

// An entry as this call orders them: where its runs of tokens begin, in both buffers.
struct Entry {
  int32_t streamed, resident, index;
};

SPARSE_OPTIM_VECTORIZED void dots(const Entry* entry, int64_t count, const float* streamed,
                                  const float* resident, int64_t stride, int64_t tokens,
                                  float* sums) {
  for (int64_t e = 0; e < count; ++e) {
    const float* a = streamed + entry[e].streamed % kLanes * stride;
    const float* b = resident + entry[e].resident * stride;
    float lanes[kLanes] = {};
    for (int64_t t = 0; t < tokens; t += kLanes) {
#pragma omp simd
      for (int64_t l = 0; l < kLanes; ++l) lanes[l] += a[t + l] * b[t + l];
    }
    sums[entry[e].index] = sum_of(lanes);
  }
}

// out[c * stride + t] of 16 columns and a block of tokens; 0 beyond the matrix.
void read_columns(const Matrix& matrix, int64_t first_column, int64_t first, int64_t last,
                  float* out, int64_t stride) {
  const int64_t columns = std::min(kLanes, matrix.columns - first_column);
  visit_dtype(matrix.dtype, matrix.data, [&](auto* data) {
    const auto* in = data + first * matrix.row_stride + first_column * matrix.column_stride;
    const int64_t tokens = last - first, padded = (tokens + kLanes - 1) / kLanes * kLanes;
    int64_t done = 0;
    if (columns == kLanes && matrix.column_stride == 1) {
      done = tokens / kLanes * kLanes;
      transpose_of(in, matrix.row_stride, done, out, stride);
    }
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t t = done; t < tokens; ++t)
        out[c * stride + t] = to_float(in[t * matrix.row_stride + c * matrix.column_stride]);
      std::fill(out + c * stride + tokens, out + c * stride + padded, 0.f);
    }
  });
}

// The entries by groups of 16 columns of the streamed matrix, and which groups of the other one
// they need. Wider matrices are streamed.
struct Plan {
  const Matrix *streamed, *resident;
  std::vector<Entry> entries;
  std::vector<int64_t> group_ends;  // of each group of the streamed matrix, in entries
  std::vector<int64_t> groups;      // of the resident matrix that are needed
  int64_t tokens = kMaxTokens;      // in a block

  int64_t stride() const { return tokens + kLanes; }  // so that columns share no cache set
};

bool make_plan(const Matrix& outer, const Matrix& inner, const int32_t* position, int64_t count,
               Plan& plan) {
  const bool streams_outer = outer.columns >= inner.columns;
  plan.streamed = streams_outer ? &outer : &inner;
  plan.resident = streams_outer ? &inner : &outer;
  plan.group_ends.resize(tiles_of(plan.streamed->columns, kLanes) + 1);
  std::vector<int32_t> slot(tiles_of(plan.resident->columns, kLanes), -1);
  plan.entries.resize(count);
  const auto columns_of = [&](int64_t e) {
    const int32_t first = int32_t(position[e] / inner.columns),
                  second = int32_t(position[e] % inner.columns);
    return streams_outer ? Entry{first, second, int32_t(e)} : Entry{second, first, int32_t(e)};
  };
  for (int64_t e = 0; e < count; ++e) {
    const int64_t before = e ? position[e - 1] : -1;
    if (position[e] <= before || position[e] >= outer.columns * inner.columns) return false;
    const Entry entry = columns_of(e);
    ++plan.group_ends[entry.streamed / kLanes + 1];
    slot[entry.resident / kLanes] = 0;
  }
  for (size_t g = 0; g < slot.size(); ++g) {
    if (slot[g] < 0) continue;
    slot[g] = int32_t(plan.groups.size());
    plan.groups.push_back(int64_t(g));
  }
  for (size_t g = 1; g < plan.group_ends.size(); ++g) plan.group_ends[g] += plan.group_ends[g - 1];
  for (int64_t e = 0; e < count; ++e) {  // ends as beginnings until its last entry is in place
    Entry entry = columns_of(e);
    entry.resident = slot[entry.resident / kLanes] * int32_t(kLanes) + entry.resident % kLanes;
    plan.entries[plan.group_ends[entry.streamed / kLanes]++] = entry;
  }
  const int64_t bytes = int64_t(plan.groups.size()) * kLanes * int64_t(sizeof(float));
  while (plan.tokens > kMinTokens && plan.tokens * bytes > kResidentBytes) plan.tokens /= 2;
  return true;
}

void take_block(const Plan& plan, int64_t block, float* sums) {
  const int64_t first = block * plan.tokens, stride = plan.stride();
  const int64_t last = std::min(first + plan.tokens, plan.streamed->rows);
  const int64_t tokens = (last - first + kLanes - 1) / kLanes * kLanes;
  thread_local std::vector<float> resident;
  resident.resize(std::max(resident.size(), plan.groups.size() * size_t(kLanes * stride)));
  for (size_t g = 0; g < plan.groups.size(); ++g)
    read_columns(*plan.resident, plan.groups[g] * kLanes, first, last,
                 resident.data() + int64_t(g) * kLanes * stride, stride);
  float streamed[kLanes * (kMaxTokens + kLanes)];
  for (size_t g = 0, begin = 0; g + 1 < plan.group_ends.size(); ++g) {
    const size_t end = size_t(plan.group_ends[g]);
    if (begin == end) continue;
    read_columns(*plan.streamed, int64_t(g) * kLanes, first, last, streamed, stride);
    dots(&plan.entries[begin], int64_t(end - begin), streamed, resident.data(), stride, tokens,
         sums);
    begin = end;
  }
}

}  // namespace

bool sampled_grad(const Threads& threads, const Matrix& outer, const Matrix& inner,
                  const int32_t* position, int64_t count, float* out) {
  Plan plan;
  if (!make_plan(outer, inner, position, count, plan)) return false;
  const int64_t blocks = tiles_of(outer.rows, plan.tokens);
  std::vector<float> sums(std::min(blocks, kBlocksPerRound) * count);
  for (int64_t first = 0; first < blocks; first += kBlocksPerRound) {
    const int64_t in_round = std::min(kBlocksPerRound, blocks - first);
    for_each(threads, in_round,
             [&](int64_t i) { take_block(plan, first + i, sums.data() + i * count); });
    for (int64_t i = 0; i < in_round; ++i)
      for (int64_t e = 0; e < count; ++e) out[e] += sums[i * count + e];
  }
  return true;
}

}  // namespace sparse_optim::cpu
