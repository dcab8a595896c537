// Python to C++: integers to pointers, checked sizes, a device guard, error codes to exceptions. The only file that
// knows pybind11. A pointer is an unsigned integer taken with noconvert, so that no tensor can pass for its address.
#include "cpu/linear24.h"
#include "launch.h"

#include <climits>
#include <pybind11/pybind11.h>
#include <string>

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
                   int dtype, int activation, int device, Ptr stream) {
    const char *op = "linear24_sm80";
    check_linear24(op, x, values, meta, y, m, n, k, ldx, activation, INT_MAX);
    check_range(op, "dtype", dtype, sparsekit::kFloat16, sparsekit::kBFloat16);
    check_range(op, "device", device, 0, INT_MAX);
    const DeviceGuard guard(device, op);
    check(sparsekit::launch_linear24_sm80(reinterpret_cast<const void *>(x), reinterpret_cast<const void *>(values),
                                          reinterpret_cast<const void *>(meta), reinterpret_cast<const void *>(bias),
                                          reinterpret_cast<void *>(y), static_cast<int>(m), static_cast<int>(n),
                                          static_cast<int>(k), ldx, dtype, activation,
                                          reinterpret_cast<cudaStream_t>(stream)),
          op);
}
#endif

#ifdef SPARSEKIT_LINEAR24_SM90A
// False where TMA cannot take an operand, so that another kernel must.
bool linear24_sm90a(Ptr x, Ptr values, Ptr meta, Ptr bias, Ptr y, int64_t m, int64_t n, int64_t k, int64_t ldx,
                    int dtype, int activation, int tile, int device, Ptr stream) {
    const char *op = "linear24_sm90a";
    check_linear24(op, x, values, meta, y, m, n, k, ldx, activation, INT_MAX);
    check_range(op, "dtype", dtype, sparsekit::kFloat16, sparsekit::kBFloat16);
    check_range(op, "tile", tile, 0, 8);
    check_range(op, "device", device, 0, INT_MAX);
    const DeviceGuard guard(device, op);
    const cudaError_t error = sparsekit::launch_linear24_sm90a(
        reinterpret_cast<const void *>(x), reinterpret_cast<const void *>(values), reinterpret_cast<const void *>(meta),
        reinterpret_cast<const void *>(bias), reinterpret_cast<void *>(y), static_cast<int>(m), static_cast<int>(n),
        static_cast<int>(k), ldx, dtype, activation, tile, reinterpret_cast<cudaStream_t>(stream));
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
    m.def("cpu_isa", sparsekit::cpu::cpu_isa, "The path of the CPU kernels in use: avx512, avx2 or portable.");
    m.def("set_cpu_isa", set_cpu_isa, arg("name"), "Chooses the path of the CPU kernels, for tests.");
    m.def("cuda_archs", cuda_archs, "The CUDA architectures compiled in; empty without CUDA.");
#ifdef SPARSEKIT_CUDA
    m.def("linear24_sm80", linear24_sm80, ptr("x"), ptr("values"), ptr("meta"), ptr("bias"), ptr("y"), arg("m"),
          arg("n"), arg("k"), arg("ldx"), arg("dtype"), arg("activation"), arg("device"), ptr("stream"), release);
#endif
#ifdef SPARSEKIT_LINEAR24_SM90A
    m.def("linear24_sm90a", linear24_sm90a, ptr("x"), ptr("values"), ptr("meta"), ptr("bias"), ptr("y"), arg("m"),
          arg("n"), arg("k"), arg("ldx"), arg("dtype"), arg("activation"), arg("tile"), arg("device"), ptr("stream"),
          release);
#endif
}
