// The threads of a CUDA launch as fibers of one CPU thread, and the order in which they run.
//
// A warp runs until all of its lanes wait or have ended. Between two operations of the warp its lanes run one after
// the other. Seed 0 takes warps in turn and lanes upwards. Other seeds choose the next warp, the direction of lanes,
// the starts of blocks and the interruptions of a warp at random, the same way for the same seed. A kernel that needs
// more than its barriers guarantee gives other results for some seeds.
//
// `fail` ends a launch early and jumps out of the fibers, whose destructors do not run.
#pragma once

#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

struct dim3 {
  unsigned x, y, z;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulate {

constexpr size_t kStack = 64 * 1024;
constexpr size_t kZone = 1024;  // bytes around shared memory that nobody may write
// What memory holds that nobody wrote: a NaN as bfloat16 and as float32.
constexpr uint16_t kPoison = 0xffc0;
constexpr uint64_t kSwitchEvery = 16;  // mean number of chances per interruption of a warp

inline void poison(void* p, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 2) memcpy(static_cast<char*>(p) + i, &kPoison, 2);
}
inline bool poisoned(const void* p, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 2)
    if (memcmp(static_cast<const char*>(p) + i, &kPoison, 2)) return false;
  return true;
}

struct Site {
  const char* file;
  int line;
};
constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }

#if defined(__x86_64__)
// Callee-saved registers go to the old stack, and come from the new one.
struct Context {
  void* stack_pointer;
};
extern "C" __attribute__((visibility("hidden"))) void mhc_emulate_switch(void** from, void* to);
asm(R"(
  .text
  .hidden mhc_emulate_switch
  .globl mhc_emulate_switch
  .type mhc_emulate_switch, @function
mhc_emulate_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size mhc_emulate_switch, .-mhc_emulate_switch
)");
inline void switch_context(Context& from, Context& to) {
  mhc_emulate_switch(&from.stack_pointer, to.stack_pointer);
}
inline void make_context(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStack) - 8;  // six registers, `entry`, its return address
  memset(top, 0, 8 * sizeof(void*));
  top[6] = reinterpret_cast<void*>(entry);
  context.stack_pointer = top;
}
#else
struct Context {
  ucontext_t state;
};
inline void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
inline void make_context(Context& context, char* stack, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = kStack;
  makecontext(&context.state, entry, 0);
}
#endif

struct Copy {
  void* to;
  const void* from;  // null: zeros
  size_t bytes;
};

struct Lane {
  Context context;
  struct Warp* warp;
  const char* stack;
  unsigned thread;  // within its block
  const char* what = "its start";  // the operation that it came to last
  Site site = {"", 0};
  uint32_t mask = 0;
  std::vector<Copy> copies;  // asynchronous ones under way, those of `groups` first
  std::vector<size_t> groups;  // number of copies in each committed group

  uint32_t bit() const { return 1u << thread % 32; }
};

// Every living lane is in one of `ready`, `arrived` (at an operation of the warp) and `at_barrier`.
struct Warp {
  struct Block* block;
  uint32_t ready = ~0u, arrived = 0, at_barrier = 0;
  Lane lanes[32];
  uint32_t word[32][12];  // operands, then results, of the lanes
};

struct Block {
  dim3 index;
  unsigned alive, waiting = 0;
  char* stacks;
  unsigned char* memory;  // kZone bytes, shared memory, kZone bytes
  std::vector<Warp> warps;
};

inline struct State {
  Context scheduler;
  sigjmp_buf escape;
  std::string error;
  std::function<void()> kernel;
  size_t shared_bytes, num_blocks, next_block;
  uint64_t random;  // 0: no random choices
  bool descending;
  Lane* lane;
  std::vector<std::unique_ptr<Block>> blocks;
  std::deque<Warp*> ready;
  std::vector<char*> free_stacks, all_stacks;
} state;

inline std::string text(Site site) {
  if (!site.line) return "";
  const char* slash = strrchr(site.file, '/');
  return " (" + std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line) + ")";
}
inline std::string text(const Block& block) {
  return "block (" + std::to_string(block.index.x) + ", " + std::to_string(block.index.y) + ", " +
         std::to_string(block.index.z) + ")";
}
inline std::string text(const Lane& lane) {
  return text(*lane.warp->block) + " thread " + std::to_string(lane.thread) + " (warp " +
         std::to_string(lane.thread / 32) + " lane " + std::to_string(lane.thread % 32) + ")";
}
// "lanes 0-3 at transpose (kernel.cu:12), lanes 4-31 ended"
inline std::string text(const Warp& warp) {
  auto status = [&](const Lane& lane) {
    if (warp.ready & lane.bit()) return std::string("ready");
    return (warp.arrived | warp.at_barrier) & lane.bit() ? "at " + (lane.what + text(lane.site)) : "ended";
  };
  std::string out = text(*warp.block) + " warp " + std::to_string(warp.lanes[0].thread / 32) + ":";
  for (int first = 0, last; first < 32; first = last + 1) {
    const std::string now = status(warp.lanes[first]);
    for (last = first; last < 31 && status(warp.lanes[last + 1]) == now;) ++last;
    out += (first ? ", lane" : " lane") + (last > first ? "s " + std::to_string(first) + "-" : std::string(" "));
    out += std::to_string(last) + " " + now;
  }
  return out;
}

[[noreturn]] inline void fail(const std::string& message) {
  state.error = message;
  siglongjmp(state.escape, 1);
}
[[noreturn]] inline void fail(const char* what, Site site, const std::string& message) {
  fail(text(*state.lane) + ": " + what + text(site) + ": " + message);
}

inline bool chance(uint64_t one_in) {
  if (!state.random) return false;
  state.random ^= state.random << 13;
  state.random ^= state.random >> 7;
  state.random ^= state.random << 17;
  return (state.random >> 20) % one_in == 0;
}
inline size_t choose(size_t number) {
  chance(1);
  return (state.random >> 20) % number;
}

inline Lane& next_lane(Warp& warp) {
  return warp.lanes[state.descending ? 31 - __builtin_clz(warp.ready) : __builtin_ctz(warp.ready)];
}
// Runs the next ready lane of the caller's warp, or the scheduler if none is or `leave`.
inline void reschedule(bool leave = false) {
  Lane& from = *state.lane;
  if (leave || !from.warp->ready) return switch_context(from.context, state.scheduler);
  Lane& to = next_lane(*from.warp);
  if (&to == &from) return;
  state.lane = &to;
  threadIdx.x = to.thread;
  switch_context(from.context, to.context);
}
// Where another warp may come in between.
inline void pause() {
  if (chance(kSwitchEvery)) reschedule(true);
}

// A function of its own for the address of its frame.
__attribute__((noinline)) inline Lane& come_to(const char* what, Site site) {
  Lane& lane = *state.lane;
  if (static_cast<const char*>(__builtin_frame_address(0)) < lane.stack + kStack / 8)
    fail(what, site, "the stack is full: too many local variables for the emulator");
  lane.what = what;
  lane.site = site;
  return lane;
}

// Waits for the lanes of `mask`; the last of them to come runs `compute`, on `word` of all.
template <class Compute>
inline void meet(const char* what, uint32_t mask, Site site, Compute compute) {
  Lane& lane = come_to(what, site);
  Warp& warp = *lane.warp;
  if (!(mask & lane.bit())) fail(what, site, "the mask has no bit of this lane");
  lane.mask = mask;
  warp.ready &= ~lane.bit();
  warp.arrived |= lane.bit();
  if ((warp.arrived & mask) == mask) {
    for (Lane& other : warp.lanes)
      if (mask & other.bit() && (strcmp(other.what, what) || other.mask != mask))
        fail("divergence: lanes of one warp meet at different operations or masks: " + text(warp));
    compute(warp);
    warp.arrived &= ~mask;
    warp.ready |= mask;
    state.descending = chance(2);
    pause();
  }
  reschedule();
}

inline void release_barrier(Block& block) {
  for (Warp& warp : block.warps) {
    if (!warp.at_barrier) continue;
    warp.ready |= warp.at_barrier;
    warp.at_barrier = 0;
    if (&warp != state.lane->warp) state.ready.push_back(&warp);
  }
  block.waiting = 0;
}

inline void meet_block(Site site) {
  Lane& lane = come_to("__syncthreads", site);
  Block& block = *lane.warp->block;
  lane.warp->ready &= ~lane.bit();
  lane.warp->at_barrier |= lane.bit();
  if (++block.waiting == block.alive) {
    release_barrier(block);
    return reschedule(true);
  }
  reschedule();
}

inline void run_lane() {
  state.kernel();
  Lane& lane = *state.lane;
  Block& block = *lane.warp->block;
  lane.warp->ready &= ~lane.bit();
  if (--block.alive && block.waiting == block.alive) release_barrier(block);
  reschedule();
}

}  // namespace emulate
