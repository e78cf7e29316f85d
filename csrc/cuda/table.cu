// bind: the pool's rows, written to the device's table.
//
// Rows travel as kernel arguments: no pinned memory whose reuse would have to wait for the device,
// and a captured graph keeps them.
#include "cuda/device.h"

namespace sparse_optim::cuda {
namespace {

// What fits in the arguments of a kernel: 32,764 bytes from CUDA 12.1 on, 4 KB before.
#if defined(SPARSE_OPTIM_EMULATED) || CUDART_VERSION < 12010
constexpr int kRowsPerLaunch = 120;
#else
constexpr int kRowsPerLaunch = 1000;
#endif

struct Rows {
  int64_t values[kRowsPerLaunch * kColumns];
};

__global__ void __launch_bounds__(kThreads, kResident)
    write_table_kernel(Rows rows, int count, int64_t* table) {
  for (int i = int(threadIdx.x); i < count; i += kThreads) table[i] = rows.values[i];
}

}  // namespace

cudaError_t write_table(const std::vector<Row>& rows, int64_t* table, cudaStream_t stream) {
  const int64_t size = int64_t(rows.size());
  for (int64_t first = 0; first < size; first += kRowsPerLaunch) {
    const int64_t count = size - first < kRowsPerLaunch ? size - first : kRowsPerLaunch;
    Rows part{};
    for (int64_t i = 0; i < count; ++i) write_row(part.values + i * kColumns, rows[first + i]);
    SPARSE_OPTIM_LAUNCH(write_table_kernel, 1, kThreads, stream, part, int(count * kColumns),
                        table + first * kColumns);
  }
  return cudaGetLastError();
}

}  // namespace sparse_optim::cuda
