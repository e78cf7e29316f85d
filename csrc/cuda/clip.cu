// clip: the norm of all gradients from that of each, and the factor that clips and unscales them.
//
//   grad_norm   = sqrt(sum of norms^2) / grad_scale
//   grad_factor = min(1, max_grad_norm / (grad_norm + 1e-6)) / grad_scale
//
// Bytes: 8 a gradient, 2 KB of 291. Predicted: bytes / bandwidth = a nanosecond or two on A100,
// A6000, H100 and H200, so that its launch is all it takes. One block, which adds in the same order
// in every run and on every device.
#include "core/clip.h"
#include "cuda/device.h"

namespace sparse_optim::cuda {
namespace {

__global__ void __launch_bounds__(kThreads, kResident)
    clip_kernel(const double* norms, int64_t num_norms, const float* grad_scale,
                double max_grad_norm, double* grad_norm, float* grad_factor) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < num_norms; i += kThreads) sum += norms[i] * norms[i];
  sum = block_sum(sum);
  if (threadIdx.x != 0) return;
  const Clip clip(sum, *grad_scale, max_grad_norm);
  *grad_norm = clip.grad_norm;
  *grad_factor = clip.grad_factor;
}

}  // namespace

cudaError_t clip(const double* norms, int64_t num_norms, const float* grad_scale,
                 double max_grad_norm, double* grad_norm, float* grad_factor, cudaStream_t stream) {
  SPARSE_OPTIM_LAUNCH(clip_kernel, 1, kThreads, stream, norms, num_norms, grad_scale, max_grad_norm,
                      grad_norm, grad_factor);
  return cudaGetLastError();
}

}  // namespace sparse_optim::cuda
