// Blocks of a launch and the warp that runs next: see fibers.hpp.
#pragma once

#include <cstdio>
#include <tuple>
#include <type_traits>

#include "fibers.hpp"

namespace emulate {

inline void start_block() {
  auto block = std::make_unique<Block>();
  const size_t n = state.next_block++;
  block->index.x = n % gridDim.x;
  block->index.y = n / gridDim.x % gridDim.y;
  block->index.z = n / gridDim.x / gridDim.y;
  block->alive = blockDim.x;
  if (state.free_stacks.empty()) {
    void* stacks = mmap(nullptr, blockDim.x * kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) fail("no memory for the stacks of another block");
    state.all_stacks.push_back(static_cast<char*>(stacks));
    state.free_stacks.push_back(static_cast<char*>(stacks));
  }
  block->stacks = state.free_stacks.back();
  state.free_stacks.pop_back();
  const size_t bytes = (state.shared_bytes + 2 * kZone + kZone - 1) / kZone * kZone;
  block->memory = static_cast<unsigned char*>(aligned_alloc(kZone, bytes));
  poison(block->memory, bytes);
  block->warps.resize(blockDim.x / 32);
  for (unsigned thread = 0; thread < blockDim.x; ++thread) {
    Warp& warp = block->warps[thread / 32];
    Lane& lane = warp.lanes[thread % 32];
    warp.block = block.get();
    lane.warp = &warp;
    lane.thread = thread;
    lane.stack = block->stacks + thread * kStack;
    make_context(lane.context, block->stacks + thread * kStack, run_lane);
  }
  for (Warp& warp : block->warps) state.ready.push_back(&warp);
  state.blocks.push_back(std::move(block));
}

inline void end_block(Block& block) {
  if (!poisoned(block.memory, kZone) || !poisoned(block.memory + kZone + state.shared_bytes, kZone))
    fail(text(block) + ": wrote outside of " + std::to_string(state.shared_bytes) + " bytes of shared memory");
  state.free_stacks.push_back(block.stacks);
  free(block.memory);
  for (auto& other : state.blocks)
    if (other.get() == &block) {
      other.swap(state.blocks.back());
      return state.blocks.pop_back();
    }
}

// Returns the warp to run next, or null at the end. Until then one is ready: the last lane of a block that reaches a
// barrier, or ends, releases the others, and `run_warp` fails if lanes wait for lanes that do not come.
inline Warp* next_warp() {
  if (state.next_block < state.num_blocks && (state.ready.empty() || chance(2 * kSwitchEvery))) start_block();
  if (state.ready.empty()) return nullptr;
  if (state.random) std::swap(state.ready.front(), state.ready[choose(state.ready.size())]);
  Warp* warp = state.ready.front();
  state.ready.pop_front();
  return warp;
}

inline void run_warp(Warp& warp) {
  state.descending = chance(2);
  state.lane = &next_lane(warp);
  blockIdx = warp.block->index;
  threadIdx.x = state.lane->thread;
  switch_context(state.scheduler, state.lane->context);
  if (!warp.block->alive) return end_block(*warp.block);
  if (warp.ready) return state.ready.push_back(&warp);
  if (warp.arrived) fail("deadlock: lanes wait for others of their warp that do not come: " + text(warp));
}

inline void on_fault(int number, siginfo_t* info, void*) {
  char address[32];
  snprintf(address, sizeof address, "%p", info->si_addr);
  const std::string what = number == SIGILL   ? "misaligned access"
                           : number == SIGFPE ? "integer division by zero"
                                              : "access to memory that is not there, " + std::string(address);
  fail(text(*state.lane) + ": " + what + ", after " + state.lane->what + text(state.lane->site));
}

// While this lives, faults of kernels become errors.
class FaultHandlers {
 public:
  FaultHandlers() : memory_(64 * 1024) {
    stack_t stack = {};
    stack.ss_sp = memory_.data();
    stack.ss_size = memory_.size();
    sigaltstack(&stack, &old_stack_);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 4; ++i) sigaction(kNumbers[i], &action, &old_[i]);
  }
  ~FaultHandlers() {
    for (int i = 0; i < 4; ++i) sigaction(kNumbers[i], &old_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  static constexpr int kNumbers[4] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
  std::vector<char> memory_;
  stack_t old_stack_;
  struct sigaction old_[4];
};

// Returns the error, empty if there is none.
inline const std::string& launch(std::function<void()> kernel, dim3 grid, unsigned threads, size_t shared_bytes,
                                 uint64_t seed) {
  state.error.clear();
  state.kernel = std::move(kernel);
  state.shared_bytes = shared_bytes;
  state.num_blocks = size_t(grid.x) * grid.y * grid.z;
  state.next_block = 0;
  state.random = seed * 0x9e3779b97f4a7c15u;  // spreads small seeds over all bits
  gridDim = grid;
  blockDim = {threads, 1, 1};
  threadIdx = {0, 0, 0};
  FaultHandlers handlers;
  if (!sigsetjmp(state.escape, 1))
    while (Warp* warp = next_warp()) run_warp(*warp);
  for (auto& block : state.blocks) free(block->memory);
  state.blocks.clear();
  state.ready.clear();
  for (char* stacks : state.all_stacks) munmap(stacks, threads * kStack);
  state.all_stacks.clear();
  state.free_stacks.clear();
  return state.error;
}

// Types of the kernel's parameters ("p", "i" or "f", and the size) and a call with the numbers at `values`.
template <class... P>
std::string signature(void (*)(P...)) {
  std::string out;
  ((out += (std::is_pointer_v<P> ? "p" : std::is_floating_point_v<P> ? "f" : std::is_integral_v<P> ? "i" : "?") +
           std::to_string(sizeof(P))),
   ...);
  return out;
}
template <class... P, size_t... I>
std::function<void()> bind_values(void (*kernel)(P...), void** values, std::index_sequence<I...>) {
  return [=, arguments = std::make_tuple(*static_cast<P*>(values[I])...)] { std::apply(kernel, arguments); };
}
template <class... P>
std::function<void()> bind_values(void (*kernel)(P...), void** values) {
  return bind_values(kernel, values, std::index_sequence_for<P...>());
}

}  // namespace emulate
