// The schemas of all ops, as OPS in quantops/library.py has them (a test compares them; what they mean is said there),
// so that programs without Python have the ops. This library defines them, that of each device implements them.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(quantops, m) {
  // uniform
  m.def("absmax(Tensor[] w, bool per_row) -> Tensor");
  m.def("absmean(Tensor[] w, bool per_row) -> Tensor");
  m.def(
      "round_clamp(Tensor[] w, Tensor[] scale, Tensor bits, int grid, bool signed, bool covered, ScalarType dtype) -> "
      "Tensor[]");
  m.def("round_clamp_out(Tensor[] w, Tensor[] scale, Tensor bits, int grid, bool signed, Tensor(a!)[] q) -> ()");
  m.def(
      "msq(Tensor[] w, Tensor[] scale, Tensor bits, Tensor k, int grid, bool covered, ScalarType dtype) -> (Tensor[] "
      "q, Tensor penalty, Tensor nonzero, Tensor sq_error)");
  m.def(
      "msq_out(Tensor[] w, Tensor[] scale, Tensor bits, Tensor k, int grid, Tensor(a!)[] q, Tensor(b!) penalty, "
      "Tensor(c!) nonzero, Tensor(d!) sq_error) -> ()");
  m.def("lsb(Tensor[] w, Tensor[] scale, Tensor bits, Tensor k, int grid) -> Tensor[]");
  m.def(
      "lsb_stats(Tensor[] w, Tensor[] scale, Tensor bits, Tensor k, int grid, bool covered) -> (Tensor penalty, Tensor "
      "nonzero, Tensor sq_error)");
  m.def(
      "uniform_backward(Tensor[] grad, Tensor? grad_penalty, Tensor[] w, Tensor[] scale, Tensor bits, Tensor k, int "
      "grid, bool signed, bool scale_grad) -> (Tensor[] grad_w, Tensor[] grad_scale)");
  m.def(
      "add_lsb_grad_(Tensor(a!)[] grad, Tensor[] w, Tensor[] scale, Tensor bits, Tensor k, int grid, Tensor strength) "
      "-> ()");
  m.def("encode(Tensor[] w, Tensor[] scale, Tensor bits, int rule, int grid, bool signed) -> Tensor[]");
  m.def("decode(Tensor[] codes, Tensor[] scale, Tensor bits, int grid, bool signed, ScalarType dtype) -> Tensor[]");
  // own_scale
  m.def("own_scale(Tensor[] w, bool per_row, bool mean) -> Tensor");
  m.def("own_scale_backward(Tensor[] w, Tensor[] scale, Tensor[] grad_scale, bool mean) -> Tensor[] grad_w");
  // truncate
  m.def(
      "truncate(Tensor[] w, Tensor[] scale, Tensor[]? out_scale, Tensor bits, Tensor base_bits, int rule, bool tanh, "
      "bool covered, bool exact, ScalarType dtype) -> Tensor[] q");
  m.def(
      "truncate_backward(Tensor[] grads, Tensor[] w, Tensor[] scale, Tensor[] out_scale, Tensor bits, Tensor "
      "base_bits, int rule, bool tanh, bool covered, bool scale_grad) -> (Tensor[] grad_w, Tensor[] grad_scale, "
      "Tensor[] grad_out_scale)");
  // packing
  m.def("pack(Tensor[] codes, int[] bits, int layout) -> Tensor[]");
  m.def("unpack(Tensor[] data, SymInt[] sizes, int[] dims, int[] stored, Tensor bits, int layout) -> Tensor[]");
  m.def(
      "decode_packed(Tensor[] data, SymInt[] sizes, int[] dims, int[] stored, Tensor[] scale, Tensor bits, int layout, "
      "int grid, bool signed, ScalarType dtype) -> Tensor[]");
  // categorical
  m.def(
      "categorical(Tensor[] x, Tensor[] alpha, Tensor[] sigma, Tensor bits, Tensor[]? gates, Tensor? seed, int mode, "
      "int grad_of, bool signed, ScalarType dtype) -> Tensor[]");
  m.def(
      "categorical_backward(Tensor[] grad, Tensor[] x, Tensor[] alpha, Tensor[] sigma, Tensor bits, Tensor[] gates, "
      "Tensor? seed, int mode, int grad_of, bool signed, bool scale_grad, bool gate_grad) -> (Tensor[] grad_x, "
      "Tensor[] grad_alpha, Tensor[] grad_sigma, Tensor[] grad_gates)");
  // activation
  m.def(
      "activation(Tensor x, Tensor scale, Tensor? offset, Tensor bits, int rule, bool signed, int front, int keep, int "
      "learn, ScalarType dtype) -> (Tensor q, Tensor kept)");
  m.def(
      "activation_backward(Tensor grad, Tensor? x, Tensor? q, Tensor kept, Tensor scale, Tensor? offset, Tensor bits, "
      "int rule, bool signed, int front, int keep, int learn, ScalarType dtype) -> (Tensor grad_x, Tensor[] sums)");
  // categorical_activation
  m.def(
      "categorical_activation(Tensor x, Tensor alpha, Tensor sigma, Tensor bits, int grad_of, ScalarType dtype) -> "
      "(Tensor q, Tensor quarters)");
  m.def(
      "categorical_activation_backward(Tensor grad, Tensor q, Tensor quarters, Tensor alpha, Tensor sigma, Tensor "
      "bits, int grad_of, bool scale_grad, ScalarType dtype) -> (Tensor grad_x, Tensor[] sums)");
}
