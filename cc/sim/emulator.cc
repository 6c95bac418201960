#include "sim/emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "sim/block.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace performer {
namespace sim {
namespace {

Block* g_block = nullptr;

uint64_t Random(uint64_t* state) {  // xorshift64*
  *state ^= *state << 13;
  *state ^= *state >> 7;
  *state ^= *state << 17;
  return *state * 0x2545F4914F6CDD1Dull >> 16;
}

// ---- Switching between fibers

#if defined(__x86_64__)
// A callee has to keep six registers (System V ABI). The rounding mode is the same in all fibers.
__attribute__((naked, noinline)) void SwitchStack(void** /*save*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

// Suspends `from` and resumes `to`. `ends`: nothing will resume `from`.
void Resume(Context& from, Context& to, bool ends = false) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, to.stack, to.stack_size);
#endif
  (void)ends;
#if defined(__x86_64__)
  SwitchStack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void ResumeScheduler(bool ends) { Resume(g_block->current->context, g_block->scheduler, ends); }

// `from` is the scheduler, or a fiber that waits.
void ResumeFiber(Block& block, Context& from, Fiber& fiber) {
  block.current = &fiber;
  Resume(from, fiber.context);
}

void FiberMain() {
  Block& block = *g_block;
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (block.scheduler.stack == nullptr)  // the first fiber comes from the scheduler
    block.scheduler.stack = bottom, block.scheduler.stack_size = size;
#endif
  try {
    (*block.body)();
    if (!block.current->open.empty() || !block.current->groups.empty())
      Fail("a thread ends with asynchronous copies in flight");
  } catch (const std::exception& e) {
    if (block.error.empty()) block.error = e.what();
  }
  block.current->done = true;
  --block.live;
  ResumeScheduler(true);
  std::abort();
}

// Stacks are mapped once and serve all blocks. The lowest page of each is a guard.
char* Stack(unsigned index) {
  static std::vector<char*> stacks;
  while (stacks.size() <= index) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw Error("no memory for the stack of an emulated thread");
    mprotect(stack, 4096, PROT_NONE);
    stacks.push_back(static_cast<char*>(stack));
  }
  return stacks[index];
}

void PrepareContext(Fiber& fiber) {
  fiber.context = {};
  fiber.context.stack = fiber.stack;
  fiber.context.stack_size = kStackBytes;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack + 4096, kStackBytes - 4096);
#endif
#if defined(__x86_64__)
  // The lanes of a warp begin at different offsets: otherwise their frames would compete for a few
  // cache lines.
  const size_t offset = fiber.index % 32 * (4096 + 64);
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes - 64 - offset);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(FiberMain);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.context.stack_pointer = top;
#else
  ucontext_t& context = fiber.context.context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, FiberMain, 0);
#endif
}

// ---- Scheduling

void MakeReady(Block& block, Fiber* fiber) {
  fiber->warp->ready[fiber->warp->ready_count++] = fiber;
  ++block.ready_count;
}

template <class T>
void ShuffleOrder(std::vector<T>& list, uint64_t* random) {
  for (size_t i = list.size(); i > 1; --i) std::swap(list[i - 1], list[Random(random) % i]);
}

// A number below `count`, from the upper half of x. (A division would take longer than a switch.)
unsigned Below(unsigned count, uint64_t x) {
  return static_cast<unsigned>((x >> 32 & 0xffff) * count >> 16);
}

// Takes the fiber that runs next from those that are ready; there is one.
Fiber* TakeNext(Block& block, Order order) {
  const bool random = order == Order::kRandom || order == Order::kFair;
  const uint64_t x = random ? Random(&block.random) : 0;
  if (order == Order::kRandom && x % 1024 == 0) ShuffleOrder(block.priorities, &block.random);
  const unsigned warps = static_cast<unsigned>(block.priorities.size());
  unsigned p = order == Order::kFair ? Below(warps, x << 16) : 0;
  while (block.warps[block.priorities[p]].ready_count == 0) p = p + 1 == warps ? 0 : p + 1;
  Warp& warp = block.warps[block.priorities[p]];
  const unsigned last = warp.ready_count - 1;
  const unsigned chosen = order == Order::kForward   ? 0
                          : order == Order::kReverse ? last
                                                     : Below(warp.ready_count, x);
  Fiber* fiber = warp.ready[chosen];
  if (order == Order::kForward) {
    std::copy(warp.ready + 1, warp.ready + warp.ready_count, warp.ready);
  } else {
    warp.ready[chosen] = warp.ready[last];
  }
  --warp.ready_count;
  --block.ready_count;
  return fiber;
}

// Suspends the current thread until what it waits for has made it ready.
void Suspend(const char* where) {
  Block& block = *g_block;
  Fiber& fiber = *block.current;
  fiber.waits_at = where;
  // A deadlock, or another thread's error, ends the block.
  if (block.ready_count == 0 || !block.error.empty()) return ResumeScheduler(false);
  Fiber& next = *TakeNext(block, block.order);
  if (&next != &fiber) ResumeFiber(block, fiber.context, next);
}

std::string Deadlock(const Block& block) {
  std::string text = "deadlock: ";
  unsigned shown = 0;
  for (const Fiber& fiber : block.fibers)
    if (!fiber.done && shown++ < 3)
      text += "thread " + std::to_string(fiber.index) + " waits at " + fiber.waits_at + ", ";
  return text + std::to_string(block.fibers.size() - block.live) + " of " +
         std::to_string(block.fibers.size()) + " threads have ended";
}

void CreateFibers(Block& block, unsigned count) {
  block.live = count;
  block.fibers.resize(count);
  block.warps.resize(count / 32);
  for (unsigned i = 0; i < count; ++i) {
    Fiber& fiber = block.fibers[i];
    const dim3 d = block.block_dim;
    fiber.position = {dim3(i % d.x, i / d.x % d.y, i / d.x / d.y), block.index, d, block.grid_dim,
                      i % 32};
    fiber.index = i;
    fiber.warp = &block.warps[i / 32];
    fiber.stack = Stack(i);
    PrepareContext(fiber);
    MakeReady(block, &fiber);
  }
}

void SetPriorities(Block& block, Order order) {
  const unsigned warps = static_cast<unsigned>(block.warps.size());
  for (unsigned w = 0; w < warps; ++w)
    block.priorities.push_back(order == Order::kReverse ? warps - 1 - w : w);
  if (order == Order::kRandom) ShuffleOrder(block.priorities, &block.random);
}

void RunBlock(Block& block) {
  const unsigned count = block.block_dim.x * block.block_dim.y * block.block_dim.z;
  if (count == 0 || count > 1024 || count % 32 != 0)
    throw Error("a block must have a multiple of 32 threads, at most 1024");
  const Order order = block.order = TheOptions().order;
  g_block = &block;
  ++TheCounters().blocks;
  CreateFibers(block, count);
  SetPriorities(block, order);
  while (block.ready_count > 0 && block.error.empty())
    ResumeFiber(block, block.scheduler, *TakeNext(block, order));
  if (block.error.empty() && block.live > 0) block.error = Deadlock(block);
  g_block = nullptr;
}

// ---- Memory

void PerformCopy(const Copy& copy, void* instruction) {
  RaceAccess(copy.to, copy.bytes, true, instruction);
  RaceAccess(copy.from, copy.valid, false, instruction);
  std::memcpy(copy.to, copy.from, copy.valid);
  std::memset(static_cast<char*>(copy.to) + copy.valid, 0, copy.bytes - copy.valid);
}

// Where the lanes of `mask` wait for each other.
inline Rendezvous& FindRendezvous(Warp& warp, uint32_t mask) {
  for (Rendezvous& known : warp.rendezvous)
    if (known.mask == mask) return known;
  if (warp.rendezvous.empty()) warp.rendezvous.reserve(16);  // references stay valid
  if (warp.rendezvous.size() == 16) Fail("more than 16 masks in one warp");
  warp.rendezvous.push_back({});
  warp.rendezvous.back().mask = mask;
  return warp.rendezvous.back();
}

// Shared memory of one block. It starts as NaN, in every type.
class SharedBuffer {
 public:
  explicit SharedBuffer(size_t bytes) : bytes_(bytes), rounded_((bytes + 127) / 128 * 128) {
    if (bytes == 0) return;
    data_.reset(static_cast<unsigned char*>(std::aligned_alloc(128, rounded_)));
    if (!data_) throw Error("no memory for emulated shared memory");
    std::memset(data_.get(), 0xFF, rounded_);
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(data_.get() + bytes_, rounded_ - bytes_);
#endif
  }
#if defined(__SANITIZE_ADDRESS__)
  ~SharedBuffer() {
    if (data_) __asan_unpoison_memory_region(data_.get(), rounded_);
  }
#endif
  unsigned char* data() const { return data_.get(); }
  size_t bytes() const { return bytes_; }

 private:
  struct FreeDeleter {
    void operator()(unsigned char* p) const { std::free(p); }
  };

  const size_t bytes_, rounded_;
  std::unique_ptr<unsigned char, FreeDeleter> data_;
};

// The order in which the blocks of a launch run.
std::vector<uint64_t> BlockOrder(uint64_t count, Order order, uint64_t* random) {
  std::vector<uint64_t> blocks(count);
  for (uint64_t i = 0; i < count; ++i) blocks[i] = order == Order::kReverse ? count - 1 - i : i;
  if (order == Order::kRandom) ShuffleOrder(blocks, random);
  return blocks;
}

}  // namespace

Options& TheOptions() {
  static Options options;
  return options;
}
Counters& TheCounters() {
  static Counters counters;
  return counters;
}
std::set<std::string>& Sites() {
  static std::set<std::string> sites;
  return sites;
}
std::map<std::string, Traffic>& TheTraffic() {
  static std::map<std::string, Traffic> traffic;
  return traffic;
}
Races& TheRaces() {
  static Races races;
  return races;
}
Block* TheBlock() { return g_block; }
const Position& Here() { return g_block->current->position; }
unsigned char* SharedMemory() { return g_block->shared; }

void Fail(const std::string& message) {
  const Position& here = Here();
  throw Error(message + " [block " + std::to_string(here.block.x) + "," +
              std::to_string(here.block.y) + "," + std::to_string(here.block.z) + " thread " +
              std::to_string(g_block->current->index) + "]");
}

void SyncThreads(const char* site) {
  Block& block = *g_block;
  if (block.current->index == 0) Sites().insert(site);
  if (!TheOptions().skip.empty() && TheOptions().skip == site) return;
  if (block.arrived > 0 && block.barrier_site != site && std::strcmp(block.barrier_site, site) != 0)
    Fail(std::string("barriers in divergent code: ") + site + " meets " + block.barrier_site);
  const unsigned object = block.generation & 1;
  RaceRelease(object);
  block.barrier_site = site;
  if (++block.arrived == block.fibers.size()) {
    ++TheCounters().barriers;
    block.arrived = 0;
    ++block.generation;
    for (Fiber* fiber : block.at_barrier) MakeReady(block, fiber);
    block.at_barrier.clear();
    MakeReady(block, block.current);
  } else {
    block.at_barrier.push_back(block.current);
  }
  Suspend(site);
  RaceAcquire(object);
}

void Collective(uint32_t mask, const char* name, void* slot, void (*apply)(void**, uint32_t)) {
  Block& block = *g_block;
  Fiber& fiber = *block.current;
  const unsigned lane = fiber.position.lane;
  Rendezvous& rendezvous = FindRendezvous(*fiber.warp, mask);
  if ((mask >> lane & 1) == 0) Fail(std::string(name) + ": the lane is not in its own mask");
  if (rendezvous.arrived != 0 && rendezvous.name != name && std::strcmp(rendezvous.name, name) != 0)
    Fail(std::string("a warp diverges: ") + name + " meets " + rendezvous.name);
  rendezvous.name = name;
  rendezvous.slots[lane] = slot;
  rendezvous.arrived |= 1u << lane;
  if (rendezvous.arrived == mask) {
    if (apply != nullptr) apply(rendezvous.slots, mask);
    rendezvous.arrived = 0;
    ++rendezvous.generation;
    Fiber* const lanes = &fiber - lane;
    for (unsigned other = 0; other < 32; ++other)
      if (mask >> other & 1) MakeReady(block, lanes + other);
  }
  Suspend(name);
}

void SyncWarp(uint32_t mask, const char* site) {
  Block& block = *g_block;
  if (block.current->index == 0) Sites().insert(site);
  if (!TheOptions().skip.empty() && TheOptions().skip == site) return;
  Warp& warp = *block.current->warp;
  const Rendezvous& rendezvous = FindRendezvous(warp, mask);
  const auto of_warp = static_cast<unsigned>(&warp - block.warps.data());
  const auto of_mask = static_cast<unsigned>(&rendezvous - warp.rendezvous.data());
  const unsigned object = 2 + (of_warp * 16 + of_mask) * 2 + (rendezvous.generation & 1);
  RaceRelease(object);
  Collective(mask, "bar.warp.sync", nullptr, nullptr);
  RaceAcquire(object);
}

void CopyAsync(void* to, const void* from, int bytes, int valid) {
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 ||
      reinterpret_cast<uintptr_t>(from) % bytes != 0)
    Fail("cp.async: address not aligned to its size");
  ++TheCounters().copies;
  void* const instruction = __builtin_return_address(0);
  RaceAccess(to, bytes, true, instruction);  // it may be written from here on
  TrafficAccess(to, bytes, true);
  TrafficAccess(from, valid, false);
  const Copy copy = {to, from, bytes, valid};
  if (TheOptions().order == Order::kRandom && Random(&g_block->random) % 4 == 0) {
    PerformCopy(copy, instruction);
  } else {
    g_block->current->open.push_back(copy);
  }
}

void CopyAsyncCommit() {
  Fiber& fiber = *g_block->current;
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

void CopyAsyncWait(int groups_left, const char* file, int line) {
  Fiber& fiber = *g_block->current;
  if (fiber.index == 0 || !TheOptions().skip.empty()) {
    const std::string site = std::string(file) + ":" + std::to_string(line);
    if (fiber.index == 0) Sites().insert(site);
    if (TheOptions().skip == site) return;
  }
  void* const instruction = __builtin_return_address(0);
  while (fiber.groups.size() > static_cast<size_t>(groups_left)) {
    for (const Copy& copy : fiber.groups.front()) PerformCopy(copy, instruction);
    fiber.groups.erase(fiber.groups.begin());
  }
}

Graph*& TheGraph() {
  static Graph* graph = nullptr;
  return graph;
}
void Enqueue(const std::function<void()>& launch) {
  if (TheGraph() != nullptr) return TheGraph()->push_back(launch);
  launch();
}

void Launch(const char* name, dim3 grid, dim3 block_dim, size_t shared_bytes,
            const std::function<void()>& body) {
  TrafficLaunchBegins(name);
  uint64_t random = TheOptions().seed * 0x9E3779B97F4A7C15ull + 88172645463325252ull;
  const uint64_t count = uint64_t{grid.x} * grid.y * grid.z;
  for (const uint64_t i : BlockOrder(count, TheOptions().order, &random)) {
    const SharedBuffer shared(shared_bytes);
    const auto block = std::make_unique<Block>();
    block->grid_dim = grid;
    block->block_dim = block_dim;
    block->index =
        dim3(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
             static_cast<unsigned>(i / grid.x / grid.y));
    block->random = Random(&random) | 1;
    block->body = &body;
    block->shared = shared.data();
    block->shared_bytes = shared.bytes();
    RaceBlockBegins(*block);
    TrafficBlockBegins();
    RunBlock(*block);
    RaceBlockEnds();
    if (!block->error.empty()) throw Error(block->error);
  }
  RaceLaunchEnds();
}

}  // namespace sim
}  // namespace performer
