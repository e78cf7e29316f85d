// Runs CUDA kernels on the CPU, unchanged: one fiber per CUDA thread, one block at a time.
//
// Between barriers, threads run in a shuffled order, warps get ahead of each other, and blocks run
// in a shuffled order: a missing barrier, or a result that depends on the order of atomics, shows.
// A barrier or a warp operation that not all threads reach is reported instead of hanging. What it
// cannot show: races between blocks that run at the same time, memory ordering, and speed.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

struct uint4 {
  unsigned x, y, z, w;
};
struct Index {
  unsigned x;
};
enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure };
typedef void* cudaStream_t;
using std::fmaf;
using std::isinf;
using std::max;
using std::min;

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 1 << 16;

enum class State { kIdle, kReady, kAtBlockBarrier, kAtWarpBarrier };

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  std::unique_ptr<char[]> stack;
  bool started = false;
  State state = State::kIdle;
  uint64_t offered = 0;  // value handed to the lanes of the warp
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline ucontext_t scheduler_start;
inline jmp_buf scheduler;
inline int current;
inline std::function<void()> body;
inline std::mt19937 shuffle_order;
inline cudaError_t last_error = cudaSuccess;
inline int multiprocessors = 1;
inline int64_t launches = 0;
inline Index thread_index, block_index, block_size, grid_size;

// Hands the CPU back to the scheduler until the thread is ready again.
inline void wait(State state) {
  const int me = current;
  fibers[me]->state = state;
  if (!_setjmp(fibers[me]->resume)) _longjmp(scheduler, 1);
  thread_index.x = unsigned(me);
}

// A fiber lives on for the blocks to come: making one costs two system calls.
inline void run_fiber() {
  for (;;) {
    body();
    wait(State::kIdle);
  }
}

inline void resume(int thread) {
  Fiber& fiber = *fibers[thread];
  current = thread;
  thread_index.x = unsigned(thread);
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.stack = std::make_unique<char[]>(kStackBytes);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber.start, run_fiber, 0);
  setcontext(&fiber.start);
}

// Lets the threads first..last - 1 go on if all of them wait at this kind of barrier.
inline bool release(int first, int last, State barrier) {
  for (int i = first; i < last; ++i)
    if (fibers[i]->state != barrier) return false;
  for (int i = first; i < last; ++i) fibers[i]->state = State::kReady;
  return true;
}

// False if some threads wait for others that will never come.
inline bool run_block(int threads) {
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  for (int i = 0; i < threads; ++i) fibers[i]->state = State::kReady;
  unsigned stalled = shuffle_order();
  for (;;) {
    std::shuffle(order.begin(), order.end(), shuffle_order);
    bool ready = false, ran = false;
    for (int i : order) {
      if (fibers[i]->state != State::kReady) continue;
      ready = true;
      if (stalled >> (i / kWarp) & 1u) continue;
      resume(i);
      ran = true;
    }
    // Half of the warps stand still until the others can go no further, or nearly so.
    if (!ran || shuffle_order() % 32 == 0) stalled = shuffle_order();
    for (int first = 0; first < threads; first += kWarp)
      ready |= release(first, std::min(first + kWarp, threads), State::kAtWarpBarrier);
    ready |= release(0, threads, State::kAtBlockBarrier);
    if (ready) continue;
    return std::all_of(order.begin(), order.end(),
                       [](int i) { return fibers[i]->state == State::kIdle; });
  }
}

template <class Kernel>
void launch(int64_t blocks, int threads, Kernel kernel) {
  ++launches;
  if (last_error != cudaSuccess) return;
  if (blocks < 1) last_error = cudaErrorLaunchFailure;
  body = kernel;
  grid_size.x = unsigned(blocks);
  block_size.x = unsigned(threads);
  while (int(fibers.size()) < threads) fibers.push_back(std::make_unique<Fiber>());
  std::vector<unsigned> order(static_cast<size_t>(std::max<int64_t>(blocks, 0)));
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), shuffle_order);
  for (unsigned block : order) {
    block_index.x = block;
    if (run_block(threads)) continue;
    last_error = cudaErrorLaunchFailure;
    fibers.clear();
    return;
  }
}

// What `lane_of(lane)` of the warp has offered; all 32 lanes must come.
template <class T, class Choose>
T exchange(T value, Choose&& choose) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const int first = current / kWarp * kWarp;
  std::memcpy(&fibers[current]->offered, &value, sizeof value);
  wait(State::kAtWarpBarrier);
  auto offered = [&](int lane) {
    T other;
    std::memcpy(&other, &fibers[first + lane]->offered, sizeof other);
    return other;
  };
  const T result = choose(current - first, offered);
  wait(State::kAtWarpBarrier);
  return result;
}

template <class T>
T update(T* at, T value) {
  const T before = *at;
  *at = value;
  return before;
}

}  // namespace emulator

#define threadIdx (emulator::thread_index)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)
#define SPARSE_OPTIM_LAUNCH(kernel, blocks, threads, stream, ...) \
  emulator::launch(blocks, threads, [=] { kernel(__VA_ARGS__); })

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = emulator::last_error;
  emulator::last_error = cudaSuccess;
  return error;
}

inline void __syncthreads() {
  emulator::wait(emulator::State::kAtBlockBarrier);
}
inline void __syncwarp() {
  emulator::wait(emulator::State::kAtWarpBarrier);
}
inline void __threadfence() {}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::exchange(value, [=](int lane, auto offered) { return offered(lane ^ mask); });
}
template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return emulator::exchange(value, [=](int, auto offered) { return offered(from); });
}
template <class T>
T __shfl_up_sync(unsigned, T value, int distance) {
  return emulator::exchange(value, [=](int lane, auto offered) {
    return offered(lane < distance ? lane : lane - distance);
  });
}
inline unsigned __ballot_sync(unsigned, bool value) {
  return emulator::exchange(unsigned(value), [](int, auto offered) {
    unsigned bits = 0;
    for (int lane = 0; lane < emulator::kWarp; ++lane) bits |= offered(lane) << lane;
    return bits;
  });
}
inline int __reduce_max_sync(unsigned, int value) {
  return emulator::exchange(value, [](int, auto offered) {
    int most = offered(0);
    for (int lane = 1; lane < emulator::kWarp; ++lane) most = std::max(most, offered(lane));
    return most;
  });
}
inline int __reduce_min_sync(unsigned, int value) {
  return -__reduce_max_sync(0, -value);
}

template <class T>
T __ldcs(const T* at) {
  return *at;
}
template <class T>
T __ldcg(const T* at) {
  return *at;
}
inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}

template <class T>
T atomicAdd(T* at, T value) {
  return emulator::update(at, T(*at + value));
}
template <class T>
T atomicExch(T* at, T value) {
  return emulator::update(at, value);
}
template <class T>
T atomicMax(T* at, T value) {
  return emulator::update(at, std::max(*at, value));
}
template <class T>
T atomicMin(T* at, T value) {
  return emulator::update(at, std::min(*at, value));
}
template <class T>
T atomicOr(T* at, T value) {
  return emulator::update(at, T(*at | value));
}

namespace sparse_optim::cuda {

inline int multiprocessors() {
  return emulator::multiprocessors;
}

}  // namespace sparse_optim::cuda
