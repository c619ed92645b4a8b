// The products of warpgroups (wgmma) that are in flight. A product is computed from its operands when it is issued, and
// its accumulators are NaN from then until a wait for its group. The wait checks that the operands are still what they
// were, in shared memory and in registers, and that nobody wrote to the accumulators: the device reads and writes them at
// any time in between.
#pragma once
#include <list>

#include "core/cuda/descriptor.cuh"
#include "core/math.h"
#include "hopper_state.h"

namespace emulator {

constexpr unsigned kGroup = 128;  // threads of a warpgroup

// Pieces of 16 bytes in shared memory that a product reads, and what they held.
struct Operand {
  std::vector<uintptr_t> pieces;
  std::vector<std::array<char, 16>> held;

  void read(uintptr_t at, float (*value)(uint16_t), float* to) {
    uint16_t bits[8];
    std::memcpy(bits, reinterpret_cast<const void*>(at), 16);
    for (int i = 0; i < 8; ++i) to[i] = value(bits[i]);
    pieces.push_back(at);
    std::memcpy(held.emplace_back().data(), bits, 16);
  }

  bool unchanged() const {
    for (size_t i = 0; i < pieces.size(); ++i) {
      if (std::memcmp(reinterpret_cast<const void*>(pieces[i]), held[i].data(), 16) != 0) return false;
    }
    return true;
  }
};

// One thread's part in a product.
struct Call {
  float* c;
  const uint32_t* registers;  // of a; null: a is in shared memory
  uint64_t a, b;
  bool add;
  unsigned group;
};

struct Accumulators {
  float* registers[kGroup];
  int columns;
  unsigned group;             // the last that adds to them
  std::vector<float> values;  // (64, columns)
  bool delivered[kGroup] = {};
};

struct Product {
  unsigned group;
  Operand a, b;
  const uint32_t* registers[kGroup];
  uint32_t held[kGroup][4];
  bool checked[kGroup] = {};
};

struct Warpgroup {
  Call calls[kGroup];
  std::string name;  // of the product that threads are at
  unsigned arrived = 0;
  bool fenced[kGroup] = {};
  unsigned closed[kGroup] = {};  // groups
  std::list<Accumulators> open;
  std::list<Product> products;
  race::Agent agent = 0;  // reads their operands; its work is numbered by groups, from 1
};

// A descriptor, decoded. Each error is what the device leaves undefined.
struct Layout {
  uintptr_t start;
  uint64_t leading, stride;

  explicit Layout(uint64_t word) {
    const auto shared = reinterpret_cast<uintptr_t>(machine().dynamic_shared.get());
    start = shared + ((((word & 0x3fff) << 4) - shared) & 0x3fff0);
    leading = (word >> 16 & 0x3fff) << 4, stride = (word >> 32 & 0x3fff) << 4;
    if (word >> 62 != 1) {
      stop("wgmma: a descriptor with swizzle mode ", word >> 62, ", expected 1 (128 bytes)");
    }
    if ((word & 0x3fffc000c000c000) != 0) stop("wgmma: a descriptor with a base offset, or with bits without meaning");
  }

  static uintptr_t swizzled(uintptr_t address) { return address ^ (address >> 7 & 7) << 4; }

  // Where 8 of the 16 values of row r along the lines are.
  uintptr_t along(int r, int half) const {
    return swizzled(start / 1024 * 1024 + r / 8 * stride + r % 8 * 128 + start % 1024 + half * 16);
  }

  // Where 8 values of line k are, from this column on.
  uintptr_t across(int k, int column) const {
    return swizzled(start + column / 64 * leading + k / 8 * stride + k % 8 * 128 + column % 64 * 2);
  }

  void check_stride() const {
    if (stride % 1024 == 0 && stride > 0) return;
    stop("wgmma: a stride offset of ", stride, " bytes between groups of eight lines, expected whole atoms");
  }

  // Reads `rows` x 16 values along the lines into x[row][k].
  void read_along(int rows, float (*x)[16], float (*value)(uint16_t), Operand& operand) const {
    if (start % 1024 >= 128 || start % 32 != 0) {
      stop("wgmma: an operand along the lines starts at ", Hopper::offset(start),
           ", expected 32-byte steps in the first line of an atom of 1024 bytes");
    }
    check_stride();
    if (!Hopper::in_shared(start / 1024 * 1024, (rows / 8 - 1) * stride + 1024)) {
      stop("wgmma: an operand leaves shared memory");
    }
    for (int r = 0; r < rows; ++r) {
      for (int half = 0; half < 2; ++half) operand.read(along(r, half), value, x[r] + half * 8);
    }
  }

  // Reads 16 lines of `columns` values into y[k][column].
  void read_across(int columns, float (*y)[256], float (*value)(uint16_t), Operand& operand) const {
    if (start % 1024 != 0) {
      stop("wgmma: an operand across the lines starts at ", Hopper::offset(start), ", expected an atom of 1024 bytes");
    }
    check_stride();
    if (columns > 64 && (leading % 1024 != 0 || leading == 0)) {
      stop("wgmma: a leading offset of ", leading, " bytes between blocks of 64 columns, expected whole atoms");
    }
    if (!Hopper::in_shared(start, (columns / 64 - 1) * leading + stride + 1024)) {
      stop("wgmma: an operand leaves shared memory");
    }
    for (int k = 0; k < 16; ++k) {
      for (int c = 0; c < columns; c += 8) operand.read(across(k, c), value, y[k] + c);
    }
  }
};

// Where thread t of a warpgroup holds element e of tile m.
inline int row_of(unsigned t, int e) { return static_cast<int>(t / 32 * 16 + t % 32 / 4) + e / 2 * 8; }
inline int column_of(unsigned t, int m, int e) { return 8 * m + static_cast<int>(t % 4) * 2 + e % 2; }

struct Products {
  uint64_t block = 0;
  std::map<unsigned, Warpgroup> groups;

  Warpgroup& own() {
    const unsigned number = machine().current->warp / 4;
    const auto [found, made] = groups.try_emplace(number);
    if (made) found->second.agent = race::agent("wgmma of warpgroup", number);
    return found->second;
  }
  static unsigned thread() { return machine().current->warp % 4 * 32 + machine().current->lane; }

  void fence() {
    own().fenced[thread()] = true;
  }

  // The group of this thread that is open.
  race::Work open_group() {
    const Warpgroup& w = own();
    return {w.agent, w.closed[thread()] + 1};
  }

  void commit() {
    own().fenced[thread()] = false;
    ++own().closed[thread()];
  }

  // Waits for all 128 threads of the warpgroup; the last one computes.
  void issue(const char* name, int columns, float (*value)(uint16_t), Call call) {
    Warpgroup& w = own();
    const unsigned t = thread();
    if (!w.fenced[t]) stop(name, ": no wgmma.fence since the last group was closed");
    if (w.arrived == 0) w.name = name;
    if (w.name != name) stop("deadlock: a warpgroup is at ", w.name, " and at ", name);
    call.group = w.closed[t];
    w.calls[t] = call;
    machine().current->waits_for = "the other threads of its warpgroup at " + std::string(name);
    if (++w.arrived < kGroup) {
      machine().wait(State::at_collective);
    } else {
      w.arrived = 0;
      compute(w, columns, value);
      if (!machine().error.empty()) return machine().wait(State::at_collective);
      const unsigned first = machine().current->warp / 4 * kGroup;
      for (unsigned i = first; i < first + kGroup; ++i) {
        if (&machine().fibers[i] != machine().current) machine().fibers[i].state = State::ready;
      }
    }
    machine().current->waits_for.clear();
  }

  static Accumulators& opened(Warpgroup& w, int columns) {
    for (Accumulators& c : w.open) {
      if (c.registers[0] != w.calls[0].c) continue;
      if (c.columns != columns) stop("wgmma: accumulators in flight are used with another shape");
      return c;
    }
    Accumulators& c = w.open.emplace_back();
    c.columns = columns;
    c.values.assign(64 * static_cast<size_t>(columns), 0.0f);
    for (unsigned t = 0; t < kGroup; ++t) {
      c.registers[t] = w.calls[t].c;
      for (int i = 0; i < columns / 2; ++i) {
        c.values[row_of(t, i % 4) * columns + column_of(t, i / 4, i % 4)] = c.registers[t][i];
      }
      std::memset(c.registers[t], kPoison, columns / 2 * sizeof(float));
    }
    return c;
  }

  static void compute(Warpgroup& w, int columns, float (*value)(uint16_t)) {
    const Call& call = w.calls[0];
    for (const Call& other : w.calls) {
      if (other.a != call.a || other.b != call.b || other.add != call.add || other.group != call.group) {
        stop("wgmma: the threads of a warpgroup pass different operands");
      }
    }
    static float a[64][16], b[256][16], across[16][256];
    Product& p = w.products.emplace_back();
    p.group = call.group;
    for (unsigned t = 0; t < kGroup; ++t) {
      p.registers[t] = w.calls[t].registers;
      if (p.registers[t] == nullptr) continue;
      std::memcpy(p.held[t], p.registers[t], sizeof p.held[t]);
      for (int i = 0; i < 8; ++i) {  // as in mma
        const int k = static_cast<int>(t % 4) * 2 + i % 2 + i / 4 * 8;
        a[t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8][k] = value(static_cast<uint16_t>(p.held[t][i / 2] >> 16 * (i % 2)));
      }
    }
    if (call.registers == nullptr) {
      Layout(call.a).read_along(64, a, value, p.a);
      Layout(call.b).read_along(columns, b, value, p.b);
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < columns; ++n) across[k][n] = b[n][k];
      }
    } else {
      Layout(call.b).read_across(columns, across, value, p.b);
    }
    Accumulators& c = opened(w, columns);
    c.group = call.group;
    if (!call.add) std::fill(c.values.begin(), c.values.end(), 0.0f);
    for (int row = 0; row < 64; ++row) {
      float* sum = c.values.data() + row * columns;
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < columns; ++n) sum[n] += a[row][k] * across[k][n];
      }
    }
  }

  // Delivers the results of all groups of this thread except the last n.
  void wait(unsigned n) {
    Warpgroup& w = own();
    const unsigned t = thread();
    const auto done = [&](unsigned group) { return group + n < w.closed[t]; };
    for (Product& p : w.products) {
      if (p.checked[t] || !done(p.group)) continue;
      p.checked[t] = true;
      if (t % 32 == 0 && !(p.a.unchanged() && p.b.unchanged())) {
        stop("wgmma: an operand in shared memory changed before the wait for its product");
      }
      if (p.registers[t] != nullptr && std::memcmp(p.registers[t], p.held[t], sizeof p.held[t]) != 0) {
        stop("wgmma: an operand in registers changed before the wait for its product");
      }
    }
    if (w.closed[t] > n) race::finished({w.agent, w.closed[t] - n});
    for (Accumulators& c : w.open) {
      if (done(c.group) && !c.delivered[t]) deliver(c, t);
    }
    const auto everywhere = [](const bool(&threads)[kGroup]) {
      return std::all_of(std::begin(threads), std::end(threads), [](bool b) { return b; });
    };
    w.open.remove_if([&](const Accumulators& c) { return everywhere(c.delivered); });
    w.products.remove_if([&](const Product& p) { return everywhere(p.checked); });
  }

  static void deliver(Accumulators& c, unsigned t) {
    for (int i = 0; i < c.columns / 2; ++i) {
      uint32_t bits;
      std::memcpy(&bits, c.registers[t] + i, 4);
      if (bits != 0xffffffffu) stop("wgmma: an accumulator was written before the wait for its product");
      c.registers[t][i] = c.values[row_of(t, i % 4) * c.columns + column_of(t, i / 4, i % 4)];
    }
    c.delivered[t] = true;
  }

  void check_end() const {
    for (const auto& [number, w] : groups) {
      if (!w.open.empty()) fail("a block ended before warpgroup ", number, " waited for its products");
    }
  }
};

// Of the running block.
inline Products& products() {
  static Products p;
  Machine& m = machine();
  if (p.block != m.block) {
    p = Products{};
    p.block = m.block;
    m.at_end.push_back([] { products().check_end(); });
  }
  return p;
}

// Calls f(products()); what it does with memory is no access of the kernel.
template <typename F>
void products_aside(F f) {
  const race::Aside aside;
  f(products());
}

inline race::Work open_group() {
  const race::Aside aside;
  return products().open_group();
}

inline Layout decoded(uint64_t word) {
  const race::Aside aside;
  return Layout(word);
}

}  // namespace emulator
