// The CUDA kernels without torch: for compute-sanitizer and ncu, whose every kernel is then ours,
// and for a first run on a new card. Run by bench/gpu_first.py; by hand:
//
//   nvcc -std=c++17 -O3 -fmad=false -lineinfo -arch=sm_90 -Icsrc -Ibench
//     bench/kernels_alone.cu csrc/cuda/*.cu -o kernels_alone
//   kernels_alone check [fresh | large]    compare two steps with a host implementation
//   kernels_alone bench [shrink [rounds]]  time 7B in bfloat16, tensors divided by `shrink`
//   kernels_alone step [shrink]            run one step of it, for ncu
//
// No GPU has run it yet. The check also runs in the emulator of tests/support/cuda_emulator.
#include <string>

#include "kernels_alone/check.h"
#include "kernels_alone/timings.h"

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const std::string mode = argc > 1 ? argv[1] : "";
  const std::string argument = argc > 2 ? argv[2] : "";
  const int64_t shrink = argument.empty() ? 1 : std::atoll(argv[2]);
  const int rounds = argc > 3 ? std::atoi(argv[3]) : 9;
  if (mode == "check") {
    const bool is_large = argument == "large";
    const bool good = is_large ? alone::check_large() : alone::check_all(argument == "fresh");
    std::printf(good ? "all equal\n" : "FAILED\n");
    return good ? 0 : 1;
  }
  if (mode == "bench" || mode == "step") {
    alone::Timings timings(shrink, rounds);
    mode == "bench" ? timings.run() : timings.step();
    return 0;
  }
  std::printf(
      "usage: kernels_alone check [fresh | large] | bench [shrink [rounds]] | step [shrink]\n");
  return 2;
}
