// The CUDA launchers as C functions for ctypes, run by the emulator. Pointers are of host memory.
// Each returns 0, or an error number where threads waited for others that never came.
#include "cuda/kernels.h"

using namespace sparse_optim;
using cuda::Pool;

extern "C" {

// How many multiprocessors to pretend, which sets the grids; and the order of threads and blocks.
void configure(int multiprocessors, unsigned seed) {
  emulator::multiprocessors = multiprocessors;
  emulator::shuffle_order.seed(seed);
}

// Kernels launched so far.
int64_t launches() {
  return emulator::launches;
}

int64_t scratch_bytes(int64_t num_tiles, int64_t capacity, int64_t max_quota) {
  return cuda::scratch_bytes(num_tiles, capacity, max_quota);
}

// rows: (num_tensors, 5) of grad, param, numel and the two dtypes.
int write_table(const int64_t* rows, int64_t num_tensors, int64_t* table) {
  std::vector<Row> list;
  for (const int64_t* row = rows; row != rows + 5 * num_tensors; row += 5)
    list.push_back({reinterpret_cast<const void*>(row[0]), reinterpret_cast<void*>(row[1]), row[2],
                    DType(row[3]), DType(row[4])});
  return cuda::write_table(list, table, nullptr);
}

// dense: (num_dense, 3) of gradient, numel, dtype.
int scan(Pool pool, const int64_t* dense, int64_t num_dense, const int32_t* position,
         const int64_t* offsets, int32_t* tile_max, float* active_grad, double* norms,
         float* found_inf, void* scratch) {
  std::vector<DenseGrad> list;
  for (const int64_t* row = dense; row != dense + 3 * num_dense; row += 3)
    list.push_back({reinterpret_cast<const void*>(row[0]), row[1], DType(row[2])});
  return cuda::scan(pool, list, position, offsets, {tile_max, active_grad, norms, found_inf},
                    scratch, nullptr);
}

// row: as in write_table.
int scan_one(const int64_t* row, int64_t* table, int64_t num_tiles, int64_t tile,
             const int32_t* position, const int64_t* offsets, int32_t* tile_max, float* active_grad,
             double* norm, float* found_inf, unsigned* arrived, void* scratch) {
  const Row packed{reinterpret_cast<const void*>(row[0]), reinterpret_cast<void*>(row[1]), row[2],
                   DType(row[3]), DType(row[4])};
  return cuda::scan_one(packed, table, num_tiles, tile, position, offsets,
                        {tile_max, active_grad, norm, found_inf}, arrived, scratch, nullptr);
}

int clip(const double* norms, int64_t num_norms, const float* grad_scale, double max_grad_norm,
         double* grad_norm, float* grad_factor) {
  return cuda::clip(norms, num_norms, grad_scale, max_grad_norm, grad_norm, grad_factor, nullptr);
}

int rank(Pool pool, const int32_t* position, const int64_t* offsets, const int64_t* noise,
         int32_t* tile_max) {
  return cuda::rank(pool, position, offsets, noise, tile_max, nullptr);
}

int cut(Pool pool, const int32_t* position, const int64_t* offsets, const int32_t* tile_max,
        const float* param_bound, const int64_t* targets, int64_t num_targets,
        const int64_t* progress, const float* found_inf, double exp, double eps,
        const int64_t* noise, int32_t* new_tensor, int32_t* new_position, int64_t* new_count,
        int64_t max_quota, float* threshold, void* scratch) {
  return cuda::cut(
      pool, position, offsets,
      {tile_max, param_bound, targets, num_targets, progress, found_inf, exp, float(eps), noise},
      {new_tensor, new_position, new_count, max_quota}, threshold, scratch, nullptr);
}

int64_t collected_bytes(int64_t max_quota) {
  return cuda::collected_bytes(max_quota);
}

int collect_begin(const int64_t* targets, int64_t num_targets, const int64_t* progress,
                  int64_t max_quota, void* collected) {
  return cuda::collect_begin({targets, num_targets, progress}, max_quota, collected, nullptr);
}

int collect(Pool pool, const int32_t* position, const int64_t* offsets, const int32_t* tile_max,
            const float* param_bound, double exp, double eps, int scored, int64_t first_tensor,
            int64_t max_quota, void* collected, void* scratch) {
  return cuda::collect(pool, position, offsets, tile_max, param_bound, exp, float(eps), scored != 0,
                       first_tensor, max_quota, collected, scratch, nullptr);
}

int collect_end(const float* found_inf, int32_t* new_tensor, int32_t* new_position,
                int64_t* new_count, int64_t room, float* threshold, float* grad, int64_t max_quota,
                void* collected) {
  return cuda::collect_end(found_inf, {new_tensor, new_position, new_count, room}, threshold, grad,
                           max_quota, collected, nullptr);
}

int append(Pool pool, int32_t* new_tensor, int32_t* new_position, int64_t* new_count,
           int64_t max_quota, Active active, int64_t capacity, void* scratch) {
  return cuda::append(pool, {new_tensor, new_position, new_count, max_quota}, active, capacity,
                      scratch, nullptr);
}

int update(Pool pool, Active active, int64_t capacity, const float* grad_factor,
           const float* found_inf, const double* hyper, int64_t num_groups,
           const int32_t* group_index, int entry_age, unsigned* arrived) {
  return cuda::update(pool, active, capacity, grad_factor, found_inf,
                      reinterpret_cast<const Hyper*>(hyper), num_groups, group_index,
                      entry_age != 0, arrived, nullptr);
}

int64_t sampled_grad_scratch_bytes(int64_t tokens, int64_t count) {
  return cuda::sampled_grad_scratch_bytes(tokens, count);
}

// outer, inner: data, rows, columns, strides of both, dtype.
int sampled_grad(const int64_t* outer, const int64_t* inner, const int32_t* position, int64_t count,
                 float* out, void* scratch, int64_t scratch_bytes) {
  const auto matrix_of = [](const int64_t* values) {
    return Matrix{reinterpret_cast<const void*>(values[0]),
                  values[1],
                  values[2],
                  values[3],
                  values[4],
                  DType(values[5])};
  };
  return cuda::sampled_grad(matrix_of(outer), matrix_of(inner), position, count, out, scratch,
                            scratch_bytes, nullptr);
}

int gather(Pool pool, const int32_t* position, const int64_t* offsets, int64_t capacity,
           int32_t* value) {
  return cuda::gather(pool, position, offsets, capacity, value, nullptr);
}

int exchange(Pool pool, const int32_t* position, const int64_t* offsets, int64_t capacity,
             int32_t* value) {
  return cuda::exchange(pool, position, offsets, capacity, value, nullptr);
}

}  // extern "C"
