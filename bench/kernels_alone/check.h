// Two steps on small tensors against a plain host implementation: which entries are unmasked, where
// they go, that nothing else of the parameters changes; and the maxima of every scan variant.
#pragma once
#include <cmath>
#include <cstring>
#include <random>

#include "core/importance.h"
#include "kernels_alone/optimizer.h"
#include "kernels_alone/scan_variants.h"

namespace alone {

// What is checked: tensors, how many entries a step unmasks, one in how many is active before. In
// the `crowded` first entries of the first tensor, gradients are ten times as large.
struct Case {
  const char* name;
  std::vector<int64_t> sizes;
  int64_t quota;
  unsigned one_of;
  int64_t crowded;
};

// The large ones are for a GPU: there, several blocks move entries, collect candidates and find
// more of them than there is room for.
inline Case small_case() {
  return {"small", {4097, 0, 1, 33, 12293, 70, 4095, 8192, 31}, 700, 97, 0};
}
inline std::vector<Case> large_cases() {
  return {{"large", {1500000, 33, 700001}, 50, 33, 0},
          {"crowded", {1500000, 33, 700001}, 50, 33, 45000},
          {"large quota", {1500000, 33, 700001}, 5000, 33, 0}};
}

struct HostTensor {
  DType dtype;
  int64_t numel;
  std::vector<char> grad, param;
  std::vector<int32_t> active;
  DeviceArray<char> device_grad, device_param;
};

inline size_t width(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}
inline float value_at(DType dtype, const std::vector<char>& data, int64_t i) {
  const char* at = data.data() + size_t(i) * width(dtype);
  switch (dtype) {
    case DType::kFloat32: return *reinterpret_cast<const float*>(at);
    case DType::kBFloat16: return to_float(*reinterpret_cast<const BFloat16*>(at));
    default: return to_float(*reinterpret_cast<const Float16*>(at));
  }
}
inline void set_value(DType dtype, std::vector<char>& data, int64_t i, float value) {
  char* at = data.data() + size_t(i) * width(dtype);
  if (dtype == DType::kFloat32) *reinterpret_cast<float*>(at) = value;
  else if (dtype == DType::kBFloat16) store(*reinterpret_cast<BFloat16*>(at), value);
  else store(*reinterpret_cast<Float16*>(at), value);
}

// Tensors of all dtypes; gradients begin at any element. With `ties`, many entries are equal.
inline std::vector<HostTensor> make_tensors(const Case& made_of, bool ties) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  std::vector<HostTensor> tensors;
  for (const int64_t numel : made_of.sizes) {
    const int index = int(tensors.size());
    HostTensor made{DType(index % 3), numel, {}, {}, {}, {}, {}};
    const size_t shift = width(made.dtype) * size_t(index % 5);
    for (auto* data : {&made.grad, &made.param}) {
      data->resize(size_t(numel) * width(made.dtype));
      for (int64_t i = 0; i < numel; ++i) {
        const bool large = data == &made.grad && index == 0 && i < made_of.crowded;
        const float drawn = normal(random) * (large ? 10.f : 1.f);
        set_value(made.dtype, *data, i, ties ? std::round(drawn * 2) / 4 : drawn);
      }
    }
    std::vector<char> shifted(shift);
    shifted.insert(shifted.end(), made.grad.begin(), made.grad.end());
    made.device_grad = DeviceArray<char>(shifted);
    made.device_param = DeviceArray<char>(made.param);
    for (int64_t i = 0; i < numel; ++i)
      if (random() % made_of.one_of == 0) made.active.push_back(int32_t(i));
    tensors.push_back(std::move(made));
  }
  return tensors;
}

inline Optimizer optimizer_of(const std::vector<HostTensor>& tensors, int64_t quota) {
  std::vector<Row> rows;
  Positions active;
  int64_t held = 0;
  for (const HostTensor& each : tensors) {
    char* grad = each.device_grad.get() + (each.device_grad.size() - each.grad.size());
    rows.push_back(
        {each.numel ? grad : nullptr, each.device_param.get(), each.numel, each.dtype, each.dtype});
    active.push_back(each.active);
    held += int64_t(each.active.size());
  }
  return {std::move(rows), active, Run{{0, 0, 0, held + quota, held + 2 * quota}, 2, 2 * quota}};
}

// Unmasks, on the host, the `quota` frozen entries of the largest importance; ties by position.
inline std::vector<Entry> select_on_host(std::vector<HostTensor>& tensors, int64_t quota,
                                         double exp) {
  std::vector<std::pair<int32_t, Entry>> keys;
  for (size_t t = 0; t < tensors.size(); ++t) {
    const HostTensor& each = tensors[t];
    for (int64_t i = 0; i < tensors[t].numel; ++i) {
      if (std::binary_search(each.active.begin(), each.active.end(), int32_t(i))) continue;
      const float grad = value_at(each.dtype, each.grad, i);
      const float param = value_at(each.dtype, each.param, i);
      visit_importance(exp, 1.f, [&](auto importance) {
        const int32_t key = importance_key(importance(grad, param));
        if (key) keys.push_back({-key, {int64_t(t), i}});
      });
    }
  }
  std::sort(keys.begin(), keys.end());
  std::vector<Entry> chosen;
  for (size_t i = 0; i < size_t(quota); ++i) chosen.push_back(keys[i].second);
  std::sort(chosen.begin(), chosen.end());
  for (const auto& [tensor, position] : chosen) {
    auto& active = tensors[size_t(tensor)].active;
    active.insert(std::upper_bound(active.begin(), active.end(), position), int32_t(position));
  }
  return chosen;
}

// Names what differs; the check fails if anything does.
class Verdict {
 public:
  void expect(bool holds, const char* what) {
    if (!holds) std::printf("  DIFFERS: %s\n", what);
    failed_ = failed_ || !holds;
  }
  bool failed() const { return failed_; }

 private:
  bool failed_ = false;
};

inline void compare_active(const std::vector<HostTensor>& tensors, const Optimizer& optimizer,
                           Verdict& verdict) {
  std::vector<int64_t> ends{0};
  std::vector<int32_t> positions;
  for (const HostTensor& each : tensors) {
    positions.insert(positions.end(), each.active.begin(), each.active.end());
    ends.push_back(int64_t(positions.size()));
  }
  verdict.expect(optimizer.offsets.download() == ends, "offsets of the active entries");
  verdict.expect(optimizer.position.download(positions.size()) == positions, "active positions");
  const auto grads = optimizer.active_grad.download(positions.size());
  bool equal = true;
  for (size_t t = 0, at = 0; t < tensors.size(); ++t)
    for (const int32_t i : tensors[t].active)
      equal = equal && grads[at++] == value_at(tensors[t].dtype, tensors[t].grad, i);
  verdict.expect(equal, "gradients of the active entries");
}

inline void compare_frozen(const std::vector<HostTensor>& tensors, Verdict& verdict) {
  bool same = true, moved = false;
  for (size_t t = 0; t < tensors.size(); ++t) {
    const HostTensor& each = tensors[t];
    const auto now = each.device_param.download();
    const size_t size = width(each.dtype);
    for (int64_t i = 0; i < tensors[t].numel; ++i) {
      const size_t at = size_t(i) * size;
      const bool changed = std::memcmp(now.data() + at, each.param.data() + at, size) != 0;
      if (std::binary_search(each.active.begin(), each.active.end(), int32_t(i)))
        moved = moved || changed;
      else same = same && !changed;
    }
  }
  verdict.expect(same, "frozen entries are not as they were");
  verdict.expect(moved, "no active entry has changed");
}

inline double norm_on_host(const std::vector<HostTensor>& tensors) {
  double sum = 0.0;
  for (size_t t = 0; t < tensors.size(); ++t)
    for (int64_t i = 0; i < tensors[t].numel; ++i)
      sum += std::pow(double(value_at(tensors[t].dtype, tensors[t].grad, i)), 2);
  return std::sqrt(sum);
}

inline bool check_steps(const Case& checked, double exp, bool ties, bool fresh) {
  std::vector<HostTensor> tensors = make_tensors(checked, ties);
  Optimizer optimizer = optimizer_of(tensors, checked.quota);
  if (!fresh) optimizer.scratch.fill(0xA5);
  Verdict verdict;
  for (int step = 0; step < 2; ++step) {
    const std::vector<Entry> wanted = select_on_host(tensors, checked.quota, exp);
    verdict.expect(optimizer.collect(exp) == wanted, "entries that are collected");
    optimizer.step(exp, nullptr);
    MUST(cudaDeviceSynchronize());
    verdict.expect(optimizer.last_new() == wanted, "entries that are unmasked");
    compare_active(tensors, optimizer, verdict);
    // The next step reads the parameters as this one leaves them.
    compare_frozen(tensors, verdict);
    for (HostTensor& each : tensors) each.param = each.device_param.download();
    const auto progress = optimizer.progress.download();
    const std::vector<int64_t> expected{3 + step, optimizer.held + (step + 1) * checked.quota, 0};
    verdict.expect(progress == expected, "counts of steps and active entries");
    const double norm = norm_on_host(tensors);
    verdict.expect(std::fabs(optimizer.grad_norm.download()[0] / norm - 1.0) < 1e-6,
                   "norm of the gradients");
  }
  std::printf("%s, steps with exp %g%s: %s\n", checked.name, exp, ties ? " and ties" : "",
              verdict.failed() ? "FAILED" : "equal");
  return !verdict.failed();
}

inline bool check_variants() {
  const std::vector<HostTensor> tensors = make_tensors(small_case(), false);
  Optimizer optimizer = optimizer_of(tensors, 1);
  optimizer.bind(nullptr), optimizer.scan(nullptr);
  MUST(cudaDeviceSynchronize());
  const auto maxima = optimizer.tile_max.download();
  const auto grads = optimizer.active_grad.download(size_t(optimizer.held));
  DeviceArray<float> squares(maxima.size());
  Verdict verdict;
  each_scan_variant(optimizer.pool.num_tiles, [&](const char* name, auto kernel, int64_t blocks) {
    optimizer.tile_max.fill(0xFF), optimizer.active_grad.fill(0xFF);
    launch_variant(kernel, blocks, optimizer, squares);
    MUST(cudaDeviceSynchronize());
    verdict.expect(optimizer.tile_max.download() == maxima &&
                       optimizer.active_grad.download(size_t(optimizer.held)) == grads,
                   name);
  });
  std::printf("scan variants: %s\n", verdict.failed() ? "FAILED" : "equal");
  return !verdict.failed();
}

// Whether everything is equal. Scratch memory holds garbage, unless it is left `fresh`: initcheck
// then sees a read of what no kernel has written.
inline bool check_all(bool fresh) {
  bool good = check_variants();
  for (const double exp : {0.0, 2.0, 0.5})
    for (const bool ties : {false, true})
      good = check_steps(small_case(), exp, ties, fresh) && good;
  return good;
}

// Several times, as blocks come in another order each time.
inline bool check_large() {
  bool good = true;
  for (const Case& each : large_cases())
    for (const double exp : {0.0, 2.0})
      for (int time = 0; time < 3; ++time) good = check_steps(each, exp, time == 2, false) && good;
  return good;
}

}  // namespace alone
