// Device memory and times, with errors that end the program.
#pragma once
#include "cuda/launch.h"
#if defined(SPARSE_OPTIM_EMULATED)
#include "emulated_runtime.h"
#endif

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#define MUST(call)                                                                         \
  do {                                                                                     \
    const cudaError_t error = (call);                                                      \
    if (error != cudaSuccess) {                                                            \
      std::printf("%s:%d %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error)); \
      std::exit(2);                                                                        \
    }                                                                                      \
  } while (0)

namespace alone {

// `size` elements of device memory. Exactly as many, so that memcheck sees a read beyond them.
template <class T>
class DeviceArray {
 public:
  DeviceArray() = default;
  explicit DeviceArray(size_t size) : size_(size) {
    void* at = nullptr;
    if (size) MUST(cudaMalloc(&at, size * sizeof(T)));
    data_ = static_cast<T*>(at);
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    upload(values);
  }
  DeviceArray(DeviceArray&& other) noexcept { swap(other); }
  DeviceArray& operator=(DeviceArray&& other) noexcept {
    swap(other);
    return *this;
  }
  ~DeviceArray() {
    if (data_) MUST(cudaFree(data_));
  }

  T* get() const { return data_; }
  size_t size() const { return size_; }
  void fill(int byte) {
    if (size_) MUST(cudaMemset(data_, byte, size_ * sizeof(T)));
  }
  void upload(const std::vector<T>& values) {
    if (size_) MUST(cudaMemcpy(data_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  std::vector<T> download() const { return download(size_); }
  std::vector<T> download(size_t count) const {
    std::vector<T> values(count);
    if (count) MUST(cudaMemcpy(values.data(), data_, count * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  void swap(DeviceArray& other) {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }

  T* data_ = nullptr;
  size_t size_ = 0;
};

// Times calls on cold caches: events around a call that follows a write of `flush_bytes`.
class Stopwatch {
 public:
  Stopwatch(size_t flush_bytes, int rounds) : flush_(flush_bytes), rounds_(rounds) {
    MUST(cudaEventCreate(&begin_));
    MUST(cudaEventCreate(&end_));
  }
  Stopwatch(const Stopwatch&) = delete;
  ~Stopwatch() {
    MUST(cudaEventDestroy(begin_));
    MUST(cudaEventDestroy(end_));
  }

  // Median in ms of the calls of `run`, each after an untimed call of `prepare`.
  template <class Prepare, class Run>
  double median_ms(Prepare&& prepare, Run&& run) {
    constexpr int kWarmup = 2;
    std::vector<float> times;
    for (int round = 0; round < kWarmup + rounds_; ++round) {
      prepare();
      MUST(cudaMemsetAsync(flush_.get(), round, flush_.size()));
      MUST(cudaEventRecord(begin_));
      run();
      MUST(cudaEventRecord(end_));
      MUST(cudaEventSynchronize(end_));
      float ms = 0.f;
      MUST(cudaEventElapsedTime(&ms, begin_, end_));
      if (round >= kWarmup) times.push_back(ms);
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
  }

 private:
  DeviceArray<char> flush_;
  int rounds_;
  cudaEvent_t begin_, end_;
};

}  // namespace alone
