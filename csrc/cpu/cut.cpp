// cut: the `quota` frozen entries of greatest importance, exactly, ties to the lower global index.
//
// Few tiles can hold a winner. A tile whose bound (importance of its greatest |grad| with the most
// favourable |param|) is below the quota-th best entry holds none; that threshold is approached
// from below:
//   1. floor: at least `quota` tiles have a bound of at least `floor` (histogram of bounds). With
//      exp = 0 bounds are exact tile maxima, so at least `quota` entries reach the floor too.
//   2. Otherwise those tiles are scored; the quota-th greatest of their exact maxima is the floor.
//   3. Every tile with a bound at or above the floor is opened, no other can hold a winner.
//   4. Radix selection over the entries of opened tiles: a histogram of the upper 15 bits of their
//      keys, then of the lower 16 bits in the bin of the cut, gives the exact threshold and how
//      many of its ties belong. No buffer grows with the number of candidates.
// Delegates that stand for groups of candidates: Gaihre et al. 2021, Dr. Top-k, arXiv 2109.08219.
//
// Bytes: 4 per tile twice, and the opened tiles (about k to 3k of 2 KB each) a few times, in cache.
#include <functional>
#include <memory>

#include "core/importance.h"
#include "cpu/support.h"

namespace sparse_optim::cpu {
namespace {

constexpr int kLowBits = 16;
constexpr int64_t kHighBins = int64_t(1) << (31 - kLowBits);
constexpr int64_t kLowBins = int64_t(1) << kLowBits;
// Opened tiles are scored several times; up to so many their keys are kept instead (8 MB).
constexpr int64_t kKeptTiles = 4096;
constexpr int64_t kTilesPerTask = 32;
constexpr int64_t kBoundsPerTask = 16384;

template <class T>
SPARSE_OPTIM_INLINE void load_of(const T* in, int64_t count, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(in[i]);
}
SPARSE_OPTIM_VECTORIZED void load(const float* in, int64_t n, float* out) { load_of(in, n, out); }
SPARSE_OPTIM_VECTORIZED void load(const BFloat16* in, int64_t n, float* out) {
  load_of(in, n, out);
}
SPARSE_OPTIM_VECTORIZED void load(const Float16* in, int64_t n, float* out) { load_of(in, n, out); }

template <class Importance>
SPARSE_OPTIM_INLINE void keys_of(Importance importance, const float* grad, const float* param,
                                 int64_t count, int32_t* keys) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) keys[i] = importance_key(importance(grad[i], param[i]));
}
#define SPARSE_OPTIM_KEYS(Importance)                                                        \
  SPARSE_OPTIM_VECTORIZED void keys(Importance importance, const float* grad,                \
                                    const float* param, int64_t n, int32_t* out) {           \
    keys_of(importance, grad, param, n, out);                                                \
  }
SPARSE_OPTIM_KEYS(Exp0)
SPARSE_OPTIM_KEYS(Exp1)
SPARSE_OPTIM_KEYS(Exp2)
SPARSE_OPTIM_KEYS(ExpHalf)
SPARSE_OPTIM_KEYS(ExpMinus1)
SPARSE_OPTIM_KEYS(ExpMinusHalf)
#undef SPARSE_OPTIM_KEYS
void keys(ExpAny importance, const float* grad, const float* param, int64_t n, int32_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = importance_key(importance(grad[i], param[i]));
}

SPARSE_OPTIM_VECTORIZED int32_t greatest(const int32_t* values, int64_t count) {
  int32_t most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < count; ++i) most = values[i] > most ? values[i] : most;
  return most;
}

// How many of 16 values reach a limit: what lets loops over mostly losing entries skip them.
SPARSE_OPTIM_VECTORIZED void reaching(const int32_t* values, int64_t blocks, int32_t limit,
                                      int32_t* counts) {
  for (int64_t b = 0; b < blocks; ++b) {
    int32_t count = 0;
#pragma omp simd reduction(+ : count)
    for (int64_t i = 0; i < 16; ++i) count += values[16 * b + i] >= limit;
    counts[b] = count;
  }
}

// visit(i) for every values[i] >= limit, in order. `values` is readable up to a multiple of 16.
template <class Visit>
void visit_reaching(const int32_t* values, int64_t count, int32_t limit, Visit&& visit) {
  int32_t counts[kMaxTile / 16];
  const int64_t blocks = (count + 15) / 16;
  reaching(values, blocks, limit, counts);
  for (int64_t b = 0; b < blocks; ++b) {
    if (counts[b] == 0) continue;
    const int64_t end = std::min(count, 16 * b + 16);
    for (int64_t i = 16 * b; i < end; ++i)
      if (values[i] >= limit) visit(i);
  }
}

struct Problem {
  const Threads& threads;
  const std::vector<PoolTensor>& pool;
  const Active& active;
  int64_t num_tiles;
  int64_t quota;
  double exp;
  float eps;
  int64_t tile;
};

int64_t tensor_of(const Problem& problem, int64_t tile_index) {
  auto after = std::upper_bound(
      problem.pool.begin(), problem.pool.end(), tile_index,
      [](int64_t index, const PoolTensor& tensor) { return index < tensor.first_tile; });
  return after - problem.pool.begin() - 1;  // tensors without tiles share their successor's first
}

// Keys of the entries of a tile, 0 for active ones and up to the next multiple of 16.
int64_t open_tile(const Problem& problem, int64_t tile_index, int32_t* out) {
  const int64_t t = tensor_of(problem, tile_index);
  const PoolTensor& tensor = problem.pool[t];
  const int64_t first = (tile_index - tensor.first_tile) * problem.tile;
  const int64_t count = std::min(problem.tile, tensor.numel - first);
  float grad[kMaxTile], param[kMaxTile];
  visit_dtype(tensor.grad_dtype, tensor.grad, [&](auto* data) { load(data + first, count, grad); });
  if (problem.exp != 0.0) {
    visit_dtype(tensor.param_dtype, tensor.param,
                [&](auto* data) { load(data + first, count, param); });
  }
  visit_importance(problem.exp, problem.eps, [&](auto importance) {
    keys(importance, grad, problem.exp != 0.0 ? param : grad, count, out);
  });
  const int32_t* next = active_from(problem.active, t, first);
  const int32_t* end = active_end(problem.active, t);
  for (; next != end && *next < first + count; ++next) out[*next - first] = 0;
  std::fill(out + count, out + (count + 15) / 16 * 16, 0);
  return count;
}

// The tiles that may hold a winner, in ascending order, and their keys.
class OpenTiles {
 public:
  OpenTiles(const Problem& problem, std::vector<int64_t> tiles)
      : problem_(problem), tiles_(std::move(tiles)), stride_((problem.tile + 15) / 16 * 16) {
    if (int64_t(tiles_.size()) > kKeptTiles) return;
    keys_.reset(new int32_t[tiles_.size() * stride_]);
    counts_.resize(tiles_.size());
    for_each(problem_.threads, num_tasks(), [&](int64_t task) {
      for (int64_t i = begin(task); i < end(task); ++i)
        counts_[i] = open_tile(problem_, tiles_[i], keys_.get() + i * stride_);
    });
  }

  int64_t num_tasks() const {
    return (int64_t(tiles_.size()) + kTilesPerTask - 1) / kTilesPerTask;
  }

  // visit(tile, i, key) for every entry of the task's tiles with key >= limit, in global order.
  template <class Visit>
  void visit_entries(int64_t task, int32_t limit, Visit&& visit) const {
    int32_t opened[kMaxTile + 16];
    for (int64_t i = begin(task); i < end(task); ++i) {
      const int32_t* keys = keys_ ? keys_.get() + i * stride_ : opened;
      const int64_t count = keys_ ? counts_[i] : open_tile(problem_, tiles_[i], opened);
      visit_reaching(keys, count, limit, [&](int64_t j) { visit(tiles_[i], j, keys[j]); });
    }
  }

  // counts of bin(key) over all entries with key >= limit
  template <class Bin>
  std::vector<int64_t> histogram(int32_t limit, int64_t bins, Bin&& bin) const {
    const int64_t parts = std::min<int64_t>(std::max(problem_.threads.workers, 1), num_tasks());
    std::vector<std::vector<int32_t>> counts(parts);
    for_each(problem_.threads, parts, [&](int64_t part) {
      counts[part].resize(bins);
      for (int64_t task = part; task < num_tasks(); task += parts)
        visit_entries(task, limit,
                      [&](int64_t, int64_t, int32_t key) { ++counts[part][bin(key)]; });
    });
    std::vector<int64_t> total(bins);
    for (const auto& part : counts)
      for (int64_t b = 0; b < bins; ++b) total[b] += part[b];
    return total;
  }

 private:
  int64_t begin(int64_t task) const { return task * kTilesPerTask; }
  int64_t end(int64_t task) const {
    return std::min(int64_t(tiles_.size()), (task + 1) * kTilesPerTask);
  }

  const Problem& problem_;
  std::vector<int64_t> tiles_;
  int64_t stride_;
  std::unique_ptr<int32_t[]> keys_;
  std::vector<int64_t> counts_;
};

struct Bin {
  int64_t index;  // -1 if fewer than `wanted` in all
  int64_t above;  // entries in greater bins
};

// The bin that holds the wanted-th greatest.
Bin find_bin(const std::vector<int64_t>& counts, int64_t wanted) {
  int64_t above = 0;
  for (int64_t b = int64_t(counts.size()) - 1; b >= 0; --b) {
    if (above + counts[b] >= wanted) return {b, above};
    above += counts[b];
  }
  return {-1, above};
}

// A key that at least `quota` tiles reach; 1 (the least positive) if fewer are above 0.
int32_t floor_of_bounds(const Problem& problem, const int32_t* bounds) {
  const int64_t tasks = (problem.num_tiles + kBoundsPerTask - 1) / kBoundsPerTask;
  const int64_t parts = std::min<int64_t>(std::max(problem.threads.workers, 1), tasks);
  std::vector<std::vector<int32_t>> counts(parts);
  for_each(problem.threads, parts, [&](int64_t part) {
    counts[part].resize(kHighBins);
    const int64_t share = (problem.num_tiles + parts - 1) / parts;
    const int64_t end = std::min(problem.num_tiles, (part + 1) * share);
    for (int64_t i = part * share; i < end; ++i) ++counts[part][bounds[i] >> kLowBits];
  });
  std::vector<int64_t> total(kHighBins);
  for (const auto& part : counts)
    for (int64_t b = 0; b < kHighBins; ++b) total[b] += part[b];
  const Bin bin = find_bin(total, problem.quota);
  return bin.index <= 0 ? 1 : int32_t(bin.index << kLowBits);
}

std::vector<int64_t> tiles_reaching(const Problem& problem, const int32_t* bounds, int32_t floor) {
  const int64_t tasks = (problem.num_tiles + kBoundsPerTask - 1) / kBoundsPerTask;
  std::vector<std::vector<int64_t>> found(tasks);
  for_each(problem.threads, tasks, [&](int64_t task) {
    const int64_t end = std::min(problem.num_tiles, (task + 1) * kBoundsPerTask);
    for (int64_t i = task * kBoundsPerTask; i < end; ++i)
      if (bounds[i] >= floor) found[task].push_back(i);
  });
  std::vector<int64_t> all;
  for (const auto& part : found) all.insert(all.end(), part.begin(), part.end());
  return all;
}

// Importance of each tile's greatest |grad| with the param that favours it most.
std::vector<int32_t> bounds_of(const Problem& problem, const int32_t* tile_max,
                               const float* param_bound) {
  std::vector<int32_t> bounds(problem.num_tiles);
  const int64_t tasks = (problem.num_tiles + kBoundsPerTask - 1) / kBoundsPerTask;
  const bool exact = problem.exp == 1.0 || problem.exp == 2.0 || std::abs(problem.exp) == 0.5 ||
                     problem.exp == -1.0;
  for_each(problem.threads, tasks, [&](int64_t task) {
    const int64_t first = task * kBoundsPerTask;
    const int64_t count = std::min(problem.num_tiles - first, kBoundsPerTask);
    std::vector<float> grad(count), param(count, 0.f);
    for (int64_t i = 0; i < count; ++i) grad[i] = from_bits(tile_max[first + i]);
    if (param_bound) std::copy_n(param_bound + first, count, param.data());
    visit_importance(problem.exp, problem.eps, [&](auto importance) {
      keys(importance, grad.data(), param.data(), count, bounds.data() + first);
    });
    for (int64_t i = 0; !exact && i < count; ++i)
      if (grad[i] > 0.f) bounds[first + i] = std::min(bounds[first + i] + kPowMargin, kInfinityBits);
  });
  return bounds;
}

// Replaces the bounds of promising tiles by their exact maxima; returns the quota-th greatest.
int32_t tighten(const Problem& problem, std::vector<int32_t>& bounds) {
  const auto tiles = tiles_reaching(problem, bounds.data(), floor_of_bounds(problem, bounds.data()));
  std::vector<int32_t> maxima(tiles.size());
  for_each(problem.threads, tiles_of(int64_t(tiles.size()), kTilesPerTask), [&](int64_t task) {
    int32_t opened[kMaxTile + 16];
    const int64_t end = std::min(int64_t(tiles.size()), (task + 1) * kTilesPerTask);
    for (int64_t i = task * kTilesPerTask; i < end; ++i) {
      const int64_t count = open_tile(problem, tiles[i], opened);
      bounds[tiles[i]] = maxima[i] = greatest(opened, count);
    }
  });
  if (int64_t(maxima.size()) < problem.quota) return 1;
  auto kth = maxima.begin() + (problem.quota - 1);
  std::nth_element(maxima.begin(), kth, maxima.end(), std::greater<int32_t>());
  return std::max(*kth, 1);
}

}  // namespace

int32_t cut(const Threads& threads, const std::vector<PoolTensor>& pool, const Active& active,
            int64_t num_tiles, const int32_t* tile_max, const float* param_bound, int64_t quota,
            double exp, float eps, int64_t tile, NewEntries& found) {
  *found.count = 0;
  if (quota == 0 || num_tiles == 0) return 0;
  const Problem problem{threads, pool, active, num_tiles, quota, exp, eps, tile};
  std::vector<int32_t> bounds;
  int32_t floor;
  if (exp == 0.0) {
    floor = floor_of_bounds(problem, tile_max);
  } else {
    bounds = bounds_of(problem, tile_max, param_bound);
    floor = tighten(problem, bounds);
    tile_max = bounds.data();
  }
  const OpenTiles tiles(problem, tiles_reaching(problem, tile_max, floor));
  if (tiles.num_tasks() == 0) return 0;

  // Radix selection: the exact threshold key, and how many entries that tie with it belong.
  int32_t threshold = 1;
  int64_t ties = quota;
  const Bin high = find_bin(
      tiles.histogram(floor, kHighBins, [](int32_t key) { return key >> kLowBits; }), quota);
  if (high.index >= 0) {
    const int32_t first = int32_t(high.index << kLowBits), last = first + int32_t(kLowBins - 1);
    auto in_bin = tiles.histogram(std::max(first, floor), kLowBins + 1, [&](int32_t key) {
      return key <= last ? int64_t(key - first) : kLowBins;
    });
    in_bin[kLowBins] = 0;
    const Bin low = find_bin(in_bin, quota - high.above);
    threshold = first + int32_t(low.index);
    ties = quota - high.above - low.above;
  }

  // Where each task writes: winners above the threshold, and ties until they are used up.
  const int64_t num_tasks = tiles.num_tasks();
  std::vector<int64_t> winners(num_tasks), tied(num_tasks), start(num_tasks), ties_left(num_tasks);
  for_each(threads, num_tasks, [&](int64_t task) {
    tiles.visit_entries(task, threshold, [&](int64_t, int64_t, int32_t key) {
      ++(key > threshold ? winners : tied)[task];
    });
  });
  int64_t total = 0;
  for (int64_t task = 0; task < num_tasks; ++task) {
    start[task] = total;
    ties_left[task] = std::min(tied[task], ties);
    ties -= ties_left[task];
    total += winners[task] + ties_left[task];
  }
  std::vector<int32_t> least(num_tasks, kInfinityBits);
  for_each(threads, num_tasks, [&](int64_t task) {
    int64_t out = start[task], left = ties_left[task];
    tiles.visit_entries(task, threshold, [&](int64_t tile_index, int64_t i, int32_t key) {
      if (key == threshold && left-- <= 0) return;
      const int64_t t = tensor_of(problem, tile_index);
      found.tensor[out] = int32_t(t);
      found.position[out++] = int32_t((tile_index - pool[t].first_tile) * tile + i);
      least[task] = std::min(least[task], key);
    });
  });
  *found.count = total;
  return total ? *std::min_element(least.begin(), least.end()) : 0;
}

}  // namespace sparse_optim::cpu
