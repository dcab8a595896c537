// The machine's controls, as ctypes calls them. Each library of emulated kernels includes this in one of its files.
#pragma once
#include "cuda_host.h"

extern "C" {

void emulator_seed(uint64_t seed) { emulator::machine.seed(seed); }
void emulator_forget_memory() { emulator::machine.ranges.clear(); }
void emulator_allow(const void *pointer, size_t bytes, int writable) {
    const auto begin = reinterpret_cast<uintptr_t>(pointer);
    emulator::machine.ranges.push_back({begin, begin + bytes, writable != 0});
}
void emulator_multiprocessors(int count) { emulator::multiprocessors = count; }
const char *emulator_error() { return emulator::machine.error.c_str(); }
}
