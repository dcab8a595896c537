// Python to C++: integers to pointers, checked sizes, a device guard, error codes to exceptions. The only file that
// knows pybind11. A pointer is an unsigned integer taken with noconvert, so that no tensor can pass for its address.
#include "cpu/linear24.h"
#include "launch.h"

#include <climits>
#include <initializer_list>
#include <pybind11/pybind11.h>
#include <string>
#include <utility>

namespace py = pybind11;

namespace {

using Ptr = std::uintptr_t;

py::arg ptr(const char *name) { return py::arg(name).noconvert(); }

[[noreturn]] void refuse(const std::string &op, const std::string &must, int64_t got) {
    throw py::value_error(op + ": " + must + ", got " + std::to_string(got));
}

void check_range(const std::string &op, const char *name, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high)
        refuse(op, std::string(name) + " must be from " + std::to_string(low) + " to " + std::to_string(high), value);
}

void check_pointer(const std::string &op, const char *name, Ptr address, bool needed) {
    if (needed && !address)
        refuse(op, std::string(name) + " must be the address of its data", 0);
}

// What every linear24 must hold; sizes above `most` do not fit the launcher.
void check_linear24(const std::string &op, Ptr x, Ptr values, Ptr meta, Ptr y, int64_t m, int64_t n, int64_t k,
                    int64_t ldx, int activation, int64_t most) {
    check_range(op, "m", m, 0, most);
    check_range(op, "n", n, 0, most);
    check_range(op, "k", k, 0, most);
    check_range(op, "ldx", ldx, 0, INT64_MAX);
    check_range(op, "activation", activation, sparsekit::kNone, sparsekit::kSilu);
    check_pointer(op, "x", x, m > 0 && k > 0);
    check_pointer(op, "values", values, n > 0 && k > 0);
    check_pointer(op, "meta", meta, n > 0 && k > 0);
    check_pointer(op, "y", y, m > 0 && n > 0);
}

void linear24_cpu(Ptr x, Ptr values, Ptr meta, Ptr bias, Ptr y, int64_t m, int64_t n, int64_t k, int64_t ldx,
                  int x_dtype, int w_dtype, int activation, int threads) {
    const char *op = "linear24_cpu";
    check_linear24(op, x, values, meta, y, m, n, k, ldx, activation, INT_MAX);
    check_range(op, "x_dtype", x_dtype, sparsekit::kFloat32, sparsekit::kBFloat16);
    check_range(op, "w_dtype", w_dtype, sparsekit::kFloat32, sparsekit::kBFloat16);
    check_range(op, "threads", threads, 1, INT_MAX);
    sparsekit::linear24_cpu(reinterpret_cast<const void *>(x), reinterpret_cast<const void *>(values),
                            reinterpret_cast<const uint8_t *>(meta), reinterpret_cast<const void *>(bias),
                            reinterpret_cast<void *>(y), m, n, k, ldx, x_dtype, w_dtype, activation, threads);
}

// ---- the 2:4 format ----

// What every format op must hold. The limit leaves room for any index of an element, a byte or a group.
void check_sizes(const std::string &op, int64_t rows, int64_t cols, int threads) {
    const int64_t most = int64_t{1} << 56;
    check_range(op, "rows", rows, 0, most);
    check_range(op, "cols", cols, 0, most / (rows > 0 ? rows : 1));
    check_range(op, "threads", threads, 1, INT_MAX);
}

// And those that report what they find.
void check_format(const std::string &op, int64_t rows, int64_t cols, Ptr status, int threads) {
    check_sizes(op, rows, cols, threads);
    check_pointer(op, "status", status, true);
}

// A matrix that is read; `prefix` comes before the names of its strides.
void check_matrix(const std::string &op, const char *name, const std::string &prefix, Ptr data, int64_t rows,
                  int64_t cols, int64_t row_stride, int64_t col_stride) {
    check_pointer(op, name, data, rows > 0 && cols > 0);
    const int64_t most = INT64_MAX / 16; // in bytes, from the first row or column to the last
    check_range(op, (prefix + "row_stride").c_str(), row_stride, 0, most / (rows > 0 ? rows : 1));
    check_range(op, (prefix + "col_stride").c_str(), col_stride, 0, most / (cols > 0 ? cols : 1));
}

// What else has data unless the matrix is empty.
void check_pointers(const std::string &op, std::initializer_list<std::pair<const char *, Ptr>> arrays, int64_t rows,
                    int64_t cols) {
    for (const auto &[name, data] : arrays)
        check_pointer(op, name, data, rows > 0 && cols > 0);
}

void check_scores(const std::string &op, Ptr scores, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride,
                  int dtype, Ptr mask, Ptr status, int threads) {
    check_format(op, rows, cols, status, threads);
    check_matrix(op, "scores", "", scores, rows, cols, row_stride, col_stride);
    check_range(op, "dtype", dtype, sparsekit::kFloat32, sparsekit::kFloat8E5M2);
    check_pointers(op, {{"mask", mask}}, rows, cols);
}

void compress24_cpu(Ptr w, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, int dtype, Ptr values,
                    Ptr meta, Ptr status, int threads) {
    const char *op = "compress24_cpu";
    check_format(op, rows, cols, status, threads);
    check_matrix(op, "w", "", w, rows, cols, row_stride, col_stride);
    check_range(op, "dtype", dtype, sparsekit::kFloat32, sparsekit::kInt8);
    check_pointers(op, {{"values", values}, {"meta", meta}}, rows, cols);
    sparsekit::compress24_cpu(reinterpret_cast<const void *>(w), rows, cols, row_stride, col_stride, dtype,
                              reinterpret_cast<void *>(values), reinterpret_cast<uint8_t *>(meta),
                              reinterpret_cast<int64_t *>(status), threads);
}

void obs_block_cpu(Ptr w, Ptr upper, int64_t batch, int64_t rows, int64_t cols, int64_t batch_stride,
                   int64_t row_stride, bool given, int n, int m, bool pairs, Ptr mask, Ptr errors, Ptr loss, Ptr status,
                   int threads) {
    const char *op = "obs_block_cpu";
    check_range(op, "batch", batch, 0, INT_MAX);
    check_range(op, "rows", rows, 0, INT_MAX);
    check_range(op, "cols", cols, 0, INT_MAX);
    check_format(op, batch * rows, cols, status, threads);
    check_matrix(op, "w", "", w, rows, batch * cols, row_stride, batch > 0 && cols > 0 ? 1 : 0);
    check_range(op, "batch_stride", batch_stride, 0, INT64_MAX / 16 / (batch > 0 ? batch : 1));
    if (!given) {
        check_range(op, "m", m, 1, INT_MAX / 2);
        check_range(op, "n", n, 0, m);
    }
    check_pointers(op, {{"upper", upper}, {"mask", mask}, {"errors", errors}}, batch * rows, cols);
    check_pointer(op, "loss", loss, batch * rows > 0);
    sparsekit::obs_block_cpu(reinterpret_cast<float *>(w), reinterpret_cast<const float *>(upper), batch, rows, cols,
                             batch_stride, row_stride, given, n, m, pairs, reinterpret_cast<uint8_t *>(mask),
                             reinterpret_cast<float *>(errors), reinterpret_cast<float *>(loss),
                             reinterpret_cast<int64_t *>(status), threads);
}

void check_prune(const std::string &op, Ptr w, int64_t rows, int64_t cols, int64_t w_row_stride, int64_t w_col_stride,
                 int dtype, Ptr rank, int rank_kind, int rank_dtype, int64_t rank_row_stride, int64_t rank_col_stride,
                 Ptr status, int threads) {
    check_format(op, rows, cols, status, threads);
    check_matrix(op, "w", "w_", w, rows, cols, w_row_stride, w_col_stride);
    check_range(op, "dtype", dtype, sparsekit::kFloat32, sparsekit::kInt8);
    check_range(op, "rank_kind", rank_kind, sparsekit::kByWeight, sparsekit::kByMask);
    if (rank_kind != sparsekit::kByWeight)
        check_matrix(op, "rank", "rank_", rank, rows, cols, rank_row_stride, rank_col_stride);
    if (rank_kind == sparsekit::kByScores)
        check_range(op, "rank_dtype", rank_dtype, sparsekit::kFloat32, sparsekit::kFloat8E5M2);
}

void prune_compress24_cpu(Ptr w, int64_t rows, int64_t cols, int64_t w_row_stride, int64_t w_col_stride, int dtype,
                          Ptr rank, int rank_kind, int rank_dtype, int64_t rank_row_stride, int64_t rank_col_stride,
                          Ptr values, Ptr meta, Ptr status, int threads) {
    const char *op = "prune_compress24_cpu";
    check_prune(op, w, rows, cols, w_row_stride, w_col_stride, dtype, rank, rank_kind, rank_dtype, rank_row_stride,
                rank_col_stride, status, threads);
    check_pointers(op, {{"values", values}, {"meta", meta}}, rows, cols);
    sparsekit::prune_compress24_cpu(reinterpret_cast<const void *>(w), rows, cols, w_row_stride, w_col_stride, dtype,
                                    reinterpret_cast<const void *>(rank), rank_kind, rank_dtype, rank_row_stride,
                                    rank_col_stride, reinterpret_cast<void *>(values),
                                    reinterpret_cast<uint8_t *>(meta), reinterpret_cast<int64_t *>(status), threads);
}

void prune24_cpu(Ptr w, int64_t rows, int64_t cols, int64_t w_row_stride, int64_t w_col_stride, int dtype, Ptr rank,
                 int rank_kind, int rank_dtype, int64_t rank_row_stride, int64_t rank_col_stride, Ptr out, Ptr status,
                 int threads) {
    const char *op = "prune24_cpu";
    check_prune(op, w, rows, cols, w_row_stride, w_col_stride, dtype, rank, rank_kind, rank_dtype, rank_row_stride,
                rank_col_stride, status, threads);
    check_pointers(op, {{"out", out}}, rows, cols);
    sparsekit::prune24_cpu(reinterpret_cast<const void *>(w), rows, cols, w_row_stride, w_col_stride, dtype,
                           reinterpret_cast<const void *>(rank), rank_kind, rank_dtype, rank_row_stride,
                           rank_col_stride, reinterpret_cast<void *>(out), reinterpret_cast<int64_t *>(status),
                           threads);
}

void expand24_cpu(Ptr values, Ptr meta, int itemsize, int64_t rows, int64_t cols, Ptr out, int threads) {
    const char *op = "expand24_cpu";
    check_sizes(op, rows, cols, threads);
    if (itemsize != 1 && itemsize != 2 && itemsize != 4)
        refuse(op, "itemsize must be 1, 2 or 4", itemsize);
    check_pointers(op, {{"values", values}, {"meta", meta}, {"out", out}}, rows, cols);
    sparsekit::expand24_cpu(reinterpret_cast<const void *>(values), reinterpret_cast<const uint8_t *>(meta), itemsize,
                            rows, cols, reinterpret_cast<void *>(out), threads);
}

void mask_nm_cpu(Ptr scores, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, int dtype, int n,
                 int m, bool pairs, Ptr mask, Ptr status, int threads) {
    const char *op = "mask_nm_cpu";
    check_scores(op, scores, rows, cols, row_stride, col_stride, dtype, mask, status, threads);
    check_range(op, "m", m, 1, sparsekit::kMostM);
    check_range(op, "n", n, 0, m);
    sparsekit::mask_nm_cpu(reinterpret_cast<const void *>(scores), rows, cols, row_stride, col_stride, dtype, n, m,
                           pairs, reinterpret_cast<uint8_t *>(mask), reinterpret_cast<int64_t *>(status), threads);
}

void mask_rows_cpu(Ptr scores, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, int dtype,
                   int64_t kept, Ptr mask, Ptr status, int threads) {
    const char *op = "mask_rows_cpu";
    check_scores(op, scores, rows, cols, row_stride, col_stride, dtype, mask, status, threads);
    check_range(op, "kept", kept, 0, cols);
    sparsekit::mask_rows_cpu(reinterpret_cast<const void *>(scores), rows, cols, row_stride, col_stride, dtype, kept,
                             reinterpret_cast<uint8_t *>(mask), reinterpret_cast<int64_t *>(status), threads);
}

void validate24_cpu(Ptr values, Ptr meta, int dtype, int64_t rows, int64_t cols, Ptr status, int threads) {
    const char *op = "validate24_cpu";
    check_format(op, rows, cols, status, threads);
    check_range(op, "dtype", dtype, sparsekit::kFloat32, sparsekit::kInt8);
    check_pointers(op, {{"values", values}, {"meta", meta}}, rows, cols);
    sparsekit::validate24_cpu(reinterpret_cast<const void *>(values), reinterpret_cast<const uint8_t *>(meta), dtype,
                              rows, cols, reinterpret_cast<int64_t *>(status), threads);
}

void set_cpu_isa(const std::string &name) {
    if (!sparsekit::cpu::set_cpu_isa(name.c_str()))
        throw py::value_error("set_cpu_isa: the name must be a path that this CPU and build have, got '" + name + "'");
}

py::list cuda_archs() {
    py::list archs;
#ifdef SPARSEKIT_CUDA
    std::string all = SPARSEKIT_CUDA_ARCHS; // "80,90a"
    for (size_t comma; (comma = all.find(',')) != std::string::npos; all.erase(0, comma + 1))
        archs.append(all.substr(0, comma));
    archs.append(all);
#endif
    return archs;
}

#ifdef SPARSEKIT_CUDA
void check(cudaError_t error, const char *op) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
}

int cuda_driver() {
    int version = 0;
    check(cudaDriverGetVersion(&version), "cuda_driver");
    return version;
}

// Makes `device` current, and the former one again at the end of the scope.
class DeviceGuard {
  public:
    DeviceGuard(int device, const char *op) {
        check(cudaGetDevice(&former_), op);
        changed_ = former_ != device;
        if (changed_)
            check(cudaSetDevice(device), op);
    }
    ~DeviceGuard() {
        if (changed_)
            cudaSetDevice(former_);
    }
    DeviceGuard(const DeviceGuard &) = delete;
    DeviceGuard &operator=(const DeviceGuard &) = delete;

  private:
    int former_ = 0;
    bool changed_ = false;
};

void linear24_sm80(Ptr x, Ptr values, Ptr meta, Ptr bias, Ptr y, int64_t m, int64_t n, int64_t k, int64_t ldx,
                   int dtype, int activation, int tile, int device, Ptr stream) {
    const char *op = "linear24_sm80";
    check_linear24(op, x, values, meta, y, m, n, k, ldx, activation, INT_MAX);
    check_range(op, "dtype", dtype, sparsekit::kFloat16, sparsekit::kBFloat16);
    check_range(op, "tile", tile, 0, 4);
    check_range(op, "device", device, 0, INT_MAX);
    const DeviceGuard guard(device, op);
    check(sparsekit::launch_linear24_sm80(reinterpret_cast<const void *>(x), reinterpret_cast<const void *>(values),
                                          reinterpret_cast<const void *>(meta), reinterpret_cast<const void *>(bias),
                                          reinterpret_cast<void *>(y), static_cast<int>(m), static_cast<int>(n),
                                          static_cast<int>(k), ldx, dtype, activation, tile,
                                          reinterpret_cast<cudaStream_t>(stream)),
          op);
}

// The bytes of workspace that a linear24 needs for the same arguments: `ask` the launcher.
template <typename F>
int64_t linear24_workspace(const char *op, F ask, int64_t m, int64_t n, int64_t k, int tile, int split, int device) {
    check_range(op, "m", m, 0, INT_MAX);
    check_range(op, "n", n, 0, INT_MAX);
    check_range(op, "k", k, 0, INT_MAX);
    check_range(op, "device", device, 0, INT_MAX);
    const DeviceGuard guard(device, op);
    const int64_t bytes = ask(static_cast<int>(m), static_cast<int>(n), static_cast<int>(k), tile, split);
    if (bytes < 0)
        check(cudaErrorInvalidValue, op);
    return bytes;
}

int64_t linear24_decode_workspace(int64_t m, int64_t n, int64_t k, int tile, int split, int device) {
    return linear24_workspace("linear24_decode_workspace", sparsekit::linear24_decode_workspace, m, n, k, tile, split,
                              device);
}

void linear24_decode_sm80(Ptr x, Ptr values, Ptr meta, Ptr bias, Ptr y, Ptr workspace, int64_t m, int64_t n, int64_t k,
                          int64_t ldx, int dtype, int activation, int tile, int split, int device, Ptr stream) {
    const char *op = "linear24_decode_sm80";
    check_linear24(op, x, values, meta, y, m, n, k, ldx, activation, INT_MAX);
    check_range(op, "dtype", dtype, sparsekit::kFloat16, sparsekit::kBFloat16);
    check_range(op, "device", device, 0, INT_MAX);
    const DeviceGuard guard(device, op);
    check(sparsekit::launch_linear24_decode_sm80(
              reinterpret_cast<const void *>(x), reinterpret_cast<const void *>(values),
              reinterpret_cast<const void *>(meta), reinterpret_cast<const void *>(bias), reinterpret_cast<void *>(y),
              reinterpret_cast<void *>(workspace), static_cast<int>(m), static_cast<int>(n), static_cast<int>(k), ldx,
              dtype, activation, tile, split, reinterpret_cast<cudaStream_t>(stream)),
          op);
}
#endif

#ifdef SPARSEKIT_LINEAR24_SM90A
int64_t linear24_sm90a_workspace(int64_t m, int64_t n, int64_t k, int tile, int split, int device) {
    return linear24_workspace("linear24_sm90a_workspace", sparsekit::linear24_sm90a_workspace, m, n, k, tile, split,
                              device);
}

// False where TMA cannot take an operand, so that another kernel must.
bool linear24_sm90a(Ptr x, Ptr values, Ptr meta, Ptr bias, Ptr y, Ptr workspace, int64_t m, int64_t n, int64_t k,
                    int64_t ldx, int dtype, int activation, int tile, int split, int device, Ptr stream) {
    const char *op = "linear24_sm90a";
    check_linear24(op, x, values, meta, y, m, n, k, ldx, activation, INT_MAX);
    check_range(op, "dtype", dtype, sparsekit::kFloat16, sparsekit::kBFloat16);
    check_range(op, "tile", tile, 0, 10);
    check_range(op, "split", split, 0, INT_MAX);
    check_range(op, "device", device, 0, INT_MAX);
    const DeviceGuard guard(device, op);
    const cudaError_t error = sparsekit::launch_linear24_sm90a(
        reinterpret_cast<const void *>(x), reinterpret_cast<const void *>(values), reinterpret_cast<const void *>(meta),
        reinterpret_cast<const void *>(bias), reinterpret_cast<void *>(y), reinterpret_cast<void *>(workspace),
        static_cast<int>(m), static_cast<int>(n), static_cast<int>(k), ldx, dtype, activation, tile, split,
        reinterpret_cast<cudaStream_t>(stream));
    if (error != cudaErrorNotSupported)
        check(error, op);
    return error == cudaSuccess;
}
#endif

} // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    using py::arg;
    const auto release = py::call_guard<py::gil_scoped_release>();
    m.doc() = "The compiled kernels of sparsekit: raw addresses and sizes in, see csrc/launch.h.";
    m.def("linear24_cpu", linear24_cpu, ptr("x"), ptr("values"), ptr("meta"), ptr("bias"), ptr("y"), arg("m"), arg("n"),
          arg("k"), arg("ldx"), arg("x_dtype"), arg("w_dtype"), arg("activation"), arg("threads"), release);
    m.def("compress24_cpu", compress24_cpu, ptr("w"), arg("rows"), arg("cols"), arg("row_stride"), arg("col_stride"),
          arg("dtype"), ptr("values"), ptr("meta"), ptr("status"), arg("threads"), release);
    m.def("prune_compress24_cpu", prune_compress24_cpu, ptr("w"), arg("rows"), arg("cols"), arg("w_row_stride"),
          arg("w_col_stride"), arg("dtype"), ptr("rank"), arg("rank_kind"), arg("rank_dtype"), arg("rank_row_stride"),
          arg("rank_col_stride"), ptr("values"), ptr("meta"), ptr("status"), arg("threads"), release);
    m.def("prune24_cpu", prune24_cpu, ptr("w"), arg("rows"), arg("cols"), arg("w_row_stride"), arg("w_col_stride"),
          arg("dtype"), ptr("rank"), arg("rank_kind"), arg("rank_dtype"), arg("rank_row_stride"),
          arg("rank_col_stride"), ptr("out"), ptr("status"), arg("threads"), release);
    m.def("expand24_cpu", expand24_cpu, ptr("values"), ptr("meta"), arg("itemsize"), arg("rows"), arg("cols"),
          ptr("out"), arg("threads"), release);
    m.def("mask_nm_cpu", mask_nm_cpu, ptr("scores"), arg("rows"), arg("cols"), arg("row_stride"), arg("col_stride"),
          arg("dtype"), arg("n"), arg("m"), arg("pairs"), ptr("mask"), ptr("status"), arg("threads"), release);
    m.def("mask_rows_cpu", mask_rows_cpu, ptr("scores"), arg("rows"), arg("cols"), arg("row_stride"), arg("col_stride"),
          arg("dtype"), arg("kept"), ptr("mask"), ptr("status"), arg("threads"), release);
    m.def("validate24_cpu", validate24_cpu, ptr("values"), ptr("meta"), arg("dtype"), arg("rows"), arg("cols"),
          ptr("status"), arg("threads"), release);
    m.def("obs_block_cpu", obs_block_cpu, ptr("w"), ptr("upper"), arg("batch"), arg("rows"), arg("cols"),
          arg("batch_stride"), arg("row_stride"), arg("given"), arg("n"), arg("m"), arg("pairs"), ptr("mask"),
          ptr("errors"), ptr("loss"), ptr("status"), arg("threads"), release);
    m.def("cpu_isa", sparsekit::cpu::cpu_isa, "The path of the CPU kernels in use: avx512, avx2 or portable.");
    m.def("set_cpu_isa", set_cpu_isa, arg("name"), "Chooses the path of the CPU kernels, for tests.");
    m.def("cuda_archs", cuda_archs, "The CUDA architectures compiled in; empty without CUDA.");
#ifdef SPARSEKIT_CUDA
    m.def("cuda_driver", cuda_driver, "The CUDA version that the driver is for, as 13000; 0 without a driver.");
    m.def("linear24_sm80", linear24_sm80, ptr("x"), ptr("values"), ptr("meta"), ptr("bias"), ptr("y"), arg("m"),
          arg("n"), arg("k"), arg("ldx"), arg("dtype"), arg("activation"), arg("tile"), arg("device"), ptr("stream"),
          release);
    m.def("linear24_decode_workspace", linear24_decode_workspace, arg("m"), arg("n"), arg("k"), arg("tile"),
          arg("split"), arg("device"), "The bytes of workspace that linear24_decode_sm80 needs; no need to fill them.");
    m.def("linear24_decode_sm80", linear24_decode_sm80, ptr("x"), ptr("values"), ptr("meta"), ptr("bias"), ptr("y"),
          ptr("workspace"), arg("m"), arg("n"), arg("k"), arg("ldx"), arg("dtype"), arg("activation"), arg("tile"),
          arg("split"), arg("device"), ptr("stream"), release);
#endif
#ifdef SPARSEKIT_LINEAR24_SM90A
    m.def("linear24_sm90a_workspace", linear24_sm90a_workspace, arg("m"), arg("n"), arg("k"), arg("tile"), arg("split"),
          arg("device"), "The bytes of workspace that linear24_sm90a needs; no need to fill them.");
    m.def("linear24_sm90a", linear24_sm90a, ptr("x"), ptr("values"), ptr("meta"), ptr("bias"), ptr("y"),
          ptr("workspace"), arg("m"), arg("n"), arg("k"), arg("ldx"), arg("dtype"), arg("activation"), arg("tile"),
          arg("split"), arg("device"), ptr("stream"), release);
#endif
}
