#include "cpu/isa.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <stdexcept>

#if defined(PYLLM_X86_ISAS) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pyllm {
namespace {

constexpr std::array<const char*, 4> kNames = {"baseline", "avx2", "avx512", "amx"};

bool is_built(Isa isa) {
#if defined(PYLLM_AMX)
  (void)isa;
  return true;
#elif defined(PYLLM_X86_ISAS)
  return isa != Isa::amx;
#else
  return isa == Isa::baseline;
#endif
}

// A process has to ask for the tile registers: saving them takes 8 KiB for each thread that uses
// them, and from then on no thread may have a signal stack without room for that. May be denied: by
// an old system, or where a thread's signal stack is too small.
bool may_use_amx() {
#if defined(PYLLM_X86_ISAS) && defined(__linux__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24, kInt8 = 1u << 25;
  constexpr unsigned kAll = kBFloat16 | kTiles | kInt8;
  if ((edx & kAll) != kAll) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// __builtin_cpu_supports also asks the operating system (XGETBV) whether it saves the registers.
bool is_supported(Isa isa) {
  if (!is_built(isa)) return false;
#ifdef PYLLM_X86_ISAS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
                      __builtin_cpu_supports("avx512bf16");
  if (isa == Isa::avx2) return avx2;
  if (isa == Isa::avx512) return avx512;
  if (isa == Isa::amx) {
    static const bool amx = may_use_amx();
    return avx512 && amx;
  }
#endif
  return true;
}

template <class Predicate>
std::vector<std::string> names_where(Predicate keep) {
  std::vector<std::string> names;
  for (int i = 0; i < static_cast<int>(kNames.size()); ++i) {
    if (keep(static_cast<Isa>(i))) names.emplace_back(kNames[i]);
  }
  return names;
}

Isa fastest() {
  if (is_supported(Isa::amx)) return Isa::amx;
  if (is_supported(Isa::avx512)) return Isa::avx512;
  if (is_supported(Isa::avx2)) return Isa::avx2;
  return Isa::baseline;
}

// Chosen by set_isa or at the first use. Not before: a process that is to run on another one must
// not have asked for the tile registers.
constexpr int kUnset = -1;
std::atomic<int> active{kUnset};

}  // namespace

std::vector<std::string> built_isas() { return names_where(is_built); }

std::vector<std::string> supported_isas() { return names_where(is_supported); }

void set_isa(const std::string& name) {
  if (name.empty()) {
    active = static_cast<int>(fastest());
    return;
  }
  const auto found = std::find(kNames.begin(), kNames.end(), name);
  const auto isa = static_cast<Isa>(found - kNames.begin());
  if (found == kNames.end() || !is_supported(isa)) {
    std::string expected;
    for (const std::string& one : supported_isas())
      expected += (expected.empty() ? "" : ", ") + one;
    throw std::invalid_argument("PYLLM_ISA='" + name +
                                "' is not an instruction set that is built and supported on this "
                                "machine; expected one of: " +
                                expected);
  }
  active = static_cast<int>(isa);
}

Isa active_isa() {
  int isa = active;
  if (isa == kUnset) {
    const int chosen = static_cast<int>(fastest());
    if (active.compare_exchange_strong(isa, chosen)) isa = chosen;
  }
  return static_cast<Isa>(isa);
}

std::string active_isa_name() { return kNames[static_cast<int>(active_isa())]; }

}  // namespace pyllm
