// scan: read every gradient once.
//
//   tile_max[j] = max over the frozen entries of tile j of the bits of |grad|
//   active.grad = grad at the active entries
//   sum of squares, and whether any entry is infinite or NaN
//
// Bytes: one read of the gradient (4 N in float32, 2 N in bfloat16), 4 per tile and 12 per active
// entry. The maxima are exact integers; sums are float32 in a tile, float64 above, in fixed order.
#include "cpu/support.h"
#include "cpu/vector.h"

namespace sparse_optim::cpu {
namespace {

// Entries that one task reads: 256 KB of float32. Active gradients are gathered right after, while
// they are still in L2 (with B = 3.5M the step took 17.8 ms gathering them later, 9.7 ms so).
constexpr int64_t kTaskEntries = 65536;

// How far ahead of the arithmetic to fetch. The hardware's own prefetching restarts at each 4 KB
// page: with 8 KB, two cores read 38.4 instead of 34.9 GB/s in float32 and 41.6 instead of 30.0 in
// bfloat16 (a bare read: 41 and 44); 1, 2, 4, 12, 16 and 32 KB were slower.
constexpr int64_t kPrefetchBytes = 8192;

struct Peak {
  int32_t bits;
  float squares;
};

// Running maximum of |grad| and sum of squares over 64 bytes at a time. Two sums, since one alone
// would wait for its own additions.
template <class T>
struct Lanes;

template <>
struct Lanes<float> {
  static constexpr int64_t kCount = 32;
  Int16Lanes top[2] = {};
  Float16Lanes sum[2] = {};

  SPARSE_OPTIM_INLINE void add(const float* grad) {
    for (int k = 0; k < 2; ++k) {
      const auto value = load_vector<Float16Lanes>(grad + 16 * k);
      top[k] = greater_of(top[k], bit_cast<Int16Lanes>(value) & 0x7fffffff);
      sum[k] += value * value;
    }
  }
  SPARSE_OPTIM_INLINE int32_t greatest() const {
    const Int16Lanes both = greater_of(top[0], top[1]);
    int32_t most = 0;
    for (int i = 0; i < 16; ++i) most = both[i] > most ? both[i] : most;
    return most;
  }
};

// bfloat16: maxima on the 16-bit patterns themselves, squares of the even and the odd entries.
template <>
struct Lanes<BFloat16> {
  static constexpr int64_t kCount = 32;
  Short32Lanes top = {};
  Float16Lanes sum[2] = {};

  SPARSE_OPTIM_INLINE void add(const BFloat16* grad) {
    const auto pairs = load_vector<Int16Lanes>(grad);
    top = greater_of(top, bit_cast<Short32Lanes>(pairs & 0x7fff7fff));
    const auto even = bit_cast<Float16Lanes>(pairs << 16);
    const auto odd = bit_cast<Float16Lanes>(pairs & int32_t(0xffff0000));
    sum[0] += even * even;
    sum[1] += odd * odd;
  }
  SPARSE_OPTIM_INLINE int32_t greatest() const {
    int16_t most = 0;
    for (int i = 0; i < 32; ++i) most = top[i] > most ? top[i] : most;
    return int32_t(most) << 16;
  }
};

template <>
struct Lanes<Float16> {
  static constexpr int64_t kCount = 32;
  Lanes<float> wide;

  SPARSE_OPTIM_INLINE void add(const Float16* grad) {
    float values[kCount];
#pragma omp simd
    for (int64_t i = 0; i < kCount; ++i) values[i] = to_float(grad[i]);
    wide.add(values);
  }
  SPARSE_OPTIM_INLINE int32_t greatest() const { return wide.greatest(); }
};

SPARSE_OPTIM_INLINE const Float16Lanes* sums(const Lanes<float>& lanes) {
  return lanes.sum;
}
SPARSE_OPTIM_INLINE const Float16Lanes* sums(const Lanes<BFloat16>& lanes) {
  return lanes.sum;
}
SPARSE_OPTIM_INLINE const Float16Lanes* sums(const Lanes<Float16>& lanes) {
  return lanes.wide.sum;
}

template <class T>
SPARSE_OPTIM_INLINE Peak peak_of(const T* grad, int64_t count) {
  Lanes<T> lanes;
  int64_t i = 0;
  for (; i + lanes.kCount <= count; i += lanes.kCount) {
    const char* ahead = reinterpret_cast<const char*>(grad + i) + kPrefetchBytes;
    for (size_t line = 0; line < lanes.kCount * sizeof(T); line += 64)
      __builtin_prefetch(ahead + line);
    lanes.add(grad + i);
  }
  Float16Lanes sum = sums(lanes)[0] + sums(lanes)[1];
  Peak peak{lanes.greatest(), 0.f};
  for (int width = 8; width; width /= 2)
    for (int k = 0; k < width; ++k) sum[k] += sum[k + width];
  peak.squares = sum[0];
  for (; i < count; ++i) {
    const float value = to_float(grad[i]);
    peak.bits = std::max(peak.bits, magnitude_bits(value));
    peak.squares += value * value;
  }
  return peak;
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
