// What the operations are handed: the pool's tensors, the active set, the new entries. Plain
// pointers, of the host or of a device; no torch headers.
#pragma once
#include "core/types.h"

namespace sparse_optim {

// Columns of the (S, 4) table that `bind` writes and the other operations read.
enum Column { kGrad, kParam, kNumel, kDTypes, kColumns };

// A row of the table. grad is null where the gradient is missing in this step.
struct Row {
  const void* grad;
  void* param;
  int64_t numel;
  DType grad_dtype;
  DType param_dtype;
};

SPARSE_OPTIM_INLINE Row read_row(const int64_t* table, int64_t tensor) {
  const int64_t* row = table + tensor * kColumns;
  return {reinterpret_cast<const void*>(row[kGrad]), reinterpret_cast<void*>(row[kParam]),
          row[kNumel], DType(row[kDTypes] >> 8), DType(row[kDTypes] & 0xff)};
}

inline void write_row(int64_t* row, const Row& from) {
  row[kGrad] = reinterpret_cast<int64_t>(from.grad);
  row[kParam] = reinterpret_cast<int64_t>(from.param);
  row[kNumel] = from.numel;
  row[kDTypes] = int64_t(from.grad_dtype) << 8 | int64_t(from.param_dtype);
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

// One row of `hyper`: what AdamW needs to know of a param group.
struct Hyper {
  double lr, beta1, beta2, eps, weight_decay, sign;
};

constexpr int64_t kMaxTile = 4096;

}  // namespace sparse_optim
