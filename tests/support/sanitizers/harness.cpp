// Runs the CPU kernels on random cases under the sanitizers, against a brute force of its own.
//
// Every buffer is a heap block of exactly the size that the kernels may touch, so that a read or
// write one entry beyond it is reported. No torch: threads are std::thread.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>

#include "core/importance.h"
#include "cpu/kernels.h"

using namespace sparse_optim;
using namespace sparse_optim::cpu;

namespace {

#define EXPECT(condition, ...)                                             \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fprintf(stderr, "\n");                                          \
      std::exit(1);                                                        \
    }                                                                      \
  } while (0)

std::mt19937_64 engine(2026);

int64_t below(int64_t limit) {
  return int64_t(engine() % uint64_t(limit));
}
template <size_t n>
int64_t one_of(const int64_t (&choices)[n]) {
  return choices[below(int64_t(n))];
}

void spawn(int workers, void (*worker)(int, void*), void* context) {
  std::vector<std::thread> threads;
  for (int i = 0; i < workers; ++i) threads.emplace_back(worker, i, context);
  for (auto& thread : threads) thread.join();
}

// Conversions by the definition of the formats, with ldexp.
float value_of(uint16_t bits, DType dtype) {
  const int mantissa_bits = dtype == DType::kBFloat16 ? 7 : 10;
  const int bias = dtype == DType::kBFloat16 ? 127 : 15;
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const int exponent = (bits & 0x7fff) >> mantissa_bits;
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (exponent == 2 * bias + 1) return mantissa ? NAN : float(sign * INFINITY);
  if (exponent == 0) return float(sign * std::ldexp(mantissa, 1 - bias - mantissa_bits));
  return float(sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits));
}

// A tensor in a block of its own size; `offset` elements are skipped to misalign it.
struct Buffer {
  DType dtype;
  int64_t numel, offset;
  std::unique_ptr<uint8_t[]> bytes;

  Buffer(DType type, int64_t count, int64_t skip) : dtype(type), numel(count), offset(skip) {
    bytes.reset(new uint8_t[size_t((count + skip) * width()) + 1]);
  }
  int64_t width() const { return dtype == DType::kFloat32 ? 4 : 2; }
  uint8_t* at(int64_t i) const { return bytes.get() + (offset + i) * width(); }
  float get(int64_t i) const {
    if (dtype == DType::kFloat32) {
      float value;
      std::memcpy(&value, at(i), 4);
      return value;
    }
    return value_of(bits(i), dtype);
  }
  uint16_t bits(int64_t i) const {
    uint16_t half;
    std::memcpy(&half, at(i), 2);
    return half;
  }
  void set(int64_t i, float value) {
    if (dtype == DType::kFloat32) {
      std::memcpy(at(i), &value, 4);
    } else if (dtype == DType::kBFloat16) {
      const uint16_t half = uint16_t(uint32_t(to_bits(value)) >> 16);
      std::memcpy(at(i), &half, 2);
    } else if (std::isnan(value)) {
      const uint16_t half = 0x7e00;
      std::memcpy(at(i), &half, 2);
    } else {  // truncated to eleven bits, subnormal below 2^-14
      int exponent;
      const double fraction = std::frexp(std::fabs(double(value)), &exponent);
      const int drop = std::max(exponent - 11, -24);
      const double kept = std::ldexp(std::trunc(std::ldexp(fraction, exponent - drop)), drop);
      uint16_t half = 0;
      for (uint16_t bit = 0x4000; bit; bit >>= 1)  // the largest pattern that is not above
        if (double(value_of(uint16_t(half | bit), dtype)) <= kept) half |= bit;
      if (std::signbit(value)) half |= 0x8000;
      std::memcpy(at(i), &half, 2);
    }
  }
};

float random_value(int kind) {
  const double uniform = double(engine() >> 11) * 0x1p-53;
  switch (kind) {
    case 0: return float(std::sqrt(-2 * std::log(uniform + 1e-300)) * std::cos(6.28 * uniform));
    case 1: return float(below(5) - 2) * 0.25f;            // ties and zeros
    case 2: return -0.5f;                                  // all equal
    case 3: return 0.f;                                    // nothing to unmask
    case 4: return float(std::ldexp(uniform - 0.5, -14));  // subnormal in float16
    default: return float((uniform - 0.5) * std::exp(8.0 * double(below(3) - 1)));
  }
}

float score(double exp, float eps, float grad, float param) {
  const float magnitude = std::fabs(grad);
  volatile float base = std::fabs(param) + eps;  // volatile: no contraction
  volatile float square = base * base, root = std::sqrt(base);
  if (exp == 0.0) return magnitude;
  if (exp == 1.0) return magnitude / base;
  if (exp == 2.0) return magnitude / square;
  if (exp == 0.5) return magnitude / root;
  if (exp == -1.0) return magnitude * base;
  if (exp == -0.5) return magnitude * root;
  return magnitude / powf(base, float(exp));
}

struct Entry {
  int64_t tensor, position;
  int32_t key;
};

struct Case {
  int64_t tile = 512, quota = 0, num_tiles = 0, step = 5;
  double exp = 0.0;
  float eps = 1.f;
  Noise noise{};  // with it, gradients stand for scores
  bool entry_age = true, poisoned = false;
  Threads threads{1, &spawn};
  std::vector<Buffer> grads, params, dense;
  std::vector<bool> missing;
  std::vector<PoolTensor> pool;
  std::vector<DenseGrad> dense_grads;
  std::vector<std::vector<bool>> taken;  // active entries, densely

  std::unique_ptr<int32_t[]> position, unmask_step, tile_max, new_tensor, new_position;
  std::unique_ptr<float[]> exp_avg, exp_avg_sq, master, active_grad, param_bound;
  std::unique_ptr<int64_t[]> offsets, progress;
  int64_t new_count = -1, capacity = 0;
  bool low_precision = false;

  Active active() const {
    return {position.get(),
            exp_avg.get(),
            exp_avg_sq.get(),
            unmask_step.get(),
            low_precision ? master.get() : nullptr,
            active_grad.get(),
            offsets.get(),
            progress.get()};
  }
};

constexpr int64_t kTiles[] = {1, 7, 16, 17, 128, 512, 4096};
constexpr double kExps[] = {-1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 0.3, -1.7};

void add_tensor(Case& c, int64_t size, int kind) {
  const auto dtype = DType(below(3));
  c.low_precision |= dtype != DType::kFloat32;
  c.params.emplace_back(dtype, size, below(2));
  c.grads.emplace_back(below(4) ? dtype : DType(below(3)), size, below(2));
  c.missing.push_back(below(8) == 0);
  for (int64_t i = 0; i < size; ++i) {
    c.params.back().set(i, random_value(below(10) ? 0 : 3));
    c.grads.back().set(i, random_value(kind));
  }
}

Case random_case(int64_t number) {
  Case c;
  c.tile = one_of(kTiles);
  c.exp = kExps[below(8)];
  if (c.exp == 0.0 && below(2)) c.noise = {true, engine(), uint32_t(engine())};
  c.eps = below(2) ? 1.f : 1e-3f;
  c.entry_age = below(2);
  c.threads.workers = int(1 + below(4));
  const int kind = int(below(6));
  const int64_t sizes[] = {0, 1, 15, 16, 17, c.tile - 1, c.tile, c.tile + 1, 3 * c.tile + 5, 1000};
  const int64_t count = 1 + below(5);
  for (int64_t t = 0; t < count; ++t) add_tensor(c, one_of(sizes), kind);
  if (number % 50 == 0) add_tensor(c, 300000, kind % 3);  // more candidates than the buffer holds
  for (int64_t t = below(3); t > 0; --t) {
    c.dense.emplace_back(DType(below(3)), one_of(sizes), below(2));
    for (int64_t i = 0; i < c.dense.back().numel; ++i) c.dense.back().set(i, random_value(kind));
  }
  if (below(8) == 0) {
    Buffer& victim = c.grads[size_t(below(count))];
    const size_t index = size_t(&victim - c.grads.data());
    if (victim.numel && !c.missing[index]) {
      const float poisons[] = {INFINITY, -INFINITY, NAN};
      victim.set(below(victim.numel), poisons[below(3)]);
      c.poisoned = true;
    }
  }
  return c;
}

// Allocates what depends on the sizes, with some entries active already.
void finish(Case& c) {
  const size_t num_tensors = c.params.size();
  c.offsets.reset(new int64_t[num_tensors + 1]());
  c.progress.reset(new int64_t[3]{c.step, 0, 0});
  std::vector<int32_t> positions;
  const int64_t share = one_of({0, 2, 10, 100});
  int64_t total = 0;
  for (size_t t = 0; t < num_tensors; ++t) {
    const int64_t size = c.params[t].numel;
    c.taken.emplace_back(size_t(size), false);
    for (int64_t i = 0; i < size; ++i) {
      if (share && below(share) == 0) {
        c.taken[t][size_t(i)] = true;
        positions.push_back(int32_t(i));
      }
    }
    c.offsets[t + 1] = int64_t(positions.size());
    c.pool.push_back({c.missing[t] || size == 0 ? nullptr : c.grads[t].at(0), c.params[t].at(0),
                      size, c.num_tiles, c.grads[t].dtype, c.params[t].dtype});
    c.num_tiles += (size + c.tile - 1) / c.tile;
    total += size;
  }
  const int64_t num_active = int64_t(positions.size());
  c.progress[1] = num_active;
  // 70,000 is beyond what the cut collects in a buffer.
  c.quota = std::min(one_of({0, 1, 3, 40, 5000, 70000}), total - num_active);
  c.capacity = num_active + c.quota;
  const size_t capacity = size_t(c.capacity);
  c.position.reset(new int32_t[capacity]);
  c.unmask_step.reset(new int32_t[capacity]);
  for (auto* array : {&c.exp_avg, &c.exp_avg_sq, &c.master, &c.active_grad})
    array->reset(new float[capacity]());
  for (size_t t = 0, i = 0; t < num_tensors; ++t) {
    for (; i < size_t(c.offsets[t + 1]); ++i) {
      c.position[i] = positions[i];
      c.unmask_step[i] = int32_t(1 + below(c.step));
      c.exp_avg[i] = random_value(0);
      c.exp_avg_sq[i] = std::fabs(random_value(0));
      c.master[i] = c.params[t].get(positions[i]);
    }
  }
  c.tile_max.reset(new int32_t[size_t(c.num_tiles)]);
  c.param_bound.reset(new float[size_t(c.num_tiles)]());
  for (size_t t = 0; t < num_tensors; ++t)
    for (int64_t i = 0; i < c.params[t].numel; ++i) {
      float& bound = c.param_bound[size_t(c.pool[t].first_tile + i / c.tile)];
      bound = std::max(bound, std::fabs(c.params[t].get(i)));
    }
  c.new_tensor.reset(new int32_t[size_t(c.quota)]);
  c.new_position.reset(new int32_t[size_t(c.quota)]);
  for (const Buffer& grad : c.dense) c.dense_grads.push_back({grad.at(0), grad.numel, grad.dtype});
}

bool check_scan(Case& c) {
  const Active active = c.active();
  const size_t num_grads = c.pool.size() + c.dense_grads.size();
  const std::unique_ptr<double[]> norms(new double[num_grads]);
  const bool finite =
      scan(c.threads, c.pool, c.dense_grads, active, c.tile, c.tile_max.get(), norms.get());
  std::vector<double> squares(num_grads, 0.0);
  bool non_finite = false;
  auto add = [&](size_t grad, float value) {
    squares[grad] += double(value) * value;
    non_finite |= !std::isfinite(value);
  };
  for (size_t t = 0; t < c.pool.size(); ++t) {
    std::vector<int32_t> maxima(size_t((c.pool[t].numel + c.tile - 1) / c.tile), 0);
    for (int64_t i = 0; c.pool[t].grad && i < c.pool[t].numel; ++i) {
      const float value = c.grads[t].get(i);
      add(t, value);
      int32_t& most = maxima[size_t(i / c.tile)];
      if (!c.taken[t][size_t(i)]) most = std::max(most, magnitude_bits(value));
    }
    for (size_t j = 0; j < maxima.size(); ++j)
      EXPECT(c.tile_max[size_t(c.pool[t].first_tile) + j] == maxima[j], "tensor %zu tile %zu", t,
             j);
    for (int64_t i = c.offsets[t]; c.pool[t].grad && i < c.offsets[t + 1]; ++i) {
      const float value = c.grads[t].get(c.position[size_t(i)]);
      EXPECT(to_bits(active.grad[i]) == to_bits(value), "active gradient %lld", (long long)i);
    }
  }
  for (size_t d = 0; d < c.dense.size(); ++d)
    for (int64_t i = 0; i < c.dense[d].numel; ++i) add(c.pool.size() + d, c.dense[d].get(i));
  EXPECT(finite == !non_finite, "non-finite");
  EXPECT(c.poisoned <= non_finite, "the poison was not seen");
  // Not vectorized here, so that half a tile is added one after the other in float32.
  const double rounding = (double(c.tile) / 2 + 4) * 0x1p-24;
  for (size_t i = 0; !non_finite && i < num_grads; ++i)
    EXPECT(std::fabs(norms[i] * norms[i] - squares[i]) <= rounding * squares[i] + 1e-30,
           "gradient %zu: %.9g against %.9g", i, norms[i], std::sqrt(squares[i]));
  return !non_finite;
}

float noisy(const Noise& noise, float score, int64_t tensor, int64_t position) {
  if (!noise.on) return score;
  const uint32_t group = uint32_t(position / 4);
  const uint32_t word = philox(noise, group, uint32_t(tensor), 0).word[position % 4];
  const uint32_t second = philox(noise, group, uint32_t(tensor), 1).word[position % 4];
  return perturbed(score, word, word < kRefinedBelow ? refinement(second) : 0.5f);
}

void check_cut(Case& c) {
  NewEntries found{c.new_tensor.get(), c.new_position.get(), &c.new_count, c.quota};
  const float* bound = c.exp < 0 ? c.param_bound.get() : nullptr;
  const Active active = c.active();
  const Problem problem{c.threads, c.pool, active,  c.num_tiles, c.quota,
                        c.exp,     c.eps,  c.noise, c.tile};
  if (c.noise.on) rank(problem, c.tile_max.get());
  const int32_t threshold = cut(problem, c.tile_max.get(), bound, found);
  std::vector<Entry> entries;
  for (size_t t = 0; t < c.pool.size(); ++t) {
    for (int64_t i = 0; c.pool[t].grad && i < c.pool[t].numel; ++i) {
      const float plain = score(c.exp, c.eps, c.grads[t].get(i), c.params[t].get(i));
      const float value = noisy(c.noise, plain, int64_t(t), i);
      if (!c.taken[t][size_t(i)] && value > 0.f) entries.push_back({int64_t(t), i, to_bits(value)});
    }
  }
  std::stable_sort(entries.begin(), entries.end(),
                   [](const Entry& a, const Entry& b) { return a.key > b.key; });
  if (int64_t(entries.size()) > c.quota) entries.resize(size_t(c.quota));
  EXPECT(threshold == (entries.empty() ? 0 : entries.back().key), "threshold, exp %g", c.exp);
  EXPECT(c.new_count == int64_t(entries.size()), "%lld of %zu, exp %g", (long long)c.new_count,
         entries.size(), c.exp);
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return a.tensor != b.tensor ? a.tensor < b.tensor : a.position < b.position;
  });
  for (size_t i = 0; i < entries.size(); ++i)
    EXPECT(c.new_tensor[i] == entries[i].tensor && c.new_position[i] == entries[i].position,
           "winner %zu, exp %g", i, c.exp);
}

struct State {
  int32_t position, unmask_step;
  float exp_avg, exp_avg_sq, master, grad;
};

void check_append(Case& c) {
  std::vector<std::vector<State>> expected(c.pool.size());
  for (size_t t = 0; t < c.pool.size(); ++t)
    for (size_t i = size_t(c.offsets[t]); i < size_t(c.offsets[t + 1]); ++i)
      expected[t].push_back({c.position[i], c.unmask_step[i], c.exp_avg[i], c.exp_avg_sq[i],
                             c.master[i], c.active_grad[i]});
  for (size_t i = 0; i < size_t(c.new_count); ++i) {
    const size_t t = size_t(c.new_tensor[i]);
    const int32_t where = c.new_position[i];
    expected[t].push_back(
        {where, int32_t(c.step + 1), 0.f, 0.f, c.params[t].get(where), c.grads[t].get(where)});
    c.taken[t][size_t(where)] = true;
  }
  const NewEntries found{c.new_tensor.get(), c.new_position.get(), &c.new_count, c.quota};
  Active active = c.active();
  append(c.threads, c.pool, found, active);
  size_t i = 0;
  for (size_t t = 0; t < c.pool.size(); ++t) {
    std::sort(expected[t].begin(), expected[t].end(),
              [](const State& a, const State& b) { return a.position < b.position; });
    for (const State& want : expected[t]) {
      EXPECT(c.position[i] == want.position && c.unmask_step[i] == want.unmask_step &&
                 c.exp_avg[i] == want.exp_avg && c.exp_avg_sq[i] == want.exp_avg_sq &&
                 (!c.low_precision || c.master[i] == want.master) && c.active_grad[i] == want.grad,
             "entry %zu of tensor %zu", i, t);
      ++i;
    }
    EXPECT(c.offsets[t + 1] == int64_t(i), "offsets");
  }
  EXPECT(c.progress[1] == int64_t(i), "count");
}

// |got - want| within a few units in the last place of the largest term.
void close(float got, double want, double scale, const char* what) {
  EXPECT(std::fabs(double(got) - want) <= 1e-6 * (std::fabs(want) + scale) + 1e-30, "%s: %g for %g",
         what, double(got), want);
}

void check_update(Case& c) {
  const Hyper hyper[2] = {{1e-2, 0.9, 0.999, 1e-8, 0.1, 1.0}, {3e-3, 0.5, 0.9, 1e-6, 0.0, -1.0}};
  std::vector<int32_t> group(c.pool.size());
  std::vector<std::vector<float>> frozen(c.pool.size());
  const size_t size = size_t(c.progress[1]);
  std::vector<double> value(size), first(size), second(size), scale(size);
  for (size_t t = 0; t < c.pool.size(); ++t) {
    group[t] = int32_t(t % 2);
    for (int64_t i = 0; i < c.pool[t].numel; ++i) frozen[t].push_back(c.params[t].get(i));
    const Hyper& h = hyper[group[t]];
    for (size_t i = size_t(c.offsets[t]); i < size_t(c.offsets[t + 1]); ++i) {
      const double g = h.sign * 0.5 * c.active_grad[i];
      const double age = double(c.entry_age ? c.step + 1 - c.unmask_step[i] + 1 : c.step + 1);
      first[i] = h.beta1 * c.exp_avg[i] + (1 - h.beta1) * g;
      second[i] = h.beta2 * c.exp_avg_sq[i] + (1 - h.beta2) * g * g;
      scale[i] = std::max(std::fabs(g), double(std::fabs(c.exp_avg[i])));
      const double denominator = std::sqrt(second[i] / (1 - std::pow(h.beta2, age))) + h.eps;
      const double rate = h.lr / (1 - std::pow(h.beta1, age));
      value[i] = c.low_precision ? c.master[i] : c.params[t].get(c.position[i]);
      value[i] = value[i] * (1 - h.lr * h.weight_decay) - rate * first[i] / denominator;
    }
  }
  Active active = c.active();
  update(c.threads, c.pool, active, hyper, group.data(), c.entry_age, 0.5f);
  for (size_t t = 0; t < c.pool.size(); ++t) {
    size_t i = size_t(c.offsets[t]);
    for (int64_t where = 0; where < c.pool[t].numel; ++where) {
      const float got = c.params[t].get(where);
      const bool moves = c.taken[t][size_t(where)];
      if (!moves || !c.pool[t].grad) {
        EXPECT(to_bits(got) == to_bits(frozen[t][size_t(where)]), "a frozen entry moved");
        i += moves;
        continue;
      }
      close(c.exp_avg[i], first[i], scale[i], "exp_avg");
      close(c.exp_avg_sq[i], second[i], scale[i] * scale[i], "exp_avg_sq");
      const float exact = c.low_precision ? c.master[i] : got;
      close(exact, value[i], 0.1, "value");
      if (c.params[t].dtype == DType::kFloat32) {
        EXPECT(got == exact, "a float32 parameter is its master value");
      } else {  // no neighbour is nearer
        const uint16_t bits = c.params[t].bits(where);
        const double error = std::fabs(double(got) - exact);
        for (const int side : {-1, 1}) {
          const float neighbour = value_of(uint16_t(bits + side), c.params[t].dtype);
          EXPECT(!(std::fabs(double(neighbour) - exact) < error), "rounding of %g", double(exact));
        }
      }
      ++i;
    }
  }
}

uint32_t word(const Buffer& of, int64_t i) {
  uint32_t bits = 0;
  std::memcpy(&bits, of.at(i), size_t(of.width()));
  return bits;
}

// The active entries of all tensors, read, and swapped with random bits; then one that is nowhere.
void check_exchange(Case& c) {
  const int64_t count = c.progress[1];
  std::unique_ptr<int32_t[]> value(new int32_t[count]);
  std::vector<uint32_t> brought(static_cast<size_t>(count)), before(static_cast<size_t>(count));
  const auto each_entry = [&](auto&& visit) {
    for (size_t t = 0; t < c.pool.size(); ++t)
      for (int64_t i = c.offsets[t]; i < c.offsets[t + 1]; ++i) visit(t, size_t(i));
  };
  each_entry([&](size_t t, size_t i) {
    brought[i] = uint32_t(engine()) & (c.params[t].width() == 4 ? 0xffffffffu : 0xffffu);
    value[i] = int32_t(brought[i]);
    before[i] = word(c.params[t], c.position[i]);
  });
  const auto run = [&] {
    return exchange(c.threads, c.pool, c.position.get(), &c.offsets[0], value.get());
  };
  std::unique_ptr<int32_t[]> read(new int32_t[count]);
  EXPECT(gather(c.threads, c.pool, c.position.get(), &c.offsets[0], read.get()), "refused");
  each_entry([&](size_t t, size_t i) {
    EXPECT(uint32_t(read[i]) == before[i], "entry %zu of tensor %zu is read", i, t);
  });
  for (const auto* there : {&brought, &before}) {
    const auto& kept = there == &brought ? before : brought;
    EXPECT(run(), "%lld entries refused", (long long)count);
    each_entry([&](size_t t, size_t i) {
      EXPECT(word(c.params[t], c.position[i]) == (*there)[i] && uint32_t(value[i]) == kept[i],
             "entry %zu of tensor %zu", i, t);
    });
  }
  if (!count) return;
  const int64_t at = below(count);
  const int32_t right = c.position[size_t(at)];
  c.position[size_t(at)] = below(2) ? INT32_MAX : -1;
  EXPECT(!run(), "a position outside of its tensor");
  c.position[size_t(at)] = right;
  each_entry([&](size_t t, size_t i) {
    EXPECT(word(c.params[t], c.position[i]) == before[i], "entry %zu was written", i);
  });
}

// Weight gradients at active entries, from strided matrices in blocks that end with them.
void check_sampled(int64_t number) {
  const int64_t tokens = one_of({0, 1, 15, 16, 17, 64, 257, 300}), rows = 1 + below(70),
                columns = 1 + below(70), row_stride = below(3);
  const bool column_major = below(4) == 0;
  const auto make = [&](int64_t width) {
    const int64_t stride = column_major ? 1 : width + row_stride,
                  column_stride = column_major ? tokens + row_stride : 1;
    const int64_t size = tokens ? (tokens - 1) * stride + (width - 1) * column_stride + 1 : 0;
    Buffer values(DType(below(3)), size, below(2));
    for (int64_t i = 0; i < size; ++i) values.set(i, random_value(0));
    Matrix matrix{values.at(0), tokens, width, stride, column_stride, values.dtype};
    return std::make_pair(std::move(values), matrix);
  };
  const auto outer = make(rows), inner = make(columns);
  std::vector<int32_t> chosen;
  for (int64_t i = 0; i < rows * columns; ++i)
    if (below(9) == 0) chosen.push_back(int32_t(i));
  const int64_t count = int64_t(chosen.size());
  std::unique_ptr<int32_t[]> position(new int32_t[count]);
  std::copy(chosen.begin(), chosen.end(), position.get());
  std::unique_ptr<float[]> out(new float[count]);
  std::fill_n(out.get(), count, 0.5f);
  const Threads threads{int(1 + number % 3), &spawn};
  EXPECT(sampled_grad(threads, outer.second, inner.second, position.get(), count, out.get()),
         "%lld entries refused", (long long)count);
  for (int64_t e = 0; e < count; ++e) {
    const auto value = [&](const std::pair<Buffer, Matrix>& of, int64_t t, int64_t c) {
      return double(of.first.get(t * of.second.row_stride + c * of.second.column_stride));
    };
    double want = 0.5, scale = 0.5;
    for (int64_t t = 0; t < tokens; ++t) {
      const double term =
          value(outer, t, position[e] / columns) * value(inner, t, position[e] % columns);
      want += term;
      scale += std::fabs(term);
    }
    EXPECT(std::fabs(out[e] - want) <= 1e-6 * scale, "%g for %g", double(out[e]), want);
  }
  if (count < 2) return;
  std::swap(position[0], position[count - 1]);
  EXPECT(!sampled_grad(threads, outer.second, inner.second, position.get(), count, out.get()),
         "positions that do not ascend");
}

template <class Half>
void check_conversions(DType dtype) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float want = value_of(uint16_t(bits), dtype), got = to_float(Half{uint16_t(bits)});
    EXPECT(std::isnan(want) ? std::isnan(got) : to_bits(got) == to_bits(want), "pattern %x", bits);
    Half back;
    store(back, want);
    EXPECT(std::isnan(want) ? std::isnan(value_of(back.bits, dtype)) : back.bits == bits,
           "pattern %x comes back as %x", bits, unsigned(back.bits));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t cases = argc > 1 ? std::atoll(argv[1]) : 1000;
  check_conversions<BFloat16>(DType::kBFloat16);
  check_conversions<Float16>(DType::kFloat16);
  int64_t skipped = 0, unmasked = 0;
  for (int64_t number = 0; number < cases; ++number) {
    Case c = random_case(number);
    finish(c);
    if (!check_scan(c)) {
      ++skipped;
      continue;
    }
    check_cut(c);
    check_append(c);
    check_update(c);
    check_exchange(c);
    check_sampled(number);
    unmasked += c.new_count;
  }
  std::printf("%lld cases, %lld with non-finite gradients, %lld entries unmasked\n",
              (long long)cases, (long long)skipped, (long long)unmasked);
  return 0;
}
