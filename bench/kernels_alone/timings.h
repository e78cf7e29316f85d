// Times of every operation, of the scan variants, and of plain copies and reads, on a pool with the
// shapes of Llama-7B in bfloat16, half of a budget of 3.5M entries being active.
#pragma once
#include <cmath>
#include <cstring>
#include <functional>
#include <random>
#include <string>

#include "kernels_alone/optimizer.h"
#include "kernels_alone/scan_variants.h"

namespace alone {

constexpr int64_t kBudget = 3500000, kNewEntries = 466;
#if defined(SPARSE_OPTIM_EMULATED)
constexpr int kFillBlocks = 1;
constexpr size_t kFlushBytes = 1 << 12;
#else
constexpr int kFillBlocks = 1056;
constexpr size_t kFlushBytes = 256 << 20;
#endif

// Normal numbers of a standard deviation, from counters (splitmix64, Box-Muller).
__global__ void fill_kernel(BFloat16* out, int64_t count, float std, unsigned seed) {
  for (int64_t i = global_thread(); i < count; i += grid_threads()) {
    uint64_t bits = (uint64_t(i) + 1) * 0x9E3779B97F4A7C15ull + seed;
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9ull;
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EBull;
    bits ^= bits >> 31;
    const float radius = (float(uint32_t(bits)) + 0.5f) * 0x1p-32f;
    const float angle = float(uint32_t(bits >> 32)) * 0x1p-32f * 6.28318531f;
    store(out[i], std * sqrtf(-2.f * logf(radius)) * cosf(angle));
  }
}

// Reads a buffer with `kN` loads of 16 bytes in flight a thread: what the memory gives.
template <int kN>
__global__ void read_kernel(const uint4* data, int64_t count, float* out) {
  unsigned most = 0;
  const int64_t step = grid_threads();
  for (int64_t i = global_thread(); i < count; i += kN * step) {
    uint4 load[kN];
#pragma unroll
    for (int k = 0; k < kN; ++k)
      load[k] = i + k * step < count ? __ldcs(data + i + k * step) : uint4{0, 0, 0, 0};
#pragma unroll
    for (int k = 0; k < kN; ++k) most = max(most, load[k].x ^ load[k].y ^ load[k].z ^ load[k].w);
  }
  if (most == 0xdeadbeefu) *out = 1.f;  // else the compiler would leave the reads out
}

inline std::vector<int64_t> sizes_of_7b(int64_t shrink) {
  std::vector<int64_t> sizes{32000 * 4096ll / shrink};
  for (int layer = 0; layer < 32; ++layer) {
    for (int i = 0; i < 4; ++i) sizes.push_back(4096 * 4096ll / shrink);
    for (int i = 0; i < 3; ++i) sizes.push_back(4096 * 11008ll / shrink);
    for (int i = 0; i < 2; ++i) sizes.push_back(std::max<int64_t>(4096 / shrink, 1));
  }
  sizes.push_back(std::max<int64_t>(4096 / shrink, 1));
  sizes.push_back(32000 * 4096ll / shrink);
  return sizes;
}

inline void print_time(const std::string& name, double ms, double bytes = 0.0) {
  std::printf("%-42s %9.4f ms", name.c_str(), ms);
  if (bytes > 0) std::printf(" %8.1f GB/s", bytes / ms / 1e6);
  std::printf("\n");
}

// The pool in device memory, and an optimizer half through its run.
class Pool7B {
 public:
  explicit Pool7B(int64_t shrink) : sizes_(sizes_of_7b(shrink)) {
    for (const int64_t size : sizes_) total += (size + 7) / 8 * 8;  // tensors begin at 16 bytes
    grads = DeviceArray<BFloat16>(size_t(total));
    params = DeviceArray<BFloat16>(size_t(total));
    std::mt19937_64 random(1);
    std::normal_distribution<float> normal;
    std::vector<Row> rows;
    int64_t at = 0;
    for (const int64_t size : sizes_) {
      BFloat16 *grad = grads.get() + at, *param = params.get() + at;
      const float std = std::exp(normal(random) - 9.f);  // tensors differ in scale
      const unsigned seed = unsigned(at);
      SPARSE_OPTIM_LAUNCH(fill_kernel, kFillBlocks, kThreads, nullptr, grad, size, std, seed);
      SPARSE_OPTIM_LAUNCH(fill_kernel, kFillBlocks, kThreads, nullptr, param, size, 0.04f,
                          seed + 7);
      rows.push_back({grad, param, size, DType::kBFloat16, DType::kBFloat16});
      at += (size + 7) / 8 * 8;
    }
    MUST(cudaGetLastError());
    const int64_t taken = kBudget / kNewEntries / 2;
    const Positions active = positions(kNewEntries * taken / shrink, random);
    int64_t held = 0;
    for (const auto& each : active) held += int64_t(each.size());
    std::vector<int64_t> targets;
    for (int64_t step = 0; step <= 2 * taken; ++step)
      targets.push_back(std::max<int64_t>(held + kNewEntries * (step - taken), 0));
    optimizer.emplace_back(std::move(rows), active, Run{targets, taken, 2 * kNewEntries});
  }

  int64_t total = 0;
  DeviceArray<BFloat16> grads, params;
  std::vector<Optimizer> optimizer;  // one; built last

 private:
  // `count` positions, dealt out by size, at random distances.
  Positions positions(int64_t count, std::mt19937_64& random) const {
    Positions active;
    double credit = 0.0;
    for (const int64_t size : sizes_) {
      credit += double(count) * double(size) / double(total);
      const int64_t own = std::min(int64_t(credit), size / 2);
      credit -= double(own);
      std::vector<int32_t> chosen;
      for (int64_t j = 0; j < own; ++j) {
        const double within = double(random() % 1000) / 1000;
        chosen.push_back(int32_t((double(j) + within) * double(size) / double(own)));
      }
      active.push_back(std::move(chosen));
    }
    return active;
  }

  std::vector<int64_t> sizes_;
};

class Timings {
 public:
  Timings(int64_t shrink, int rounds)
      : pool_(shrink), optimizer_(pool_.optimizer[0]), watch_(kFlushBytes, rounds) {}

  void run() {
    optimizer_.bind(nullptr);
    std::printf("pool of %.2f GB, %lld tiles, %lld active entries\n", bytes() / 1e9,
                static_cast<long long>(optimizer_.pool.num_tiles),
                static_cast<long long>(optimizer_.held));
    time_memory();
    time_scans();
    time_operations();
    time_graphs();
  }

  // One step, for a profiler.
  void step() {
    optimizer_.step(0.0, nullptr);
    MUST(cudaDeviceSynchronize());
  }

 private:
  double bytes() const { return double(pool_.total) * sizeof(BFloat16); }

  template <class Run>
  double ms(Run&& run) {
    return watch_.median_ms([] {}, run);
  }

  void time_memory() {
    const size_t half = size_t(pool_.total) / 16 * 16;  // bytes of half of the pool
    char* params = reinterpret_cast<char*>(pool_.params.get());
    print_time("copy (bytes read and written)", ms([&] {
                 MUST(cudaMemcpyAsync(params, params + half, half, cudaMemcpyDeviceToDevice));
               }),
               2.0 * double(half));
    const uint4* grads = reinterpret_cast<const uint4*>(pool_.grads.get());
    auto read = [&](const char* name, auto kernel, int blocks) {
      print_time(name, ms([&] {
                   SPARSE_OPTIM_LAUNCH(kernel, multiprocessors() * blocks, kThreads, nullptr, grads,
                                       pool_.total / 8, optimizer_.found_inf.get());
                 }),
                 bytes());
    };
    read("read, 4 loads, 4 blocks", read_kernel<4>, 4);
    read("read, 8 loads, 8 blocks", read_kernel<8>, 8);
  }

  void time_scans() {
    print_time("scan (norms included)", ms([&] { optimizer_.scan(nullptr); }), bytes());
    const auto maxima = optimizer_.tile_max.download();
    DeviceArray<float> squares(maxima.size());
    each_scan_variant(
        optimizer_.pool.num_tiles, [&](const char* name, auto kernel, int64_t blocks) {
          optimizer_.tile_max.fill(0xFF);
          const double spent = ms([&] { launch_variant(kernel, blocks, optimizer_, squares); });
          const bool equal = optimizer_.tile_max.download() == maxima;
          print_time(std::string("  variant: ") + name + (equal ? "" : " DIFFERS"), spent, bytes());
        });
  }

  // Each call starts from the same active set.
  void time_operations() {
    const auto progress = optimizer_.progress.download();
    const auto offsets = optimizer_.offsets.download();
    const auto position = optimizer_.position.download();
    restore_ = [this, progress, offsets, position] {
      optimizer_.progress.upload(progress);
      optimizer_.offsets.upload(offsets);
      optimizer_.position.upload(position);
    };
    auto time = [&](const std::string& name, auto&& run) {
      print_time(name, watch_.median_ms(restore_, run));
    };
    optimizer_.scan(nullptr);
    for (const double exp : {0.0, 2.0})
      time("cut, exp " + std::to_string(int(exp)), [&] { optimizer_.cut(exp, nullptr); });
    time("append", [&] { optimizer_.append(nullptr); });
    time("clip", [&] { optimizer_.clip(nullptr); });
    time("update", [&] { optimizer_.update(nullptr); });
    for (const double exp : {0.0, 2.0})
      time("step, exp " + std::to_string(int(exp)) + ", as the host launches it",
           [&] { optimizer_.step(exp, nullptr); });
  }

  void time_graphs() {
#if !defined(SPARSE_OPTIM_EMULATED)
    cudaStream_t stream;
    MUST(cudaStreamCreate(&stream));
    for (const double exp : {0.0, 2.0}) {
      restore_();
      cudaGraph_t graph;
      cudaGraphExec_t replayed;
      MUST(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
      optimizer_.step(exp, stream);
      MUST(cudaStreamEndCapture(stream, &graph));
      MUST(cudaGraphInstantiate(&replayed, graph, 0));
      print_time("step, exp " + std::to_string(int(exp)) + ", replayed as a graph",
                 watch_.median_ms(restore_, [&] { MUST(cudaGraphLaunch(replayed, nullptr)); }));
      const auto count = optimizer_.new_count.download()[0];
      if (count != kNewEntries)
        std::printf("  DIFFERS: %lld new entries\n", static_cast<long long>(count));
      MUST(cudaGraphExecDestroy(replayed));
      MUST(cudaGraphDestroy(graph));
    }
    MUST(cudaStreamDestroy(stream));
#endif
  }

  Pool7B pool_;
  Optimizer& optimizer_;
  Stopwatch watch_;
  std::function<void()> restore_;
};

}  // namespace alone
