// How kernels are launched: by nvcc, or in the emulator that runs the same text on the CPU
// (tests/support/cuda_emulator).
#pragma once
#if defined(SPARSE_OPTIM_EMULATED)
#include "emulator.h"
#else
#include <cuda_runtime.h>

#define SPARSE_OPTIM_LAUNCH(kernel, blocks, threads, stream, ...) \
  kernel<<<unsigned(blocks), threads, 0, stream>>>(__VA_ARGS__)

namespace sparse_optim::cuda {

inline int multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

}  // namespace sparse_optim::cuda
#endif
