// scan: read every gradient once.
//
//   tile_max[j] = max over the frozen entries of tile j of the bits of |grad|
//   active.grad = grad at the active entries
//   sum of squares, and whether any entry is infinite or NaN
//
// Bytes: one read of the gradient (4 N in float32, 2 N in bfloat16), 4 per tile and 12 per active
// entry. The maxima are exact integers; sums are float32 in a tile, float64 above, in fixed order.
#include "cpu/support.h"

namespace sparse_optim::cpu {
namespace {

// Entries that one task reads: 256 KB of float32. Active gradients are gathered right after, while
// they are still in L2 (with B = 3.5M the step took 17.8 ms gathering them later, 9.7 ms so).
constexpr int64_t kTaskEntries = 65536;

struct Peak {
  int32_t bits;
  float squares;
};

template <class T>
SPARSE_OPTIM_INLINE Peak peak_of(const T* grad, int64_t count) {
  int32_t bits = 0;
  float squares = 0.f;
#pragma omp simd reduction(max : bits) reduction(+ : squares)
  for (int64_t i = 0; i < count; ++i) {
    const float value = to_float(grad[i]);
    const int32_t magnitude = magnitude_bits(value);
    bits = magnitude > bits ? magnitude : bits;
    squares += value * value;
  }
  return {bits, squares};
}

template <class T>
SPARSE_OPTIM_INLINE void magnitudes_of(const T* grad, int64_t count, int32_t* bits) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) bits[i] = magnitude_bits(to_float(grad[i]));
}

SPARSE_OPTIM_VECTORIZED Peak peak(const float* grad, int64_t n) { return peak_of(grad, n); }
SPARSE_OPTIM_VECTORIZED Peak peak(const BFloat16* grad, int64_t n) { return peak_of(grad, n); }
SPARSE_OPTIM_VECTORIZED Peak peak(const Float16* grad, int64_t n) { return peak_of(grad, n); }
SPARSE_OPTIM_VECTORIZED void magnitudes(const float* grad, int64_t n, int32_t* bits) {
  magnitudes_of(grad, n, bits);
}
SPARSE_OPTIM_VECTORIZED void magnitudes(const BFloat16* grad, int64_t n, int32_t* bits) {
  magnitudes_of(grad, n, bits);
}
SPARSE_OPTIM_VECTORIZED void magnitudes(const Float16* grad, int64_t n, int32_t* bits) {
  magnitudes_of(grad, n, bits);
}
SPARSE_OPTIM_VECTORIZED int32_t greatest(const int32_t* bits, int64_t count) {
  int32_t most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < count; ++i) most = bits[i] > most ? bits[i] : most;
  return most;
}

struct Task {
  int64_t tensor;  // of the pool, or pool size + index of a dense gradient
  int64_t first, last;
};

struct Partial {
  double squares = 0.0;
  int32_t bits = 0;

  void add(Peak peak) {
    squares += double(peak.squares);
    bits = std::max(bits, peak.bits);
  }
};

// Tiles from `first` to `last`, which is a multiple of `tile` or the end of the tensor.
template <class T>
Partial scan_pool(const T* grad, int64_t first, int64_t last, int64_t tile, const int32_t* next,
                  const int32_t* end, const Active& active, int32_t* tile_max) {
  Partial partial;
  int32_t frozen[kMaxTile];
  for (int64_t begin = first; begin < last; begin += tile, ++tile_max) {
    const int64_t count = std::min(tile, last - begin);
    const Peak all = peak(grad + begin, count);
    partial.add(all);
    *tile_max = all.bits;
    if (next == end || *next >= begin + count) continue;
    magnitudes(grad + begin, count, frozen);
    for (; next != end && *next < begin + count; ++next) {
      frozen[*next - begin] = 0;
      active.grad[next - active.position] = to_float(grad[*next]);
    }
    *tile_max = greatest(frozen, count);
  }
  return partial;
}

template <class T>
Partial scan_dense(const T* grad, int64_t first, int64_t last, int64_t tile) {
  Partial partial;
  for (int64_t begin = first; begin < last; begin += tile)
    partial.add(peak(grad + begin, std::min(tile, last - begin)));
  return partial;
}

void add_tasks(std::vector<Task>& tasks, int64_t tensor, int64_t numel, int64_t tile) {
  const int64_t size = std::max(kTaskEntries / tile, int64_t(1)) * tile;
  for (int64_t first = 0; first < numel; first += size)
    tasks.push_back({tensor, first, std::min(first + size, numel)});
}

}  // namespace

ScanResult scan(const Threads& threads, const std::vector<PoolTensor>& pool,
                const std::vector<DenseGrad>& dense, const Active& active, int64_t tile,
                int32_t* tile_max) {
  const int64_t num_pool = int64_t(pool.size());
  std::vector<Task> tasks;
  for (int64_t t = 0; t < num_pool; ++t) {
    if (pool[t].grad) {
      add_tasks(tasks, t, pool[t].numel, tile);
    } else {
      std::fill_n(tile_max + pool[t].first_tile, tiles_of(pool[t].numel, tile), 0);
    }
  }
  for (size_t t = 0; t < dense.size(); ++t) add_tasks(tasks, num_pool + t, dense[t].numel, tile);

  std::vector<Partial> partials(tasks.size());
  for_each(threads, int64_t(tasks.size()), [&](int64_t i) {
    const Task task = tasks[i];
    if (task.tensor >= num_pool) {
      const DenseGrad& tensor = dense[task.tensor - num_pool];
      visit_dtype(tensor.dtype, tensor.grad, [&](auto* grad) {
        partials[i] = scan_dense(grad, task.first, task.last, tile);
      });
      return;
    }
    const PoolTensor& tensor = pool[task.tensor];
    const int32_t* next = active_from(active, task.tensor, task.first);
    const int32_t* end = active_end(active, task.tensor);
    int32_t* maxima = tile_max + tensor.first_tile + task.first / tile;
    visit_dtype(tensor.grad_dtype, tensor.grad, [&](auto* grad) {
      partials[i] = scan_pool(grad, task.first, task.last, tile, next, end, active, maxima);
    });
  });

  Partial total;
  for (const Partial& partial : partials) {
    total.squares += partial.squares;
    total.bits = std::max(total.bits, partial.bits);
  }
  return {total.squares, total.bits >= kInfinityBits};
}

}  // namespace sparse_optim::cpu
