// Argument checks that the CPU and the CUDA operators share: everything that can be told without
// reading the tensors. Each message names the argument, what was expected and what arrived.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <string>
#include <vector>

#include "core/pool.h"

namespace sparse_optim {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

template <class T>
T* data(const Tensor& tensor) {
  return tensor.numel() ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

// Where the arguments of a call must be: on the CPU, or on one CUDA device.
struct Place {
  int32_t cuda_device = -1;  // -1: the CPU

  void check_device(const Tensor& tensor, const char* name) const {
    if (cuda_device < 0) {
      STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
    } else {
      STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == cuda_device, name,
                      " must be on cuda:", cuda_device);
    }
  }

  void check(const Tensor& tensor, const char* name) const {
    check_device(tensor, name);
    STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  }

  void check(const Tensor& tensor, const char* name, ScalarType dtype, int64_t numel = -1) const {
    check(tensor, name);
    STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype");
    STD_TORCH_CHECK(numel < 0 || tensor.numel() == numel, name, " must hold ", numel,
                    " elements, got ", tensor.numel());
  }

  DType dtype_of(const Tensor& tensor, const char* name) const {
    check(tensor, name);
    return strided_dtype_of(tensor, name);
  }

  DType strided_dtype_of(const Tensor& tensor, const char* name) const {
    check_device(tensor, name);
    switch (tensor.scalar_type()) {
      case ScalarType::Float: return DType::kFloat32;
      case ScalarType::BFloat16: return DType::kBFloat16;
      case ScalarType::Half: return DType::kFloat16;
      default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
    }
    return DType::kFloat32;
  }
};

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d)) return false;
  return true;
}

// The rows of the table for these tensors.
inline std::vector<Row> check_bind(const Place& place, const Tensors& grads, const Tensors& params,
                                   const Tensor& table) {
  STD_TORCH_CHECK(grads.size() == params.size(), "got ", grads.size(), " grads for ", params.size(),
                  " params");
  place.check(table, "table", ScalarType::Long, int64_t(params.size()) * kColumns);
  std::vector<Row> rows;
  for (size_t i = 0; i < params.size(); ++i) {
    const DType grad_dtype = place.dtype_of(grads[i], "grads");
    const DType param_dtype = place.dtype_of(params[i], "params");
    const int64_t numel = params[i].numel(), grad_numel = grads[i].numel();
    STD_TORCH_CHECK(grad_numel == 0 || same_shape(grads[i], params[i]), "grads[", i, "] has ",
                    grad_numel, " entries, its parameter ", numel, ", or another shape");
    rows.push_back({grad_numel ? grads[i].const_data_ptr() : nullptr,
                    numel ? params[i].mutable_data_ptr() : nullptr, numel, grad_dtype,
                    param_dtype});
  }
  return rows;
}

// A row on the CPU that `bind` or read_held (held.h) wrote.
inline Row sealed_row(const Tensor& table, int64_t i, const char* name) {
  STD_TORCH_CHECK(is_sealed(data<int64_t>(table) + i * kColumns), name, ": row ", i,
                  " is not what bind wrote");
  return read_row(data<int64_t>(table), i);
}

// All rows of a table on the CPU, for one of the same size.
inline std::vector<Row> check_rows(const Tensor& rows, const Place& place, const Tensor& table) {
  place.check(table, "table", ScalarType::Long);
  Place{}.check(rows, "rows", ScalarType::Long, table.numel());
  std::vector<Row> from;
  for (int64_t i = 0; i < rows.numel() / kColumns; ++i) from.push_back(sealed_row(rows, i, "rows"));
  return from;
}

// How many tensors the table has rows for.
inline int64_t check_bound(const Place& place, const Tensor& table) {
  place.check(table, "bound", ScalarType::Long);
  return table.numel() / kColumns;
}

inline void check_tiles(const Place& place, int64_t num_tensors, int64_t tile,
                        const Tensor& tile_offsets, const Tensor& tile_max) {
  STD_TORCH_CHECK(tile >= 1 && tile <= kMaxTile, "tile must be 1 to ", kMaxTile, ", got ", tile);
  place.check(tile_offsets, "tile_offsets", ScalarType::Long, num_tensors + 1);
  place.check(tile_max, "tile_max", ScalarType::Int);
}

inline void check_positions(const Place& place, int64_t num_tensors, const Tensor& position,
                            const Tensor& offsets) {
  place.check(position, "position", ScalarType::Int);
  place.check(offsets, "offsets", ScalarType::Long, num_tensors + 1);
}

inline void check_exchange(const Place& place, int64_t num_tensors, const Tensor& position,
                           const Tensor& offsets, const Tensor& value) {
  check_positions(place, num_tensors, position, offsets);
  place.check(value, "value", ScalarType::Int, position.numel());
}

inline std::vector<DenseGrad> check_dense(const Place& place, const Tensors& grads) {
  std::vector<DenseGrad> dense;
  for (const Tensor& grad : grads)
    dense.push_back({grad.const_data_ptr(), grad.numel(), place.dtype_of(grad, "dense_grads")});
  return dense;
}

inline void check_scan(const Place& place, const Tensor& position, const Tensor& active_grad,
                       int64_t num_grads, const Tensor& norms, const Tensor& found_inf) {
  place.check(active_grad, "active_grad", ScalarType::Float, position.numel());
  place.check(norms, "norms", ScalarType::Double, num_grads);
  place.check(found_inf, "found_inf", ScalarType::Float, 1);
}

inline void check_clip(const Place& place, const Tensor& norms, const Tensor& grad_scale,
                       const Tensor& grad_norm, const Tensor& grad_factor) {
  place.check(norms, "norms", ScalarType::Double);
  place.check(grad_scale, "grad_scale", ScalarType::Float, 1);
  place.check(grad_norm, "grad_norm", ScalarType::Double, 1);
  place.check(grad_factor, "grad_factor", ScalarType::Float, 1);
}

inline NewEntries check_new(const Place& place, const Tensor& new_tensor,
                            const Tensor& new_position, const Tensor& new_count) {
  place.check(new_tensor, "new_tensor", ScalarType::Int);
  place.check(new_position, "new_position", ScalarType::Int, new_tensor.numel());
  place.check(new_count, "new_count", ScalarType::Long, 1);
  return {data<int32_t>(new_tensor), data<int32_t>(new_position), data<int64_t>(new_count),
          new_position.numel()};
}

inline void check_param_bound(const Place& place, const Tensor& tile_max, const Tensor& param_bound,
                              double exp) {
  place.check(param_bound, "param_bound", ScalarType::Float, exp < 0 ? tile_max.numel() : 0);
}

inline void check_targets(const Place& place, const Tensor& targets, const Tensor& progress) {
  place.check(targets, "targets", ScalarType::Long);
  place.check(progress, "progress", ScalarType::Long, 3);
  STD_TORCH_CHECK(targets.numel() > 0, "targets must hold at least one element");
  STD_TORCH_CHECK(targets.dim() == 1 || (targets.dim() == 2 && targets.size(1) == 4),
                  "targets must be a table of one dimension or a formula of four columns");
}

inline void check_cut(const Place& place, const Tensor& tile_max, const Tensor& param_bound,
                      const Tensor& targets, const Tensor& progress, const Tensor& found_inf,
                      double exp, const Tensor& threshold) {
  check_param_bound(place, tile_max, param_bound, exp);
  check_targets(place, targets, progress);
  place.check(found_inf, "found_inf", ScalarType::Float, 1);
  place.check(threshold, "threshold", ScalarType::Float, 1);
}

// T + 1 of a table, minus the pieces of a formula.
inline int64_t signed_length(const Tensor& targets) {
  return targets.dim() == 2 ? -targets.size(0) : targets.numel();
}

// Sampling ranks scores, whose exponent is in them already.
inline void check_noise(const Place& place, const Tensor& noise, double exp) {
  place.check(noise, "noise", ScalarType::Long);
  STD_TORCH_CHECK(noise.numel() == 0 || noise.numel() == 2,
                  "noise must hold seed and step, or nothing, got ", noise.numel(), " elements");
  STD_TORCH_CHECK(noise.numel() == 0 || exp == 0.0, "exp must be 0 with noise, got ", exp);
}

inline Active check_active(const Place& place, int64_t num_tensors, const Tensor& position,
                           const Tensor& exp_avg, const Tensor& exp_avg_sq,
                           const Tensor& unmask_step, const Tensor& master,
                           const Tensor& active_grad, const Tensor& offsets,
                           const Tensor& progress) {
  const int64_t capacity = position.numel();
  check_positions(place, num_tensors, position, offsets);
  place.check(exp_avg, "exp_avg", ScalarType::Float, capacity);
  place.check(exp_avg_sq, "exp_avg_sq", ScalarType::Float, capacity);
  place.check(unmask_step, "unmask_step", ScalarType::Int, capacity);
  place.check(master, "master", ScalarType::Float, master.numel() ? capacity : 0);
  place.check(active_grad, "active_grad", ScalarType::Float, capacity);
  place.check(progress, "progress", ScalarType::Long, 3);
  return {data<int32_t>(position),    data<float>(exp_avg),   data<float>(exp_avg_sq),
          data<int32_t>(unmask_step), data<float>(master),    data<float>(active_grad),
          data<int64_t>(offsets),     data<int64_t>(progress)};
}

// The rows of hyper.
inline int64_t check_update(const Place& place, int64_t num_tensors,
                            const std::string& bias_correction, const Tensor& grad_factor,
                            const Tensor& found_inf, const Tensor& hyper,
                            const Tensor& group_index) {
  STD_TORCH_CHECK(bias_correction == "entry" || bias_correction == "global",
                  "bias_correction must be 'entry' or 'global', got '", bias_correction, "'");
  place.check(grad_factor, "grad_factor", ScalarType::Float, 1);
  place.check(found_inf, "found_inf", ScalarType::Float, 1);
  place.check(hyper, "hyper", ScalarType::Double);
  place.check(group_index, "group_index", ScalarType::Int, num_tensors);
  static_assert(sizeof(Hyper) == 6 * sizeof(double));
  return hyper.numel() / 6;
}

// A matrix that may be strided.
inline Matrix matrix_of(const Place& place, const Tensor& tensor, const char* name) {
  const DType dtype = place.strided_dtype_of(tensor, name);
  return {tensor.const_data_ptr(), tensor.size(0),   tensor.size(1),
          tensor.stride(0),        tensor.stride(1), dtype};
}

// input (T, in) and grad_output (T, out) may be strided.
inline void check_sampled(const Place& place, const Tensor& input, const Tensor& grad_output,
                          const Tensor& position, const Tensor& out) {
  place.check_device(input, "input");
  place.check_device(grad_output, "grad_output");
  STD_TORCH_CHECK(
      input.dim() == 2 && grad_output.dim() == 2 && input.size(0) == grad_output.size(0),
      "input must be (T, in) and grad_output (T, out), got ", input.dim(), " and ",
      grad_output.dim(), " dimensions, ", input.numel() ? input.size(0) : 0, " and ",
      grad_output.numel() ? grad_output.size(0) : 0, " tokens");
  STD_TORCH_CHECK(input.size(1) * grad_output.size(1) <= INT32_MAX, "a weight of ", input.size(1),
                  " x ", grad_output.size(1), " entries is too large");
  place.check(position, "position", ScalarType::Int);
  place.check(out, "out", ScalarType::Float, position.numel());
}

}  // namespace sparse_optim
