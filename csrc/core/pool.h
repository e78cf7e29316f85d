// What the operations are handed: the pool's tensors, the active set, the new entries. Plain
// pointers, of the host or of a device; no torch headers.
#pragma once
#include "core/types.h"

namespace sparse_optim {

// Columns of the (S, 4) table that `bind` writes and the other operations read. kDTypes holds, from
// the lowest bits, the dtype of the parameter, that of the gradient, and 32 bits that seal the row:
// addresses cannot be checked, but whether `bind` wrote them can.
enum Column { kGrad, kParam, kNumel, kDTypes, kColumns };

// A row of the table. grad is null where the gradient is missing in this step.
struct Row {
  const void* grad;
  void* param;
  int64_t numel;
  DType grad_dtype;
  DType param_dtype;
};

// splitmix64's finalizer over the columns.
inline int64_t seal_of(const int64_t* row, int64_t dtypes) {
  uint64_t hash = uint64_t(dtypes);
  for (int column = kGrad; column < kDTypes; ++column) {
    hash = (hash ^ uint64_t(row[column])) + 0x9e3779b97f4a7c15u;
    hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9u;
    hash = (hash ^ (hash >> 27)) * 0x94d049bb133111ebu;
    hash ^= hash >> 31;
  }
  return int64_t(hash >> 32);
}

inline bool is_sealed(const int64_t* row) {
  const int64_t dtypes = row[kDTypes] & 0xffff;
  return row[kDTypes] == (seal_of(row, dtypes) << 16 | dtypes);
}

SPARSE_OPTIM_INLINE Row read_row(const int64_t* table, int64_t tensor) {
  const int64_t* row = table + tensor * kColumns;
  return {reinterpret_cast<const void*>(row[kGrad]), reinterpret_cast<void*>(row[kParam]),
          row[kNumel], DType(row[kDTypes] >> 8 & 0xff), DType(row[kDTypes] & 0xff)};
}

inline void write_row(int64_t* row, const Row& from) {
  row[kGrad] = reinterpret_cast<int64_t>(from.grad);
  row[kParam] = reinterpret_cast<int64_t>(from.param);
  row[kNumel] = from.numel;
  const int64_t dtypes = int64_t(from.grad_dtype) << 8 | int64_t(from.param_dtype);
  row[kDTypes] = seal_of(row, dtypes) << 16 | dtypes;
}

// The active set; offsets[i]:offsets[i + 1] are the entries of pool tensor i.
struct Active {
  int32_t* position;
  float* exp_avg;
  float* exp_avg_sq;
  int32_t* unmask_step;
  float* master;  // null where every parameter is float32
  float* grad;
  int64_t* offsets;
  int64_t* progress;  // applied steps, active entries, skipped steps
};

struct NewEntries {
  int32_t* tensor;
  int32_t* position;
  int64_t* count;
  int64_t capacity;
};

struct DenseGrad {
  const void* grad;
  int64_t numel;
  DType dtype;
};

// Values of tokens (rows) and features (columns); strides in elements.
struct Matrix {
  const void* data;
  int64_t rows, columns, row_stride, column_stride;
  DType dtype;
};

// One row of `hyper`: what AdamW needs to know of a param group.
struct Hyper {
  double lr, beta1, beta2, eps, weight_decay, sign;
};

constexpr int64_t kMaxTile = 4096;

}  // namespace sparse_optim
