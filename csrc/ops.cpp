// The operators torch.ops.sparse_optim.{bind, bind_rows, scan, clip, rank, cut, append, update,
// sampled_grad, gather, exchange}: schemas, argument checks, and the CPU kernels behind them.
// LibTorch stable ABI only. What each does: sparse_optim/backends/reference.py.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "core/clip.h"
#include "core/schedule.h"
#include "cpu/kernels.h"
#include "held.h"

namespace sparse_optim {
namespace {

constexpr Place kCpu{};

template <class T>
T scalar(const Tensor& tensor) {
  return *static_cast<const T*>(tensor.const_data_ptr());
}

void bind(Tensors grads, Tensors params, Tensor table) {
  int64_t* row = data<int64_t>(table);
  for (const Row& from : check_bind(kCpu, grads, params, table)) {
    write_row(row, from);
    row += kColumns;
  }
}

void bind_rows(Tensor rows, Tensor table) {
  check_rows(rows, kCpu, table);
  std::copy_n(data<int64_t>(rows), rows.numel(), data<int64_t>(table));
}

std::vector<cpu::PoolTensor> pool_of(const Tensor& table) {
  const int64_t size = check_bound(kCpu, table);
  std::vector<cpu::PoolTensor> pool;
  for (int64_t i = 0; i < size; ++i) {
    const Row row = sealed_row(table, i, "bound");
    pool.push_back({row.grad, row.param, row.numel, 0, row.grad_dtype, row.param_dtype});
  }
  return pool;
}

std::vector<cpu::PoolTensor> tiled_pool_of(const Tensor& table, const Tensor& tile_offsets,
                                           int64_t tile, const Tensor& tile_max) {
  auto pool = pool_of(table);
  check_tiles(kCpu, int64_t(pool.size()), tile, tile_offsets, tile_max);
  const int64_t* first_tile = data<int64_t>(tile_offsets);
  for (size_t i = 0; i < pool.size(); ++i) {
    pool[i].first_tile = first_tile[i];
    STD_TORCH_CHECK(first_tile[i + 1] - first_tile[i] == (pool[i].numel + tile - 1) / tile,
                    "tile_offsets give tensor ", i, " ", first_tile[i + 1] - first_tile[i],
                    " tiles of ", tile, " for ", pool[i].numel, " entries");
  }
  kCpu.check(tile_max, "tile_max", ScalarType::Int, first_tile[pool.size()]);
  return pool;
}

// What kernels index by, as far as one look at each tensor tells: positions ascend in between.
void check_entries(const std::vector<cpu::PoolTensor>& pool, const Tensor& position,
                   const Tensor& offsets) {
  const int64_t* offset = data<int64_t>(offsets);
  STD_TORCH_CHECK(offset[0] >= 0, "offsets begin at ", offset[0]);
  for (size_t i = 0; i < pool.size(); ++i) {
    const int64_t first = offset[i], last = offset[i + 1];
    STD_TORCH_CHECK(first <= last && last <= position.numel() && last - first <= pool[i].numel,
                    "offsets give tensor ", i, " of ", pool[i].numel, " entries those from ", first,
                    " to ", last, " of ", position.numel());
    if (first == last) continue;
    const int64_t least = data<int32_t>(position)[first], most = data<int32_t>(position)[last - 1];
    STD_TORCH_CHECK(least >= 0 && least <= most && most < pool[i].numel, "position of tensor ", i,
                    " goes from ", least, " to ", most, ", beyond its ", pool[i].numel, " entries");
  }
}

void check_progress(const Active& active, size_t num_tensors) {
  const int64_t step = active.progress[0], held = active.offsets[num_tensors];
  STD_TORCH_CHECK(step >= 0 && step < INT32_MAX && active.progress[1] == held, "progress counts ",
                  step, " steps and ", active.progress[1], " active entries of ", held);
}

void check_found(const std::vector<cpu::PoolTensor>& pool, const NewEntries& found,
                 const Active& active, int64_t capacity) {
  const int64_t count = *found.count;
  STD_TORCH_CHECK(count >= 0 && count <= found.capacity && active.progress[1] + count <= capacity,
                  "new_count is ", count, ", more than there is room for");
  for (int64_t i = 0; i < count; ++i) {
    const int64_t tensor = found.tensor[i], position = found.position[i];
    const bool inside = tensor >= 0 && tensor < int64_t(pool.size()) && position >= 0 &&
                        position < pool[tensor].numel && pool[tensor].grad != nullptr;
    const bool ascends = i == 0 || found.tensor[i - 1] < tensor ||
                         (found.tensor[i - 1] == tensor && found.position[i - 1] < position);
    STD_TORCH_CHECK(inside && ascends, "new_tensor and new_position: entry ", i, " is ", position,
                    " of tensor ", tensor, ", out of range or out of order");
  }
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
          int64_t tile, Tensor tile_max, Tensor active_grad, Tensor norms, Tensor found_inf,
          Tensor scratch) {
  const auto pool = tiled_pool_of(bound, tile_offsets, tile, tile_max);
  check_positions(kCpu, int64_t(pool.size()), position, offsets);
  check_entries(pool, position, offsets);
  const auto dense = check_dense(kCpu, dense_grads);
  check_scan(kCpu, position, active_grad, int64_t(pool.size() + dense.size()), norms, found_inf);

  Active active{};
  active.position = data<int32_t>(position);
  active.offsets = data<int64_t>(offsets);
  active.grad = data<float>(active_grad);
  const bool finite =
      cpu::scan(threads(), pool, dense, active, tile, data<int32_t>(tile_max), data<double>(norms));
  if (!finite) *data<float>(found_inf) = 1.f;
}

void clip(Tensor norms, Tensor grad_scale, double max_grad_norm, Tensor grad_norm,
          Tensor grad_factor) {
  check_clip(kCpu, norms, grad_scale, grad_norm, grad_factor);
  double squares = 0.0;
  for (int64_t i = 0; i < norms.numel(); ++i) {
    const double norm = data<double>(norms)[i];
    squares += norm * norm;
  }
  const Clip result(squares, scalar<float>(grad_scale), max_grad_norm);
  *data<double>(grad_norm) = result.grad_norm;
  *data<float>(grad_factor) = result.grad_factor;
}

Noise noise_of(const Tensor& noise) {
  const int64_t* values = data<int64_t>(noise);
  return values ? Noise{true, uint64_t(values[0]), uint32_t(values[1])} : Noise{};
}

void rank(Tensor bound, Tensor position, Tensor offsets, Tensor tile_offsets, Tensor noise,
          int64_t tile, Tensor tile_max, Tensor scratch) {
  const auto pool = tiled_pool_of(bound, tile_offsets, tile, tile_max);
  check_positions(kCpu, int64_t(pool.size()), position, offsets);
  check_entries(pool, position, offsets);
  check_noise(kCpu, noise, 0.0);

  Active active{};
  active.position = data<int32_t>(position);
  active.offsets = data<int64_t>(offsets);
  const cpu::Threads workers = threads();
  cpu::rank({workers, pool, active, tile_max.numel(), 0, 0.0, 1.f, noise_of(noise), tile},
            data<int32_t>(tile_max));
}

void cut(Tensor bound, Tensor position, Tensor offsets, Tensor tile_offsets, Tensor tile_max,
         Tensor param_bound, Tensor targets, Tensor progress, Tensor found_inf, double exp,
         double eps, Tensor noise, int64_t tile, Tensor new_tensor, Tensor new_position,
         Tensor new_count, Tensor threshold, Tensor scratch) {
  const auto pool = tiled_pool_of(bound, tile_offsets, tile, tile_max);
  check_positions(kCpu, int64_t(pool.size()), position, offsets);
  check_entries(pool, position, offsets);
  check_cut(kCpu, tile_max, param_bound, targets, progress, found_inf, exp, threshold);
  check_noise(kCpu, noise, exp);
  NewEntries found = check_new(kCpu, new_tensor, new_position, new_count);

  const int64_t quota =
      step_quota(data<int64_t>(targets), signed_length(targets), data<int64_t>(progress),
                 scalar<float>(found_inf), found.capacity);
  Active active{};
  active.position = data<int32_t>(position);
  active.offsets = data<int64_t>(offsets);
  const cpu::Threads workers = threads();
  const cpu::Problem problem{
      workers, pool, active, tile_max.numel(), quota, exp, float(eps), noise_of(noise), tile};
  const int32_t key = cpu::cut(problem, data<int32_t>(tile_max), data<float>(param_bound), found);
  if (key) *data<float>(threshold) = from_bits(key);
}

void append(Tensor bound, Tensor new_tensor, Tensor new_position, Tensor new_count, Tensor position,
            Tensor exp_avg, Tensor exp_avg_sq, Tensor unmask_step, Tensor master,
            Tensor active_grad, Tensor offsets, Tensor progress, Tensor scratch) {
  const auto pool = pool_of(bound);
  Active active = check_active(kCpu, int64_t(pool.size()), position, exp_avg, exp_avg_sq,
                               unmask_step, master, active_grad, offsets, progress);
  check_entries(pool, position, offsets);
  const NewEntries found = check_new(kCpu, new_tensor, new_position, new_count);
  check_progress(active, pool.size());
  check_found(pool, found, active, position.numel());
  cpu::append(threads(), pool, found, active);
}

void update(Tensor bound, Tensor position, Tensor offsets, Tensor active_grad, Tensor grad_factor,
            Tensor found_inf, Tensor hyper, Tensor group_index, std::string bias_correction,
            Tensor exp_avg, Tensor exp_avg_sq, Tensor unmask_step, Tensor master, Tensor progress,
            Tensor arrived) {
  const auto pool = pool_of(bound);
  const int64_t num_groups = check_update(kCpu, int64_t(pool.size()), bias_correction, grad_factor,
                                          found_inf, hyper, group_index);
  Active active = check_active(kCpu, int64_t(pool.size()), position, exp_avg, exp_avg_sq,
                               unmask_step, master, active_grad, offsets, progress);
  check_entries(pool, position, offsets);
  for (size_t i = 0; i < pool.size(); ++i) {
    const int32_t group = data<int32_t>(group_index)[i];
    STD_TORCH_CHECK(group >= 0 && group < num_groups, "group_index[", i, "] is ", group,
                    ", but hyper has ", num_groups, " rows");
  }
  check_progress(active, pool.size());
  if (scalar<float>(found_inf) != 0.f) {
    ++active.progress[2];
    return;
  }
  const bool inside = cpu::update(
      threads(), pool, active, reinterpret_cast<const Hyper*>(data<double>(hyper)),
      data<int32_t>(group_index), bias_correction == "entry", scalar<float>(grad_factor));
  STD_TORCH_CHECK(inside, "position holds entries beyond their tensor");
  ++active.progress[0];
}

void sampled_grad(Tensor input, Tensor grad_output, Tensor position, bool transposed, Tensor out) {
  check_sampled(kCpu, input, grad_output, position, out);
  const Matrix x = matrix_of(kCpu, input, "input");
  const Matrix dy = matrix_of(kCpu, grad_output, "grad_output");
  const bool inside =
      cpu::sampled_grad(threads(), transposed ? x : dy, transposed ? dy : x,
                        data<int32_t>(position), position.numel(), data<float>(out));
  STD_TORCH_CHECK(inside, "position does not ascend within the ", x.columns * dy.columns,
                  " entries of the weight");
}

template <auto visit>
void visit_entries(Tensor bound, Tensor position, Tensor offsets, Tensor value) {
  const auto pool = pool_of(bound);
  check_exchange(kCpu, int64_t(pool.size()), position, offsets, value);
  check_entries(pool, position, offsets);
  const bool inside =
      visit(threads(), pool, data<int32_t>(position), data<int64_t>(offsets), data<int32_t>(value));
  STD_TORCH_CHECK(inside, "position holds entries beyond their tensor");
}

}  // namespace

STABLE_TORCH_LIBRARY(sparse_optim, library) {
  library.def("bind(Tensor[] grads, Tensor[] params, Tensor(a!) table) -> ()");
  library.def("bind_rows(Tensor rows, Tensor(a!) table) -> ()");
  library.def(
      "scan(Tensor bound, Tensor[] dense_grads, Tensor position, Tensor offsets, "
      "Tensor tile_offsets, int tile, Tensor(a!) tile_max, Tensor(b!) active_grad, "
      "Tensor(c!) norms, Tensor(d!) found_inf, Tensor(e!) scratch) -> ()");
  library.def(
      "clip(Tensor norms, Tensor grad_scale, float max_grad_norm, Tensor(a!) grad_norm, "
      "Tensor(b!) grad_factor) -> ()");
  library.def(
      "rank(Tensor bound, Tensor position, Tensor offsets, Tensor tile_offsets, Tensor noise, "
      "int tile, Tensor(a!) tile_max, Tensor(b!) scratch) -> ()");
  library.def(
      "cut(Tensor bound, Tensor position, Tensor offsets, Tensor tile_offsets, "
      "Tensor tile_max, Tensor param_bound, Tensor targets, Tensor progress, Tensor found_inf, "
      "float exp, float eps, Tensor noise, int tile, Tensor(a!) new_tensor, Tensor(b!) "
      "new_position, "
      "Tensor(c!) new_count, Tensor(d!) threshold, Tensor(e!) scratch) -> ()");
  // On CUDA alone.
  library.def(
      "scan_one(Tensor grad, Tensor param, Tensor(a!) table, Tensor position, Tensor offsets, "
      "int tile, Tensor(b!) tile_max, Tensor(c!) active_grad, Tensor(d!) norm, "
      "Tensor(e!) found_inf, Tensor(f!) arrived, Tensor(g!) scratch) -> ()");
  library.def(
      "collect_begin(Tensor targets, Tensor progress, int max_quota, Tensor(a!) collected) -> ()");
  library.def(
      "collect(Tensor bound, Tensor position, Tensor offsets, Tensor tile_offsets, "
      "Tensor tile_max, Tensor param_bound, float exp, float eps, bool scored, int tile, "
      "int first_tensor, "
      "int max_quota, Tensor(a!) collected, Tensor(b!) scratch) -> ()");
  library.def(
      "collect_end(Tensor found_inf, Tensor(a!) new_tensor, Tensor(b!) new_position, "
      "Tensor(c!) new_count, Tensor(d!) threshold, Tensor(e!) grad, Tensor(f!) collected) -> ()");
  library.def(
      "append(Tensor bound, Tensor new_tensor, Tensor new_position, "
      "Tensor new_count, Tensor(a!) position, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
      "Tensor(d!) unmask_step, Tensor(e!) master, Tensor(f!) active_grad, Tensor(g!) offsets, "
      "Tensor(h!) progress, Tensor(i!) scratch) -> ()");
  library.def(
      "update(Tensor bound, Tensor position, Tensor offsets, "
      "Tensor active_grad, Tensor grad_factor, Tensor found_inf, Tensor hyper, Tensor group_index, "
      "str bias_correction, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor unmask_step, "
      "Tensor(d!) master, Tensor(e!) progress, Tensor(f!) arrived) -> ()");
  library.def(
      "sampled_grad(Tensor input, Tensor grad_output, Tensor position, bool transposed, "
      "Tensor(a!) out) -> ()");
  library.def("gather(Tensor bound, Tensor position, Tensor offsets, Tensor(a!) value) -> ()");
  library.def("exchange(Tensor bound, Tensor position, Tensor offsets, Tensor(a!) value) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_optim, CPU, library) {
  library.impl("bind", TORCH_BOX(&bind));
  library.impl("bind_rows", TORCH_BOX(&bind_rows));
  library.impl("scan", TORCH_BOX(&scan));
  library.impl("clip", TORCH_BOX(&clip));
  library.impl("rank", TORCH_BOX(&rank));
  library.impl("cut", TORCH_BOX(&cut));
  library.impl("append", TORCH_BOX(&append));
  library.impl("update", TORCH_BOX(&update));
  library.impl("sampled_grad", TORCH_BOX(&sampled_grad));
  library.impl("gather", TORCH_BOX(&visit_entries<&cpu::gather>));
  library.impl("exchange", TORCH_BOX(&visit_entries<&cpu::exchange>));
}

}  // namespace sparse_optim

static PyMethodDef functions[] = {
    {"layouts_of", sparse_optim::held::layouts_of, METH_VARARGS, nullptr},
    {"read_held", sparse_optim::held::read_held, METH_VARARGS, nullptr},
    {"versions_of", sparse_optim::held::versions_of, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};
extern "C" PyMODINIT_FUNC PyInit__C(void) {
  return PyModule_Create(&module);
}
