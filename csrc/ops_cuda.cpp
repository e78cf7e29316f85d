// The CUDA kernels behind torch.ops.sparse_optim.{bind, bind_rows, scan, scan_one, clip, rank, cut,
// collect_begin, collect, collect_end, append, update, sampled_grad, gather, exchange}, whose
// schemas csrc/ops.cpp defines. LibTorch stable ABI only; compiles without nvcc.
//
// Nothing here reads a device tensor, so that no call waits for the device and a step can be
// captured in a CUDA graph. Checks of contents (tile_offsets, offsets, group_index, new_count,
// position) are therefore left to the CPU operators.
#include <Python.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "cuda/kernels.h"

namespace sparse_optim {
namespace {

// The device of a call, made the current one, and its stream.
class Device {
 public:
  Device(const Tensor& tensor, const char* name) : place{device_of(tensor, name)}, guard_(index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }

  const Place place;
  cudaStream_t stream;

 private:
  static int32_t device_of(const Tensor& tensor, const char* name) {
    STD_TORCH_CHECK(tensor.is_cuda(), name, " must be on a CUDA device");
    return tensor.get_device_index();
  }
  int32_t index() const { return place.cuda_device; }

  torch::stable::accelerator::DeviceGuard guard_;
};

cuda::Pool pool_of(const Device& device, const Tensor& bound) {
  const int64_t num_tensors = check_bound(device.place, bound);
  return {data<int64_t>(bound), nullptr, num_tensors, 0, 1};
}

cuda::Pool tiled_pool_of(const Device& device, const Tensor& bound, const Tensor& tile_offsets,
                         int64_t tile, const Tensor& tile_max) {
  cuda::Pool pool = pool_of(device, bound);
  check_tiles(device.place, pool.num_tensors, tile, tile_offsets, tile_max);
  STD_TORCH_CHECK(tile_max.numel() < int64_t(1) << 31, "the pool has ", tile_max.numel(),
                  " tiles of ", tile, ", 2^31 or more");
  pool.tile_offsets = data<int64_t>(tile_offsets);
  pool.num_tiles = tile_max.numel();
  pool.tile = tile;
  return pool;
}

void* check_scratch(const Device& device, const Tensor& scratch, int64_t bytes) {
  device.place.check(scratch, "scratch", ScalarType::Byte);
  STD_TORCH_CHECK(scratch.numel() >= bytes, "scratch must hold ", bytes, " bytes, got ",
                  scratch.numel(), "; size it with sparse_optim.backends.cuda.scratch_bytes");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(scratch.const_data_ptr()) % 8 == 0,
                  "scratch must be aligned to 8 bytes");
  return data<uint8_t>(scratch);
}

void bind(Tensors grads, Tensors params, Tensor table) {
  const Device device(table, "table");
  const auto rows = check_bind(device.place, grads, params, table);
  STD_CUDA_CHECK(cuda::write_table(rows, data<int64_t>(table), device.stream));
}

void bind_rows(Tensor rows, Tensor table) {
  const Device device(table, "table");
  const auto from = check_rows(rows, device.place, table);
  STD_CUDA_CHECK(cuda::write_table(from, data<int64_t>(table), device.stream));
}

void scan(Tensor bound, Tensors dense_grads, Tensor position, Tensor offsets, Tensor tile_offsets,
          int64_t tile, Tensor tile_max, Tensor active_grad, Tensor norms, Tensor found_inf,
          Tensor scratch) {
  const Device device(bound, "bound");
  const cuda::Pool pool = tiled_pool_of(device, bound, tile_offsets, tile, tile_max);
  check_positions(device.place, pool.num_tensors, position, offsets);
  const auto dense = check_dense(device.place, dense_grads);
  check_scan(device.place, position, active_grad, pool.num_tensors + int64_t(dense.size()), norms,
             found_inf);
  void* work = check_scratch(device, scratch, cuda::scan_scratch_bytes(pool.num_tiles));
  const cuda::ScanOutput out{data<int32_t>(tile_max), data<float>(active_grad), data<double>(norms),
                             data<float>(found_inf)};
  STD_CUDA_CHECK(cuda::scan(pool, dense, data<int32_t>(position), data<int64_t>(offsets), out, work,
                            device.stream));
}

void scan_one(Tensor grad, Tensor param, Tensor table, Tensor position, Tensor offsets,
              int64_t tile, Tensor tile_max, Tensor active_grad, Tensor norm, Tensor found_inf,
              Tensor arrived, Tensor scratch) {
  const Device device(table, "table");
  const Row row = check_bind(device.place, {grad}, {param}, table)[0];
  STD_TORCH_CHECK(tile >= 1 && tile <= kMaxTile, "tile must be 1 to ", kMaxTile, ", got ", tile);
  const int64_t num_tiles = (row.numel + tile - 1) / tile;
  device.place.check(tile_max, "tile_max", ScalarType::Int, num_tiles);
  check_positions(device.place, 1, position, offsets);
  check_scan(device.place, position, active_grad, 1, norm, found_inf);
  device.place.check(arrived, "arrived", ScalarType::Int, 1);
  void* work = check_scratch(device, scratch, cuda::scan_scratch_bytes(num_tiles));
  const cuda::ScanOutput out{data<int32_t>(tile_max), data<float>(active_grad), data<double>(norm),
                             data<float>(found_inf)};
  STD_CUDA_CHECK(cuda::scan_one(
      row, data<int64_t>(table), num_tiles, tile, data<int32_t>(position), data<int64_t>(offsets),
      out, reinterpret_cast<unsigned*>(data<int32_t>(arrived)), work, device.stream));
}

void clip(Tensor norms, Tensor grad_scale, double max_grad_norm, Tensor grad_norm,
          Tensor grad_factor) {
  const Device device(norms, "norms");
  check_clip(device.place, norms, grad_scale, grad_norm, grad_factor);
  STD_CUDA_CHECK(cuda::clip(data<double>(norms), norms.numel(), data<float>(grad_scale),
                            max_grad_norm, data<double>(grad_norm), data<float>(grad_factor),
                            device.stream));
}

void rank(Tensor bound, Tensor position, Tensor offsets, Tensor tile_offsets, Tensor noise,
          int64_t tile, Tensor tile_max, Tensor scratch) {
  const Device device(bound, "bound");
  const cuda::Pool pool = tiled_pool_of(device, bound, tile_offsets, tile, tile_max);
  check_positions(device.place, pool.num_tensors, position, offsets);
  check_noise(device.place, noise, 0.0);
  STD_CUDA_CHECK(cuda::rank(pool, data<int32_t>(position), data<int64_t>(offsets),
                            data<int64_t>(noise), data<int32_t>(tile_max), device.stream));
}

void cut(Tensor bound, Tensor position, Tensor offsets, Tensor tile_offsets, Tensor tile_max,
         Tensor param_bound, Tensor targets, Tensor progress, Tensor found_inf, double exp,
         double eps, Tensor noise, int64_t tile, Tensor new_tensor, Tensor new_position,
         Tensor new_count, Tensor threshold, Tensor scratch) {
  const Device device(bound, "bound");
  const cuda::Pool pool = tiled_pool_of(device, bound, tile_offsets, tile, tile_max);
  check_positions(device.place, pool.num_tensors, position, offsets);
  check_cut(device.place, tile_max, param_bound, targets, progress, found_inf, exp, threshold);
  check_noise(device.place, noise, exp);
  const NewEntries found = check_new(device.place, new_tensor, new_position, new_count);
  void* work = check_scratch(device, scratch, cuda::cut_scratch_bytes(pool.num_tiles));
  const cuda::CutInput in{data<int32_t>(tile_max),
                          data<float>(param_bound),
                          data<int64_t>(targets),
                          signed_length(targets),
                          data<int64_t>(progress),
                          data<float>(found_inf),
                          exp,
                          float(eps),
                          data<int64_t>(noise)};
  STD_CUDA_CHECK(cuda::cut(pool, data<int32_t>(position), data<int64_t>(offsets), in, found,
                           data<float>(threshold), work, device.stream));
}

void* check_collected(const Device& device, const Tensor& collected, int64_t max_quota) {
  STD_TORCH_CHECK(max_quota >= 0, "max_quota must not be negative, got ", max_quota);
  device.place.check(collected, "collected", ScalarType::Byte, cuda::collected_bytes(max_quota));
  void* at = data<uint8_t>(collected);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(at) % sizeof(uint64_t) == 0,
                  "collected must begin at a multiple of 8 bytes");
  return at;
}

void collect_begin(Tensor targets, Tensor progress, int64_t max_quota, Tensor collected) {
  const Device device(progress, "progress");
  check_targets(device.place, targets, progress);
  const cuda::CollectInput in{data<int64_t>(targets), signed_length(targets),
                              data<int64_t>(progress)};
  void* at = check_collected(device, collected, max_quota);
  STD_CUDA_CHECK(cuda::collect_begin(in, max_quota, at, device.stream));
}

void collect(Tensor bound, Tensor position, Tensor offsets, Tensor tile_offsets, Tensor tile_max,
             Tensor param_bound, double exp, double eps, bool scored, int64_t tile,
             int64_t first_tensor, int64_t max_quota, Tensor collected, Tensor scratch) {
  const Device device(bound, "bound");
  const cuda::Pool pool = tiled_pool_of(device, bound, tile_offsets, tile, tile_max);
  check_positions(device.place, pool.num_tensors, position, offsets);
  check_param_bound(device.place, tile_max, param_bound, exp);
  STD_TORCH_CHECK(first_tensor >= 0 && first_tensor + pool.num_tensors <= INT32_MAX,
                  "first_tensor must be from 0 to 2^31 - 1 less the number of tensors, got ",
                  first_tensor);
  void* at = check_collected(device, collected, max_quota);
  void* work = check_scratch(device, scratch, cuda::cut_scratch_bytes(pool.num_tiles));
  STD_CUDA_CHECK(cuda::collect(pool, data<int32_t>(position), data<int64_t>(offsets),
                               data<int32_t>(tile_max), data<float>(param_bound), exp, float(eps),
                               scored, first_tensor, max_quota, at, work, device.stream));
}

void collect_end(Tensor found_inf, Tensor new_tensor, Tensor new_position, Tensor new_count,
                 Tensor threshold, Tensor grad, Tensor collected) {
  const Device device(found_inf, "found_inf");
  device.place.check(found_inf, "found_inf", ScalarType::Float, 1);
  device.place.check(threshold, "threshold", ScalarType::Float, 1);
  const NewEntries found = check_new(device.place, new_tensor, new_position, new_count);
  device.place.check(grad, "grad", ScalarType::Float, found.capacity);
  void* at = check_collected(device, collected, found.capacity);
  STD_CUDA_CHECK(cuda::collect_end(data<float>(found_inf), found, data<float>(threshold),
                                   data<float>(grad), found.capacity, at, device.stream));
}

void append(Tensor bound, Tensor new_tensor, Tensor new_position, Tensor new_count, Tensor position,
            Tensor exp_avg, Tensor exp_avg_sq, Tensor unmask_step, Tensor master,
            Tensor active_grad, Tensor offsets, Tensor progress, Tensor scratch) {
  const Device device(bound, "bound");
  const cuda::Pool pool = pool_of(device, bound);
  const Active active = check_active(device.place, pool.num_tensors, position, exp_avg, exp_avg_sq,
                                     unmask_step, master, active_grad, offsets, progress);
  const NewEntries found = check_new(device.place, new_tensor, new_position, new_count);
  void* work =
      check_scratch(device, scratch, cuda::append_scratch_bytes(position.numel(), found.capacity));
  STD_CUDA_CHECK(cuda::append(pool, found, active, position.numel(), work, device.stream));
}

void update(Tensor bound, Tensor position, Tensor offsets, Tensor active_grad, Tensor grad_factor,
            Tensor found_inf, Tensor hyper, Tensor group_index, std::string bias_correction,
            Tensor exp_avg, Tensor exp_avg_sq, Tensor unmask_step, Tensor master, Tensor progress,
            Tensor arrived) {
  const Device device(bound, "bound");
  const cuda::Pool pool = pool_of(device, bound);
  device.place.check(arrived, "arrived", ScalarType::Int, 1);
  const int64_t num_groups = check_update(device.place, pool.num_tensors, bias_correction,
                                          grad_factor, found_inf, hyper, group_index);
  STD_TORCH_CHECK(num_groups <= cuda::kMaxGroups, "hyper has ", num_groups,
                  " rows; on CUDA an optimizer has at most ", cuda::kMaxGroups,
                  " param groups: merge groups of equal options");
  const Active active = check_active(device.place, pool.num_tensors, position, exp_avg, exp_avg_sq,
                                     unmask_step, master, active_grad, offsets, progress);
  STD_CUDA_CHECK(cuda::update(pool, active, position.numel(), data<float>(grad_factor),
                              data<float>(found_inf),
                              reinterpret_cast<const Hyper*>(data<double>(hyper)), num_groups,
                              data<int32_t>(group_index), bias_correction == "entry",
                              reinterpret_cast<unsigned*>(data<int32_t>(arrived)), device.stream));
}

void sampled_grad(Tensor input, Tensor grad_output, Tensor position, bool transposed, Tensor out) {
  const Device device(input, "input");
  check_sampled(device.place, input, grad_output, position, out);
  const Matrix x = matrix_of(device.place, input, "input");
  const Matrix dy = matrix_of(device.place, grad_output, "grad_output");
  const int64_t bytes = cuda::sampled_grad_scratch_bytes(x.rows, position.numel());
  // From the caching allocator: reused in the order of the stream, captured in graphs.
  const Tensor scratch = torch::stable::new_empty(out, {bytes}, ScalarType::Byte);
  STD_CUDA_CHECK(cuda::sampled_grad(transposed ? x : dy, transposed ? dy : x,
                                    data<int32_t>(position), position.numel(), data<float>(out),
                                    data<uint8_t>(scratch), bytes, device.stream));
}

template <auto visit>
void visit_entries(Tensor bound, Tensor position, Tensor offsets, Tensor value) {
  const Device device(bound, "bound");
  const cuda::Pool pool = pool_of(device, bound);
  check_exchange(device.place, pool.num_tensors, position, offsets, value);
  STD_CUDA_CHECK(visit(pool, data<int32_t>(position), data<int64_t>(offsets), position.numel(),
                       data<int32_t>(value), device.stream));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse_optim, CUDA, library) {
  library.impl("bind", TORCH_BOX(&bind));
  library.impl("bind_rows", TORCH_BOX(&bind_rows));
  library.impl("scan", TORCH_BOX(&scan));
  library.impl("scan_one", TORCH_BOX(&scan_one));
  library.impl("clip", TORCH_BOX(&clip));
  library.impl("rank", TORCH_BOX(&rank));
  library.impl("cut", TORCH_BOX(&cut));
  library.impl("collect_begin", TORCH_BOX(&collect_begin));
  library.impl("collect", TORCH_BOX(&collect));
  library.impl("collect_end", TORCH_BOX(&collect_end));
  library.impl("append", TORCH_BOX(&append));
  library.impl("update", TORCH_BOX(&update));
  library.impl("sampled_grad", TORCH_BOX(&sampled_grad));
  library.impl("gather", TORCH_BOX(&visit_entries<&cuda::gather>));
  library.impl("exchange", TORCH_BOX(&visit_entries<&cuda::exchange>));
}

}  // namespace sparse_optim

// scratch_bytes(num_tiles, capacity, max_quota): how long `scratch` must be.
static PyObject* scratch_bytes(PyObject*, PyObject* arguments) {
  long long num_tiles, capacity, max_quota;
  if (!PyArg_ParseTuple(arguments, "LLL", &num_tiles, &capacity, &max_quota)) return nullptr;
  return PyLong_FromLongLong(sparse_optim::cuda::scratch_bytes(num_tiles, capacity, max_quota));
}

// collected_bytes(max_quota): how long `collected` must be.
static PyObject* collected_bytes(PyObject*, PyObject* arguments) {
  long long max_quota;
  if (!PyArg_ParseTuple(arguments, "L", &max_quota)) return nullptr;
  return PyLong_FromLongLong(sparse_optim::cuda::collected_bytes(max_quota));
}

static PyMethodDef functions[] = {{"scratch_bytes", scratch_bytes, METH_VARARGS, nullptr},
                                  {"collected_bytes", collected_bytes, METH_VARARGS, nullptr},
                                  {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};
extern "C" PyMODINIT_FUNC PyInit__C_cuda(void) {
  return PyModule_Create(&module);
}
