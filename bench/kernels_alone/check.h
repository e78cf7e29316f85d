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

constexpr int64_t kSizes[] = {4097, 0, 1, 33, 12293, 70, 4095, 8192, 31};
constexpr int64_t kQuota = 700;

struct HostTensor {
  DType dtype;
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
inline std::vector<HostTensor> make_tensors(bool ties) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  std::vector<HostTensor> tensors;
  for (const int64_t numel : kSizes) {
    const int index = int(tensors.size());
    HostTensor made{DType(index % 3), {}, {}, {}, {}, {}};
    const size_t shift = width(made.dtype) * size_t(index % 5);
    for (auto* data : {&made.grad, &made.param}) {
      data->resize(size_t(numel) * width(made.dtype));
      for (int64_t i = 0; i < numel; ++i) {
        const float drawn = normal(random);
        set_value(made.dtype, *data, i, ties ? std::round(drawn * 2) / 4 : drawn);
      }
    }
    std::vector<char> shifted(shift);
    shifted.insert(shifted.end(), made.grad.begin(), made.grad.end());
    made.device_grad = DeviceArray<char>(shifted);
    made.device_param = DeviceArray<char>(made.param);
    for (int64_t i = 0; i < numel; ++i)
      if (random() % 97 == 0) made.active.push_back(int32_t(i));
    tensors.push_back(std::move(made));
  }
  return tensors;
}

inline Optimizer optimizer_of(const std::vector<HostTensor>& tensors) {
  std::vector<Row> rows;
  Positions active;
  int64_t held = 0;
  for (const HostTensor& each : tensors) {
    const int64_t numel = int64_t(each.grad.size() / width(each.dtype));
    char* grad = each.device_grad.get() + (each.device_grad.size() - each.grad.size());
    rows.push_back(
        {numel ? grad : nullptr, each.device_param.get(), numel, each.dtype, each.dtype});
    active.push_back(each.active);
    held += int64_t(each.active.size());
  }
  return {std::move(rows), active, Run{{0, 0, 0, held + kQuota, held + 2 * kQuota}, 2, 2 * kQuota}};
}

// Entries by (key, position in the pool); the selection is the first of them.
using Entry = std::pair<int64_t, int64_t>;  // tensor, position

// Unmasks, on the host, the `kQuota` frozen entries of the largest importance; ties by position.
inline std::vector<Entry> select_on_host(std::vector<HostTensor>& tensors, double exp) {
  std::vector<std::pair<int32_t, Entry>> keys;
  for (size_t t = 0; t < tensors.size(); ++t) {
    const HostTensor& each = tensors[t];
    for (int64_t i = 0; i < kSizes[t]; ++i) {
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
  for (size_t i = 0; i < size_t(kQuota); ++i) chosen.push_back(keys[i].second);
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
    for (int64_t i = 0; i < kSizes[t]; ++i) {
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
    for (int64_t i = 0; i < kSizes[t]; ++i)
      sum += std::pow(double(value_at(tensors[t].dtype, tensors[t].grad, i)), 2);
  return std::sqrt(sum);
}

inline bool check_steps(double exp, bool ties, bool fresh) {
  std::vector<HostTensor> tensors = make_tensors(ties);
  Optimizer optimizer = optimizer_of(tensors);
  if (!fresh) optimizer.scratch.fill(0xA5);
  Verdict verdict;
  for (int step = 0; step < 2; ++step) {
    const std::vector<Entry> wanted = select_on_host(tensors, exp);
    optimizer.step(exp, nullptr);
    MUST(cudaDeviceSynchronize());
    const int64_t count = optimizer.new_count.download()[0];
    const auto tensor = optimizer.new_tensor.download(size_t(count));
    const auto position = optimizer.new_position.download(size_t(count));
    std::vector<Entry> found;
    for (size_t i = 0; i < size_t(count); ++i) found.push_back({tensor[i], position[i]});
    verdict.expect(found == wanted, "entries that are unmasked");
    compare_active(tensors, optimizer, verdict);
    // The next step reads the parameters as this one leaves them.
    compare_frozen(tensors, verdict);
    for (HostTensor& each : tensors) each.param = each.device_param.download();
    const auto progress = optimizer.progress.download();
    const std::vector<int64_t> expected{3 + step, optimizer.held + (step + 1) * kQuota, 0};
    verdict.expect(progress == expected, "counts of steps and active entries");
    const double norm = norm_on_host(tensors);
    verdict.expect(std::fabs(optimizer.grad_norm.download()[0] / norm - 1.0) < 1e-6,
                   "norm of the gradients");
  }
  std::printf("steps with exp %g%s: %s\n", exp, ties ? " and ties" : "",
              verdict.failed() ? "FAILED" : "equal");
  return !verdict.failed();
}

inline bool check_variants() {
  const std::vector<HostTensor> tensors = make_tensors(false);
  Optimizer optimizer = optimizer_of(tensors);
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
    for (const bool ties : {false, true}) good = check_steps(exp, ties, fresh) && good;
  return good;
}

}  // namespace alone
