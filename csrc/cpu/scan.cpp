// scan: read every gradient once.
//
//   tile_max[j] = max over the frozen entries of tile j of the bits of |grad|
//   active.grad = grad at the active entries
//   norms[i] = sqrt(sum of grad^2) of gradient i, the dense ones after the pool's
//   whether all entries are finite
//
// Bytes: one read of the gradient (4 N in float32, 2 N in bfloat16), 4 per tile and 12 per active
// entry. The maxima are exact integers; sums are float32 in a tile, float64 above, in an order
// that neither threads nor other tensors change (the width of the machine's vectors does).
#include <cmath>
#include <type_traits>

#include "cpu/peaks.h"
#include "cpu/support.h"

namespace sparse_optim::cpu {
namespace {

// What one task reads. Active gradients are gathered right after, while they are still in L2 (a
// prototype's step with B = 3.5M took 17.8 ms gathering later, 9.7 so). Each task begins with a
// search among the active entries and without what the last one prefetched. Scan over a bare read,
// two cores of an AMD EPYC with 1 MB of L2 each, AVX-512, 110M entries, float32 | bfloat16:
//              1 of 684 active        1 of 62 active
//   128 KB   1.10-1.12 | 1.13-1.15   1.17-1.19 | 1.27-1.30
//   256 KB   1.00-1.04 | 1.05-1.09   1.16      | 1.23-1.25
//   512 KB   1.02      | 1.03        1.09-1.11 | 1.30-1.33
//   1 MB     1.01-1.02 | 1.05-1.06   1.12-1.15 | 1.41-1.49
constexpr int64_t kTaskBytes = 512 * 1024;

// Entries first..first + count - 1 of a tensor, and the maxima of their tiles.
template <class T>
struct Stretch {
  const T* grad;
  int64_t first, count, tile;
  int32_t* tile_max;
};

// The largest of a tile without its active entries, which are among those from `next` to `end`.
template <class T>
int32_t frozen_peak(const Stretch<T>& stretch, int64_t index, const int32_t* next,
                    const int32_t* end) {
  const int64_t begin = stretch.first + index * stretch.tile;
  const int64_t count = std::min(stretch.tile, stretch.first + stretch.count - begin);
  int32_t keep[kMaxTile];
  std::fill_n(keep, count, -1);
  for (next = std::lower_bound(next, end, int32_t(begin)); next != end && *next < begin + count;
       ++next)
    keep[*next - begin] = 0;
  return kept_peak(stretch.grad + begin, keep, count);
}

// Copies the gradients of the active entries from `next` on. The largest of a tile is looked for
// again only where an active entry may have been it.
//
// After the whole stretch, not after each tile: how many entries a tile holds cannot be predicted.
template <class T>
void gather(const Stretch<T>& stretch, const Active& active, const int32_t* next,
            const int32_t* end) {
  // Multiplied and shifted, as good as a division below 2^32 / kMaxTile.
  const uint64_t reciprocal = (uint64_t(1) << 32) / uint64_t(stretch.tile) + 1;
  std::vector<int64_t> hidden;
  const int32_t* entry = next;
  for (; entry != end && *entry < stretch.first + stretch.count; ++entry) {
    const float value = to_float(stretch.grad[*entry]);
    const int64_t index = int64_t(uint64_t(*entry - stretch.first) * reciprocal >> 32);
    active.grad[entry - active.position] = value;
    if (magnitude_bits(value) < stretch.tile_max[index] || value == 0.f) continue;
    if (hidden.empty() || hidden.back() != index) hidden.push_back(index);
  }
  for (int64_t index : hidden) stretch.tile_max[index] = frozen_peak(stretch, index, next, entry);
}

struct Task {
  int64_t tensor;  // of the pool, or pool size + index of a dense gradient
  int64_t first, last;
};

void add_tasks(std::vector<Task>& tasks, int64_t tensor, DType dtype, int64_t numel, int64_t tile) {
  const int64_t size = kTaskBytes / bytes_of(dtype) / tile * tile;
  static_assert(kTaskBytes / int64_t(sizeof(float)) >= kMaxTile);
  for (int64_t first = 0; first < numel; first += size)
    tasks.push_back({tensor, first, std::min(first + size, numel)});
}

}  // namespace

bool scan(const Threads& threads, const std::vector<PoolTensor>& pool,
          const std::vector<DenseGrad>& dense, const Active& active, int64_t tile,
          int32_t* tile_max, double* norms) {
  const int64_t num_pool = int64_t(pool.size());
  std::vector<Task> tasks;
  for (int64_t t = 0; t < num_pool; ++t) {
    if (pool[t].grad) {
      add_tasks(tasks, t, pool[t].grad_dtype, pool[t].numel, tile);
    } else {
      std::fill_n(tile_max + pool[t].first_tile, tiles_of(pool[t].numel, tile), 0);
    }
  }
  for (size_t t = 0; t < dense.size(); ++t)
    add_tasks(tasks, num_pool + t, dense[t].dtype, dense[t].numel, tile);

  std::vector<Peaks> partials(tasks.size());
  for_each(threads, int64_t(tasks.size()), [&](int64_t i) {
    const Task task = tasks[i];
    const int64_t count = task.last - task.first;
    if (task.tensor >= num_pool) {
      const DenseGrad& tensor = dense[task.tensor - num_pool];
      std::vector<int32_t> unused(tiles_of(count, tile));
      visit_dtype(tensor.dtype, tensor.grad, [&](auto* grad) {
        partials[i] = peaks(grad + task.first, count, tile, unused.data());
      });
      return;
    }
    const PoolTensor& tensor = pool[task.tensor];
    int32_t* maxima = tile_max + tensor.first_tile + task.first / tile;
    visit_dtype(tensor.grad_dtype, tensor.grad, [&](auto* grad) {
      partials[i] = peaks(grad + task.first, count, tile, maxima);
      gather<std::remove_const_t<std::remove_pointer_t<decltype(grad)>>>(
          {grad, task.first, count, tile, maxima}, active,
          active_from(active, task.tensor, task.first), active_end(active, task.tensor));
    });
  });

  const int64_t num_grads = num_pool + int64_t(dense.size());
  std::fill_n(norms, num_grads, 0.0);
  int32_t largest = 0;
  for (size_t i = 0; i < tasks.size(); ++i) {
    norms[tasks[i].tensor] += partials[i].squares;
    largest = std::max(largest, partials[i].bits);
  }
  for (int64_t i = 0; i < num_grads; ++i) norms[i] = std::sqrt(norms[i]);
  return largest < kInfinityBits;
}

}  // namespace sparse_optim::cpu
