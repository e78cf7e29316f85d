// cut: the `quota` frozen entries of largest importance, exactly, ties to the lower global index.
//
// Few tiles can hold a winner. A tile whose bound (importance of its largest |grad| with the most
// favourable |param|) is below the quota-th best entry holds none; that threshold is approached
// from below:
//   1. The tiles with the largest bounds are scored: as many as the quota, or an eighth of it.
//   2. floor: the quota-th largest of the maxima of their runs of 16 entries, or of the bounds
//      where these are keys of entries (exp = 0). At least `quota` entries reach it. (Maxima of
//      whole tiles alone make a poor floor where gradients have many scales, since one tile then
//      holds many winners.)
//   3. Tiles with a bound at or above the floor are opened, no other can hold a winner, in bands of
//      decreasing bounds: half the quota of tiles, then twice as many each time. The floor
//      rises to the quota-th best entry so far, so that fewer of the later bands reach it. Where
//      rows differ in scale, quota 3,200 opens 22,273 tiles of 110M entries without bands, of which
//      4,546 may hold a winner (exp = 2): 9.5 ms, 3.7 so; quota 16,000 at exp = 0: 6.5 ms, 5.1 so.
//      A large quota (a static selection) goes by radix selection instead: a histogram of the
//      upper 15 bits of the keys, then of the lower 16 bits in the bin of the cut.
// Delegates that stand for groups of candidates: Gaihre et al. 2021, Dr. Top-k, arXiv 2109.08219.
//
// Bytes: 4 per tile twice, and 2 KB for each opened tile (4 unless exp = 0).
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "core/importance.h"
#include "cpu/open_tile.h"

namespace sparse_optim::cpu {
namespace {

constexpr int kLowBits = 16;
constexpr int64_t kHighBins = int64_t(1) << (31 - kLowBits);
constexpr int64_t kLowBins = int64_t(1) << kLowBits;
// Lower bits that the histogram of `kth` leaves out: its counters fit the L1 and L2 caches.
constexpr int kKthShift = 17;
constexpr int64_t kTilesPerTask = 32;
// Tiles that are scored for a floor: an eighth of the quota, but this many of a small quota.
constexpr int64_t kScoredTiles = 512;
// Tiles ahead that are fetched: 16,000 tiles in 110M entries took 6.5 ms instead of 7.2 (8 ahead:
// 6.8). Into L2: exp = 2 with quota 16,000 takes 6.8 ms so, 8.7 where each line waits for a place
// in L1. Touching each page 6 or 16 tiles ahead gained nothing, nor did reading parameters (exp >
// 0) only where the gradient alone can reach the floor.
constexpr int64_t kTilesAhead = 2;
constexpr int64_t kBoundsPerTask = 16384;
// Up to this quota winners are collected in a buffer, beyond it by radix selection.
constexpr int64_t kBufferedQuota = 1 << 16;
// The buffer is trimmed to the quota when it holds more than max(this, 2 quota) candidates.
constexpr int64_t kCandidates = 4096;
// Tasks between two looks at the floor; the first rounds are shorter. Each round waits for all
// threads, and on a busy machine for the scheduler: there, with more runnable processes than cores,
// quota 16,000 took 128 ms so, and 260 with rounds of 2 to 16 tasks; on a quiet one no difference.
constexpr int64_t kTasksPerRound = 64, kFirstRound = 8;
// Tiles that are opened before the floor is raised and the others are looked at again.
constexpr int64_t kFirstBand = 512;
constexpr int32_t kAboveAll = std::numeric_limits<int32_t>::max();  // no key is

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
      if (i + kTilesAhead < end) prefetch_tile(problem_, tiles_[i + kTilesAhead]);
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

// The bin that holds the wanted-th largest.
template <class Count>
Bin find_bin(const std::vector<Count>& counts, int64_t wanted) {
  int64_t above = 0;
  for (int64_t b = int64_t(counts.size()) - 1; b >= 0; --b) {
    if (above + counts[b] >= wanted) return {b, above};
    above += counts[b];
  }
  return {-1, above};
}

// The k-th largest of values that are not negative; 0 if there are fewer. By a histogram of the
// upper bits: nth_element alone takes 1.3 ms for the 16,000th of 215,000, this 0.2.
int32_t kth(const std::vector<int32_t>& values, int64_t k) {
  if (int64_t(values.size()) < k) return 0;
  std::vector<int32_t> counts(size_t(1) << (31 - kKthShift)), rest;
  for (const int32_t value : values) ++counts[value >> kKthShift];
  const Bin bin = find_bin(counts, k);
  rest.reserve(counts[bin.index]);
  for (const int32_t value : values)
    if (value >> kKthShift == bin.index) rest.push_back(value);
  const auto place = rest.begin() + (k - bin.above - 1);
  std::nth_element(rest.begin(), place, rest.end(), std::greater<int32_t>());
  return *place;
}

// Values with the largest of each run of 16, which narrows searches for the great ones.
class Ranked {
 public:
  Ranked(const int32_t* values, int64_t count)
      : values_(values), count_(count), blocks_(tiles_of(count, 16)) {
    block_maxima(values, count, blocks_.data());
  }

  // All i with least <= values[i] < bound, in order.
  std::vector<int64_t> between(int32_t least, int32_t bound) const {
    return select<int64_t>(
        least, [](int64_t i, int32_t) { return i; }, [&](int32_t value) { return value < bound; });
  }
  std::vector<int64_t> reaching(int32_t least) const { return between(least, kAboveAll); }

  // The k-th largest value, but no less than `least`. The k-th largest maximum of a run is not
  // above it.
  int32_t kth_largest(int64_t k, int32_t least = 1) const {
    least = std::max(kth(blocks_, k), least);
    const auto great = select<int32_t>(
        least, [](int64_t, int32_t value) { return value; }, [](int32_t) { return true; });
    return std::max(kth(great, k), least);
  }

 private:
  // of(i, values[i]) for every values[i] >= least that also meets the condition, in order. Without
  // a branch for each value, which no processor foresees.
  template <class T, class Of, class Meets>
  std::vector<T> select(int32_t least, Of&& of, Meets&& meets) const {
    std::vector<T> found(1024);
    size_t kept = 0;
    for (size_t b = 0; b < blocks_.size(); ++b) {
      if (blocks_[b] < least) continue;
      const int64_t first = 16 * int64_t(b), end = std::min(count_, first + 16);
      if (kept + 16 > found.size()) found.resize(2 * found.size());
      for (int64_t i = first; i < end; ++i) {
        found[kept] = of(i, values_[i]);
        kept += (values_[i] >= least) & meets(values_[i]);
      }
    }
    found.resize(kept);
    return found;
  }

  const int32_t* values_;
  int64_t count_;
  std::vector<int32_t> blocks_;
};

bool is_exact(double exp) {
  return exp == 1.0 || exp == 2.0 || std::abs(exp) == 0.5 || exp == -1.0;
}

// Where a greater |grad| always means a greater bound, tiles are ranked by tile_max as it is.
bool ranks_by_magnitude(double exp) {
  return exp == 0.0 || (exp > 0.0 && is_exact(exp));
}

// Importance of each tile's largest |grad| with the param that favours it most.
std::vector<int32_t> bounds_of(const Problem& problem, const int32_t* tile_max,
                               const float* param_bound) {
  std::vector<int32_t> bounds(problem.num_tiles);
  for_each(problem.threads, tiles_of(problem.num_tiles, kBoundsPerTask), [&](int64_t task) {
    const int64_t first = task * kBoundsPerTask;
    const int64_t count = std::min(problem.num_tiles - first, kBoundsPerTask);
    std::vector<float> grad(count), param(count, 0.f);
    for (int64_t i = 0; i < count; ++i) grad[i] = from_bits(tile_max[first + i]);
    if (param_bound) std::copy_n(param_bound + first, count, param.data());
    importance_keys(problem.exp, problem.eps, grad.data(), param.data(), count,
                    bounds.data() + first);
    for (int64_t i = 0; !is_exact(problem.exp) && i < count; ++i)
      if (grad[i] > 0.f) bounds[first + i] = raised_by_margin(bounds[first + i]);
  });
  return bounds;
}

// The least |grad|, as bits, whose bound reaches the floor; for exponents that rank by magnitude.
int32_t least_magnitude(const Problem& problem, int32_t floor) {
  int32_t low = 1, high = kInfinityBits;
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    const float grad = from_bits(middle), param = 0.f;
    int32_t bound;
    importance_keys(problem.exp, problem.eps, &grad, &param, 1, &bound);
    if (bound >= floor) high = middle;
    else low = middle + 1;
  }
  return low;
}

// The least bound of a tile that may hold an entry of at least this key.
int32_t least_bound(const Problem& problem, int32_t floor) {
  return ranks_by_magnitude(problem.exp) ? least_magnitude(problem, floor) : floor;
}

// Scores the `count` tiles that promise most. The quota-th largest of the maxima of their runs of
// 16 entries is a floor: each stands for an entry of its own.
int32_t score(const Problem& problem, const Ranked& ranked, int64_t count) {
  auto promising = ranked.reaching(ranked.kth_largest(count));
  count = std::min(int64_t(promising.size()), count);  // tied tiles beyond are not needed
  const int64_t runs = tiles_of(problem.tile, 16);
  std::vector<int32_t> run_maxima(count * runs);
  for_each(problem.threads, tiles_of(count, kTilesPerTask), [&](int64_t task) {
    int32_t opened[kMaxTile + 16];
    const int64_t end = std::min(count, (task + 1) * kTilesPerTask);
    for (int64_t i = task * kTilesPerTask; i < end; ++i) {
      if (i + kTilesAhead < end) prefetch_tile(problem, promising[i + kTilesAhead]);
      block_maxima(opened, open_tile(problem, promising[i], opened).count, &run_maxima[i * runs]);
    }
  });
  return Ranked(run_maxima.data(), count * runs).kth_largest(problem.quota);
}

// A key that at least `quota` entries reach, or 1.
int32_t first_floor(const Problem& problem, const Ranked& ranked) {
  const int64_t count = std::min(problem.quota, std::max(kScoredTiles, problem.quota / 8));
  const int32_t floor = score(problem, ranked, count);
  // Where bounds are the keys of entries, the quota-th largest is a floor as well.
  return problem.exp == 0.0 ? ranked.kth_largest(problem.quota, floor) : floor;
}

struct Candidate {
  int32_t tensor, position, key;

  bool operator<(const Candidate& other) const {  // the order of entries, whatever their keys
    return tensor != other.tensor ? tensor < other.tensor : position < other.position;
  }
};

// Keeps the `quota` largest, in order, of ties the first; returns the least key among them.
int32_t trim(std::vector<Candidate>& candidates, int64_t quota) {
  std::vector<int32_t> keys(candidates.size());
  std::transform(candidates.begin(), candidates.end(), keys.begin(),
                 [](const Candidate& candidate) { return candidate.key; });
  const int32_t least = kth(keys, quota);
  int64_t ties =
      quota - std::count_if(keys.begin(), keys.end(), [&](int32_t k) { return k > least; });
  size_t kept = 0;
  for (const Candidate candidate : candidates) {
    if (candidate.key < least || (candidate.key == least && ties-- <= 0)) continue;
    candidates[kept++] = candidate;
  }
  candidates.resize(kept);
  return least;
}

// The `quota` best entries of these tiles that reach the floor, or more, in order. The floor rises
// while tiles are opened: with gradients of many scales, a hundred times the quota reach the first
// one. What comes later in global order loses ties, so that it must be above the least of a full
// set.
std::vector<Candidate> collect(const Problem& problem, const OpenTiles& tiles, int32_t floor) {
  const int64_t most = std::max(kCandidates, 2 * problem.quota);
  std::vector<Candidate> candidates;
  int64_t round = std::max<int64_t>(problem.threads.workers, kFirstRound / 2);
  for (int64_t first = 0; first < tiles.num_tasks(); first += round) {
    round = std::min(2 * round, kTasksPerRound);
    const int64_t count = std::min(round, tiles.num_tasks() - first);
    std::vector<std::vector<Candidate>> parts(count);
    for_each(problem.threads, count, [&](int64_t i) {
      tiles.visit_entries(first + i, floor, [&](int32_t tensor, int32_t position, int32_t key) {
        parts[i].push_back({tensor, position, key});
      });
    });
    for (const auto& part : parts) candidates.insert(candidates.end(), part.begin(), part.end());
    if (int64_t(candidates.size()) > most) floor = trim(candidates, problem.quota) + 1;
  }
  return candidates;
}

// The winners, by opening tiles in bands of decreasing bounds: after the first of them the floor is
// close to the last winner's key, and few of the other tiles still reach it.
int32_t collect_bands(const Problem& problem, const Ranked& ranked, int32_t floor,
                      NewEntries& found) {
  std::vector<Candidate> best;
  int64_t opened = 0, band = std::max(kFirstBand, problem.quota / 2);
  int32_t done = kAboveAll;  // tiles with bounds from here on have been opened
  for (; done > least_bound(problem, floor); band *= 2) {
    const int32_t last = ranked.kth_largest(opened + band, least_bound(problem, floor));
    auto tiles = ranked.between(last, done);
    opened += int64_t(tiles.size());
    done = last;
    const auto more = collect(problem, OpenTiles(problem, std::move(tiles)), floor);
    std::vector<Candidate> both(best.size() + more.size());
    std::merge(best.begin(), best.end(), more.begin(), more.end(), both.begin());
    best.swap(both);
    if (int64_t(best.size()) >= problem.quota) floor = trim(best, problem.quota);
  }
  int32_t least = best.empty() ? 0 : kInfinityBits;
  for (size_t i = 0; i < best.size(); ++i) {
    found.tensor[i] = best[i].tensor;
    found.position[i] = best[i].position;
    least = std::min(least, best[i].key);
  }
  *found.count = int64_t(best.size());
  return least;
}

// What belongs of the entries that reach a threshold: all above it, and the first `ties` that tie.
struct Threshold {
  int32_t key;
  int64_t ties;
};

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

// Writes the winners; each task counts first, to know where.
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

int32_t cut(const Problem& problem, const int32_t* tile_max, const float* param_bound,
            NewEntries& found) {
  *found.count = 0;
  if (problem.quota == 0 || problem.num_tiles == 0) return 0;
  std::vector<int32_t> bounds;
  if (!ranks_by_magnitude(problem.exp)) {
    bounds = bounds_of(problem, tile_max, param_bound);
    tile_max = bounds.data();
  }
  const Ranked ranked(tile_max, problem.num_tiles);
  const int32_t floor = first_floor(problem, ranked);
  if (problem.quota <= kBufferedQuota) return collect_bands(problem, ranked, floor, found);
  const OpenTiles tiles(problem, ranked.reaching(least_bound(problem, floor)));
  return write(problem, tiles, radix_select(tiles, floor, problem.quota), found);
}

}  // namespace sparse_optim::cpu
