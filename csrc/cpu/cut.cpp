// cut: the `quota` frozen entries of greatest importance, exactly, ties to the lower global index.
//
// Few tiles can hold a winner. A tile whose bound (importance of its greatest |grad| with the most
// favourable |param|) is below the quota-th best entry holds none; that threshold is approached
// from below:
//   1. floor: the quota-th greatest bound. With exp = 0 bounds are exact tile maxima, so at least
//      `quota` entries reach the floor too.
//   2. Otherwise the tiles that reach it are scored; the quota-th greatest of their exact maxima is
//      the floor.
//   3. Every tile with a bound at or above the floor is opened, no other can hold a winner, and the
//      entries that reach the floor are ranked. Where they are too many for a small buffer (a large
//      quota, or ties by the million), radix selection finds the threshold without one: a histogram
//      of the upper 15 bits of the keys, then of the lower 16 bits in the bin of the cut.
// Delegates that stand for groups of candidates: Gaihre et al. 2021, Dr. Top-k, arXiv 2109.08219.
//
// Bytes: 4 per tile two or three times, and about quota to 3 quota tiles of 2 KB (with their
// parameters unless exp = 0) once or twice.
#include <functional>

#include "core/importance.h"
#include "cpu/support.h"

namespace sparse_optim::cpu {
namespace {

constexpr int kLowBits = 16;
constexpr int64_t kHighBins = int64_t(1) << (31 - kLowBits);
constexpr int64_t kLowBins = int64_t(1) << kLowBits;
constexpr int64_t kTilesPerTask = 32;
constexpr int64_t kBoundsPerTask = 16384;
// Candidates that are ranked in a buffer; more than max(this, 8 quota) go to radix selection.
constexpr int64_t kCandidates = 1 << 18;

template <class T>
SPARSE_OPTIM_INLINE void load_of(const T* in, int64_t count, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(in[i]);
}
SPARSE_OPTIM_VECTORIZED void load(const float* in, int64_t n, float* out) {
  load_of(in, n, out);
}
SPARSE_OPTIM_VECTORIZED void load(const BFloat16* in, int64_t n, float* out) {
  load_of(in, n, out);
}
SPARSE_OPTIM_VECTORIZED void load(const Float16* in, int64_t n, float* out) {
  load_of(in, n, out);
}

template <class Importance>
SPARSE_OPTIM_INLINE void keys_of(Importance importance, const float* grad, const float* param,
                                 int64_t count, int32_t* keys) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) keys[i] = importance_key(importance(grad[i], param[i]));
}
#define SPARSE_OPTIM_KEYS(Importance)                                                             \
  SPARSE_OPTIM_VECTORIZED void keys(Importance importance, const float* grad, const float* param, \
                                    int64_t n, int32_t* out) {                                    \
    keys_of(importance, grad, param, n, out);                                                     \
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

// The greatest of each run of 16 values.
SPARSE_OPTIM_VECTORIZED void block_maxima(const int32_t* values, int64_t count, int32_t* maxima) {
  const int64_t whole = count / 16;
  for (int64_t b = 0; b < whole; ++b) {
    int32_t most = 0;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < 16; ++i) most = values[16 * b + i] > most ? values[16 * b + i] : most;
    maxima[b] = most;
  }
  if (whole * 16 < count) maxima[whole] = greatest(values + 16 * whole, count - 16 * whole);
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

struct Opened {
  int64_t tensor, first, count;
};

// Keys of the entries of a tile, 0 for active ones and up to the next multiple of 16.
Opened open_tile(const Problem& problem, int64_t tile_index, int32_t* out) {
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
  return {t, first, count};
}

// The tiles that may hold a winner, in ascending order, opened anew at each visit.
class OpenTiles {
 public:
  OpenTiles(const Problem& problem, std::vector<int64_t> tiles)
      : problem_(problem), tiles_(std::move(tiles)) {}

  int64_t num_tasks() const { return tiles_of(int64_t(tiles_.size()), kTilesPerTask); }

  // visit(tensor, position, key) for every entry of the task's tiles with key >= limit, in order.
  template <class Visit>
  void visit_entries(int64_t task, int32_t limit, Visit&& visit) const {
    int32_t keys[kMaxTile + 16];
    const int64_t end = std::min(int64_t(tiles_.size()), (task + 1) * kTilesPerTask);
    for (int64_t i = task * kTilesPerTask; i < end; ++i) {
      const Opened tile = open_tile(problem_, tiles_[i], keys);
      visit_reaching(keys, tile.count, limit, [&](int64_t j) {
        visit(int32_t(tile.tensor), int32_t(tile.first + j), keys[j]);
      });
    }
  }

  // counts of bin(key) over all entries with key >= limit
  template <class Bin>
  std::vector<int64_t> histogram(int32_t limit, int64_t bins, Bin&& bin) const {
    const int64_t parts = std::min<int64_t>(std::max(problem_.threads.workers, 1), num_tasks());
    std::vector<std::vector<int64_t>> counts(parts);
    for_each(problem_.threads, parts, [&](int64_t part) {
      counts[part].resize(bins);
      for (int64_t task = part; task < num_tasks(); task += parts)
        visit_entries(task, limit,
                      [&](int32_t, int32_t, int32_t key) { ++counts[part][bin(key)]; });
    });
    std::vector<int64_t> total(bins);
    for (const auto& part : counts)
      for (int64_t b = 0; b < bins; ++b) total[b] += part[b];
    return total;
  }

 private:
  const Problem& problem_;
  std::vector<int64_t> tiles_;
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

// The k-th greatest of `count` values; 1, the least positive key, if fewer than k are above 0.
// One maximum per 16 values narrows the search: the k-th greatest of these is not above the result.
int32_t kth_greatest(const int32_t* values, int64_t count, int64_t k) {
  const int64_t num_blocks = (count + 15) / 16;
  std::vector<int32_t> blocks(num_blocks);
  block_maxima(values, count, blocks.data());
  const auto descending = std::greater<int32_t>();
  int32_t least = 1;
  if (k <= num_blocks) {
    auto maxima = blocks;
    std::nth_element(maxima.begin(), maxima.begin() + (k - 1), maxima.end(), descending);
    least = std::max(maxima[k - 1], 1);
  }
  std::vector<int32_t> reaching;
  for (int64_t b = 0; b < num_blocks; ++b) {
    if (blocks[b] < least) continue;
    for (int64_t i = 16 * b; i < std::min(count, 16 * b + 16); ++i)
      if (values[i] >= least) reaching.push_back(values[i]);
  }
  if (int64_t(reaching.size()) < k) return 1;
  std::nth_element(reaching.begin(), reaching.begin() + (k - 1), reaching.end(), descending);
  return reaching[k - 1];
}

std::vector<int64_t> tiles_reaching(const Problem& problem, const int32_t* bounds, int32_t floor) {
  const int64_t tasks = tiles_of(problem.num_tiles, kBoundsPerTask);
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
  const int64_t tasks = tiles_of(problem.num_tiles, kBoundsPerTask);
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
      if (grad[i] > 0.f)
        bounds[first + i] = std::min(bounds[first + i] + kPowMargin, kInfinityBits);
  });
  return bounds;
}

// Replaces the bounds of promising tiles by their exact maxima; returns the quota-th greatest.
int32_t tighten(const Problem& problem, std::vector<int32_t>& bounds) {
  const int32_t promising = kth_greatest(bounds.data(), problem.num_tiles, problem.quota);
  const auto tiles = tiles_reaching(problem, bounds.data(), promising);
  std::vector<int32_t> maxima(tiles.size());
  for_each(problem.threads, tiles_of(int64_t(tiles.size()), kTilesPerTask), [&](int64_t task) {
    int32_t opened[kMaxTile + 16];
    const int64_t end = std::min(int64_t(tiles.size()), (task + 1) * kTilesPerTask);
    for (int64_t i = task * kTilesPerTask; i < end; ++i) {
      const int64_t count = open_tile(problem, tiles[i], opened).count;
      bounds[tiles[i]] = maxima[i] = greatest(opened, count);
    }
  });
  return kth_greatest(maxima.data(), int64_t(maxima.size()), problem.quota);
}

struct Candidate {
  int32_t tensor, position, key;
};

// The entries that reach the floor, in global order; false if there are too many to keep.
bool collect(const Problem& problem, const OpenTiles& tiles, int32_t floor,
             std::vector<Candidate>& candidates) {
  const int64_t most = std::max(kCandidates, 8 * problem.quota);
  std::atomic<int64_t> total{0};
  std::vector<std::vector<Candidate>> found(tiles.num_tasks());
  for_each(problem.threads, tiles.num_tasks(), [&](int64_t task) {
    if (total.load(std::memory_order_relaxed) > most) return;
    tiles.visit_entries(task, floor, [&](int32_t tensor, int32_t position, int32_t key) {
      found[task].push_back({tensor, position, key});
    });
    total.fetch_add(int64_t(found[task].size()), std::memory_order_relaxed);
  });
  if (total > most) return false;
  for (const auto& part : found) candidates.insert(candidates.end(), part.begin(), part.end());
  return true;
}

// What of the entries that reach a threshold belongs: all above it, and the first `ties` that tie.
struct Threshold {
  int32_t key;
  int64_t ties;
};

Threshold rank(const std::vector<Candidate>& candidates, int64_t quota) {
  if (int64_t(candidates.size()) <= quota) return {1, quota};
  std::vector<int32_t> keys(candidates.size());
  std::transform(candidates.begin(), candidates.end(), keys.begin(),
                 [](const Candidate& candidate) { return candidate.key; });
  const auto kth = keys.begin() + (quota - 1);
  std::nth_element(keys.begin(), kth, keys.end(), std::greater<int32_t>());
  // nth_element leaves what is not below the k-th before it: the rest of those places are ties.
  const int64_t above = std::count_if(keys.begin(), kth, [&](int32_t key) { return key > *kth; });
  return {*kth, quota - above};
}

Threshold radix_select(const OpenTiles& tiles, int32_t floor, int64_t quota) {
  const Bin high = find_bin(
      tiles.histogram(floor, kHighBins, [](int32_t key) { return key >> kLowBits; }), quota);
  if (high.index < 0) return {1, quota};
  const int32_t first = int32_t(high.index << kLowBits), last = first + int32_t(kLowBins - 1);
  auto in_bin = tiles.histogram(std::max(first, floor), kLowBins + 1, [&](int32_t key) {
    return key <= last ? int64_t(key - first) : kLowBins;
  });
  in_bin[kLowBins] = 0;  // counted in high.above already
  const Bin low = find_bin(in_bin, quota - high.above);
  return {first + int32_t(low.index), quota - high.above - low.above};
}

// Writes the winners among candidates that are at hand.
int32_t write(const std::vector<Candidate>& candidates, Threshold threshold, NewEntries& found) {
  int64_t out = 0;
  int32_t least = kInfinityBits;
  for (const Candidate& candidate : candidates) {
    if (candidate.key < threshold.key) continue;
    if (candidate.key == threshold.key && threshold.ties-- <= 0) continue;
    found.tensor[out] = candidate.tensor;
    found.position[out++] = candidate.position;
    least = std::min(least, candidate.key);
  }
  *found.count = out;
  return out ? least : 0;
}

// The same, opening the tiles again: each task counts first, to know where it writes.
int32_t write(const Problem& problem, const OpenTiles& tiles, Threshold threshold,
              NewEntries& found) {
  const int64_t tasks = tiles.num_tasks();
  std::vector<int64_t> above(tasks), tied(tasks), start(tasks);
  for_each(problem.threads, tasks, [&](int64_t task) {
    tiles.visit_entries(task, threshold.key, [&](int32_t, int32_t, int32_t key) {
      ++(key > threshold.key ? above : tied)[task];
    });
  });
  int64_t total = 0;
  for (int64_t task = 0; task < tasks; ++task) {
    start[task] = total;
    tied[task] = std::min(tied[task], threshold.ties);
    threshold.ties -= tied[task];
    total += above[task] + tied[task];
  }
  std::vector<int32_t> least(tasks, kInfinityBits);
  for_each(problem.threads, tasks, [&](int64_t task) {
    int64_t out = start[task], ties_left = tied[task];
    tiles.visit_entries(task, threshold.key, [&](int32_t tensor, int32_t position, int32_t key) {
      if (key == threshold.key && ties_left-- <= 0) return;
      found.tensor[out] = tensor;
      found.position[out++] = position;
      least[task] = std::min(least[task], key);
    });
  });
  *found.count = total;
  return total ? *std::min_element(least.begin(), least.end()) : 0;
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
    floor = kth_greatest(tile_max, num_tiles, quota);
  } else {
    bounds = bounds_of(problem, tile_max, param_bound);
    floor = tighten(problem, bounds);
    tile_max = bounds.data();
  }
  const OpenTiles tiles(problem, tiles_reaching(problem, tile_max, floor));
  std::vector<Candidate> candidates;
  if (collect(problem, tiles, floor, candidates))
    return write(candidates, rank(candidates, quota), found);
  return write(problem, tiles, radix_select(tiles, floor, quota), found);
}

}  // namespace sparse_optim::cpu
