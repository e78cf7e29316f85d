// scan: read every gradient once.
//
//   tile_max[j] = max over the frozen entries of tile j of the bits of |grad|
//   active.grad = grad at the active entries
//   sum of squares, and whether any entry is infinite or NaN
//
// Bytes: one read of the gradient (4 N in float32, 2 N in bfloat16), 4 per tile and 12 per active
// entry. The maxima are exact integers; sums are float32 in a tile, float64 above, in an order
// that threads do not change (the width of the machine's vectors does).
#include "cpu/support.h"

namespace sparse_optim::cpu {
namespace {

// Entries that one task reads: 256 KB of float32. Active gradients are gathered right after, while
// they are still in L2 (a prototype's step with B = 3.5M took 17.8 ms gathering later, 9.7 so).
constexpr int64_t kTaskEntries = 65536;

// How far ahead of the arithmetic to fetch. The hardware's own prefetching restarts at each 4 KB
// page: with 8 KB, two cores read 38.4 instead of 34.9 GB/s in float32 and 41.6 instead of 30.0 in
// bfloat16 (a bare read: 41 and 44); 1, 2 and 4 KB were slower, 6, 12, 16 and 32 KB no faster over
// both. Measured with AVX-512 loops written by hand, before those below.
constexpr int64_t kPrefetchBytes = 8192;

struct Peak {
  int32_t bits;
  float squares;
};

// Two chains of maxima and sums, since one alone would wait for its own additions.
template <class T>
SPARSE_OPTIM_INLINE Peak peak_of(const T* grad, int64_t count) {
  const int64_t half = count / 2;
  int32_t bits = 0, more_bits = 0;
  float squares = 0.f, more_squares = 0.f;
#pragma omp simd reduction(max : bits, more_bits) reduction(+ : squares, more_squares)
  for (int64_t i = 0; i < half; ++i) {
    const float value = to_float(grad[i]), more = to_float(grad[half + i]);
    const int32_t magnitude = magnitude_bits(value), more_magnitude = magnitude_bits(more);
    bits = magnitude > bits ? magnitude : bits;
    more_bits = more_magnitude > more_bits ? more_magnitude : more_bits;
    squares += value * value;
    more_squares += more * more;
  }
  const float last = count % 2 ? to_float(grad[count - 1]) : 0.f;
  return {std::max(std::max(bits, more_bits), magnitude_bits(last)),
          squares + more_squares + last * last};
}

// bfloat16 in pairs: the upper half of a word is a float32 as it stands, the lower one after a
// shift. From a cache one core takes 46 GB/s so, widening one by one 30.
SPARSE_OPTIM_INLINE Peak peak_of(const BFloat16* grad, int64_t count) {
  typedef int32_t Pair __attribute__((aligned(2), may_alias));
  const Pair* pairs = reinterpret_cast<const Pair*>(grad);
  int32_t even_bits = 0, odd_bits = 0;
  float even_squares = 0.f, odd_squares = 0.f;
#pragma omp simd reduction(max : even_bits, odd_bits) reduction(+ : even_squares, odd_squares)
  for (int64_t i = 0; i < count / 2; ++i) {
    const int32_t even = int32_t(uint32_t(pairs[i]) << 16) & 0x7fffffff;
    const int32_t odd = pairs[i] & 0x7fff0000;
    even_bits = even > even_bits ? even : even_bits;
    odd_bits = odd > odd_bits ? odd : odd_bits;
    even_squares += from_bits(even) * from_bits(even);
    odd_squares += from_bits(odd) * from_bits(odd);
  }
  const float last = count % 2 ? to_float(grad[count - 1]) : 0.f;
  return {std::max(std::max(even_bits, odd_bits), magnitude_bits(last)),
          even_squares + odd_squares + last * last};
}

template <class T>
SPARSE_OPTIM_INLINE int32_t peak_of_kept(const T* grad, const int32_t* keep, int64_t count) {
  int32_t most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < count; ++i) {
    const int32_t bits = magnitude_bits(to_float(grad[i])) & keep[i];
    most = bits > most ? bits : most;
  }
  return most;
}

#define SPARSE_OPTIM_FOR(T)                                                                      \
  SPARSE_OPTIM_VECTORIZED Peak peak(const T* grad, int64_t count) {                              \
    return peak_of(grad, count);                                                                 \
  }                                                                                              \
  SPARSE_OPTIM_VECTORIZED int32_t kept_peak(const T* grad, const int32_t* keep, int64_t count) { \
    return peak_of_kept(grad, keep, count);                                                      \
  }
SPARSE_OPTIM_FOR(float)
SPARSE_OPTIM_FOR(BFloat16)
SPARSE_OPTIM_FOR(Float16)
#undef SPARSE_OPTIM_FOR

template <class T>
void prefetch(const T* grad, int64_t count) {
  const char* ahead = reinterpret_cast<const char*>(grad) + kPrefetchBytes;
  for (size_t line = 0; line < count * sizeof(T); line += 64) __builtin_prefetch(ahead + line);
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
// The greatest of a tile is looked for again only where an active entry may have been it.
template <class T>
Partial scan_pool(const T* grad, int64_t first, int64_t last, int64_t tile, const int32_t* next,
                  const int32_t* end, const Active& active, int32_t* tile_max) {
  Partial partial;
  int32_t keep[kMaxTile];
  std::fill_n(keep, tile, -1);
  for (int64_t begin = first; begin < last; begin += tile, ++tile_max) {
    const int64_t count = std::min(tile, last - begin);
    prefetch(grad + begin, count);
    const Peak all = peak(grad + begin, count);
    partial.add(all);
    *tile_max = all.bits;
    const int32_t* here = next;
    int32_t active_bits = 0;
    for (; next != end && *next < begin + count; ++next) {
      const float value = to_float(grad[*next]);
      active.grad[next - active.position] = value;
      active_bits = std::max(active_bits, magnitude_bits(value));
    }
    if (here == next || active_bits < all.bits) continue;
    for (const int32_t* entry = here; entry != next; ++entry) keep[*entry - begin] = 0;
    *tile_max = kept_peak(grad + begin, keep, count);
    for (const int32_t* entry = here; entry != next; ++entry) keep[*entry - begin] = -1;
  }
  return partial;
}

template <class T>
Partial scan_dense(const T* grad, int64_t first, int64_t last, int64_t tile) {
  Partial partial;
  for (int64_t begin = first; begin < last; begin += tile) {
    const int64_t count = std::min(tile, last - begin);
    prefetch(grad + begin, count);
    partial.add(peak(grad + begin, count));
  }
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
      visit_dtype(tensor.dtype, tensor.grad,
                  [&](auto* grad) { partials[i] = scan_dense(grad, task.first, task.last, tile); });
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
