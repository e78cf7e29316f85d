// What the CPU kernels share: clones for vector instruction sets, and a dynamic parallel loop.
#pragma once
#include <algorithm>
#include <atomic>

#include "cpu/kernels.h"

// One function, compiled for AVX-512, AVX2 and the baseline, picked when the library is loaded.
#if defined(SPARSE_OPTIM_CLONES)
#define SPARSE_OPTIM_VECTORIZED \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SPARSE_OPTIM_VECTORIZED
#endif

namespace sparse_optim::cpu {

// body(i) for i in 0..count-1, handed out one at a time: cores of a shared host are never equally
// fast. Bodies must write to places of their own, so that the result does not depend on threads.
template <class Body>
void for_each(const Threads& threads, int64_t count, Body&& body) {
  struct Context {
    std::atomic<int64_t> next;
    int64_t count;
    Body& body;
  } context{{0}, count, body};
  auto worker = [](int, void* opaque) {
    auto& shared = *static_cast<Context*>(opaque);
    for (int64_t i; (i = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.count;)
      shared.body(i);
  };
  const int workers = count < threads.workers ? int(count) : threads.workers;
  if (workers <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
  } else {
    threads.spawn(workers, worker, &context);
  }
}

// visit(pointer of the element type)
template <class Visit>
void visit_dtype(DType dtype, const void* data, Visit&& visit) {
  switch (dtype) {
    case DType::kFloat32: return visit(static_cast<const float*>(data));
    case DType::kBFloat16: return visit(static_cast<const BFloat16*>(data));
    case DType::kFloat16: return visit(static_cast<const Float16*>(data));
  }
}

inline int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

// The active entries of tensor t from a flat position on; they end at `active_end`.
inline const int32_t* active_from(const Active& active, int64_t t, int64_t position) {
  const int32_t* all = active.position;
  return std::lower_bound(all + active.offsets[t], all + active.offsets[t + 1], int32_t(position));
}
inline const int32_t* active_end(const Active& active, int64_t t) {
  return active.position + active.offsets[t + 1];
}

inline int64_t tiles_of(int64_t numel, int64_t tile) {
  return (numel + tile - 1) / tile;
}

}  // namespace sparse_optim::cpu
