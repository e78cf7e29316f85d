// The operators torch.ops.sparse_optim.{bind, scan, cut, append, update}: schemas, argument checks,
// and the CPU kernels behind them. LibTorch stable ABI only. What each does:
// sparse_optim/reference.py.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <string>

#include "cpu/kernels.h"

namespace sparse_optim {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

void check(const Tensor& tensor, const char* name, ScalarType dtype, int64_t numel = -1) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(numel < 0 || tensor.numel() == numel, name, " must hold ", numel,
                  " elements, got ", tensor.numel());
}

template <class T>
T* data(const Tensor& tensor) {
  return tensor.numel() ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

template <class T>
T scalar(const Tensor& tensor) {
  return *static_cast<const T*>(tensor.const_data_ptr());
}

DType dtype_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
  return DType::kFloat32;
}

void check_tile(int64_t tile) {
  STD_TORCH_CHECK(tile >= 1 && tile <= cpu::kMaxTile, "tile must be 1 to ", cpu::kMaxTile, ", got ",
                  tile);
}

// Columns of the table that `bind` writes and the operations read.
enum Column { kGrad, kParam, kNumel, kDTypes, kColumns };

void bind(Tensors grads, Tensors params, Tensor table) {
  STD_TORCH_CHECK(grads.size() == params.size(), "got ", grads.size(), " grads for ", params.size(),
                  " params");
  check(table, "table", ScalarType::Long, int64_t(params.size()) * kColumns);
  int64_t* row = data<int64_t>(table);
  for (size_t i = 0; i < params.size(); ++i, row += kColumns) {
    const Tensor &grad = grads[i], &param = params[i];
    const int64_t grad_dtype = int64_t(dtype_of(grad, "grads"));
    const int64_t param_dtype = int64_t(dtype_of(param, "params"));
    const int64_t numel = param.numel(), grad_numel = grad.numel();
    STD_TORCH_CHECK(grad_numel == 0 || grad_numel == numel, "grads[", i, "] has ", grad_numel,
                    " entries, its parameter ", numel);
    row[kGrad] = grad_numel ? reinterpret_cast<int64_t>(grad.const_data_ptr()) : 0;
    row[kParam] = numel ? reinterpret_cast<int64_t>(param.mutable_data_ptr()) : 0;
    row[kNumel] = numel;
    row[kDTypes] = grad_dtype << 8 | param_dtype;
  }
}

std::vector<cpu::PoolTensor> pool_of(const Tensor& table, const Tensor* tile_offsets,
                                     int64_t tile) {
  check(table, "bound", ScalarType::Long);
  const int64_t size = table.numel() / kColumns;
  std::vector<cpu::PoolTensor> pool(size);
  const int64_t* row = data<int64_t>(table);
  const int64_t* first_tile = nullptr;
  if (tile_offsets) {
    check(*tile_offsets, "tile_offsets", ScalarType::Long, size + 1);
    first_tile = data<int64_t>(*tile_offsets);
  }
  for (int64_t i = 0; i < size; ++i, row += kColumns) {
    pool[i] = {reinterpret_cast<const void*>(row[kGrad]),
               reinterpret_cast<void*>(row[kParam]),
               row[kNumel],
               first_tile ? first_tile[i] : 0,
               DType(row[kDTypes] >> 8),
               DType(row[kDTypes] & 0xff)};
    STD_TORCH_CHECK(
        !first_tile || first_tile[i + 1] - first_tile[i] == (row[kNumel] + tile - 1) / tile,
        "tile_offsets give tensor ", i, " ", first_tile[i + 1] - first_tile[i], " tiles of ", tile,
        " for ", row[kNumel], " entries");
  }
  return pool;
}

void check_active(const Tensor& position, const Tensor& offsets, size_t num_tensors) {
  check(position, "position", ScalarType::Int);
  check(offsets, "offsets", ScalarType::Long, int64_t(num_tensors) + 1);
  const int64_t last = data<int64_t>(offsets)[num_tensors];
  STD_TORCH_CHECK(last >= 0 && last <= position.numel(), "offsets end at ", last,
                  ", beyond the capacity ", position.numel());
}

void spawn(int workers, void (*worker)(int, void*), void* context) {
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) worker(int(i), context);
  });
}

cpu::Threads threads() {
  return {int(torch::stable::get_num_threads()), &spawn};
}

void scan(Tensor bound, Tensors dense_grads, Tensor position, Tensor offsets, Tensor tile_offsets,
          Tensor grad_scale, double max_grad_norm, int64_t tile, Tensor tile_max,
          Tensor active_grad, Tensor grad_norm, Tensor grad_factor, Tensor found_inf,
          Tensor scratch) {
  check_tile(tile);
  const auto pool = pool_of(bound, &tile_offsets, tile);
  check(tile_max, "tile_max", ScalarType::Int, data<int64_t>(tile_offsets)[pool.size()]);
  check_active(position, offsets, pool.size());
  check(active_grad, "active_grad", ScalarType::Float, position.numel());
  check(grad_scale, "grad_scale", ScalarType::Float, 1);
  check(grad_norm, "grad_norm", ScalarType::Double, 1);
  check(grad_factor, "grad_factor", ScalarType::Float, 1);
  check(found_inf, "found_inf", ScalarType::Float, 1);
  std::vector<cpu::DenseGrad> dense;
  for (const Tensor& grad : dense_grads)
    dense.push_back({grad.const_data_ptr(), grad.numel(), dtype_of(grad, "dense_grads")});

  cpu::Active active{};
  active.position = data<int32_t>(position);
  active.offsets = data<int64_t>(offsets);
  active.grad = data<float>(active_grad);
  const cpu::ScanResult result =
      cpu::scan(threads(), pool, dense, active, tile, data<int32_t>(tile_max));
  const double scale = scalar<float>(grad_scale);
  const double norm = std::sqrt(result.sum_of_squares) / scale;
  const double clip =
      std::isinf(max_grad_norm) ? 1.0 : std::fmin(1.0, max_grad_norm / (norm + 1e-6));
  *data<double>(grad_norm) = norm;
  *data<float>(grad_factor) = float(clip / scale);
  if (result.non_finite) *data<float>(found_inf) = 1.f;
}

void cut(Tensor bound, Tensor position, Tensor offsets, Tensor tile_offsets, Tensor tile_max,
         Tensor param_bound, Tensor targets, Tensor progress, Tensor found_inf, double exp,
         double eps, int64_t tile, Tensor new_tensor, Tensor new_position, Tensor new_count,
         Tensor threshold, Tensor scratch) {
  check_tile(tile);
  const auto pool = pool_of(bound, &tile_offsets, tile);
  check(tile_max, "tile_max", ScalarType::Int, data<int64_t>(tile_offsets)[pool.size()]);
  check_active(position, offsets, pool.size());
  check(param_bound, "param_bound", ScalarType::Float, exp < 0 ? tile_max.numel() : 0);
  check(targets, "targets", ScalarType::Long);
  check(progress, "progress", ScalarType::Long, 3);
  check(found_inf, "found_inf", ScalarType::Float, 1);
  check(new_tensor, "new_tensor", ScalarType::Int);
  check(new_position, "new_position", ScalarType::Int, new_tensor.numel());
  check(new_count, "new_count", ScalarType::Long, 1);
  check(threshold, "threshold", ScalarType::Float, 1);
  STD_TORCH_CHECK(targets.numel() > 0, "targets must hold at least one element");

  const int64_t* counts = data<int64_t>(progress);
  const int64_t last = targets.numel() - 1;
  const int64_t target = data<int64_t>(targets)[counts[0] < last ? counts[0] + 1 : last];
  int64_t quota = target > counts[1] ? target - counts[1] : 0;
  quota = quota < new_position.numel() ? quota : new_position.numel();
  if (scalar<float>(found_inf) != 0.f) quota = 0;

  cpu::Active active{};
  active.position = data<int32_t>(position);
  active.offsets = data<int64_t>(offsets);
  cpu::NewEntries found{data<int32_t>(new_tensor), data<int32_t>(new_position),
                        data<int64_t>(new_count), new_position.numel()};
  const int32_t key = cpu::cut(threads(), pool, active, tile_max.numel(), data<int32_t>(tile_max),
                               data<float>(param_bound), quota, exp, float(eps), tile, found);
  if (key) *data<float>(threshold) = from_bits(key);
}

cpu::Active active_of(const Tensor& position, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                      const Tensor& unmask_step, const Tensor& master, const Tensor& active_grad,
                      const Tensor& offsets, const Tensor& progress, size_t num_tensors) {
  const int64_t capacity = position.numel();
  check_active(position, offsets, num_tensors);
  check(exp_avg, "exp_avg", ScalarType::Float, capacity);
  check(exp_avg_sq, "exp_avg_sq", ScalarType::Float, capacity);
  check(unmask_step, "unmask_step", ScalarType::Int, capacity);
  check(master, "master", ScalarType::Float, master.numel() ? capacity : 0);
  check(active_grad, "active_grad", ScalarType::Float, capacity);
  check(progress, "progress", ScalarType::Long, 3);
  return {data<int32_t>(position),    data<float>(exp_avg),   data<float>(exp_avg_sq),
          data<int32_t>(unmask_step), data<float>(master),    data<float>(active_grad),
          data<int64_t>(offsets),     data<int64_t>(progress)};
}

void append(Tensor bound, Tensor new_tensor, Tensor new_position, Tensor new_count, Tensor position,
            Tensor exp_avg, Tensor exp_avg_sq, Tensor unmask_step, Tensor master,
            Tensor active_grad, Tensor offsets, Tensor progress, Tensor scratch) {
  const auto pool = pool_of(bound, nullptr, 1);
  cpu::Active active = active_of(position, exp_avg, exp_avg_sq, unmask_step, master, active_grad,
                                 offsets, progress, pool.size());
  check(new_tensor, "new_tensor", ScalarType::Int);
  check(new_position, "new_position", ScalarType::Int, new_tensor.numel());
  check(new_count, "new_count", ScalarType::Long, 1);
  const cpu::NewEntries found{data<int32_t>(new_tensor), data<int32_t>(new_position),
                              data<int64_t>(new_count), new_position.numel()};
  STD_TORCH_CHECK(
      *found.count <= found.capacity && active.progress[1] + *found.count <= position.numel(),
      "new_count is ", *found.count, ", more than there is room for");
  cpu::append(threads(), pool, found, active);
}

void update(Tensor bound, Tensor position, Tensor offsets, Tensor active_grad, Tensor grad_factor,
            Tensor found_inf, Tensor hyper, Tensor group_index, std::string bias_correction,
            Tensor exp_avg, Tensor exp_avg_sq, Tensor unmask_step, Tensor master, Tensor progress) {
  STD_TORCH_CHECK(bias_correction == "entry" || bias_correction == "global",
                  "bias_correction must be 'entry' or 'global', got '", bias_correction, "'");
  const auto pool = pool_of(bound, nullptr, 1);
  cpu::Active active = active_of(position, exp_avg, exp_avg_sq, unmask_step, master, active_grad,
                                 offsets, progress, pool.size());
  check(grad_factor, "grad_factor", ScalarType::Float, 1);
  check(found_inf, "found_inf", ScalarType::Float, 1);
  check(hyper, "hyper", ScalarType::Double);
  check(group_index, "group_index", ScalarType::Int, int64_t(pool.size()));
  for (size_t i = 0; i < pool.size(); ++i) {
    const int32_t group = data<int32_t>(group_index)[i];
    STD_TORCH_CHECK(group >= 0 && 6 * (int64_t(group) + 1) <= hyper.numel(), "group_index[", i,
                    "] is ", group, ", but hyper has ", hyper.numel() / 6, " rows");
  }
  if (scalar<float>(found_inf) != 0.f) {
    ++active.progress[2];
    return;
  }
  static_assert(sizeof(cpu::Hyper) == 6 * sizeof(double));
  cpu::update(threads(), pool, active, reinterpret_cast<const cpu::Hyper*>(data<double>(hyper)),
              data<int32_t>(group_index), bias_correction == "entry", scalar<float>(grad_factor));
  ++active.progress[0];
}

}  // namespace

STABLE_TORCH_LIBRARY(sparse_optim, library) {
  library.def("bind(Tensor[] grads, Tensor[] params, Tensor(a!) table) -> ()");
  library.def(
      "scan(Tensor bound, Tensor[] dense_grads, Tensor position, Tensor offsets, "
      "Tensor tile_offsets, Tensor grad_scale, float max_grad_norm, int tile, "
      "Tensor(a!) tile_max, Tensor(b!) active_grad, Tensor(c!) grad_norm, Tensor(d!) grad_factor, "
      "Tensor(e!) found_inf, Tensor(f!) scratch) -> ()");
  library.def(
      "cut(Tensor bound, Tensor position, Tensor offsets, Tensor tile_offsets, "
      "Tensor tile_max, Tensor param_bound, Tensor targets, Tensor progress, Tensor found_inf, "
      "float exp, float eps, int tile, Tensor(a!) new_tensor, Tensor(b!) new_position, "
      "Tensor(c!) new_count, Tensor(d!) threshold, Tensor(e!) scratch) -> ()");
  library.def(
      "append(Tensor bound, Tensor new_tensor, Tensor new_position, "
      "Tensor new_count, Tensor(a!) position, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
      "Tensor(d!) unmask_step, Tensor(e!) master, Tensor(f!) active_grad, Tensor(g!) offsets, "
      "Tensor(h!) progress, Tensor(i!) scratch) -> ()");
  library.def(
      "update(Tensor bound, Tensor position, Tensor offsets, "
      "Tensor active_grad, Tensor grad_factor, Tensor found_inf, Tensor hyper, Tensor group_index, "
      "str bias_correction, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor unmask_step, "
      "Tensor(d!) master, Tensor(e!) progress) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_optim, CPU, library) {
  library.impl("bind", TORCH_BOX(&bind));
  library.impl("scan", TORCH_BOX(&scan));
  library.impl("cut", TORCH_BOX(&cut));
  library.impl("append", TORCH_BOX(&append));
  library.impl("update", TORCH_BOX(&update));
}

}  // namespace sparse_optim

static PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
extern "C" PyMODINIT_FUNC PyInit__C(void) {
  return PyModule_Create(&module);
}
