// The parameters of a pool and the gradients that they hold, looked at by one call of Python.
//
// Handing two lists of 291 tensors to an operator takes longer than all else that the host does in
// a step. Here tensors are looked at through DLPack's table of C functions, which torch 2.11 and
// newer offer (`Tensor.__dlpack_c_exchange_api__`); the structs are DLPack's.
#pragma once
#include <Python.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/pool.h"

namespace sparse_optim::held {

// DLPack 1.x.
struct DLTensor {
  void* data;
  struct {
    int32_t type, index;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DLPackExchange {
  struct {
    uint32_t major, minor;
  } version;
  void* previous;
  void* other[3];  // functions that nothing here calls
  int (*view)(void* tensor, DLTensor* out);
  void* stream;
};

// What is asked of Python once.
struct Known {
  const DLPackExchange* exchange = nullptr;  // null: torch offers another version
  PyObject *tensor = nullptr, *parameter = nullptr, *grad = nullptr, *version = nullptr;
};

inline const Known& known() {
  static const Known once = [] {
    Known found;
    PyObject* torch = PyImport_ImportModule("torch");
    PyObject* nn = PyImport_ImportModule("torch.nn");
    found.grad = PyUnicode_InternFromString("grad");
    found.version = PyUnicode_InternFromString("_version");
    if (torch) found.tensor = PyObject_GetAttrString(torch, "Tensor");
    if (nn) found.parameter = PyObject_GetAttrString(nn, "Parameter");
    PyObject* capsule =
        found.tensor ? PyObject_GetAttrString(found.tensor, "__dlpack_c_exchange_api__") : nullptr;
    void* table = capsule ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : nullptr;
    const auto* exchange = static_cast<const DLPackExchange*>(table);
    if (exchange && exchange->version.major == 1 && exchange->view) found.exchange = exchange;
    PyErr_Clear();
    Py_XDECREF(capsule);
    Py_XDECREF(torch);
    Py_XDECREF(nn);
    return found;
  }();
  return once;
}

// A plain tensor or parameter as it is now; false if it is of another class, or has no memory. The
// view is valid while nothing else runs.
inline bool view(PyObject* tensor, DLTensor* out) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  if (type != known().tensor && type != known().parameter) return false;
  if (known().exchange->view(tensor, out) == 0) return true;
  PyErr_Clear();
  return false;
}

inline bool find_dtype(const DLTensor& tensor, DType* dtype) {
  const auto [code, bits, lanes] = tensor.dtype;
  if (lanes != 1) return false;
  if (code == 2 && bits == 32) *dtype = DType::kFloat32;
  else if (code == 4 && bits == 16) *dtype = DType::kBFloat16;
  else if (code == 2 && bits == 16) *dtype = DType::kFloat16;
  else return false;
  return true;
}

inline int64_t numel_of(const DLTensor& tensor) {
  int64_t numel = 1;
  for (int d = 0; d < tensor.ndim; ++d) numel *= tensor.shape[d];
  return numel;
}

// Stricter than torch, which does not look at the strides of dimensions of one entry.
inline bool is_compact(const DLTensor& tensor) {
  int64_t stride = 1;
  for (int d = tensor.ndim - 1; d >= 0; --d) {
    if (tensor.strides[d] != stride) return false;
    stride *= tensor.shape[d];
  }
  return true;
}

inline bool same_place(const DLTensor& a, const DLTensor& b) {
  return a.device.type == b.device.type && a.device.index == b.device.index;
}

inline bool same_shape(const DLTensor& a, const DLTensor& b) {
  return a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape);
}

// Appends what a parameter must stay: its device, dtype and shape.
inline bool append_layout(const DLTensor& param, std::vector<int64_t>& layouts) {
  DType dtype;
  if (!find_dtype(param, &dtype)) return false;
  layouts.insert(layouts.end(),
                 {param.device.type, param.device.index, int64_t(dtype), param.ndim});
  layouts.insert(layouts.end(), param.shape, param.shape + param.ndim);
  return true;
}

inline PyObject* nothing() {
  Py_INCREF(Py_None);
  return Py_None;
}

// layouts_of(params): bytes that say what each parameter is; None if one is no plain tensor.
inline PyObject* layouts_of(PyObject*, PyObject* arguments) {
  PyObject* params;
  if (!PyArg_ParseTuple(arguments, "O!", &PyTuple_Type, &params)) return nullptr;
  if (!known().exchange) return nothing();
  std::vector<int64_t> layouts;
  for (Py_ssize_t i = 0; i < PyTuple_Size(params); ++i) {
    DLTensor param;
    if (!view(PyTuple_GetItem(params, i), &param) || !append_layout(param, layouts))
      return nothing();
  }
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(layouts.data()),
                                   Py_ssize_t(layouts.size() * sizeof(int64_t)));
}

// The row of a parameter and of its gradient, which is None where it is missing; false if it cannot
// be bound as it is.
inline bool read_row_of(PyObject* param_object, PyObject* grad_object,
                        std::vector<int64_t>& layouts, int64_t* out) {
  DLTensor param, grad;
  Row row{};
  if (!view(param_object, &param) || !is_compact(param) || !append_layout(param, layouts) ||
      !find_dtype(param, &row.param_dtype))
    return false;
  row.numel = numel_of(param);
  row.param = row.numel ? param.data : nullptr;
  row.grad_dtype = row.param_dtype;
  if (row.numel && !row.param) return false;
  if (grad_object != Py_None) {
    if (!view(grad_object, &grad) || !same_place(grad, param) || !find_dtype(grad, &row.grad_dtype))
      return false;
    if (numel_of(grad)) {  // else it was freed behind our back, and is missing
      row.grad = grad.data;
      if (!row.grad || !same_shape(grad, param) || !is_compact(grad)) return false;
    }
  }
  write_row(out, row);
  return true;
}

// The gradient that a parameter holds; if `present` is a list, the parameter itself where it says
// so, as a stand-in, else None. A new reference; null where there is no such attribute.
inline PyObject* grad_of(PyObject* param, PyObject* present, Py_ssize_t i) {
  if (present == Py_None) return PyObject_GetAttr(param, known().grad);
  PyObject* there = PyList_GetItem(present, i);
  PyObject* grad = there == Py_True ? param : Py_None;
  if (!there) return nullptr;
  Py_INCREF(grad);
  return grad;
}

// read_held(params, layouts, rows, present): writes the rows of `bind` for the parameters and their
// gradients (see grad_of). Returns the gradients, None where one is missing, and how many are; or
// None, if a parameter is not what `layouts` says or a gradient cannot be read as it is.
inline PyObject* read_held(PyObject*, PyObject* arguments) {
  PyObject *params, *expected, *table, *present;
  if (!PyArg_ParseTuple(arguments, "O!SOO", &PyTuple_Type, &params, &expected, &table, &present))
    return nullptr;
  const Py_ssize_t size = PyTuple_Size(params);
  DLTensor rows;
  if (!known().exchange || !view(table, &rows) || !is_compact(rows) || rows.device.type != 1 ||
      rows.dtype.code != 0 || rows.dtype.bits != 64 || numel_of(rows) != size * kColumns) {
    PyErr_SetString(PyExc_ValueError, "rows must be int64 of shape (S, 4) on the CPU");
    return nullptr;
  }
  if (present != Py_None && (!PyList_Check(present) || PyList_Size(present) != size)) {
    PyErr_SetString(PyExc_ValueError, "present must be a list of a bool for each parameter");
    return nullptr;
  }
  PyObject* grads = PyList_New(size);
  if (!grads) return nullptr;
  Py_ssize_t missing = 0;
  std::vector<int64_t> layouts;
  layouts.reserve(size_t(PyBytes_Size(expected)) / sizeof(int64_t));
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* param = PyTuple_GetItem(params, i);
    PyObject* grad = grad_of(param, present, i);
    if (!grad) PyErr_Clear();
    if (grad) PyList_SetItem(grads, i, grad);  // owns it
    missing += grad == Py_None;
    if (grad && read_row_of(param, grad, layouts, static_cast<int64_t*>(rows.data) + i * kColumns))
      continue;
    Py_DECREF(grads);
    return nothing();
  }
  const auto bytes = Py_ssize_t(layouts.size() * sizeof(int64_t));
  if (bytes == PyBytes_Size(expected) &&
      std::memcmp(layouts.data(), PyBytes_AsString(expected), size_t(bytes)) == 0)
    return Py_BuildValue("Nn", grads, missing);
  Py_DECREF(grads);
  return nothing();
}

// versions_of(params, less): the version of each, less a number.
inline PyObject* versions_of(PyObject*, PyObject* arguments) {
  PyObject* params;
  long long less;
  if (!PyArg_ParseTuple(arguments, "O!L", &PyTuple_Type, &params, &less)) return nullptr;
  const Py_ssize_t size = PyTuple_Size(params);
  PyObject* versions = PyList_New(size);
  for (Py_ssize_t i = 0; versions && i < size; ++i) {
    PyObject* version = PyObject_GetAttr(PyTuple_GetItem(params, i), known().version);
    const long long value = version ? PyLong_AsLongLong(version) : -1;
    Py_XDECREF(version);
    PyObject* left = PyErr_Occurred() ? nullptr : PyLong_FromLongLong(value - less);
    if (left) {
      PyList_SetItem(versions, i, left);
      continue;
    }
    Py_DECREF(versions);
    versions = nullptr;
  }
  return versions;
}

}  // namespace sparse_optim::held
