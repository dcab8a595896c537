// Arithmetic on sizes. Unnamed namespace: see epilogue.h.
#pragma once
#include <cstdint>

namespace sparsekit::cpu {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

} // namespace
} // namespace sparsekit::cpu
